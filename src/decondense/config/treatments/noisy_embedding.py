"""Noise on the token embeddings (NEFTune)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from decondense.config.treatment import Treatment


class NoisyEmbeddingConfig(Treatment):
    """Baseline: uniform noise on the token embeddings in training (NEFTune; paper, table 2)."""

    title: ClassVar[str] = "noisy embedding"

    alpha: float = Field(default=1.0, gt=0)
    """The noise is bounded by alpha / sqrt(tokens x features). Paper: 1."""
