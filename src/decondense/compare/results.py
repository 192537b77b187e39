"""The results of a comparison: plain values, with no text except names and notes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from decondense.compare.gold import HARDLY
from decondense.compare.gold import METRICS as GOLD
from decondense.compare.quantities import shown_in
from decondense.compare.statistics import Difference, Interval
from decondense.compare.study import VALIDATION, Fault


@dataclass(frozen=True)
class Values:
    """One arm's values of a quantity at its final checkpoints."""

    arm: str
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    mean: float
    sd: float | None

    @classmethod
    def of(cls, arm: str, pairs: Sequence[tuple[int, float]]) -> Values:
        """Summarise (seed, value) pairs."""
        values = np.array([value for _, value in pairs])
        sd = float(values.std(ddof=1)) if len(values) > 1 else None
        return cls(arm, tuple(s for s, _ in pairs), tuple(values.tolist()), float(values.mean()), sd)


@dataclass(frozen=True)
class Measure:
    """One quantity of the final checkpoints: every arm's values and its difference to the baseline."""

    quantity: str
    """Id of the quantity (:class:`decondense.compare.quantity.Quantity`)."""
    title: str
    unit: str
    higher_is_better: bool | None
    values: tuple[Values, ...]
    differences: tuple[Difference, ...]
    items: int | None = None

    @property
    def name(self) -> str:
        """The title."""
        return self.title

    def of(self, arm: str) -> Values | None:
        """The values of an arm."""
        return next((values for values in self.values if values.arm == arm), None)

    def difference(self, arm: str) -> Difference | None:
        """The difference of an arm."""
        return next((d for d in self.differences if d.arm == arm), None)


@dataclass(frozen=True)
class TaskMeasure(Measure):
    """A task's score."""

    task: str = ""
    metric: str = ""
    scored: tuple[int, ...] = ()
    """Numbers of items that were scored at the final checkpoints: one, unless the runs differ."""
    official: int | None = None
    """Official number of items of the benchmark; None: not a benchmark, or unknown."""
    decision_accuracy: float | None = None
    """How often the task's accuracy decides right at this size (:data:`decondense.compare.gold.DECISION_ACCURACY`)."""

    @property
    def gold(self) -> bool:
        """Whether this is the likelihood of the right answers, not the task's own score."""
        return self.metric in GOLD

    @property
    def hardly_decides(self) -> bool:
        """Whether the task's accuracy is known to decide hardly better than a coin toss at this size."""
        return self.decision_accuracy is not None and self.decision_accuracy < HARDLY

    @property
    def deviation(self) -> str:
        """How the scored items differ in number from the official ones, in words; empty when they do not."""
        if self.official is None or set(self.scored) <= {self.official}:
            return ""
        return f"{' or '.join(f'{count:,}' for count in self.scored)} of {self.official:,} items"


Clock = Literal["wall", "cpu"]


@dataclass(frozen=True)
class Speed:
    """Training tokens until a validation loss that an arm and its baseline of the same seed both reach."""

    arm: str
    n: int
    reached: int
    """Seeds in which the arm ends at or below the baseline's final loss."""
    seeds: tuple[int, ...]
    targets: tuple[float, ...]
    """The higher of the two final losses, by seed."""
    baseline_tokens: tuple[float, ...]
    """Tokens at which the target is first reached: linear interpolation between evaluated checkpoints."""
    tokens: tuple[float, ...]
    resolved: bool
    """Whether the checkpoints around the targets are close enough (at most 60 % of training apart) to interpolate."""
    clock: Clock
    in_tokens: Difference | None
    """Of the logarithm of the tokens; None: not resolved, or the start has the loss already."""
    in_time: Difference | None
    """The same in step time, at the arm's median pace."""

    @property
    def share_of_tokens(self) -> float | None:
        """The arm's tokens over the baseline's, geometric mean: 0.5 means half the tokens."""
        return None if self.in_tokens is None else math.exp(self.in_tokens.mean)

    @property
    def share_of_time(self) -> float | None:
        """The same of the step time."""
        return None if self.in_time is None else math.exp(self.in_time.mean)


@dataclass(frozen=True)
class EqualTime:
    """Held-out loss at equal training time."""

    clock: Clock
    paces: dict[str, float]
    """Each arm's step time over the baseline's, median over seeds."""
    differences: tuple[Difference, ...]

    def difference(self, arm: str) -> Difference | None:
        """The difference of an arm."""
        return next((d for d in self.differences if d.arm == arm), None)


@dataclass(frozen=True)
class Cost:
    """What an arm costs, paired by seed with the baseline."""

    arm: str
    n: int
    seeds: tuple[int, ...]
    step_wall_ms: tuple[float | None, ...]
    step_cpu_ms: tuple[float | None, ...]
    train_wall_s: tuple[float | None, ...]
    peak_rss_bytes: tuple[float | None, ...]
    peak_cuda_bytes: tuple[float | None, ...]
    """Peak GPU memory that was allocated; None: not recorded, or no GPU."""
    wall_ratio: tuple[float, float, float] | None
    """Median, minimum and maximum over seeds of the arm's step time over the baseline's."""
    cpu_ratio: tuple[float, float, float] | None
    cuda_ratio: tuple[float, float, float] | None
    """The same of the GPU memory."""
    resumed: int
    """Runs that were interrupted: their total time is only that of the last attempt."""
    untrained: bool = False
    """Nothing was trained, so there is no cost of training: every entry is None."""


@dataclass(frozen=True)
class Selection:
    """What choosing the best checkpoint by the reported score itself would have shown. Never the result."""

    arm: str
    quantity: str
    """Id of the task's score."""
    checkpoints: int
    final: float
    best: float
    gain: float
    """best - final of the arm, mean over seeds: the selection effect."""
    difference_final: float | None
    """Arm - baseline at the final checkpoint."""
    difference_best: float | None
    """Arm - baseline when both take their best checkpoint."""


@dataclass(frozen=True)
class TaskMean:
    """Mean over tasks that share a metric, and the mean rank among the arms (1 = best)."""

    metric: str
    tasks: tuple[str, ...]
    measure: Measure
    mean_rank: dict[str, float]


@dataclass(frozen=True)
class Pairing:
    """The hashes that the arms of a seed share, which prove that they are a pair (None: no shared hash)."""

    seed: int
    arms: tuple[str, ...]
    init_hash: str | None
    order_hash: str | None
    corpus_hash: str | None
    other_starts: tuple[str, ...] = ()
    """Arms with their own model: they share the order of the data, but not the initial weights."""


@dataclass(frozen=True)
class Trial:
    """One setting that was tried."""

    learning_rate: float
    warmup: float | None
    """As a fraction of the run's steps; None: not swept."""
    max_grad_norm: float | None
    steps: int
    seeds: tuple[int, ...]
    value: float | None
    """Loss on the documents set aside for this choice, mean over ``seeds``; None: a trial failed."""
    chosen: bool
    error: str | None

    @property
    def seed(self) -> int:
        """The first trial seed."""
        return self.seeds[0]


Edge = Literal["smallest", "largest"]


@dataclass(frozen=True)
class Sweep:
    """The settings tried for an arm, ascending."""

    arm: str
    trials: tuple[Trial, ...]

    @property
    def chosen(self) -> Trial | None:
        """The trial whose setting the arm's runs take."""
        return next((trial for trial in self.trials if trial.chosen), None)

    @property
    def edges(self) -> dict[str, Edge]:
        """The knobs whose chosen value is at the edge of the grid, so that a better one may lie outside.

        A value that failed bounds the grid too, and a warm-up of 0 is not an edge.
        """
        found: dict[str, Edge] = {}
        for knob in ("learning_rate", "warmup", "max_grad_norm"):
            values = sorted({v for trial in self.trials if (v := getattr(trial, knob)) is not None})
            value = getattr(self.chosen, knob, None)
            if len(values) < 2 or value is None:
                continue
            if value == values[-1]:
                found[knob] = "largest"
            elif value == values[0] and value > 0:
                found[knob] = "smallest"
        return found

    @property
    def edge(self) -> Edge | None:
        """Whether the chosen learning rate is at the edge of the grid."""
        return self.edges.get("learning_rate")

    @property
    def by_rate(self) -> tuple[Trial, ...]:
        """For each learning rate, the trial with the lowest loss over the other knobs."""
        best: dict[float, Trial] = {}
        for trial in self.trials:
            rival = best.get(trial.learning_rate)
            if rival is None or rival.value is None or (trial.value is not None and trial.value < rival.value):
                best[trial.learning_rate] = trial
        return tuple(best.values())


@dataclass(frozen=True)
class ArmCondensation:
    """Condensation of one arm's final checkpoints."""

    arm: str
    parameters: int | None
    blocks: int | None
    """Number of blocks L; None: not the same in every run."""
    last: dict[str, Values]
    """``"1"`` to ``"5"`` and ``"L/2"``: mean cosine of the last n layers, where the model has that many blocks."""
    spearman: Values | None
    kendall: Values | None


@dataclass(frozen=True)
class SizePoint:
    """An arm in the trend over model size."""

    arm: str
    family: str
    parameters: int
    values: dict[str, Values]
    """By id of the quantity (:data:`SIZE_QUANTITIES`)."""

    def value(self, quantity: str) -> float | None:
        """Mean over seeds of one of :data:`SIZE_QUANTITIES`; None where the rows do not have it."""
        return self.values[quantity].mean if quantity in self.values else None


SIZE_QUANTITIES = {quantity.id: quantity.title for quantity in shown_in("size")}
"""Titles of the quantities that are set against model size."""
FEWEST_MODELS = 5
"""Fewer models than that get no p: no order of four of them would have one of 0.05 or less (2 / 4! = 0.083)."""


@dataclass(frozen=True)
class SizeCorrelation:
    """Spearman's rank correlation over models between the number of parameters and one measure of condensation."""

    family: str | None
    """None: over all families."""
    quantity: str
    n: int
    rho: float | None
    """None: one of the two does not vary."""
    p: float | None
    """Two-sided; exact up to 8 models; None below 5."""


@dataclass(frozen=True)
class SizeTrend:
    """Condensation against model size, over arms that differ in their model."""

    points: tuple[SizePoint, ...]
    correlations: tuple[SizeCorrelation, ...]

    @property
    def families(self) -> tuple[str, ...]:
        """The families in the order of the arms."""
        return tuple(dict.fromkeys(point.family for point in self.points))


@dataclass(frozen=True)
class Layers:
    """Mean cosine of every state of the final checkpoints. Intervals are pointwise: not corrected over states.

    A state is known by its place: 0 is the embedding, 1 to L are the blocks.
    """

    labels: tuple[str, ...]
    """Title of each state, as the rows have it."""
    values: dict[str, tuple[Values, ...]]
    differences: dict[str, tuple[Difference, ...]]


@dataclass(frozen=True)
class Plateau:
    """The part of a run's training that it spends condensed: mean cosine over the blocks above 0.9."""

    arm: str
    seed: int
    share: float
    """Of the steps, linear between evaluated checkpoints."""
    escape: float | None
    """Step at which it last falls to 0.9; None: it was never above, or still is."""
    between: tuple[float, float] | None
    """The evaluated checkpoints around the escape."""
    stuck: bool
    """Whether the final checkpoint is above."""


Undefined = Literal["few seeds", "no gain", "equal cosines", "on a line"]


@dataclass(frozen=True)
class Mediation:
    """The share of one arm's gain that is associated with the cosine at one point of training."""

    arm: str
    at: float
    """Fraction of training at which the cosine is taken; the loss is taken at the end."""
    seeds: tuple[int, ...]
    cosine: float
    """Mean difference arm - baseline of the cosine."""
    gain: float
    """Mean difference arm - baseline of the final held-out loss; below 0 is better."""
    slope: float | None = None
    """Change of the loss per unit change of the cosine between seeds."""
    correlation: float | None = None
    share: float | None = None
    interval: Interval | None = None
    undefined: Undefined | None = None
    """Why there is no share."""


NoteKind = Literal[
    "not the mean of items", "different layers", "measured", "other start", "untrained", "rates by seed",
    "rates without a sweep", "rates that no sweep chose", "not swept", "no trials", "no choice", "no trial finished",
    "edge of the grid", "not the least loss", "not as chosen", "plateaus in some arms", "spreads differ",
    "few documents", "seeds added", "not decided", "hardly decides",
    "scaled-down trials",
]  # fmt: skip


@dataclass(frozen=True)
class Note:
    """A qualification of a comparison: its kind, the arms that it is about, and its numbers."""

    kind: NoteKind
    arms: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """The results of a study for all of its arms."""

    study: str
    fingerprint: str
    title: str
    question: str
    baseline: str
    arms: tuple[str, ...]
    labels: dict[str, str]
    seeds: tuple[int, ...]
    steps: int | None
    tokens: int | None
    parameters: int | None
    tasks: tuple[TaskMeasure, ...]
    condensation: tuple[Measure, ...]
    layers: Layers | None
    means: tuple[TaskMean, ...]
    equal_time: EqualTime | None
    speed: tuple[Speed, ...]
    cost: tuple[Cost, ...]
    selection: tuple[Selection, ...]
    pairing: tuple[Pairing, ...]
    omitted: tuple[Fault, ...]
    notes: tuple[Note, ...]
    margin: float
    """Differences of a loss up to this, in nats per token, count as equal in practice."""
    task_notes: tuple[str, ...] = ()
    """Qualifications of the benchmark scores; every table that shows these scores repeats them."""
    measured: bool = False
    """Nothing was trained: the arms are models measured as they are, and a seed is a choice of passages."""
    untrained: tuple[str, ...] = ()
    """Arms whose start was evaluated as it is."""
    dispersed: tuple[str, ...] = ()
    """Arms that are trained with a dispersion loss."""
    other_starts: tuple[str, ...] = ()
    """Arms with their own model: paired by the order of the data, but not by the same start."""
    condensation_by_arm: tuple[ArmCondensation, ...] = ()
    size: SizeTrend | None = None
    trials: tuple[Sweep, ...] = ()
    plateaus: tuple[Plateau, ...] = ()
    """Of every trained run, condensed or not."""
    mediation: tuple[Mediation, ...] = ()
    """The share of each arm's gain that is associated with the cosine, by point of training; empty below five seeds."""
    learning_rates: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """Peak learning rates of each trained arm's runs: one, unless its seeds differ."""

    @property
    def treated(self) -> tuple[str, ...]:
        """The arms that are compared with the baseline."""
        return tuple(arm for arm in self.arms if arm != self.baseline)

    @property
    def validation(self) -> TaskMeasure | None:
        """The held-out loss on the study's own text."""
        return next((task for task in self.tasks if (task.task, task.metric) == VALIDATION), None)

    def measures(self) -> tuple[Measure, ...]:
        """Scores of tasks, their means, and condensation."""
        return (*self.tasks, *(mean.measure for mean in self.means), *self.condensation)

    def measure(self, quantity: str) -> Measure | None:
        """The measure of a quantity by its id; None where the rows do not have it."""
        return next((measure for measure in self.measures() if measure.quantity == quantity), None)

    def differences(self) -> tuple[Difference, ...]:
        """Every paired difference: of all measures, at equal time, then of the states of each arm."""
        timed = self.equal_time.differences if self.equal_time else ()
        layers = self.layers.differences.values() if self.layers else ()
        return tuple(d for group in (*(m.differences for m in self.measures()), timed, *layers) for d in group)

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON."""
        plain: dict[str, Any] = _plain(dataclasses.asdict(self))
        return plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
