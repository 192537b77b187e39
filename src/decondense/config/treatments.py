"""What an arm does that the baseline does not, beside the dispersion loss."""

from __future__ import annotations

from pydantic import Field

from decondense.config.base import Config
from decondense.config.model import prepared_name


class NoisyEmbeddingConfig(Config):
    """Baseline: uniform noise on the token embeddings in training (NEFTune; paper, table 2)."""

    alpha: float = Field(default=1.0, gt=0)
    """The noise is bounded by alpha / sqrt(tokens x features). Paper: 1."""


class ActiveForgettingConfig(Config):
    """Baseline: the input embedding is initialised again every ``every`` steps (Chen et al. 2023; paper, table 2)."""

    every: int = Field(default=1000, ge=2)
    """Optimizer steps of a period. Paper: 1000."""
    std: float = Field(default=0.02, gt=0)
    """Standard deviation of the new embedding. Paper: 0.02."""
    warmup: float = Field(default=0.1, ge=0, lt=1)
    """Fraction of a period over which the embedding's own learning rate rises; then it falls linearly to 0."""


class DistillationConfig(Config):
    """Knowledge distillation from a larger model of the same tokenizer, beside the cross-entropy (paper, figure 5)."""

    teacher: str = Field(min_length=1)
    """Directory or hub id of the teacher, or ``prepared:NAME``."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    temperature: float = Field(default=1.0, gt=0)
    """T of the softened predictions; the loss carries T^2, so that its gradient does not shrink with T."""
    weight: float = Field(default=1.0, ge=0)
    """Weight of the distillation loss; the cross-entropy keeps 1."""

    @property
    def prepared(self) -> str | None:
        """NAME when the teacher is ``prepared:NAME``."""
        return prepared_name(self.teacher)
