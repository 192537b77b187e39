"""Every knob of the project: one frozen, validated class per concern, and the only home of each default.

Public functions read their keyword defaults from these classes; the command line and the study files are parsed into
them. A configuration is data: it goes to YAML and back unchanged, and :meth:`Config.fingerprint` names it.
No torch here: the evidence side reads configurations too.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

C = TypeVar("C", bound="Config")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the place, the value and the remedy."""


def suggest(name: str, choices: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the closest of ``choices``, or an empty string when none is close."""
    close = difflib.get_close_matches(str(name), [str(choice) for choice in choices], n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def one_of(what: str, name: str, choices: Iterable[str]) -> str:
    """Return ``name`` if it is one of ``choices``, else raise a ValueError that lists them."""
    known = list(choices)
    if name in known:
        return name
    raise ConfigError(f"unknown {what} {name!r}.{suggest(name, known)} Known: {', '.join(known)}.")


class _UniqueKeys(yaml.SafeLoader):
    """YAML as the safe loader reads it, but a key that is given twice is refused: the first would go unnoticed."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            inside = node.start_mark.index <= key.start_mark.index < node.end_mark.index  # not merged in with <<
            if isinstance(key, yaml.ScalarNode) and inside:
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} is given twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def parse_yaml(text: str, where: str) -> Any:
    """The data of a YAML text; what cannot be read raises :class:`ConfigError` naming ``where``."""
    try:
        return yaml.load(text, Loader=_UniqueKeys)
    except Exception as error:  # numbers, dates and tags that cannot be constructed raise half a dozen other types
        raise ConfigError(f"{where}: is no valid YAML ({error}).") from error


class Config(BaseModel):
    """Base of all configurations: frozen, keyword-only, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_keys(cls, data: Any) -> Any:
        # pydantic's own message for an extra key does not say which key may have been meant
        if isinstance(data, dict):
            for key in data:
                if key not in cls.model_fields:
                    raise ValueError(
                        f"unknown key {key!r} in {cls.__name__}.{suggest(key, cls.model_fields)} "
                        f"Known: {', '.join(cls.model_fields)}."
                    )
        return data

    def fingerprint(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of the canonical JSON of this configuration."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        """The configuration as YAML, every default spelled out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    @classmethod
    def parse(cls: type[C], data: Any, *, where: str) -> C:
        """Validate plain data; a :class:`ConfigError` names ``where``, the key and the remedy."""
        if not isinstance(data, dict):
            raise ConfigError(f"{where}: expected a mapping of keys to values, got {type(data).__name__}.")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            lines = []
            for item in error.errors():
                place = ".".join(str(part) for part in item["loc"])
                message = item["msg"].removeprefix("Value error, ")
                shown = ""
                if item["type"] != "value_error" and item["type"] != "missing":
                    shown = f" (got {item['input']!r})"
                lines.append(f"{where}: {place + ': ' if place else ''}{message}{shown}")
            raise ConfigError("\n".join(lines)) from None

    @classmethod
    def from_yaml(cls: type[C], path: str | Path) -> C:
        """Read a YAML file; unreadable or malformed files raise :class:`ConfigError` naming the file."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read ({error}).") from error
        return cls.parse(parse_yaml(text, str(path)), where=str(path))


# --------------------------------------------------------------------------------------------------------------------
# The loss
# --------------------------------------------------------------------------------------------------------------------


FORM_NAMES = (
    "angular",
    "orthogonalization",
    "l2_repel",
    "decorrelation",
    "perplexity_entropy",
    "cosine_infonce",
    "l2_infonce",
    "hinge",
    "covariance",
    "mean_cosine",
    "uniformity",
    "vicreg",
    "barlow",
    "koleo",
    "sigreg",
)
"""The objectives, described in ``decondense.losses.FORMS``; here, so that a study file is checked without torch."""
COMPAT_NAMES = ("lm-dispersion:t=0.25", "lm-dispersion:t=0.1")
"""The published versions of the authors' code that can be reproduced (``decondense.losses.COMPAT``)."""


class LossConfig(Config):
    """One dispersion objective (:func:`decondense.dispersion_loss`)."""

    form: str = "angular"
    """Which objective; the names are the keys of ``decondense.losses.FORMS``."""
    tau: float = Field(default=1.0, gt=0)
    """Temperature of the log-mean-exp. Paper: 1."""
    delta: float = Field(default=1e-3, ge=0, lt=1)
    """Smoothing of the angle, theta = arccos(c / sqrt(1 + delta^2)); bounds the slope at c = 1."""
    impl: Literal["auto", "reference", "chunked", "fused"] = "auto"
    pairs: Literal["all", "grouped", "subset"] = "all"
    group_size: int = Field(default=128, ge=2)
    """Tokens in a random group when ``pairs="grouped"``."""
    subset_size: int = Field(default=256, ge=2)
    """Tokens of the random subset when ``pairs="subset"`` (the authors' 256)."""
    within: Literal["sequence", "batch", "world"] = "sequence"
    """Whose tokens are paired: those of one sequence, of the batch, of the batches of all ranks."""
    compat: str | None = None
    """Reproduce a published version of the authors' code; the names are the keys of ``decondense.losses.COMPAT``."""
    gradient: Literal["forward", "recompute"] = "forward"
    """Produce the gradient in the forward sweep (fast), or sweep again in backward (nothing is kept in between)."""
    margin: float = Field(default=0.5, ge=0)
    """``hinge``: cosines above -margin are pushed."""
    norm_weight: float = Field(default=0.1, ge=0)
    """``l2_repel``: weight of the mean squared element of the hidden states."""
    variance_weight: float = Field(default=25.0, ge=0)
    """``vicreg``: weight of the variance term. VICReg: 25."""
    covariance_weight: float = Field(default=1.0, ge=0)
    """``vicreg``: weight of the covariance term. VICReg: 1."""
    target_std: float = Field(default=1.0, gt=0)
    """``vicreg``: standard deviation below which a feature is pushed. VICReg: 1."""
    slices: int = Field(default=256, ge=1)
    """``sigreg``: number of random directions."""
    knots: int = Field(default=17, ge=2)
    """``sigreg``: points of the quadrature on [0, 3]."""
    seed: int = 0
    """Seed of the module's own generator (random groups, subsets, directions)."""

    @field_validator("form")
    @classmethod
    def _known_form(cls, form: str) -> str:
        return one_of("form", form, FORM_NAMES)

    @field_validator("compat")
    @classmethod
    def _known_compat(cls, compat: str | None) -> str | None:
        return compat if compat is None else one_of("compat", compat, COMPAT_NAMES)


# --------------------------------------------------------------------------------------------------------------------
# Attaching it to a model
# --------------------------------------------------------------------------------------------------------------------


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


class DispersionConfig(Config):
    """What :func:`decondense.attach` adds to the training loss: lambda times the mean loss over layers."""

    weight: float = Field(default=0.1, ge=0)
    """lambda. Paper: 0.1."""
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
    seed: int = 0
    """Seed of the loss's own random generator (only ``pairs="grouped"`` and ``"subset"`` draw)."""

    @field_validator("layers", mode="before")
    @classmethod
    def _known_layers(cls, layers: Any) -> Any:
        # pydantic's message for a union does not say which name may have been meant
        return (
            one_of("choice of layers", layers, ("all", "deep", "shallow", "last"))
            if isinstance(layers, str)
            else layers
        )


# --------------------------------------------------------------------------------------------------------------------
# Measuring
# --------------------------------------------------------------------------------------------------------------------


class MeasureConfig(Config):
    """How condensation is measured (:func:`decondense.measure`)."""

    tokens: int = Field(default=512, ge=2)
    """Length in tokens to which a passage is truncated. Paper: 512."""
    bins: int = Field(default=128, ge=2, le=2048)
    """Bins of the cosine histogram on [-1, 1], a power of two. Paper: 128."""
    histograms: tuple[Literal["pooled", "averaged"], ...] = ("pooled", "averaged")
    """``pooled``: all pairs of all passages. ``averaged``: of the matrix averaged over passages, as in the paper."""
    metrics: tuple[str, ...] = ()
    """Side metrics by name (``decondense.measuring.METRICS``), or ``("all",)``; they cost more than the means."""
    logits: bool = False
    """Measure the logits as one more state. The authors offer it too."""
    dataset: str = "embedded"
    """Source of the passages: ``embedded``, ``wikitext``, ``pubmed_qa``, ``imdb``, ``squad``, or a hub id."""
    passages: int = Field(default=100, ge=1)
    """Number of passages. Paper: 100."""
    passage_words: tuple[int, int] = (1024, 1280)
    """Fewest and most words of a passage, before truncation to ``tokens``. Paper: 1024 to 1280."""
    passage_seed: int = 0
    """Seed of the choice of passages."""
    batch_size: int | None = Field(default=None, ge=1)
    """Passages of one forward pass; None: from the memory that is free. Results do not depend on it."""
    resamples: int = Field(default=2000, ge=100)
    """Bootstrap resamples of the passages."""
    confidence: float = Field(default=0.95, gt=0, lt=1)
    """Coverage of the intervals."""

    @field_validator("bins")
    @classmethod
    def _power_of_two(cls, bins: int) -> int:
        if bins & (bins - 1):
            raise ValueError(f"bins must be a power of two from 2 to 2048, got {bins}; the paper uses 128.")
        return bins

    @field_validator("passage_words")
    @classmethod
    def _ordered_words(cls, words: tuple[int, int]) -> tuple[int, int]:
        if not 2 <= words[0] <= words[1]:
            raise ValueError(f"passage_words are (fewest, most) with 2 <= fewest <= most, got {words}.")
        return words


# --------------------------------------------------------------------------------------------------------------------
# Studies: model x corpus x training x evaluation, arms, seeds
# --------------------------------------------------------------------------------------------------------------------


PREPARED = "prepared:"
"""Prefix of a model that the study trains for itself first: ``prepared:NAME``, NAME a key of ``prepared``."""

Overrides = dict[str, int | float | str | bool | None]


class LoraConfig(Config):
    """Train low-rank adapters instead of the weights (Hu et al. 2022, arXiv:2106.09685); needs the package peft."""

    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0)
    """The adapters' output is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names of the modules that get adapters; ``all-linear``: every linear layer but the language model head."""


class ModelConfig(Config):
    """The model that every arm starts from."""

    architecture: str = "gpt2"
    """A Hugging Face ``model_type`` with a causal language model head, initialised from scratch."""
    overrides: Overrides = Field(default_factory=dict)
    """Fields of the architecture's configuration. The vocabulary size always follows the tokenizer."""
    start: str | None = None
    """Directory or hub id of a pretrained model to go on from (mid-training) instead of ``architecture``, or
    ``prepared:NAME``."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    lora: LoraConfig | None = None
    parameters: float | None = Field(default=None, gt=0)
    """Parameters of a start, for an estimate of the cost without loading it. Nothing else reads it."""

    @property
    def prepared(self) -> str | None:
        """NAME when the start is ``prepared:NAME``."""
        return _prepared_name(self.start)


class ArmModelConfig(Config):
    """What an arm's model has of its own; what is left out is the study's.

    Runs of such an arm start from other weights than the baseline's, so they are compared by seed and data order only.
    """

    architecture: str | None = None
    overrides: Overrides = Field(default_factory=dict)
    """Laid over the study's overrides, or instead of them when the arm names an architecture."""
    start: str | None = None
    revision: str | None = None
    lora: LoraConfig | None = None
    parameters: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _one_origin(self) -> ArmModelConfig:
        if self.start is not None and (self.architecture is not None or self.overrides):
            raise ValueError(
                f"start {self.start!r} brings its own architecture; leave architecture and overrides away."
            )
        return self

    def over(self, base: ModelConfig) -> ModelConfig:
        """The arm's whole model."""
        lora = base.lora if self.lora is None else self.lora
        if self.start is not None:
            return ModelConfig(start=self.start, revision=self.revision, lora=lora, parameters=self.parameters)
        if self.architecture is not None:
            return ModelConfig(architecture=self.architecture, overrides=self.overrides, lora=lora)
        overrides = {**base.overrides, **self.overrides}
        return base.model_copy(update={"overrides": overrides, "lora": lora})


def _prepared_name(start: str | None) -> str | None:
    return start[len(PREPARED) :] if start is not None and start.startswith(PREPARED) else None


class CorpusConfig(Config):
    """The text that is trained on and held out."""

    source: str = "python_docs"
    """``python_docs`` (embedded default), the path of a text file or of a directory of text files, or the hub id of a
    data set (``OWNER/NAME``)."""
    subset: str | None = None
    """Hub only: configuration of the data set."""
    split: str = "train"
    """Hub only: split that is read; documents are held out of it."""
    text_field: str | None = None
    """Field that holds the text; None: ``text``, or the only field of strings."""
    streaming: bool = False
    """Hub only: read the rows one by one over the network instead of downloading the data set first."""
    most_characters: int | None = Field(default=None, ge=1)
    """Characters of text at most, taken in the order of the source; None: all of it."""
    documents: Literal["standard_library", "scientific", "all"] = "all"
    """``python_docs`` only: the documentation of the standard library alone, with numpy, scipy and matplotlib, or of
    every dependency too."""
    tokenizer: str | None = None
    """Directory or hub id of a tokenizer to use; None: a byte-level BPE is trained on the training split."""
    vocabulary: int = Field(default=4096, ge=300, le=65_536)
    """Entries of the BPE that is trained; not used when ``tokenizer`` is given."""
    held_out: float = Field(default=0.05, gt=0, lt=0.5)
    """Share of the documents held out, chosen by the hash of their text."""


class TrainConfig(Config):
    """One training run. Defaults are the embedded study's; the paper's values are named where they differ."""

    steps: int = Field(default=300, ge=1)
    batch_sequences: int = Field(default=16, ge=1)
    """Sequences of one optimizer step (over all ranks and accumulation steps)."""
    micro_batch_sequences: int | None = Field(default=None, ge=1)
    """Sequences of one forward pass on one rank; None: as many as the step has."""
    sequence_tokens: int = Field(default=128, ge=2)
    learning_rate: float = Field(default=3e-3, gt=0)
    """Peak learning rate of AdamW. Paper: 5e-5 in mid-training."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(default=0.1, ge=0)
    gradient_clip: float = Field(default=1.0, gt=0)
    """Largest global L2 norm of the gradient."""
    warmup: float = Field(default=0.1, ge=0, lt=1)
    """Fraction of the steps over which the learning rate rises linearly. Paper: 0.2."""
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    precision: Literal["fp32", "bf16"] = "fp32"
    gradient_checkpointing: bool = False
    fsdp: bool = False
    """Shard parameters, gradients and optimizer state over the ranks (FSDP2) instead of copying them (DDP). Without
    effect on a single process."""
    threads: int | None = Field(default=1, ge=1)
    """CPU threads of a run; fixed, because the number changes the last bits. None: what torch chooses."""
    log_every: int = Field(default=10, ge=1)
    """Optimizer steps between two logged rows."""
    checkpoint_every: int = Field(default=50, ge=1)
    """Optimizer steps between two checkpoints a killed run can go on from."""

    @model_validator(mode="after")
    def _aligned(self) -> TrainConfig:
        if self.checkpoint_every % self.log_every:
            # a logged row averages since the previous one; a run that goes on between two could not know the first half
            raise ValueError(
                f"checkpoint_every {self.checkpoint_every} must be a multiple of log_every {self.log_every}."
            )
        if self.micro_batch_sequences is not None and self.batch_sequences % self.micro_batch_sequences:
            raise ValueError(
                f"batch_sequences {self.batch_sequences} must be a multiple of micro_batch_sequences "
                f"{self.micro_batch_sequences}."
            )
        return self


class EvaluateConfig(Config):
    """What is evaluated, and when. The final checkpoint is the one that counts, fixed in advance."""

    points: tuple[float, ...] = (0.0, 0.1, 0.25, 0.5, 1.0)
    """Fractions of training at which condensation and held-out loss are measured; 0 and 1 always are."""
    validation_tokens: int = Field(default=32_768, ge=1)
    """Held-out tokens at most, taken as whole documents in a fixed order."""
    passages: int = Field(default=32, ge=1)
    """Held-out passages on which condensation is measured."""
    passage_tokens: int = Field(default=128, ge=2)
    held_out_part: Literal["validation", "tuning"] = "validation"
    """Which held-out documents are scored: the first ones, or others at the end, on which learning rates are chosen."""
    tasks: tuple[str, ...] = ()
    """Benchmarks of the final checkpoint (:func:`decondense.evaluate.evaluate`): ``paper``, ``ten``, harness tasks."""
    shots: Literal["gpt2", "qwen3"] | int = "gpt2"
    """Examples in the prompts: the paper's for GPT2 or Qwen3, or one number for every task that takes some."""
    limit: int | None = Field(default=None, ge=1)
    """Items of each benchmark at most; None: all. Paper: 500 (GPT2), 200 (Qwen3)."""
    data_dir: str | None = None
    """Folder with the benchmarks in local files; None: the hub."""
    task_batch: int = Field(default=16, ge=1)
    """Benchmark requests of one forward pass."""

    @field_validator("points")
    @classmethod
    def _fractions(cls, points: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0 <= point <= 1 for point in points):
            raise ValueError(f"evaluation points are fractions of training between 0 and 1, got {points}.")
        return tuple(sorted({0.0, 1.0, *points}))

    def steps(self, total: int) -> list[int]:
        """The optimizer steps after which an evaluation is due, ascending and without repeats."""
        return sorted({round(point * total) for point in self.points})


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
        return _prepared_name(self.teacher)


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
