"""The registry of the treatments: the one list of what an arm may do that the baseline does not. No torch in here.

To add a treatment ``NAME``:

1. ``config/treatments/NAME.py``: its options, title and cost, a :class:`decondense.config.treatment.Treatment`;
2. ``training/treatments/NAME.py``: what it does to a run (``prepare``; :mod:`decondense.training.treatments`);
3. a field below.

Study files, arms, families, the plan, the commands for torchtitan and the runs all read :data:`TREATMENTS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, get_args

from pydantic import model_validator

from decondense.config.attach import DispersionConfig
from decondense.config.base import Config
from decondense.config.treatment import RunCost, Treatment
from decondense.config.treatments.active_forgetting import ActiveForgettingConfig
from decondense.config.treatments.distillation import DistillationConfig
from decondense.config.treatments.gradient_noise import GradientNoiseConfig
from decondense.config.treatments.noisy_embedding import NoisyEmbeddingConfig

__all__ = [
    "TREATMENTS",
    "ActiveForgettingConfig",
    "DistillationConfig",
    "GradientNoiseConfig",
    "NoisyEmbeddingConfig",
    "RunCost",
    "Treatment",
    "Treatments",
]


class Treatments(Config):
    """The treatments of an arm by id. None: the arm does not have the treatment.

    A run prepares them from the last to the first, so that the dispersion loss sees what the others do to the states,
    and what changes that loss comes after it.
    """

    later: ClassVar[frozenset[str]] = frozenset({"gradient_noise"})

    gradient_noise: GradientNoiseConfig | None = None
    """Noise instead of the gradient of the dispersion loss."""
    dispersion: DispersionConfig | None = None
    """The dispersion loss."""
    noisy_embedding: NoisyEmbeddingConfig | None = None
    """Noise on the token embeddings."""
    active_forgetting: ActiveForgettingConfig | None = None
    """An input embedding that is periodically reinitialised."""
    distillation: DistillationConfig | None = None
    """A larger model as the teacher."""

    @model_validator(mode="after")
    def _has_its_gradient(self) -> Treatments:
        if self.gradient_noise is None:
            return self
        if self.dispersion is None:
            raise ValueError("gradient_noise takes its norm from the dispersion loss of the same arm; add dispersion.")
        if self.dispersion.target is not None and self.dispersion.loss.form != "profile":
            raise ValueError("gradient_noise cannot follow dispersion.target; give a weight instead of the target.")
        return self

    @model_validator(mode="after")
    def _has_its_teacher(self) -> Treatments:
        if self.dispersion is not None and self.dispersion.loss.info.teacher and self.distillation is None:
            raise ValueError(
                f"dispersion.loss.form {self.dispersion.loss.form!r} needs a teacher: add distillation to the same "
                "arm, with distillation.weight: 0 if its predictions should not be used."
            )
        return self

    @property
    def treatments(self) -> dict[str, Treatment]:
        """The treatments of this arm by id, in the order of the registry."""
        return {name: value for name in TREATMENTS if (value := getattr(self, name)) is not None}


TREATMENTS: Mapping[str, type[Treatment]] = MappingProxyType(
    {name: get_args(field.annotation)[0] for name, field in Treatments.model_fields.items()}
)
"""Id -> configuration."""
