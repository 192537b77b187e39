"""A study: arms x seeds on one model, corpus and training."""

from __future__ import annotations

import re
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from decondense.config.attach import DispersionConfig
from decondense.config.base import Config, one_of
from decondense.config.measure import MeasureConfig
from decondense.config.model import ArmModelConfig, ModelConfig
from decondense.config.train import CorpusConfig, EvaluateConfig, TrainConfig
from decondense.config.treatments import ActiveForgettingConfig, DistillationConfig, NoisyEmbeddingConfig


class ArmConfig(Config):
    """One treatment; everything it does not name is the study's."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    label: str | None = None
    """How tables and figures call the arm; None: its name."""
    dispersion: DispersionConfig | None = None
    noisy_embedding: NoisyEmbeddingConfig | None = None
    active_forgetting: ActiveForgettingConfig | None = None
    distillation: DistillationConfig | None = None
    learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate of this arm; None: the one that the sweep finds, or the study's."""
    model: ArmModelConfig | None = None
    untrained: bool = False
    """Evaluate the start as it is and train nothing (the paper's row "none")."""

    @model_validator(mode="after")
    def _untouched(self) -> ArmConfig:
        if self.untrained:
            for name in ("dispersion", "noisy_embedding", "active_forgetting", "distillation", "learning_rate"):
                if getattr(self, name) is not None:
                    raise ValueError(f"arm {self.name!r} is untrained; {name} would have no effect, leave it away.")
        return self


class PreparedConfig(Config):
    """A model that the study trains for itself, once, before its arms: their start, or a teacher."""

    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    seed: int = Field(default=0, ge=0)
    """Decides its initial weights and the order of its data; the same model for all seeds of the study."""


class SweepConfig(Config):
    """A learning rate of its own for every arm, chosen before anything is compared.

    Each arm is trained at each rate with a seed that is not one of the study's, and takes the rate with the least loss
    on held-out documents that are not those of the comparison.
    """

    learning_rates: tuple[float, ...] = Field(min_length=2)
    seed: int = Field(default=1000, ge=0)
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps of a trial; None: those of the study."""

    @field_validator("learning_rates")
    @classmethod
    def _ascending(cls, rates: tuple[float, ...]) -> tuple[float, ...]:
        if any(rate <= 0 for rate in rates) or len(set(rates)) != len(rates):
            raise ValueError(f"learning_rates are different positive numbers, got {rates}.")
        return tuple(sorted(rates))


class StudyConfig(Config):
    """A paired comparison: arms x seeds from the same starts on the same data in the same order."""

    not_identity: ClassVar[frozenset[str]] = frozenset({"margin"})

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    title: str
    question: str
    scale: Literal["quick", "tiny", "gpu", "paper", "paper-qwen3"] = "tiny"
    baseline: str
    """Name of the arm that the others are compared with."""
    arms: tuple[ArmConfig, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = (0, 1, 2)
    model: ModelConfig = ModelConfig()
    corpus: CorpusConfig = CorpusConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    prepared: dict[str, PreparedConfig] = Field(default_factory=dict)
    """Models to train first, by name; an arm's start or a teacher names one as ``prepared:NAME``."""
    sweep: SweepConfig | None = None
    measure: MeasureConfig | None = None
    """Train nothing: measure the arms' starts (hub ids, revisions, directories), each with its own tokenizer, on this
    text. A seed is then the seed of the passages."""
    margin: float = Field(default=0.02, gt=0)
    """Differences of the held-out loss up to this, in nats per token, count as equal in practice."""
    launch: Literal["study", "torchtitan"] = "study"
    """``torchtitan``: too large for the study's own runner; ``--dry-run`` prints the commands that run it there."""

    @field_validator("prepared", mode="before")
    @classmethod
    def _none_prepared(cls, prepared: Any) -> Any:
        # a scale lays its keys over those of the file, and takes these away with `prepared: null`
        return {} if prepared is None else prepared

    @model_validator(mode="after")
    def _consistent(self) -> StudyConfig:
        names = [arm.name for arm in self.arms]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"arm {name!r} appears twice; arm names must differ.")
        one_of("baseline arm", self.baseline, names)
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds must be different non-negative whole numbers, got {self.seeds}.")
        for name in self.prepared:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
                raise ValueError(f"prepared: {name!r} is no name; use letters, digits, '.', '_' and '-'.")
        for arm in self.arms:
            model = self.model_of(arm)
            if arm.model is not None and arm.model.overrides and self.model.start is not None and model.start:
                raise ValueError(
                    f"arm {arm.name!r}: model.overrides have no effect on the start {model.start!r}; name an "
                    "architecture."
                )
            for wanted in self.prepared_of(arm):
                one_of("prepared model", wanted, self.prepared)
            if self.measure is not None and not (arm.untrained and model.start):
                raise ValueError(
                    f"the study measures starts and trains nothing, but arm {arm.name!r} is not untrained: true with a "
                    "model.start."
                )
        for name, entry in self.prepared.items():
            if entry.model.prepared is not None:
                raise ValueError(f"prepared.{name}: starts from another prepared model; that is not supported.")
        if self.arm(self.baseline).model is not None and self.measure is None:
            raise ValueError(f"the baseline {self.baseline!r} has a model of its own; give it as the study's model.")
        if self.sweep is not None and self.sweep.seed in self.seeds:
            raise ValueError(
                f"sweep.seed {self.sweep.seed} is one of the study's seeds; rates are chosen on a seed of their own."
            )
        start = self.model.start if self.model.prepared is None else None
        if start is not None and self.corpus.tokenizer is None and self.measure is None:
            raise ValueError(
                f"model.start {self.model.start!r} was trained with a tokenizer of its own; name it in "
                "corpus.tokenizer (usually the same directory or hub id)."
            )
        if self.evaluate.passage_tokens > self.train.sequence_tokens and self.measure is None:
            raise ValueError(
                f"evaluate.passage_tokens {self.evaluate.passage_tokens} exceeds train.sequence_tokens "
                f"{self.train.sequence_tokens}, the length that the model is trained on."
            )
        return self

    def arm(self, name: str) -> ArmConfig:
        """The arm called ``name``; an unknown name raises with a suggestion."""
        one_of("arm", name, [arm.name for arm in self.arms])
        return next(arm for arm in self.arms if arm.name == name)

    def model_of(self, arm: ArmConfig) -> ModelConfig:
        """The model that an arm starts from."""
        return self.model if arm.model is None else arm.model.over(self.model)

    def prepared_of(self, arm: ArmConfig) -> list[str]:
        """Names of the prepared models that an arm needs: its start, its teacher."""
        wanted = [self.model_of(arm).prepared, arm.distillation.prepared if arm.distillation else None]
        return [name for name in wanted if name is not None]

    def swept(self, arm: ArmConfig) -> bool:
        """Whether the sweep chooses the arm's learning rate."""
        return self.sweep is not None and not arm.untrained and arm.learning_rate is None
