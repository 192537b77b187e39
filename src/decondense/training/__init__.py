"""Training runs: one cell of a study on the Hugging Face Trainer, or on torchtitan."""
