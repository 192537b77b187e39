"""Training runs: one cell of a study on the Hugging Face Trainer, or on torchtitan.

hf            a cell from its start to its terminal row
trainer       the Trainer's subclass, its arguments and its data
recording     the callback that writes the rows
cell          what these share, and the evaluation of a checkpoint
checkpoints   the cell's folder: its lock, and the checkpoints that count
baselines     the treatments that dispersion loss is compared with
titan         the same on torchtitan
"""
