"""What a treatment is: something that an arm does and the baseline does not. No torch in here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

from decondense.config.base import Config
from decondense.config.model import ModelConfig

if TYPE_CHECKING:
    from typing_extensions import Self


class RunCost(Protocol):
    """The properties of a training run that :meth:`Treatment.extra_flops` may use."""

    @property
    def steps(self) -> int:
        """Optimizer steps."""

    @property
    def tokens(self) -> int:
        """Tokens of the run: steps x sequences per batch x tokens per sequence."""

    def forward(self, model: ModelConfig | None = None) -> float:
        """Operations of a forward pass over the run's tokens; ``None`` is the model that is trained."""


class Treatment(Config):
    """Base of the treatments.

    A treatment is registered in :mod:`decondense.config.treatments` under its id, the key in study files. What it does
    to a run is the module of the same id in :mod:`decondense.training.treatments`.
    """

    title: ClassVar[str]
    """Its name in tables and figures."""
    torchtitan: ClassVar[bool] = False
    """Whether :mod:`decondense.training.titan` can apply it."""

    @property
    def prepared_models(self) -> tuple[str, ...]:
        """Names of the study's prepared models that it needs."""
        return ()

    def located(self, folders: Mapping[str, Path]) -> Self:
        """A copy that names the directories of prepared models instead of ``prepared:NAME``."""
        return self

    def extra_flops(self, run: RunCost) -> float:
        """Operations that it adds to a run; nan: unknown."""
        return 0.0
