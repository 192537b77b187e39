"""A study: arms x seeds on one model, corpus and training."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from decondense.config.attach import DispersionConfig
from decondense.config.base import Config, formerly, one_of
from decondense.config.measure import MeasureConfig
from decondense.config.model import ArmModelConfig, ModelConfig
from decondense.config.train import CorpusConfig, EvaluateConfig, TrainConfig
from decondense.config.treatments import TREATMENTS, Treatments

SETTINGS = ("learning_rate", "warmup", "max_grad_norm")
"""Fields of :class:`TrainConfig` that an arm may override and that a sweep chooses."""
ARM_SETTINGS = (*SETTINGS, "weight_decay", "batch_size", "optimizer", "muon_learning_rate")
"""Fields of :class:`TrainConfig` that an arm may override."""


class ArmIdentity(Config):
    """Name and label of an arm. A class of its own, so that these keys come first in files."""

    name: str = Field(min_length=1, max_length=120, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    label: str | None = None
    """Label of the arm in tables and figures; None: its name."""


class ArmConfig(Treatments, ArmIdentity):
    """One arm: its treatments and settings; everything that it does not set is the study's."""

    later: ClassVar[frozenset[str]] = Treatments.later | {
        "weight_decay",
        "batch_size",
        "optimizer",
        "muon_learning_rate",
    }

    learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate of this arm; None: the one that the sweep chooses, or the study's. An arm that sets
    its own rate takes no part in the sweep."""
    warmup: float | None = Field(default=None, ge=0, lt=1)
    """Fraction of the steps over which this arm's rate rises; None: the one that the sweep chooses, or the study's."""
    max_grad_norm: float | None = Field(default=None, gt=0, **formerly("gradient_clip", "max_grad_norm"))
    """Largest global L2 norm of this arm's gradient; None: the one that the sweep chooses, or the study's."""
    weight_decay: float | None = Field(default=None, ge=0)
    """This arm's weight decay; None: the study's, as for the settings below."""
    batch_size: int | None = Field(default=None, ge=1)
    """Sequences per optimizer step of this arm. The number of steps changes inversely, so that the arm reads the same
    sequences in the same order: twice the batch size means half the steps, with the same fraction of warm-up."""
    optimizer: Literal["adamw", "muon"] | None = None
    muon_learning_rate: float | None = Field(default=None, gt=0)
    model: ArmModelConfig | None = None
    untrained: bool = False
    """Evaluate the start as it is and train nothing (the paper's row "none")."""

    @model_validator(mode="after")
    def _untouched(self) -> ArmConfig:
        if self.untrained:
            for name in (*TREATMENTS, *ARM_SETTINGS):
                if getattr(self, name) is not None:
                    raise ValueError(f"arm {self.name!r} is untrained; {name} would have no effect, omit it.")
        return self

    @property
    def settings(self) -> dict[str, Any]:
        """The fields of :class:`TrainConfig` that the arm sets."""
        return {name: value for name in ARM_SETTINGS if (value := getattr(self, name)) is not None}

    def located(self, folders: Mapping[str, Path]) -> ArmConfig:
        """A copy whose treatments name the directories of prepared models instead of ``prepared:NAME``."""
        return self.model_copy(update={name: entry.located(folders) for name, entry in self.treatments.items()})


class PreparedConfig(Config):
    """A model that the study trains once, before its arms: their start, a teacher, or the source of a target
    (``dispersion.target: prepared:NAME``)."""

    later: ClassVar[frozenset[str]] = frozenset({"untrained", "dispersion"})

    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    seed: int = Field(default=0, ge=0)
    """Seed of its initial weights and of its data order; all seeds of the study use the same model."""
    untrained: bool = False
    """Keep the initial weights, so that a target taken from this model does not depend on training."""
    dispersion: DispersionConfig | None = None
    """A dispersion loss of its own; with a weight below 0 the model ends condensed."""

    @model_validator(mode="after")
    def _untouched(self) -> PreparedConfig:
        if self.untrained and self.dispersion is not None:
            raise ValueError("dispersion has no effect on an untrained model; omit it.")
        if self.dispersion is not None and (self.dispersion.prepared_models or self.dispersion.loss.info.teacher):
            raise ValueError(
                "dispersion of a prepared model cannot use another model; omit target, or choose a form that "
                "needs no teacher."
            )
        return self


class SweepConfig(Config):
    """Chooses the settings of each arm before anything is compared.

    Each arm is trained with every combination of the listed learning rates, warm-ups and clippings, on seeds that are
    not the study's, and takes the setting with the lowest loss (mean over ``seeds``) on held-out documents that are not
    those of the comparison. Every arm has the same grid, but a setting that an arm fixes is not varied for that arm.
    """

    learning_rates: tuple[float, ...] = Field(min_length=1)
    warmups: tuple[float, ...] = ()
    """Warm-ups to try, as fractions of the run's steps; empty: only the study's ``train.warmup``."""
    max_grad_norms: tuple[float, ...] = Field(default=(), **formerly("gradient_clips", "max_grad_norms"))
    """Values of ``max_grad_norm`` to try; empty: only the study's ``train.max_grad_norm``."""
    seed: int = Field(default=1000, ge=0)
    """Seed of the trials."""
    seeds: tuple[int, ...] = ()
    """Several trial seeds instead of ``seed``: a setting is judged by its mean loss over them."""
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps of a trial; None: those of the study. A shorter trial warms up for as many steps as the run
    (``warmup_unit``), and its rate decays over the remaining steps."""
    warmup_unit: Literal["steps", "fraction"] = "steps"
    """Warm-up of a trial that is shorter than the run. ``steps``: as many warm-up steps as the run; ``fraction``: the
    same fraction of the trial's own steps, so that the trial is a scaled-down run. The rate that is best with a short
    warm-up need not be the best one with a long warm-up."""

    @field_validator("learning_rates", "max_grad_norms")
    @classmethod
    def _positive(cls, values: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        if any(not 0 < value < math.inf for value in values) or len(set(values)) != len(values):
            raise ValueError(f"{info.field_name} must be different positive numbers, got {values}.")
        return tuple(sorted(values))

    @field_validator("warmups")
    @classmethod
    def _fractions(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0 <= value < 1 for value in values) or len(set(values)) != len(values):
            raise ValueError(f"warmups must be different fractions of the run, at least 0 and below 1, got {values}.")
        return tuple(sorted(values))

    @field_validator("seeds")
    @classmethod
    def _different(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) != len(seeds) or any(seed < 0 for seed in seeds):
            raise ValueError(f"seeds must be different non-negative integers, got {seeds}.")
        return seeds

    @model_validator(mode="after")
    def _choice(self) -> SweepConfig:
        if len(self.learning_rates) * max(1, len(self.warmups)) * max(1, len(self.max_grad_norms)) < 2:
            raise ValueError("a sweep needs at least two settings to choose from; add learning_rates or warmups.")
        return self

    @property
    def trial_seeds(self) -> tuple[int, ...]:
        """The seeds of every setting's trials."""
        return self.seeds or (self.seed,)


class StudyConfig(Config):
    """A paired comparison: arms x seeds from the same starts on the same data in the same order."""

    not_identity: ClassVar[frozenset[str]] = frozenset({"margin", "until", "most_seeds", "added_seeds"})

    name: str = Field(min_length=1, max_length=120, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
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
    text. Each seed then draws its own passages."""
    margin: float = Field(default=0.02, gt=0)
    """Differences of the held-out loss up to this, in nats per token, count as equal in practice."""
    until: Literal["decided"] | None = None
    """``decided``: after its own seeds the study adds seeds one by one, the same for every arm, until each arm's
    confidence sequence for the difference in held-out loss to the baseline (:mod:`decondense.compare.sequential`)
    excludes 0 or lies within the margin. Added seeds do not change the fingerprint."""
    most_seeds: int = Field(default=20, ge=3)
    """Maximum number of seeds, including its own; a study that is still undecided then reports so."""
    added_seeds: tuple[int, ...] = ()
    """Written into the study's directory by ``until: decided``; not for study files."""
    launch: Literal["study", "torchtitan"] = "study"
    """``torchtitan``: too large for the study's own runner; ``--dry-run`` prints the commands for torchtitan."""

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
        if not self.seeds or len(set(self.every_seed)) != len(self.every_seed) or min(self.every_seed) < 0:
            raise ValueError(f"seeds must be different non-negative integers, got {self.every_seed}.")
        if self.until is not None:
            self._check_until()
        for name in self.prepared:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}", name):
                raise ValueError(
                    f"prepared: {name!r} is not a valid name; use up to 120 letters, digits, '.', '_' and '-'."
                )
        for arm in self.arms:
            model = self.model_of(arm)
            if arm.model is not None and arm.model.overrides and self.model.pretrained is not None and model.pretrained:
                raise ValueError(
                    f"arm {arm.name!r}: model.overrides have no effect on the start {model.pretrained!r}; name an "
                    "architecture."
                )
            for wanted in self.prepared_of(arm):
                one_of("prepared model", wanted, self.prepared)
            if self.train_of(arm).optimizer == "muon" and self.launch != "study":
                raise ValueError(f"arm {arm.name!r}: optimizer: muon is not supported with launch: {self.launch}.")
            if self.measure is not None and not (arm.untrained and model.pretrained):
                raise ValueError(
                    f"the study measures starts and trains nothing, so arm {arm.name!r} needs untrained: true and a "
                    "model.pretrained."
                )
        for name, entry in self.prepared.items():
            if entry.model.prepared is not None:
                raise ValueError(
                    f"prepared.{name}: starting from another prepared model is not supported; name another start."
                )
        if self.arm(self.baseline).model is not None and self.measure is None:
            raise ValueError(f"the baseline {self.baseline!r} has a model of its own; give it as the study's model.")
        if self.sweep is not None:
            self._check_sweep(self.sweep)
        start = self.model.pretrained if self.model.prepared is None else None
        if start is not None and self.corpus.tokenizer is None and self.measure is None:
            raise ValueError(
                f"model.pretrained {self.model.pretrained!r} was trained with a tokenizer of its own; name it in "
                "corpus.tokenizer (usually the same directory or hub id)."
            )
        if self.evaluate.passage_tokens > self.train.max_seq_length and self.measure is None:
            raise ValueError(
                f"evaluate.passage_tokens {self.evaluate.passage_tokens} exceeds train.max_seq_length "
                f"{self.train.max_seq_length}, the length of the training sequences; lower it."
            )
        return self

    def _check_until(self) -> None:
        if self.measure is not None or self.launch != "study":
            what = "trains nothing" if self.measure is not None else f"is run by {self.launch}"
            raise ValueError(f"until: decided adds training runs, but the study {what}; omit it.")
        if len(self.arms) < 2:
            raise ValueError("until: decided needs an arm besides the baseline; add one, or omit until.")
        if self.most_seeds < len(self.seeds):
            raise ValueError(
                f"most_seeds {self.most_seeds} is below the {len(self.seeds)} seeds that the study starts with; raise "
                "it, or list fewer seeds."
            )

    def _check_sweep(self, sweep: SweepConfig) -> None:
        for seed in sweep.trial_seeds:
            if seed in self.every_seed:
                raise ValueError(
                    f"sweep.seed {seed} is one of the study's seeds; choose a seed that the study does not use."
                )
        sequences = (sweep.steps or self.train.steps) * self.train.batch_size
        for arm in self.arms:
            size = arm.batch_size or 1
            if self.swept(arm) and sequences % size:
                raise ValueError(
                    f"arm {arm.name!r}: batch_size {size} does not divide the {sequences} sequences of a trial "
                    f"(sweep.steps {sweep.steps}); choose one that does."
                )
        if sweep.steps is None or sweep.warmup_unit == "fraction":
            return
        own = [arm.warmup for arm in self.arms if self.swept(arm) and arm.warmup is not None]
        longest = max((*(sweep.warmups or (self.train.warmup,)), *own))
        steps = round(longest * self.train.steps)
        if steps >= sweep.steps:
            raise ValueError(
                f"sweep.steps {sweep.steps}: such a trial ends within the run's warm-up of {steps} steps ({longest:g} "
                f"of {self.train.steps}) and says nothing about the rate. Give sweep.steps above {steps}, omit it, or "
                "make trials scaled-down runs with sweep.warmup_unit: fraction."
            )

    @classmethod
    def of_rows(cls, known: Sequence[Mapping[str, Any]]) -> StudyConfig:
        """The study from the configurations in its run rows, including rows of earlier releases.

        A study that was planned with fixed seeds may have been extended by the rule, which then applies to all runs.
        """
        data = dict(next((entry for entry in reversed(known) if entry.get("until")), known[0]))
        sweep = data.get("sweep")
        if isinstance(sweep, dict) and "warmup_unit" not in sweep:
            # trials of earlier releases kept the warm-up as a fraction
            data["sweep"] = {**sweep, "warmup_unit": "fraction"}
        return cls.parse(data, where="configuration")

    @property
    def every_seed(self) -> tuple[int, ...]:
        """The study's own seeds, then the added ones."""
        return (*self.seeds, *self.added_seeds)

    def arm(self, name: str) -> ArmConfig:
        """The arm called ``name``; an unknown name raises with a suggestion."""
        one_of("arm", name, [arm.name for arm in self.arms])
        return next(arm for arm in self.arms if arm.name == name)

    def model_of(self, arm: ArmConfig) -> ModelConfig:
        """The model that an arm starts from."""
        return self.model if arm.model is None else arm.model.over(self.model)

    def prepared_of(self, arm: ArmConfig) -> list[str]:
        """Names of the prepared models that an arm needs: its start, and those of its treatments."""
        start = self.model_of(arm).prepared
        treatments = [name for entry in arm.treatments.values() for name in entry.prepared_models]
        return [*([] if start is None else [start]), *treatments]

    def train_of(self, arm: ArmConfig) -> TrainConfig:
        """The training settings of an arm; with its own batch size, the number of steps that reads the same sequences.

        Raises:
            ValueError: the settings are not compatible.
        """
        settings = arm.settings
        if (size := arm.batch_size) is not None:
            steps, rest = divmod(self.train.steps * self.train.batch_size, size)
            if rest or not steps:
                raise ValueError(
                    f"arm {arm.name!r}: batch_size {size} does not divide the {self.train.steps} x "
                    f"{self.train.batch_size} sequences that every arm reads; choose one that does."
                )
            settings["steps"] = steps
        if settings.get("optimizer") == "adamw":
            settings.setdefault("muon_learning_rate", None)
        if settings.keys() <= {*SETTINGS}:
            return self.train.model_copy(update=settings)
        return TrainConfig.parse({**dict(self.train), **settings}, where=f"arm {arm.name!r}")

    def swept(self, arm: ArmConfig) -> bool:
        """Whether the sweep chooses the arm's settings."""
        return self.sweep is not None and not arm.untrained and arm.learning_rate is None
