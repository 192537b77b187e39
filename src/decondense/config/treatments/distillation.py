"""Distillation from a larger model (Hinton et al. 2015)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from decondense.config.model import ModelConfig, prepared_name
from decondense.config.treatment import RunCost, Treatment

if TYPE_CHECKING:
    from typing_extensions import Self


class DistillationConfig(Treatment):
    """Knowledge distillation from a larger model with the same tokenizer (paper, figure 5); cross-entropy is kept."""

    title: ClassVar[str] = "distillation"

    teacher: str = Field(min_length=1)
    """Directory or hub id of the teacher, or ``prepared:NAME``."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature T of the softened predictions; scaling the loss by T^2 keeps its gradient from shrinking with T."""
    weight: float = Field(default=1.0, ge=0)
    """Weight of the distillation loss; the cross-entropy has weight 1."""

    @property
    def prepared(self) -> str | None:
        """NAME when the teacher is ``prepared:NAME``."""
        return prepared_name(self.teacher)

    @property
    def prepared_models(self) -> tuple[str, ...]:
        """The teacher, when it is a prepared model."""
        return () if self.prepared is None else (self.prepared,)

    def located(self, folders: Mapping[str, Path]) -> Self:
        """A copy that names the teacher's directory."""
        return self if self.prepared is None else self.model_copy(update={"teacher": str(folders[self.prepared])})

    def extra_flops(self, run: RunCost) -> float:
        """The teacher's forward passes."""
        return run.forward(ModelConfig(pretrained=self.teacher, revision=self.revision))
