"""What is attached to a training loss: the objective, its layers, its weight over time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from decondense.config.base import Config, one_of
from decondense.config.loss import LossConfig
from decondense.config.model import prepared_name
from decondense.config.treatment import Treatment

if TYPE_CHECKING:
    from typing_extensions import Self


class WeightSchedule(Config):
    """How the weight lambda changes over training: weight(step) = weight * factor(step, total_steps).

    The factor rises from 0 to 1 during the warm-up, then stays at 1 (``constant``) or decays (``linear``, ``cosine``)
    to ``final`` at ``until``. Times are fractions of training, or optimizer steps if ``warmup_steps`` or ``until_step``
    is given.
    """

    kind: Literal["constant", "linear", "cosine"] = "constant"
    """``linear`` and ``cosine`` decay from 1 to ``final`` between the end of warm-up and ``until``."""
    warmup: float = Field(default=0.0, ge=0, le=1)
    """Fraction of training over which the weight rises linearly from 0."""
    until: float = Field(default=1.0, gt=0, le=1)
    """Fraction of training at which the decay ends, or at which a constant factor switches to ``final``."""
    final: float = Field(default=0.0, ge=0, le=1)
    """Factor after ``until``; 0 switches the loss off, so that it costs nothing from then on."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Number of warm-up steps, instead of ``warmup``."""
    until_step: int | None = Field(default=None, ge=1)
    """Optimizer step at which the decay ends or the factor switches to ``final``, instead of ``until``."""

    @model_validator(mode="after")
    def _ordered(self) -> WeightSchedule:
        if self.warmup > self.until:
            raise ValueError(f"warmup {self.warmup} lies after until {self.until}; lower warmup or raise until.")
        for fraction, steps in (("warmup", "warmup_steps"), ("until", "until_step")):
            default = type(self).model_fields[fraction].default
            if getattr(self, steps) is not None and getattr(self, fraction) != default:
                raise ValueError(f"{fraction} and {steps} set the same thing; give one of them.")
        if self.warmup_steps is not None and self.until_step is not None and self.warmup_steps > self.until_step:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} lies after until_step {self.until_step}; lower warmup_steps or "
                "raise until_step."
            )
        return self

    @property
    def is_constant(self) -> bool:
        """Whether the factor is 1 at every step."""
        stays = self.final == 1 or (self.kind == "constant" and self.until >= 1 and self.until_step is None)
        return stays and not self.warmup and not self.warmup_steps

    def factor(self, step: int, total_steps: int) -> float:
        """Factor for optimizer step ``step`` (0-based) of ``total_steps``, in [0, 1]."""
        warm = float(self.warmup * total_steps) if self.warmup_steps is None else float(self.warmup_steps)
        end = float(self.until * total_steps) if self.until_step is None else float(self.until_step)
        if step < warm:
            return step / warm
        if step >= end:
            # a run that goes on past its planned end keeps a constant weight that was never to be switched off
            endless = self.kind == "constant" and self.until >= 1 and self.until_step is None
            return 1.0 if endless else self.final
        if self.kind == "constant":
            return 1.0
        done = (step - warm) / (end - warm)
        shape = 1 - done if self.kind == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return self.final + (1 - self.final) * shape


class DispersionConfig(Treatment):
    """What :func:`decondense.attach` adds to the training loss: lambda times the mean loss over layers.

    Its cost is not that of large matrix products; :mod:`decondense.studies.cost` estimates and times it.
    """

    title: ClassVar[str] = "dispersion"
    torchtitan: ClassVar[bool] = True

    later: ClassVar[frozenset[str]] = frozenset({"target"})

    weight: float = Field(default=0.1, allow_inf_nan=False)
    """lambda; a negative weight raises the loss. With ``target``, the weight at the start of training. Paper: 0.1."""
    target: float | tuple[float, ...] | str | None = None
    """Target for the mean cosine over pairs of different tokens: the weight of each layer is adapted to keep its mean
    cosine at or below the target (:mod:`decondense.attaching.target`). One value for all chosen layers, one value per
    layer, the path of a profile (``profile.json``, interpolated over relative depth), the name of a shipped reference,
    or, in a study, ``prepared:NAME``, the profile of that model on the held-out passages. With the form ``profile`` the
    weight is not adapted, and the loss itself aims at the target."""
    layers: Literal["all", "deep", "shallow", "last"] | tuple[int, ...] = "all"
    """Blocks whose outputs are dispersed. Paper: all (tables 2, 5); the deep half does better (table 3)."""
    loss: LossConfig = LossConfig()
    schedule: WeightSchedule = WeightSchedule()
    blocks: str | None = None
    """Dotted path of the list of transformer blocks; None: found by :func:`decondense.blocks.find_blocks`."""
    final_norm: bool = False
    """Take the last block's state after the model's final norm (as transformers' ``hidden_states[-1]`` and the authors'
    code do) instead of the residual stream before it."""
    embedding: bool = False
    """Disperse the input of the first block too. Paper: never."""
    gradient_ratio_every: int | None = Field(default=None, ge=1)
    """Log the ratio of the gradient norms of the two terms every so many optimizer steps; None: never."""
    tokens_first: bool | None = None
    """Whether the blocks return [tokens, batch, width]; None: determined by :mod:`decondense.layout`."""

    @property
    def prepared_models(self) -> tuple[str, ...]:
        """NAME of the target ``prepared:NAME``."""
        name = prepared_name(self.target) if isinstance(self.target, str) else None
        return () if name is None else (name,)

    def located(self, folders: Mapping[str, Path]) -> Self:
        """A copy whose target is the directory of the prepared model, which holds its profile."""
        if not self.prepared_models:
            return self
        return self.model_copy(update={"target": str(folders[self.prepared_models[0]])})

    @property
    def seed(self) -> int:
        """Seed of the loss's own random generator (random groups, subsets, directions): ``loss.seed``."""
        return self.loss.seed

    @model_validator(mode="before")
    @classmethod
    def _one_seed(cls, data: Any) -> Any:
        # there was a seed here too, and it was the one that counted: files and rows that have it are still read
        if not isinstance(data, dict) or "seed" not in data:
            return data
        rest = {key: value for key, value in data.items() if key != "seed"}
        loss = rest.get("loss", {})
        loss = loss.model_dump() if isinstance(loss, LossConfig) else loss
        return {**rest, "loss": {**loss, "seed": data["seed"]}} if isinstance(loss, dict) else rest

    @model_validator(mode="after")
    def _one_says_the_weight(self) -> DispersionConfig:
        if self.target is None:
            return self
        if self.loss.info.teacher:
            raise ValueError(f"form {self.loss.form!r} follows a teacher; omit target.")
        numbers = [self.target] if isinstance(self.target, float) else self.target
        if not numbers:
            raise ValueError("target is empty; give one mean cosine, one for each layer, a profile or a reference.")
        for value in () if isinstance(numbers, str) else numbers:
            if not -1 <= value <= 1:  # NaN too
                raise ValueError(f"target {value} is not a mean cosine; give one between -1 and 1.")
        if self.loss.form == "profile":  # which has the target in the loss, and keeps its weight
            if self.loss.target_cosine != LossConfig().target_cosine:
                raise ValueError("target and loss.target_cosine set the same thing; give one of them.")
            return self
        if self.weight <= 0:
            raise ValueError(f"weight {self.weight:g} cannot be adapted to a target; give a weight above 0.")
        if not self.schedule.is_constant:
            raise ValueError("schedule and target both set the weight; give one of them.")
        return self

    @field_validator("layers", mode="before")
    @classmethod
    def _known_layers(cls, layers: Any) -> Any:
        # pydantic's message for a union does not say which name may have been meant
        return (
            one_of("choice of layers", layers, ("all", "deep", "shallow", "last"))
            if isinstance(layers, str)
            else layers
        )
