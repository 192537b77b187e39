"""An input embedding that is forgotten (Chen et al. 2023)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from decondense.config.treatment import Treatment


class ActiveForgettingConfig(Treatment):
    """Baseline: the input embedding is reinitialised every ``every`` steps (Chen et al. 2023; paper, table 2)."""

    title: ClassVar[str] = "active forgetting"

    every: int = Field(default=1000, ge=2)
    """Optimizer steps per period. Paper: 1000."""
    std: float = Field(default=0.02, gt=0)
    """Standard deviation of the new embedding. Paper: 0.02."""
    warmup: float = Field(default=0.1, ge=0, lt=1)
    """Fraction of a period over which the embedding's own learning rate rises; then it falls linearly to 0."""
