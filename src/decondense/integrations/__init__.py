"""Thin integrations with trainers (transformers and TRL, Lightning, Axolotl, LLaMA-Factory), one module for each."""
