"""Thin ties to trainers (transformers and TRL, Lightning, Axolotl, LLaMA-Factory); each module imports its own."""
