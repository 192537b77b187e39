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

    Rise from 0 over the warm-up, then stay (``constant``) or decay (``linear``, ``cosine``) to ``final``, reached at
    ``until``. Times are fractions of training, or optimizer steps where the ``..._step`` field is given.
    """

    kind: Literal["constant", "linear", "cosine"] = "constant"
    """``linear`` and ``cosine`` decay from 1 to ``final`` between the end of warm-up and ``until``."""
    warmup: float = Field(default=0.0, ge=0, le=1)
    """Fraction of training over which the weight rises linearly from 0."""
    until: float = Field(default=1.0, gt=0, le=1)
    """Fraction of training at which a decay has ended, or after which a constant weight is ``final``."""
    final: float = Field(default=0.0, ge=0, le=1)
    """What remains of the weight after ``until``; 0 switches the loss off, at no further cost."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Optimizer steps of warm-up, instead of ``warmup``."""
    until_step: int | None = Field(default=None, ge=1)
    """Optimizer step at which the decay has ended or the weight is switched to ``final``, instead of ``until``."""

    @model_validator(mode="after")
    def _ordered(self) -> WeightSchedule:
        if self.warmup > self.until:
            raise ValueError(f"warmup {self.warmup} lies after until {self.until}.")
        for fraction, steps in (("warmup", "warmup_steps"), ("until", "until_step")):
            default = type(self).model_fields[fraction].default
            if getattr(self, steps) is not None and getattr(self, fraction) != default:
                raise ValueError(f"{fraction} and {steps} say the same thing; give one of them.")
        if self.warmup_steps is not None and self.until_step is not None and self.warmup_steps > self.until_step:
            raise ValueError(f"warmup_steps {self.warmup_steps} lies after until_step {self.until_step}.")
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

    Its cost, which is not that of large products, is estimated and timed by :mod:`decondense.studies.cost`.
    """

    title: ClassVar[str] = "dispersion"
    torchtitan: ClassVar[bool] = True

    later: ClassVar[frozenset[str]] = frozenset({"target"})

    weight: float = Field(default=0.1, allow_inf_nan=False)
    """lambda; below 0 the loss is raised instead. With ``target`` the weight that training starts with. Paper: 0.1."""
    target: float | tuple[float, ...] | str | None = None
    """Mean cosine over pairs of different tokens at or below which the weights of the layers are to hold them
    (:mod:`decondense.attaching.target`): one for all chosen layers, one for each, the path of a profile
    (``profile.json``, interpolated over relative depth), the name of a shipped reference, or in a study
    ``prepared:NAME``, the profile of that model on the held-out passages. With the form ``profile``
    the weight stays, and this is what the loss aims at."""
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
    """Optimizer steps between two logged ratios of the gradient norms of the two terms; None: never."""
    tokens_first: bool | None = None
    """Whether the blocks return [tokens, batch, width]; None: settled by :mod:`decondense.layout`."""

    @property
    def prepared_models(self) -> tuple[str, ...]:
        """NAME of the target ``prepared:NAME``."""
        name = prepared_name(self.target) if isinstance(self.target, str) else None
        return () if name is None else (name,)

    def located(self, folders: Mapping[str, Path]) -> Self:
        """The same with the directory of the prepared model, where its profile lies."""
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
            raise ValueError("target is empty; give a mean cosine, one for each layer, a profile or a reference.")
        for value in () if isinstance(numbers, str) else numbers:
            if not -1 <= value <= 1:  # NaN too
                raise ValueError(f"target {value} is not a mean cosine, which lies between -1 and 1.")
        if self.loss.form == "profile":  # which has the target in the loss, and keeps its weight
            if self.loss.target_cosine != LossConfig().target_cosine:
                raise ValueError("target and loss.target_cosine say the same thing; give one of them.")
            return self
        if self.weight <= 0:
            raise ValueError(f"weight {self.weight:g} cannot start a search for a target; give one above 0.")
        if not self.schedule.is_constant:
            raise ValueError("schedule and target both say what the weight is; give one of them.")
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
