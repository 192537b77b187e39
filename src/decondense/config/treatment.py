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
    """A training run as far as its cost goes: what :meth:`Treatment.extra_flops` may ask."""

    @property
    def steps(self) -> int:
        """Optimizer steps."""

    @property
    def tokens(self) -> int:
        """Tokens of the run: steps x sequences of a batch x tokens of a sequence."""

    def forward(self, model: ModelConfig | None = None) -> float:
        """Operations of one forward pass over the run's tokens; None: of the model that is trained."""


class Treatment(Config):
    """Base of the treatments.

    A treatment is registered in :mod:`decondense.config.treatments` under its id, the key in study files. What it does
    to a run is the module of the same id in :mod:`decondense.training.treatments`.
    """

    title: ClassVar[str]
    """What tables and figures call it."""
    torchtitan: ClassVar[bool] = False
    """Whether :mod:`decondense.training.titan` applies it too."""

    @property
    def prepared_models(self) -> tuple[str, ...]:
        """Names of the study's prepared models that it needs."""
        return ()

    def located(self, folders: Mapping[str, Path]) -> Self:
        """The same with the directories of prepared models in the place of their names."""
        return self

    def extra_flops(self, run: RunCost) -> float:
        """Operations that it adds to a run; nan: unknown."""
        return 0.0
