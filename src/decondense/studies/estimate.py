r"""What a study will cost, before it starts: its runs, parameters, tokens, floating point operations, time and disk.

**Training.** A token costs :math:`6 N` operations for the :math:`N` parameters that it is multiplied with (2 forward,
4 backward; Kaplan et al. 2020, arXiv:2001.08361, section 2.1): the embedding tables are looked up and do not count,
the language model head does, tied or not; of a mixture of experts the share that a token is sent to. Attention adds
:math:`12 L D T` for L layers, D = heads x features of a head and sequences of T tokens (Chowdhery et al. 2022,
arXiv:2204.02311, appendix B), half of it because a causal mask needs half of the pairs. A forward pass alone is a
third. Gradient checkpointing adds one forward pass. With adapters (LoRA) the frozen weights need no gradient of their
own: 4 N instead of 6 N.

**Dispersion loss.** :math:`3 T^2 F` a sequence and layer for F features: the products of all pairs once, by symmetry
(:math:`T^2 F`), and the gradient that is made of them in the same sweep (:math:`2 T^2 F`; docs/math.md). It counts for
the layers that are dispersed and the steps in which its weight is not zero.

**Time.** A small step is timed on this machine; for a large one the operations are divided by 40 % of a GPU's peak.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from decondense.config import (
    ArmConfig,
    ConfigError,
    DispersionConfig,
    EvaluateConfig,
    LossConfig,
    ModelConfig,
    StudyConfig,
    TrainConfig,
)
from decondense.studies.runner import tasks

if TYPE_CHECKING:
    from torch import nn

SMALL_STEP = 3e12
"""Operations of an optimizer step below which it is timed instead of estimated."""
GPUS = {"A100": 312e12, "H100": 989e12}
"""Peak operations a second in bfloat16 without sparsity, from the makers' data sheets."""
UTILISATION = 0.4
"""Share of the peak that training is assumed to reach."""
_TIMED_PASS = 2.5e10
"""Operations of a timed pass at most on a CPU; a larger batch is timed on some of its sequences."""


# --------------------------------------------------------------------------------------------------------------------
# The runs
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One task of a study, in the order in which it is taken."""

    kind: Literal["prepared", "trial", "cell", "measured"]
    name: str
    """The arm, or the prepared model."""
    seed: int
    model: ModelConfig
    train: TrainConfig
    steps: int
    evaluations: int
    """Checkpoints that are evaluated on held-out text."""
    arm: ArmConfig | None = None
    learning_rate: float | None = None
    """The rate of a trial."""

    @property
    def tokens(self) -> int:
        """Tokens that are trained on."""
        return self.steps * self.train.batch_sequences * self.train.sequence_tokens


def runs_of(study: StudyConfig) -> list[Run]:
    """The tasks of the runner, as far as their cost goes. Needs no torch."""
    found = []
    for task in tasks(study, Path()):
        arm = None if task.kind == "prepared" else study.arm(task.arm)
        own, model = task.study, task.study.model if arm is None else study.model_of(arm)
        if study.measure is not None:
            found.append(Run("measured", task.arm, task.seed, model, own.train, 0, 0, arm))
            continue
        name = task.folder.name if arm is None else arm.name
        rate = own.train.learning_rate if task.kind == "trial" else None
        points = len(own.evaluate.steps(task.steps))
        # a trial differs from the study's runs in its steps and rate alone, which are said beside it
        train = own.train if arm is None else study.train
        found.append(Run(task.kind, name, task.seed, model, train, task.steps, points, arm, rate))
    return found


# --------------------------------------------------------------------------------------------------------------------
# The models
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """A model, as far as its cost goes."""

    total: float | None
    """Parameters, tied ones once; None: unknown."""
    without_embeddings: float | None
    """Parameters without embedding tables and head."""
    computing: float | None
    """Parameters that every token is multiplied with: without embedding tables, with the head."""
    layers: int = 0
    features: int = 0
    """Of a hidden state."""
    attention: int = 0
    """Heads times features of a head."""
    adapters: float | None = None
    """Parameters of the adapters, the only ones that are trained; None: all are trained."""
    note: str = ""
    """Why it is no exact count."""

    @property
    def trained(self) -> float | None:
        """Parameters that get a gradient."""
        return self.total if self.adapters is None else self.adapters


UNKNOWN = Size(None, None, None, note="unknown")


def size_of_module(model: nn.Module, config: ModelConfig | None = None) -> Size:
    """Count a built Hugging Face model; the meta device will do.

    Args:
        model: with ``config`` and ``get_output_embeddings``.
        config: how the study describes it; adapters are counted from there.
    """
    from torch import nn as modules
    from transformers.pytorch_utils import Conv1D

    described: Any = model
    settings = described.config.get_text_config()
    head = described.get_output_embeddings()
    tables = {
        id(module.weight): module.weight.numel() for module in model.modules() if isinstance(module, modules.Embedding)
    }
    head_weight = None if head is None else head.weight
    total = sum(p.numel() for p in model.parameters())
    outside = sum(tables.values())
    if head_weight is not None and id(head_weight) not in tables:
        outside += head_weight.numel()
    experts = next(
        (
            int(getattr(settings, name))
            for name in ("num_experts", "num_local_experts", "n_routed_experts")
            if isinstance(getattr(settings, name, None), int)
        ),
        0,
    )
    chosen = getattr(settings, "num_experts_per_tok", None)
    computing = 0.0 if head_weight is None else float(head_weight.numel())
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or id(parameter) in tables or parameter is head_weight:
            continue  # norms and biases are added, not multiplied
        share = chosen / experts if experts and chosen and ".experts." in name else 1.0
        computing += share * parameter.numel()
    heads = getattr(settings, "num_attention_heads", None) or 0
    width = int(settings.hidden_size)
    per_head = getattr(settings, "head_dim", None) or (width // heads if heads else 0)
    adapters = None
    if config is not None and config.lora is not None:
        targets = config.lora.targets
        adapters = float(
            sum(
                config.lora.rank * sum(module.weight.shape)
                for name, module in model.named_modules()
                if isinstance(module, (modules.Linear, Conv1D))
                and module is not head
                and (targets == "all-linear" or any(name == t or name.endswith(f".{t}") for t in targets))
            )
        )
    return Size(
        float(total),
        float(total - outside),
        computing,
        layers=int(settings.num_hidden_layers),
        features=width,
        attention=heads * per_head,
        adapters=adapters,
    )


class _Models:
    """The distinct models of a study, each built once on the meta device and never over the network."""

    def __init__(self, study: StudyConfig) -> None:
        self.study = study
        self.notes: list[str] = []
        self.sizes: dict[str, Size] = {}
        self.vocabulary = self._vocabulary()

    def resolved(self, model: ModelConfig) -> ModelConfig:
        """``prepared:NAME`` followed to what it is prepared from."""
        name = model.prepared
        return model if name is None else self.study.prepared[name].model.model_copy(update={"lora": model.lora})

    def size(self, model: ModelConfig, positions: int) -> Size:
        """The size of a model, from its architecture, its files, the hub's cache or what the study says."""
        model = self.resolved(model)
        key = f"{model.model_dump_json()} {positions}"
        if key not in self.sizes:
            self.sizes[key] = self._size(model, positions)
        return self.sizes[key]

    def _size(self, model: ModelConfig, positions: int) -> Size:
        import torch

        with torch.device("meta"):
            built = self.build(model, positions)
        if built is not None:
            settings: Any = built.config
            longest = getattr(settings.get_text_config(), "max_position_embeddings", None)
            if self.study.measure is None and longest is not None and longest < positions:
                raise ConfigError(
                    f"model.start {model.start!r} has {longest} positions, less than train.sequence_tokens {positions}."
                )
            return size_of_module(built, model)
        if model.parameters is not None:
            note = (
                f"{model.start}: parameters as the study says; attention and the pairs of the dispersion loss are not "
                "counted"
            )
            return Size(model.parameters, None, model.parameters, note=note)
        return Size(None, None, None, note=f"{model.start}: not on this machine, size and cost unknown")

    def build(self, model: ModelConfig, positions: int) -> nn.Module | None:
        """The model with random weights on the current default device; None: nothing here says what it looks like."""
        from transformers import AutoConfig, AutoModelForCausalLM

        if model.start is None:
            from decondense.training.hf import build_model

            vocabulary = self.vocabulary
            if vocabulary is None:
                try:
                    vocabulary = int(AutoConfig.for_model(model.architecture).get_text_config().vocab_size)
                except ValueError:
                    vocabulary = self.study.corpus.vocabulary  # build_model explains what is wrong with the name
            return build_model(model.model_copy(update={"lora": None}), vocabulary, positions, 0)
        try:
            settings = AutoConfig.from_pretrained(
                model.start, revision=model.revision or "main", local_files_only=True, trust_remote_code=False
            )
            made: nn.Module = AutoModelForCausalLM.from_config(settings)  # type: ignore[no-untyped-call]
            return made
        except (OSError, ValueError, KeyError, ImportError, AttributeError):
            return None

    def _vocabulary(self) -> int | None:
        name = self.study.corpus.tokenizer
        if name is None:
            return self.study.corpus.vocabulary
        if all(self.resolved(run.model).start is not None for run in runs_of(self.study)):
            return None  # nobody asks
        from transformers import AutoTokenizer

        try:
            return len(AutoTokenizer.from_pretrained(name, local_files_only=True))
        except (OSError, ValueError, KeyError, ImportError, AttributeError):
            self.notes.append(f"The tokenizer {name} is not on this machine: the architecture's own vocabulary counts.")
            return None


# --------------------------------------------------------------------------------------------------------------------
# Operations
# --------------------------------------------------------------------------------------------------------------------


def forward_flops(size: Size, tokens: float, length: int, *, causal: bool = True) -> float:
    """Operations of a forward pass over ``tokens`` tokens in sequences of ``length``; nan for an unknown model."""
    if size.computing is None:
        return math.nan
    weights = 2 * (size.computing + (size.adapters or 0.0)) * tokens
    return weights + _attention(size, tokens, length, causal)


def training_flops(
    size: Size, tokens: float, length: int, *, causal: bool = True, checkpointing: bool = False
) -> float:
    """Operations of forward and backward passes over ``tokens`` tokens in sequences of ``length``.

    Args:
        size: the model.
        tokens: tokens in all.
        length: tokens of a sequence.
        causal: count the half of attention that a causal mask needs; False: what dense kernels execute.
        checkpointing: activations are computed a second time.
    """
    if size.computing is None:
        return math.nan
    backward = 4 * size.computing if size.adapters is None else 2 * size.computing + 4 * size.adapters
    total = forward_flops(size, tokens, length, causal=causal) * (2 if checkpointing else 1)
    return total + backward * tokens + 2 * _attention(size, tokens, length, causal)


def _attention(size: Size, tokens: float, length: int, causal: bool) -> float:
    return 4.0 * size.layers * size.attention * length * tokens * (0.5 if causal else 1.0)


_BY_FEATURES = ("decorrelation", "covariance", "vicreg", "barlow")


def dispersion_flops(
    dispersion: DispersionConfig, size: Size, sequences: float, length: int, together: int = 1
) -> float:
    """Operations of the dispersion loss over ``sequences`` sequences of ``length`` tokens, gradient included.

    Args:
        dispersion: layers and loss.
        size: the model.
        sequences: sequences in all.
        length: tokens of a sequence.
        together: sequences whose tokens are paired with each other (``within`` other than ``sequence``).
    """
    if not size.layers:
        return 0.0
    from decondense.blocks import resolve_layers

    loss = dispersion.loss
    layers = len(resolve_layers(dispersion.layers, size.layers)) + dispersion.embedding
    partners: float = length * (1 if loss.within == "sequence" else together)
    if loss.form == "mean_cosine":
        each = 6.0 * length * size.features
    elif loss.form in _BY_FEATURES:
        each = 6.0 * length * size.features * min(length, size.features)
    elif loss.form == "sigreg":
        each = 6.0 * length * size.features * loss.slices
    else:
        rows: float = length
        if loss.pairs == "grouped":
            partners = min(partners, loss.group_size)
        elif loss.pairs == "subset":
            rows = partners = min(length, loss.subset_size)
        passes = 1.0 if dispersion.weight == 0 else 4.0 if loss.gradient == "recompute" else 3.0
        each = passes * rows * partners * size.features
    return each * layers * sequences


def share_of_steps(dispersion: DispersionConfig, steps: int) -> float:
    """Share of the optimizer steps in which the loss is computed; a weight of 0 is watched in all of them."""
    if steps < 1:
        return 0.0
    if dispersion.weight == 0 or dispersion.schedule.is_constant:
        return 1.0
    looked = min(steps, 2000)
    places = [int(index * steps / looked) for index in range(looked)]
    return sum(dispersion.schedule.factor(step, steps) > 0 for step in places) / looked


# --------------------------------------------------------------------------------------------------------------------
# The plan
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """Runs of one kind and name: one line of the table. Numbers are sums over its runs."""

    kind: str
    name: str
    what: str
    runs: int
    steps: int
    """Of one run."""
    size: Size
    tokens: float
    flops: float
    """nan: unknown."""
    seconds: float | None
    """Of computing, one run after the other; None: not timed on this machine."""


@dataclass(frozen=True)
class Plan:
    """A study, what it consists of and what it costs."""

    study: StudyConfig
    runs: list[Run]
    lines: list[Line]
    workers: int
    final_bytes: float
    """Disk that the trained models need in the end."""
    checkpoint_bytes: float
    """Disk that the two checkpoints of the largest run need while it is trained."""
    how: str
    """How the times were found."""
    notes: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> float:
        """Tokens of all runs."""
        return sum(line.tokens for line in self.lines)

    @property
    def flops(self) -> float:
        """Operations of all runs whose model is known."""
        return sum(line.flops for line in self.lines if not math.isnan(line.flops))

    @property
    def flops_on_gpus(self) -> float:
        """Operations of the runs that are too large to be timed here."""
        return sum(line.flops for line in self.lines if line.seconds is None and not math.isnan(line.flops))

    @property
    def seconds(self) -> float:
        """Time of the timed runs with the workers side by side."""
        timed = [line for line in self.lines if line.seconds is not None]
        longest = max((line.seconds / line.runs for line in timed if line.seconds), default=0.0)
        return max(sum(line.seconds or 0.0 for line in timed) / self.workers, longest)


def _together(notes: Iterable[str]) -> list[str]:
    """Notes ``NAME: what is said of it``, one for all names of which the same is said."""
    said: dict[str, list[str]] = {}
    for note in dict.fromkeys(note for note in notes if note):
        name, _, words = note.partition(": ")
        said.setdefault(words, []).append(name)
    return [f"{', '.join(names)}: {words}" if words else ", ".join(names) for words, names in said.items()]


def plan_of(study: StudyConfig, *, workers: int | None = None, budget: float = 3.0) -> Plan:
    """Everything that a study will do, counted, and timed where a step is small.

    Nothing is read over the network and no random state is moved.

    Args:
        study: the study.
        workers: runs side by side; None: as many as the runner takes.
        budget: seconds after which no further model is timed; the rest is taken to be as fast as what was timed.

    Raises:
        ConfigError: an architecture or one of its fields does not exist.
    """
    from decondense.seeding import fence
    from decondense.studies.runner import default_workers

    with fence():
        models = _Models(study)
        timer = _Timer(models, budget)
        runs = runs_of(study)
        lines = [_line(study, models, timer, group) for group in _grouped(runs)]
    notes = [*dict.fromkeys(models.notes), *_together(line.size.note for line in lines)]
    if study.evaluate.tasks:
        notes.append(f"Not included: the benchmarks of the final checkpoints ({', '.join(study.evaluate.tasks)}).")
    trained = [line for line in lines if line.steps]
    final = sum(4.0 * line.runs * (line.size.total or 0.0) for line in trained)
    checkpoints = max((2 * _checkpoint_bytes(line.size) for line in trained), default=0.0)
    return Plan(
        study,
        runs,
        lines,
        1 if study.launch == "torchtitan" else max(1, min(workers or default_workers(study), len(runs))),
        final,
        checkpoints,
        timer.how(),
        notes,
    )


def _checkpoint_bytes(size: Size) -> float:
    # weights and AdamW's two moments of what is trained, all of them float32
    return 4.0 * 3 * (size.trained or 0.0)


def _grouped(runs: Sequence[Run]) -> list[list[Run]]:
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.kind, run.name), []).append(run)
    return list(groups.values())


def _line(study: StudyConfig, models: _Models, timer: _Timer, runs: list[Run]) -> Line:
    run = runs[0]
    length = run.train.sequence_tokens
    size = models.size(run.model, length)
    what = describe(run, study)
    if run.kind == "measured":
        assert study.measure is not None
        tokens = float(study.measure.passages * study.measure.tokens)
        flops = forward_flops(size, tokens, study.measure.tokens)
        return Line(run.kind, run.name, what, len(runs), 0, size, tokens * len(runs), flops * len(runs), None)
    plain = training_flops(size, run.tokens, length, checkpointing=run.train.gradient_checkpointing)
    plain += evaluation_flops(study.evaluate, size, length, run.evaluations)
    arm = run.arm
    if arm is not None and arm.distillation is not None and run.steps:
        name = arm.distillation.prepared
        teacher = ModelConfig(start=arm.distillation.teacher, revision=arm.distillation.revision)
        length_of_teacher = length if name is None else study.prepared[name].train.sequence_tokens
        plain += forward_flops(models.size(teacher, length_of_teacher), run.tokens, length)
    extra, share = 0.0, 0.0
    if arm is not None and arm.dispersion is not None and run.steps:
        share = share_of_steps(arm.dispersion, run.steps)
        sequences = run.steps * run.train.batch_sequences
        together = run.train.micro_batch_sequences or run.train.batch_sequences
        extra = share * dispersion_flops(arm.dispersion, size, sequences, length, together)
    seconds = timer.seconds(run, size, plain, extra, share)
    return Line(
        run.kind,
        run.name,
        what,
        len(runs),
        run.steps,
        size,
        float(run.tokens * len(runs)),
        (plain + extra) * len(runs),
        None if seconds is None else seconds * len(runs),
    )


def evaluation_flops(evaluate: EvaluateConfig, size: Size, length: int, evaluations: int) -> float:
    """Operations of scoring the held-out text and measuring the passages, ``evaluations`` times."""
    if not evaluations:
        return 0.0
    scored = forward_flops(size, evaluate.validation_tokens, length)
    measured = forward_flops(size, evaluate.passages * evaluate.passage_tokens, evaluate.passage_tokens)
    return evaluations * (scored + measured)


def describe(run: Run, study: StudyConfig) -> str:
    """What a run is, in few words."""
    arm, words = run.arm, []
    if run.kind == "prepared":
        words.append("trained first")
    elif run.kind == "cell" and arm is not None and arm.untrained:
        words.append("start as it is")
    if run.kind == "trial" and study.sweep is not None:
        words.append(f"trials at {len(study.sweep.learning_rates)} rates")
    elif arm is not None and not arm.untrained:
        treatments = []
        if arm.dispersion is not None:
            treatments.append(_describe_dispersion(arm.dispersion))
        if arm.noisy_embedding is not None:
            treatments.append(f"noise {arm.noisy_embedding.alpha:g}")
        if arm.active_forgetting is not None:
            treatments.append(f"forgetting every {arm.active_forgetting.every}")
        if arm.distillation is not None:
            treatments.append(f"teacher {Path(arm.distillation.teacher).name}")
        words.append(" + ".join(treatments) or "cross-entropy")
    if arm is not None and arm.model is not None and (own := arm.model.start or arm.model.architecture):
        words.append(own if run.model.revision is None else f"{own}@{run.model.revision}")
    elif arm is not None and arm.model is not None and arm.model.overrides:
        changed = [f"{key} {value}" for key, value in arm.model.overrides.items()]
        words.append(", ".join(changed[:2]) + (", ..." if len(changed) > 2 else ""))
    if run.model.lora is not None:
        words.append(f"LoRA {run.model.lora.rank}")
    return ", ".join(words)


def _describe_dispersion(dispersion: DispersionConfig) -> str:
    """Weight and layers, and what else differs from the paper's loss."""
    loss, usual, layers = dispersion.loss, LossConfig(), dispersion.layers
    form = "" if loss.form == usual.form else f"{loss.form} "
    where = "last layer" if layers == "last" else f"{layers} layers"
    if not isinstance(layers, str):
        where = f"layers {' '.join(map(str, layers))}"
    words = [f"{form}dispersion {dispersion.weight:g}", where]
    if loss.tau != usual.tau:
        words.append(f"tau {loss.tau:g}")
    if loss.pairs == "grouped":
        words.append(f"groups of {loss.group_size}")
    elif loss.pairs == "subset":
        words.append(f"{loss.subset_size} tokens")
    if loss.within != usual.within:
        words.append(f"within the {loss.within}")
    if loss.compat is not None:
        words.append("authors' code")
    if not dispersion.schedule.is_constant:
        kind = dispersion.schedule.kind
        words.append("switched off" if kind == "constant" else f"{kind} decay")
    return ", ".join(words)


# --------------------------------------------------------------------------------------------------------------------
# Time
# --------------------------------------------------------------------------------------------------------------------


class _Timer:
    """Times one step of each distinct model and batch, within a budget of seconds."""

    def __init__(self, models: _Models, budget: float) -> None:
        self.models, self.budget = models, budget
        self.until = math.inf
        self.steps: dict[str, float] = {}
        """Seconds of a step by what is timed."""
        self.speeds: list[tuple[float, float]] = []
        """(operations of a step, operations a second) of what was timed."""
        self.parts, self.carried = False, False

    def seconds(self, run: Run, size: Size, plain: float, extra: float, share: float) -> float | None:
        """Seconds of one run; None: its steps are too large to be timed here, or its model is unknown."""
        train = run.train
        step = training_flops(size, train.batch_sequences * train.sequence_tokens, train.sequence_tokens)
        if math.isnan(plain) or step >= SMALL_STEP or size.note:
            return None
        alone = self._step(run, size, step, None)
        speed = step / alone if alone else self._speed(step)
        if speed is None:
            return None
        dispersion = None if run.arm is None else run.arm.dispersion
        if dispersion is None or not extra:
            return plain / speed
        both = self._step(run, size, step, dispersion) if alone else None
        # pairs are not computed at the speed of large products, so the loss is timed too where there is time for it
        more = extra / speed if both is None or alone is None else run.steps * share * max(0.0, both - alone)
        return plain / speed + more

    def how(self) -> str:
        """How the times were found, in words."""
        if not self.steps:
            return ""
        words = "timed on this machine"
        if self.parts:
            words += ", on a part of the batch"
        if self.carried:
            words += ", some runs taken to be as fast as those timed"
        return words

    def _speed(self, step: float) -> float | None:
        """The speed at which the model nearest in size was timed."""
        if not self.speeds:
            return None
        self.carried = True
        return min(self.speeds, key=lambda pair: abs(math.log(pair[0] / step)))[1]

    def _step(self, run: Run, size: Size, flops: float, dispersion: DispersionConfig | None) -> float | None:
        model = self.models.resolved(run.model)
        plain = None if dispersion is None else dispersion.model_dump_json(exclude={"schedule", "seed", "weight"})
        key = " ".join(
            [
                model.model_dump_json(exclude={"lora", "parameters"}),
                run.train.model_dump_json(
                    include={"batch_sequences", "micro_batch_sequences", "sequence_tokens", "precision", "threads"}
                ),
                str(plain),
            ]
        )
        if key in self.steps:
            return self.steps[key]
        if time.monotonic() > self.until:
            return None
        if math.isinf(self.until):  # loading torch and the architectures is not counted
            self.until = time.monotonic() + self.budget
        found = self._measured(run, flops, dispersion)
        if found is not None:
            self.steps[key] = found
            if dispersion is None:
                self.speeds.append((flops, flops / found))
        return found

    def _measured(self, run: Run, flops: float, dispersion: DispersionConfig | None) -> float | None:
        import torch

        from decondense.attaching import attach
        from decondense.config import WeightSchedule
        from decondense.seeding import generator

        train = run.train
        cuda = torch.cuda.is_available()
        device = torch.device("cuda" if cuda else "cpu")
        micro = min(train.micro_batch_sequences or train.batch_sequences, train.batch_sequences)
        most = _TIMED_PASS * (100 if cuda else 1)
        sequences = max(1, min(micro, int(most * train.batch_sequences / flops)))
        self.parts |= sequences < micro
        threads = torch.get_num_threads()
        if train.threads is not None and not cuda:
            torch.set_num_threads(train.threads)
        try:
            with device:
                model: Any = self.models.build(self.models.resolved(run.model), train.sequence_tokens)
            if model is None:
                return None
            model = model.to(torch.float32)
            model.config.use_cache = False
            model.train()
            if train.gradient_checkpointing:
                model.gradient_checkpointing_enable()
            if dispersion is not None:
                attach(model, config=dispersion.model_copy(update={"schedule": WeightSchedule()}))
            optimizer = torch.optim.AdamW(model.parameters())
            vocabulary = int(model.config.get_text_config().vocab_size)
            shape = (sequences, train.sequence_tokens)
            ids = torch.randint(vocabulary, shape, generator=generator(0, "estimate")).to(device)
            passes: list[float] = []
            updates: list[float] = []
            for number in range(5):
                began = _clock(cuda)
                with torch.autocast(device.type, torch.bfloat16, enabled=train.precision == "bf16"):
                    loss = model(input_ids=ids, labels=ids).loss
                loss.backward()
                middle = _clock(cuda)
                optimizer.step()
                optimizer.zero_grad()
                passes.append(middle - began)
                updates.append(_clock(cuda) - middle)
                if number and time.monotonic() > self.until:
                    break  # slow: the first pass warmed up, the others count
        finally:
            torch.set_num_threads(threads)
        warm = min(2, len(passes) - 1)
        return median(passes[warm:]) * train.batch_sequences / sequences + median(updates[warm:])


def _clock(cuda: bool) -> float:
    if cuda:
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


# --------------------------------------------------------------------------------------------------------------------
# The short form, without torch
# --------------------------------------------------------------------------------------------------------------------


def short_form(study: StudyConfig) -> list[str]:
    """Two or three lines for a run that is about to start: its runs and its tokens.

    The command that starts the workers does without torch; :func:`plan_of` estimates sizes and times.
    """
    runs = runs_of(study)
    cells = [run for run in runs if run.kind in ("cell", "measured")]
    arms = len(study.arms)
    what = "to measure" if study.measure is not None else "to train" if any(run.steps for run in cells) else "to score"
    first = f"{_number(len(cells), 'run')} {what}: {_number(arms, 'arm')} x {_number(len(study.seeds), 'seed')}"
    before = [
        _number(sum(run.kind == kind for run in runs), name)
        for kind, name in (("prepared", "prepared model"), ("trial", "trial"))
        if any(run.kind == kind for run in runs)
    ]
    lines = [f"{first}, after {' and '.join(before)}." if before else f"{first}."]
    if study.measure is not None:
        each = study.measure.passages * study.measure.tokens
        lines.append(f"Up to {count(each)} tokens each, {count(each * len(cells))} in all.")
    else:
        trained = {run.tokens for run in cells if run.steps}
        total = f"{count(sum(run.tokens for run in runs))} tokens in all"
        lines.append(f"{total}, {count(trained.pop())} a run." if len(trained) == 1 else f"{total}.")
    return [*lines, "--dry-run estimates the time."]


# --------------------------------------------------------------------------------------------------------------------
# Words for numbers
# --------------------------------------------------------------------------------------------------------------------


def count(value: float | None) -> str:
    """``1.7M``, ``156B``; ``?`` for what is unknown."""
    if value is None or math.isnan(value):
        return "?"
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3.4 h``, ``12 days``."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    if seconds < 2 * 86_400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86_400:,.0f} days"


def storage(size: float) -> str:
    """``12 MB``, ``1.4 TB``."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if size >= limit:
            return f"{size / limit:.3g} {unit}"
    return f"{size / 1e3:.0f} kB"


def gpu_hours(flops: float, gpu: str) -> float:
    """Hours of one GPU at :data:`UTILISATION` of its peak."""
    return flops / (UTILISATION * GPUS[gpu]) / 3600


def cost_of(flops: float) -> str:
    """``5.8e13``, ``?`` for what is unknown."""
    return "?" if math.isnan(flops) else f"{flops:.1e}".replace("e+", "e")


def time_of(line: Line) -> str:
    """The time of a line of the table: timed, or in hours of the first GPU that is known."""
    if line.seconds is not None:
        return duration(line.seconds)
    gpu = next(iter(GPUS))
    return "?" if math.isnan(line.flops) else f"{_hours(gpu_hours(line.flops, gpu))} {gpu}-h"


def totals(plan: Plan) -> list[str]:
    """What stands below the table: sums, time, disk, and what is not known."""
    study, kinds = plan.study, [run.kind for run in plan.runs]
    names = {"prepared": "prepared model", "trial": "trial", "cell": "run", "measured": "measured model"}
    parts = [_number(kinds.count(kind), name) for kind, name in names.items() if kind in kinds]
    lines = [f"{', '.join(parts)}; {count(plan.tokens)} tokens, {cost_of(plan.flops)} FLOPs in all."]
    if plan.how:
        lines.append(f"Time: {duration(plan.seconds)} on {_number(plan.workers, 'worker')} ({plan.how}).")
    if plan.flops_on_gpus:
        peaks = " and ".join(f"{peak / 1e12:.0f}" for peak in GPUS.values())
        begin = "And " if plan.how else "Time: "
        lines.append(
            f"{begin}{_gpu_hours(plan.flops_on_gpus)}, estimated at {100 * UTILISATION:.0f} % of their peak in bf16 "
            f"({peaks} TFLOP/s)."
        )
        if study.measure is None and study.train.precision == "fp32":
            lines.append("The study trains in fp32, which is slower than that; --set train.precision=bf16.")
    if plan.final_bytes:
        lines.append(
            f"Disk: {storage(plan.final_bytes)} for the trained models, up to {storage(plan.checkpoint_bytes)} of "
            "checkpoints for each run while it is trained."
        )
    return [*lines, *plan.notes]


def _gpu_hours(flops: float) -> str:
    return " or ".join(f"{_hours(gpu_hours(flops, gpu))} {gpu}-hours" for gpu in GPUS)


def _hours(hours: float) -> str:
    return "<0.01" if hours < 0.01 else f"{hours:,.0f}" if hours >= 99.5 else f"{hours:.2g}"


def _number(value: int, noun: str) -> str:
    return f"{value} {noun}{'' if value == 1 else 's'}"
