"""Training runs: one cell of a study on the Hugging Face Trainer, or on torchtitan.

hf            a cell from its start to its terminal row
trainer       the Trainer's subclass, its arguments and its data
recording     the callback that writes the rows
cell          what these share, and the evaluation of a checkpoint
checkpoints   the cell's folder: its lock, and the checkpoints that count
treatments    what the treatments do to a run, one module each
titan         the same on torchtitan
"""
