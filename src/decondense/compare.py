r"""Paired comparison of the arms of a study, computed from its rows alone (numpy and scipy, no torch).

What is compared is fixed before anything is looked at: the *final* checkpoint of every run. Within a seed all arms
start from the same weights and read the same sequences in the same order, which the recorded hashes prove; so the unit
of evidence is the difference d_s = arm - baseline of seed s, and nothing else about the runs has to be assumed.
An arm with a model of its own starts from other weights by design: it is paired by the order of the data alone, and a
note says so. A study that only measures starts trains nothing: there a seed is one choice of passages.

**Interval.** Two 95 % intervals of the mean difference are computed, and the wider one is shown:

* over seeds: ``mean +- t(S-1) sd(d) / sqrt(S)``, Student's interval. It answers for other seeds *on the same items*.
* over seeds and items: ``mean +- t(nu) se``, where ``se`` is the standard deviation of the mean difference under a
  two-level bootstrap that resamples seeds and items independently (Owen 2007, "The pigeonhole bootstrap"), after the
  seed effects have been inflated by ``sqrt(S / (S-1))``, the narrowness of a bootstrap of few seeds (Hesterberg 2015).
  With ``v_s = sd(d)^2 / S`` and ``v_i = se^2 - v_s``, ``nu = se^4 / (v_s^2/(S-1) + v_i^2/(I-1))`` (Satterthwaite). It
  answers for other seeds and other items.

A plain percentile bootstrap of three seeds covers far less than it says, and an interval over seeds alone rejects a
true null in 11 to 17 % of simulated studies in which the items differ; the wider of the two stays at or below 5 %.

**Tests.** ``p`` belongs to the interval that is shown; ``p_sign_flip`` is the exact two-sided permutation test over all
2^S sign patterns, which assumes only that a difference is symmetric under the null, and can never fall below 2^(1-S).
Both are corrected over arms by Holm's method. With one seed there is neither interval nor test.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import special, stats

from decondense.config import PREPARED, one_of
from decondense.records import Row, stable

Array = npt.NDArray[np.float64]
Key = tuple[str, str]
"""A task and its metric."""

VALIDATION: Key = ("validation", "loss")
CONFIDENCE = 0.95
RESAMPLES = 2000
_WIDEST_BRACKET = 0.6
_EXACT_SEEDS = 16
"""Up to this number of seeds every sign pattern is enumerated (65 536); beyond it they are drawn."""


class CompareError(ValueError):
    """Runs that must not be compared; the message names every cell at fault and the remedy."""


# --------------------------------------------------------------------------------------------------------------------
# Rows -> cells
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Cell:
    """One run of a study (arm x seed) and all that its rows say."""

    arm: str
    seed: int
    status: Literal["finished", "failed", "unfinished", "missing"] = "missing"
    run: Row = field(default_factory=dict)
    """The terminal row if there is one, else the latest ``run`` row."""
    started: Row = field(default_factory=dict)
    finishes: int = 0
    resumed: int = 0
    steps: dict[int, Row] = field(default_factory=dict)
    profiles: dict[int, Row] = field(default_factory=dict)
    scores: dict[Key, dict[int, Row]] = field(default_factory=dict)
    items: dict[Key, dict[int, dict[str, tuple[float, float]]]] = field(default_factory=dict)
    """Task and metric -> step -> item -> (value, weight)."""
    conflicts: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """How messages call the cell."""
        return f"{self.arm} (seed {self.seed})"

    def said(self, what: str) -> Any:
        """A field of the terminal row, or of the first row where the terminal one is silent."""
        value = self.run.get(what)
        return self.started.get(what) if value is None else value

    @property
    def untrained(self) -> bool:
        """Whether the run ended where it started: the start was evaluated as it is."""
        return self.status == "finished" and self.run.get("steps") == 0

    @property
    def final_step(self) -> int | None:
        """The step of the final checkpoint: what the terminal row says, else the last one evaluated."""
        said = self.run.get("steps") if self.status == "finished" else None
        if said is not None:
            return int(said)
        seen = [step for curve in self.scores.values() for step in curve] + list(self.profiles)
        return max(seen, default=None)

    def final_score(self, key: Key) -> float | None:
        """The score of the final checkpoint."""
        step = self.final_step
        row = self.scores.get(key, {}).get(-1 if step is None else step)
        return None if row is None else float(row["value"])

    def final_items(self, key: Key) -> dict[str, tuple[float, float]]:
        """Per-item scores of the final checkpoint (empty when there are none)."""
        step = self.final_step
        return self.items.get(key, {}).get(-1 if step is None else step, {})

    def final_profile(self) -> Row | None:
        """The profile of the final checkpoint."""
        step = self.final_step
        return None if step is None else self.profiles.get(step)

    def curve(self, key: Key = VALIDATION) -> tuple[Array, Array]:
        """(tokens, value) of every evaluated checkpoint, in the order of training."""
        rows = [row for _, row in sorted(self.scores.get(key, {}).items())]
        return np.array([row["tokens"] for row in rows], float), np.array([row["value"] for row in rows], float)

    def training_curve(self) -> tuple[Array, Array]:
        """(tokens, training loss) of the logged steps."""
        rows = [row for _, row in sorted(self.steps.items())]
        return np.array([row["tokens"] for row in rows], float), np.array([row["loss"] for row in rows], float)

    def timing(self, what: str) -> float | None:
        """One number of the terminal row's timing."""
        value = self.run.get("timing", {}).get(what)
        return float(value) if isinstance(value, (int, float)) and value > 0 else None


@dataclass
class Study:
    """The rows of one study, sorted into cells. Tolerant: broken cells are described, not refused."""

    name: str
    fingerprint: str
    title: str
    question: str
    baseline: str | None
    arms: list[str]
    seeds: list[int]
    labels: dict[str, str]
    config: dict[str, Any]
    cells: dict[tuple[str, int], Cell]
    trials: list[Row] = field(default_factory=list)
    """Learning rates tried before the runs, on a seed that is none of the study's."""

    @classmethod
    def from_rows(cls, rows: Iterable[Row]) -> Study:
        """Sort rows into cells.

        Raises:
            CompareError: no rows of a run, or rows of more than one study.
        """
        rows = [row for row in rows if row.get("kind") in ("run", "step", "profile", "eval", "eval_item", "trial")]
        # a trial's seed is none of the study's, so trials never become cells
        trials = [row for row in rows if row["kind"] == "trial"]
        rows = [row for row in rows if row["kind"] != "trial"]
        if not rows:
            raise CompareError("no rows of a run: give the rows.jsonl that a study or the demo wrote.")
        studies = Counter((str(row["study"]), str(row["study_fingerprint"])) for row in [*rows, *trials])
        if len(studies) > 1:
            listed = "; ".join(f"{name} [{mark}], {n} rows" for (name, mark), n in sorted(studies.items()))
            raise CompareError(f"rows of {len(studies)} different studies: {listed}. Compare one study at a time.")
        config: dict[str, Any] = next((row["config"] for row in rows if row["kind"] == "run" and row["config"]), {})
        arms: list[str] = [str(arm["name"]) for arm in config.get("arms", []) if isinstance(arm, dict)]
        seeds: list[int] = [int(seed) for seed in config.get("seeds", [])]
        for row in rows:
            if row["arm"] not in arms:
                arms.append(row["arm"])
            if row["seed"] not in seeds:
                seeds.append(row["seed"])
        labels = {arm: arm for arm in arms}
        for entry in config.get("arms", []):
            if isinstance(entry, dict) and entry.get("label"):
                labels[str(entry["name"])] = str(entry["label"])
        cells = {(arm, seed): Cell(arm, seed) for arm in arms for seed in seeds}
        for row in rows:
            _take(cells[row["arm"], row["seed"]], row)
        for cell in cells.values():
            if cell.finishes == 0 and cell.status == "missing" and (cell.steps or cell.scores or cell.profiles):
                cell.status = "unfinished"
        baseline = config.get("baseline")
        if baseline is None and "cross-entropy" in arms:
            baseline = "cross-entropy"
        (name, mark) = next(iter(studies))
        return cls(
            name=name,
            fingerprint=mark,
            title=str(config.get("title") or name),
            question=str(config.get("question") or ""),
            baseline=baseline,
            arms=arms,
            seeds=seeds,
            labels=labels,
            config=config,
            cells=cells,
            trials=trials,
        )

    def entry(self, arm: str) -> dict[str, Any]:
        """The arm's part of the configuration; empty when the rows do not have it."""
        found = (entry for entry in self.config.get("arms", []) if isinstance(entry, dict) and entry.get("name") == arm)
        return next(found, {})

    def has_own_model(self, arm: str) -> bool:
        """Whether the arm starts from other weights than the others by design."""
        return self.entry(arm).get("model") is not None

    @property
    def measured(self) -> bool:
        """Whether nothing is trained: the arms are models that are measured as they are."""
        return self.config.get("measure") is not None

    def of_arm(self, arm: str, *, finished: bool = True) -> list[Cell]:
        """The cells of an arm by seed; only finished ones unless told otherwise."""
        cells = [self.cells[arm, seed] for seed in self.seeds]
        return [cell for cell in cells if not finished or cell.status == "finished"]

    def task_keys(self) -> list[Key]:
        """Every task and metric, validation loss first, then in order of appearance."""
        found = {key: None for cell in self.cells.values() for key in cell.scores}
        return sorted(found, key=lambda key: key != VALIDATION)


def _take(cell: Cell, row: Row) -> None:
    kind = row["kind"]
    if kind == "run":
        status = row["status"]
        cell.resumed += status == "resumed"
        if not cell.started:
            cell.started = row
        if status == "finished":
            cell.finishes += 1
            cell.run, cell.status = row, "finished"
        elif cell.status != "finished":
            cell.run = row
            cell.status = "failed" if status == "failed" else "unfinished"
    elif kind == "step":
        cell.steps[row["step"]] = row  # steps repeated after a resume are the same steps
    elif kind == "eval_item":
        found = cell.items.setdefault((row["task"], row["metric"]), {}).setdefault(row["step"], {})
        entry = (float(row["value"]), float(row["weight"]))
        if found.setdefault(row["item"], entry) != entry:
            cell.conflicts.append(f"two different {row['task']} scores of item {row['item']} at step {row['step']}")
    else:
        if kind == "profile":
            place, what = cell.profiles, "profiles"
        else:
            place = cell.scores.setdefault((row["task"], row["metric"]), {})
            what = f"{row['task']} {row['metric']} values"
        before = place.setdefault(row["step"], row)
        if stable(before) != stable(row):
            cell.conflicts.append(f"two different {what} at step {row['step']}")


# --------------------------------------------------------------------------------------------------------------------
# Statistics
# --------------------------------------------------------------------------------------------------------------------


def sign_flip_p(differences: Sequence[float] | Array, *, draws: int = 100_000, seed: int = 0) -> float:
    """Two-sided permutation p of paired differences: the share of sign patterns whose |mean| is at least the observed.

    Exact up to 16 differences (all 2^n patterns, so never below 2^(1-n)); beyond that over ``draws`` random patterns
    and the observed one.
    """
    d = np.abs(np.asarray(differences, float))
    observed = abs(float(np.sum(differences)))
    n = len(d)
    if n == 0:
        raise ValueError("no differences to permute.")
    if n <= _EXACT_SEEDS:
        # the overall sign does not matter in a two-sided test: fix the first
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=n - 1))).reshape(2 ** (n - 1), n - 1)
        sums = np.abs(d[0] + signs @ d[1:])
        return float(np.mean(sums >= observed * (1 - 1e-12)))
    rng = np.random.default_rng(seed)
    sums = np.abs(rng.choice((-1.0, 1.0), size=(draws, n)) @ d)
    return float((1 + np.sum(sums >= observed * (1 - 1e-12))) / (1 + draws))


def smallest_sign_flip_p(n: int, *, draws: int = 100_000) -> float:
    """The smallest p that :func:`sign_flip_p` can give with ``n`` differences."""
    return 2.0 ** (1 - n) if n <= _EXACT_SEEDS else 1 / (1 + draws)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given (Holm 1979); they control the family-wise error rate."""
    m = len(p_values)
    order = sorted(range(m), key=lambda i: p_values[i])
    adjusted = [0.0] * m
    running = 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (m - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted


@dataclass(frozen=True)
class Items:
    """Paired differences of one task item by item: ``difference_SI`` [seeds, items] and ``weight_I`` [items]."""

    difference_SI: Array
    weight_I: Array


def two_level_bootstrap(tasks: Sequence[Items], *, resamples: int = RESAMPLES, seed: int = 0) -> Array:
    """Replicates [resamples] of the mean difference, resampling seeds and, within each task, items.

    A replicate draws S seeds and I items with replacement, independently, takes each task's weighted mean over items,
    averages over tasks and then over seeds. The seeds drawn are the same for every task. Seed effects are inflated by
    ``sqrt(S / (S-1))`` first, so that the variance between seeds is estimated without bias.
    """
    rng = np.random.default_rng(seed)
    n_seeds = tasks[0].difference_SI.shape[0]
    stretch = math.sqrt(n_seeds / (n_seeds - 1)) if n_seeds > 1 else 1.0
    means = np.mean([task.difference_SI @ (task.weight_I / task.weight_I.sum()) for task in tasks], axis=0)
    shift_S1 = ((stretch - 1) * (means - means.mean()))[:, None]
    total_BS = np.zeros((resamples, n_seeds))
    for task in tasks:
        n_items = len(task.weight_I)
        weighted_IS = ((task.difference_SI + shift_S1) * task.weight_I).T
        # chunks keep memory small where a task has many thousands of items
        size = max(1, 4_000_000 // n_items)
        for first in range(0, resamples, size):
            last = min(resamples, first + size)
            # counting drawn items is several times as fast as a multinomial over many categories
            drawn_BI = (
                rng.integers(0, n_items, size=(last - first, n_items)) + n_items * np.arange(last - first)[:, None]
            )
            counts_BI = np.bincount(drawn_BI.ravel(), minlength=drawn_BI.size).reshape(drawn_BI.shape).astype(float)
            total_BS[first:last] += (counts_BI @ weighted_IS) / (counts_BI @ task.weight_I)[:, None]
    draws_BS = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=resamples)
    replicates: Array = (total_BS / len(tasks) * draws_BS / n_seeds).sum(axis=1)
    return replicates


Interval = tuple[float, float]


@dataclass(frozen=True)
class Difference:
    """Paired difference arm - baseline of one quantity of the final checkpoints."""

    quantity: str
    unit: str
    arm: str
    baseline: str
    higher_is_better: bool | None
    """None: neither direction is better."""
    n: int
    """Pairs (seeds)."""
    seeds: tuple[int, ...]
    baseline_values: tuple[float, ...]
    arm_values: tuple[float, ...]
    differences: tuple[float, ...]
    mean: float
    sd: float | None
    interval: Interval | None
    """The 95 % interval that is shown: the wider of the two below."""
    interval_kind: Literal["over seeds", "over seeds and items"] | None
    interval_reason: str
    interval_over_seeds: Interval | None
    interval_over_seeds_and_items: Interval | None
    bootstrap_percentiles: Interval | None
    """2.5 and 97.5 % points of the two-level bootstrap, for reference; too narrow with few seeds."""
    items: int | None
    p: float | None
    """Two-sided, of the interval that is shown."""
    p_holm: float | None
    p_sign_flip: float | None
    p_sign_flip_holm: float | None
    p_sign_flip_smallest: float | None
    """The smallest value that the sign-flip test can take with n pairs."""
    effect_size: float | None
    """Hedges' g of the paired differences: mean / sd, times 1 - 3 / (4 (n-1) - 1); none below 3 pairs."""
    relative: float | None
    """Mean difference over the baseline's mean."""

    @property
    def detected(self) -> bool:
        """Whether the p of the shown interval, corrected over arms, is at most 0.05."""
        return self.p_holm is not None and self.p_holm <= 1 - CONFIDENCE + 1e-12

    @property
    def verdict(self) -> str:
        """In words: lower, higher, no detectable difference, or why there is no answer."""
        if self.n < 2:
            return "one seed: not tested"
        if not self.detected:
            return "no detectable difference"
        return "lower" if self.mean < 0 else "higher"

    @property
    def judgement(self) -> Literal["better", "worse", "different", "undetected"]:
        """The verdict as good or bad, where the quantity has a direction."""
        if not self.detected:
            return "undetected"
        if self.higher_is_better is None:
            return "different"
        return "better" if (self.mean > 0) == self.higher_is_better else "worse"


def _half_width(variance: float, degrees: float) -> float:
    return float(special.stdtrit(degrees, 0.5 + CONFIDENCE / 2)) * math.sqrt(variance)


def _two_sided_p(mean: float, variance: float, degrees: float) -> float:
    if variance <= 0:
        return 1.0 if mean == 0 else 0.0
    return float(2 * special.stdtr(degrees, -abs(mean) / math.sqrt(variance)))


def paired_difference(
    baseline_values: Sequence[float],
    arm_values: Sequence[float],
    *,
    quantity: str = "value",
    unit: str = "",
    arm: str = "arm",
    baseline: str = "baseline",
    seeds: Sequence[int] | None = None,
    higher_is_better: bool | None = None,
    items: Sequence[Items] | None = None,
    no_items: str = "without per-item scores it holds for these items only",
    resamples: int = RESAMPLES,
) -> Difference:
    """The paired difference of two arms, one value a seed (see the module's text for interval and tests).

    Args:
        baseline_values: baseline, one value a seed.
        arm_values: arm, in the same order of seeds.
        quantity: what the values are.
        unit: their unit.
        arm: name of the arm.
        baseline: name of the baseline.
        seeds: names of the pairs (default 0, 1, ...).
        higher_is_better: direction, None when there is none.
        items: per-item differences, one entry a task (their weighted means average to the differences).
        no_items: why there are none, for the reason that is shown.
        resamples: bootstrap replicates.
    """
    if len(baseline_values) != len(arm_values) or not len(arm_values):
        raise ValueError(f"{len(baseline_values)} baseline values and {len(arm_values)} arm values do not pair.")
    base = np.asarray(baseline_values, float)
    treated = np.asarray(arm_values, float)
    d = treated - base
    n = len(d)
    mean = float(d.mean())
    sd = p = flip = floor = effect = None
    shown: Interval | None = None
    over_seeds: Interval | None = None
    over_both: Interval | None = None
    percentiles: Interval | None = None
    kind: Literal["over seeds", "over seeds and items"] | None = None
    n_items = sum(len(task.weight_I) for task in items) if items else None
    if n < 2:
        reason = "one seed: no interval, because nothing says how much another seed would differ"
    else:
        sd = float(d.std(ddof=1))
        v_seeds = sd**2 / n
        half = _half_width(v_seeds, n - 1)
        shown = over_seeds = (mean - half, mean + half)
        kind, p = "over seeds", _two_sided_p(mean, v_seeds, n - 1)
        flip, floor = sign_flip_p(d), smallest_sign_flip_p(n)
        if sd > 0 and n > 2:
            effect = mean / sd * (1 - 3 / (4 * (n - 1) - 1))
        reason = f"Student t over {n} seeds; {no_items}"
        if items and min(len(task.weight_I) for task in items) >= 2:
            named = zlib.crc32(f"{quantity}/{arm}/{baseline}".encode())
            replicates = two_level_bootstrap(items, resamples=resamples, seed=named)
            # replicates are centred on the items' mean; what is wanted is their spread about the reported difference
            low, high = np.quantile(replicates, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
            percentiles = (float(low), float(high))
            v_items = max(0.0, float(replicates.var(ddof=1)) - v_seeds)
            v_both = v_seeds + v_items
            if v_both > 0:
                degrees = v_both**2 / (v_seeds**2 / (n - 1) + v_items**2 / (min(len(t.weight_I) for t in items) - 1))
                wide = _half_width(v_both, degrees)
                over_both = (mean - wide, mean + wide)
                if wide > half:
                    shown, kind, p = over_both, "over seeds and items", _two_sided_p(mean, v_both, degrees)
                    reason = f"two-level bootstrap over {n} seeds and {n_items} items: wider than over seeds alone"
                else:
                    reason = f"Student t over {n} seeds: wider than the two-level bootstrap with {n_items} items"
    base_mean = float(base.mean())
    return Difference(
        quantity=quantity,
        unit=unit,
        arm=arm,
        baseline=baseline,
        higher_is_better=higher_is_better,
        n=n,
        seeds=tuple(range(n) if seeds is None else seeds),
        baseline_values=tuple(base.tolist()),
        arm_values=tuple(treated.tolist()),
        differences=tuple(d.tolist()),
        mean=mean,
        sd=sd,
        interval=shown,
        interval_kind=kind,
        interval_reason=reason,
        interval_over_seeds=over_seeds,
        interval_over_seeds_and_items=over_both,
        bootstrap_percentiles=percentiles,
        items=n_items,
        p=p,
        p_holm=p,
        p_sign_flip=flip,
        p_sign_flip_holm=flip,
        p_sign_flip_smallest=floor,
        effect_size=effect,
        relative=mean / base_mean if base_mean else None,
    )


def _holm_over_arms(differences: list[Difference]) -> list[Difference]:
    tested = [d for d in differences if d.p is not None and d.p_sign_flip is not None]
    by_p = holm([d.p for d in tested if d.p is not None])
    by_flip = holm([d.p_sign_flip for d in tested if d.p_sign_flip is not None])
    corrected = {
        d.arm: dataclasses.replace(d, p_holm=p, p_sign_flip_holm=flip)
        for d, p, flip in zip(tested, by_p, by_flip, strict=True)
    }
    return [corrected.get(d.arm, d) for d in differences]


# --------------------------------------------------------------------------------------------------------------------
# The comparison
# --------------------------------------------------------------------------------------------------------------------


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

    name: str
    unit: str
    higher_is_better: bool | None
    values: tuple[Values, ...]
    differences: tuple[Difference, ...]
    items: int | None = None

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
    """Items that the benchmark has officially; None: no benchmark, or not known."""

    @property
    def deviation(self) -> str:
        """How the scored items differ in number from the official ones, in words; empty when they do not."""
        if self.official is None or set(self.scored) <= {self.official}:
            return ""
        return f"{' or '.join(f'{count:,}' for count in self.scored)} of {self.official:,} items"


@dataclass(frozen=True)
class Speed:
    """Training tokens an arm needed to reach the validation loss with which its baseline of the same seed ended."""

    arm: str
    n: int
    reached: int
    seeds: tuple[int, ...]
    targets: tuple[float, ...]
    """The baseline's final validation loss, by seed."""
    tokens: tuple[float | None, ...]
    """Linear interpolation between evaluated checkpoints; None: not reached."""
    brackets: tuple[tuple[float, float] | None, ...]
    """The two evaluated checkpoints (in tokens) between which the target was reached."""
    token_ratios: tuple[float | None, ...]
    """Baseline's tokens over the arm's: 2 means half the tokens."""
    time_ratios: tuple[float | None, ...]
    """The same in step time."""
    median_token_ratio: float | None
    """Over seeds; None unless every seed got there and :attr:`resolved`."""
    median_time_ratio: float | None
    resolved: bool
    """Whether the checkpoints around the target are close enough (at most 60 % of training apart) to interpolate."""

    @property
    def words(self) -> str:
        """In words."""
        if not self.reached:
            return "not reached"
        if not self.resolved:
            return "evaluated too rarely"
        if self.reached < self.n:
            return f"reached by {self.reached} of {self.n} seeds"
        return f"{self.median_token_ratio:.2f}x fewer tokens"


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
    """Most GPU memory that was allocated at once; None: not recorded, or no GPU."""
    wall_ratio: tuple[float, float, float] | None
    """Median, least and greatest over seeds of the arm's step time over the baseline's."""
    cpu_ratio: tuple[float, float, float] | None
    cuda_ratio: tuple[float, float, float] | None
    """The same of the GPU memory."""
    resumed: int
    """Runs that were interrupted: their total time is only that of the last attempt."""
    untrained: bool = False
    """Nothing was trained, so there is no cost of training: every entry is None."""


@dataclass(frozen=True)
class Selection:
    """What choosing the best checkpoint on the reported score itself would have shown. Never the result."""

    arm: str
    quantity: str
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
    """What proves that the arms of a seed are a pair: they share these hashes (None: there is none to share)."""

    seed: int
    arms: tuple[str, ...]
    init_hash: str | None
    order_hash: str | None
    corpus_hash: str | None
    other_starts: tuple[str, ...] = ()
    """Arms with a model of their own: they share the order of the data, not the initial weights."""


@dataclass(frozen=True)
class Trial:
    """One learning rate that was tried."""

    learning_rate: float
    steps: int
    seed: int
    value: float | None
    """Loss on the documents set aside for this choice; None: the trial failed."""
    chosen: bool
    error: str | None


@dataclass(frozen=True)
class Sweep:
    """The learning rates tried for an arm, ascending."""

    arm: str
    trials: tuple[Trial, ...]

    @property
    def chosen(self) -> Trial | None:
        """The trial whose rate the arm's runs take."""
        return next((trial for trial in self.trials if trial.chosen), None)

    @property
    def edge(self) -> Literal["smallest", "largest"] | None:
        """Whether the chosen rate ends the grid, so that a better one may lie outside; a failed rate bounds it too."""
        if self.chosen is None or len(self.trials) < 2:
            return None
        if self.chosen is self.trials[0]:
            return "smallest"
        return "largest" if self.chosen is self.trials[-1] else None


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
    """An arm in the trend over model size; values are means over seeds."""

    arm: str
    family: str
    parameters: int
    spearman: float | None
    kendall: float | None
    last_layer: float | None

    def value(self, quantity: str) -> float | None:
        """The value of one of :data:`SIZE_QUANTITIES`."""
        return {"spearman": self.spearman, "kendall": self.kendall}.get(quantity, self.last_layer)


SIZE_QUANTITIES = {
    "spearman": "Spearman of mean cosine with depth",
    "kendall": "Kendall of mean cosine with depth",
    "last_layer": "mean cosine, last layer",
}
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
    """Mean cosine of every layer of the final checkpoints. Intervals are pointwise: not corrected over layers."""

    labels: tuple[str, ...]
    values: dict[str, tuple[Values, ...]]
    differences: dict[str, tuple[Difference, ...]]


@dataclass(frozen=True)
class Comparison:
    """Everything that a study says about its arms."""

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
    speed: tuple[Speed, ...]
    cost: tuple[Cost, ...]
    selection: tuple[Selection, ...]
    pairing: tuple[Pairing, ...]
    omitted: tuple[str, ...]
    notes: tuple[str, ...]
    task_notes: tuple[str, ...] = ()
    """What qualifies the scores of benchmarks; every table that shows them says so."""
    measured: bool = False
    """Nothing was trained: the arms are models measured as they are, and a seed is a choice of passages."""
    untrained: tuple[str, ...] = ()
    """Arms whose start was evaluated as it is."""
    other_starts: tuple[str, ...] = ()
    """Arms with a model of their own: no pair from the same start, but one by the order of the data."""
    condensation_by_arm: tuple[ArmCondensation, ...] = ()
    size: SizeTrend | None = None
    trials: tuple[Sweep, ...] = ()
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


_HASHES = {"init_hash": "initial weights", "order_hash": "data order", "corpus_hash": "corpus"}


def _faults(cell: Cell, *, measured: bool = False) -> list[str]:
    if cell.status == "missing":
        return [f"{cell.name} has no rows: it was never run"]
    if cell.status == "failed":
        return [f"{cell.name} failed: {cell.run.get('error') or 'no reason recorded'}"]
    if cell.status == "unfinished":
        last = max([*cell.steps, *cell.profiles, 0])
        return [f"{cell.name} is unfinished (last row at step {last})"]
    found = [f"{cell.name} has {conflict}" for conflict in cell.conflicts]
    if cell.finishes > 1:
        found.append(f"{cell.name} finished {cell.finishes} times: two runs of one cell")
    if measured or (not cell.scores and cell.profiles):
        # condensation alone can be compared too
        if cell.final_profile() is None:
            found.append(f"{cell.name} has no profile of its final checkpoint (step {cell.final_step})")
    elif all(cell.final_score(key) is None for key in cell.scores):  # nothing to compare
        found.append(f"{cell.name} has no score of its final checkpoint (step {cell.final_step})")
    for key, curve in cell.scores.items():
        if cell.final_step not in curve:
            found.append(f"{cell.name} has no {key[0]} {key[1]} of its final checkpoint (step {cell.final_step})")
    return found


def _unpaired(cells: Sequence[Cell], baseline: str, study: Study) -> list[str]:
    """Faults between the arms of one seed, each named after the cell that departs from the baseline's."""
    reference = next((cell for cell in cells if cell.arm == baseline), None)
    if reference is None:
        return []
    found = []
    for cell in cells:
        for what, words in _HASHES.items():
            mine, theirs = cell.said(what), reference.said(what)
            own = study.has_own_model(cell.arm) or study.has_own_model(reference.arm)
            if what == "init_hash" and (own or study.measured):
                continue  # other weights by design
            if mine is None:
                # an arm that is not trained reads no data, and a study that only measures has no corpus
                if not study.measured and (what != "order_hash" or cell.final_step != 0):
                    found.append(f"{cell.name} has no {what}, so that its pairing cannot be proven")
            elif cell is not reference and theirs is not None and mine != theirs:
                found.append(
                    f"{cell.name} is not paired with {reference.name}: other {words} ({mine} against {theirs})"
                )
        if cell is reference:
            continue
        for key in reference.scores.keys() | cell.scores.keys():
            if (key in cell.scores) != (key in reference.scores):
                lacking = reference if key in cell.scores else cell
                found.append(f"{lacking.name} has no score of {key[0]} {key[1]}")
                continue
            mine_items, their_items = cell.final_items(key), reference.final_items(key)
            if mine_items and their_items and _weights(mine_items) != _weights(their_items):
                only = len(mine_items.keys() ^ their_items.keys())
                how = f"{only} items are in one of them only" if only else "the same items have other weights"
                found.append(f"{cell.name} was scored on other items of {key[0]} than {reference.name}: {how}")
    return sorted(found)


def _weights(items: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    return {name: weight for name, (_, weight) in items.items()}


def compare(
    rows: Iterable[Row] | Study,
    baseline: str | None = None,
    *,
    incomplete: Literal["refuse", "omit"] = "refuse",
    resamples: int = RESAMPLES,
) -> Comparison:
    """Compare the arms of one study with its baseline, at the final checkpoints, paired by seed and by item.

    Args:
        rows: the rows of one study (``records.read_rows``), or a :class:`Study`.
        baseline: the arm that the others are compared with; default: what the study names.
        incomplete: ``"refuse"`` (default) raises when any run is missing, failed, unfinished, duplicated or not paired;
            ``"omit"`` leaves those runs out, and names them in ``Comparison.omitted``.
        resamples: replicates of the two-level bootstrap.

    Raises:
        CompareError: runs that cannot be compared, named one by one.
        ConfigError: an unknown baseline.
    """
    study = rows if isinstance(rows, Study) else Study.from_rows(rows)
    if baseline is None and study.baseline is None:
        raise CompareError(f"the rows name no baseline; choose one of the arms: {', '.join(study.arms)}.")
    base = one_of("baseline arm", str(baseline or study.baseline), study.arms)

    faults: list[str] = []
    good: dict[tuple[str, int], Cell] = {}
    for place, cell in study.cells.items():
        found = _faults(cell, measured=study.measured)
        faults += found
        if not found:
            good[place] = cell
    for seed in study.seeds:
        cells = [good[arm, seed] for arm in study.arms if (arm, seed) in good]
        found = _unpaired(cells, base, study)
        faults += found
        for cell in cells:
            if any(fault.startswith(cell.name) for fault in found):
                del good[cell.arm, seed]
    if faults and incomplete == "refuse":
        raise CompareError(
            f"study {study.name} cannot be compared:\n  - "
            + "\n  - ".join(faults)
            + "\nFinish or repeat these runs. The report, and compare(..., incomplete='omit'), compare what is left."
        )
    if not good:
        raise CompareError(f"study {study.name} has no finished run:\n  - " + "\n  - ".join(faults))
    # an arm is compared over the seeds that it shares with the baseline
    pairs = {arm: [seed for seed in study.seeds if (arm, seed) in good and (base, seed) in good] for arm in study.arms}
    arms = [base, *(arm for arm in study.arms if arm != base and any((arm, seed) in good for seed in study.seeds))]
    seeds = [seed for seed in study.seeds if any((arm, seed) in good for arm in arms)]
    context = _Context(study, base, arms, seeds, good, pairs, resamples)

    keys = [key for key in study.task_keys() if any(key in cell.scores for cell in good.values())]
    tasks = tuple(context.task(key) for key in keys)
    final = [cell.run for cell in good.values()]
    notes = context.notes()
    return Comparison(
        study=study.name,
        fingerprint=study.fingerprint,
        title=study.title,
        question=study.question,
        baseline=base,
        arms=tuple(arms),
        labels={arm: study.labels[arm] for arm in arms},
        seeds=tuple(seeds),
        steps=_common(row.get("steps") for row in final),
        tokens=_common(row.get("tokens") for row in final),
        parameters=_common(cell.said("parameters") for cell in good.values()),
        tasks=tasks,
        condensation=context.condensation(),
        layers=context.layers(),
        means=context.means(keys),
        speed=context.speed(),
        cost=context.cost(),
        selection=context.selection(keys),
        pairing=context.pairing(),
        omitted=tuple(faults),
        notes=tuple(notes),
        task_notes=(*_item_notes(tasks), *context.task_notes()),
        measured=study.measured,
        untrained=tuple(arm for arm in arms if context.untrained(arm)),
        other_starts=tuple(context.other_starts()),
        condensation_by_arm=context.condensation_by_arm(),
        size=context.size(),
        trials=tuple(context.trials()),
        learning_rates=context.learning_rates(),
    )


def _common(values: Iterable[Any]) -> int | None:
    found = {value for value in values if value is not None}
    return int(found.pop()) if len(found) == 1 else None


_NO_ITEMS = "without the same per-item scores in every run it holds for these items only"
_UNITS = {"loss": "nats/token", "mean_cosine": "cosine"}


@dataclass(frozen=True)
class _Context:
    study: Study
    base: str
    arms: list[str]
    seeds: list[int]
    cells: dict[tuple[str, int], Cell]
    pairs: dict[str, list[int]]
    resamples: int

    def measure(
        self,
        name: str,
        of: Any,
        *,
        unit: str = "",
        higher_is_better: bool | None = None,
        items: Any = None,
    ) -> Measure:
        """``of(cell)`` -> value or None; ``items(arm, seeds)`` -> (tasks or None, why not)."""
        values: list[Values] = []
        differences: list[Difference] = []
        for arm in self.arms:
            found = [
                (seed, of(self.cells[arm, seed]))
                for seed in self.seeds
                if (arm, seed) in self.cells and of(self.cells[arm, seed]) is not None
            ]
            if found:
                values.append(Values.of(arm, found))
            if arm == self.base:
                continue
            seeds = [
                seed
                for seed in self.pairs[arm]
                if of(self.cells[arm, seed]) is not None and of(self.cells[self.base, seed]) is not None
            ]
            if not seeds:
                continue
            per_item, why = items(arm, seeds) if items else (None, "a run has one value")
            differences.append(
                paired_difference(
                    [of(self.cells[self.base, seed]) for seed in seeds],
                    [of(self.cells[arm, seed]) for seed in seeds],
                    quantity=name,
                    unit=unit,
                    arm=arm,
                    baseline=self.base,
                    seeds=seeds,
                    higher_is_better=higher_is_better,
                    items=per_item,
                    no_items=why,
                    resamples=self.resamples,
                )
            )
        count = next((d.items for d in differences if d.items), None)
        return Measure(name, unit, higher_is_better, tuple(values), tuple(_holm_over_arms(differences)), count)

    def per_item(self, key: Key, arm: str, seeds: Sequence[int]) -> Items | None:
        """Differences item by item, or None unless every run of both arms has the same items."""
        mine = [self.cells[arm, seed].final_items(key) for seed in seeds]
        theirs = [self.cells[self.base, seed].final_items(key) for seed in seeds]
        first = _weights(mine[0])
        if not first or any(_weights(items) != first for items in [*mine, *theirs]):
            return None
        names = sorted(first)
        difference_SI = np.array(
            [[a[name][0] - b[name][0] for name in names] for a, b in zip(mine, theirs, strict=True)]
        )
        return Items(difference_SI, np.array([first[name] for name in names]))

    def direction(self, key: Key) -> bool:
        rows = [row for cell in self.cells.values() for row in cell.scores.get(key, {}).values()]
        return bool(rows[0]["higher_is_better"])

    def task(self, key: Key) -> TaskMeasure:
        task, metric = key

        def items(arm: str, seeds: Sequence[int]) -> tuple[list[Items] | None, str]:
            found = self.per_item(key, arm, seeds)
            return (None, _NO_ITEMS) if found is None else ([found], "")

        measure = self.measure(
            f"{task} {metric}",
            lambda cell: cell.final_score(key),
            unit=_UNITS.get(metric, ""),
            higher_is_better=self.direction(key),
            items=items,
        )
        fields = {f.name: getattr(measure, f.name) for f in dataclasses.fields(Measure)}
        rows = [cell.scores.get(key, {}).get(-1 if cell.final_step is None else cell.final_step)
                for cell in self.cells.values()]  # fmt: skip
        scored = sorted({int(row["items"]) for row in rows if row})
        official = {int(row["official_items"]) for row in rows if row and row["official_items"] is not None}
        return TaskMeasure(
            **fields, task=task, metric=metric, scored=tuple(scored), official=max(official) if official else None
        )

    def condensation(self) -> tuple[Measure, ...]:
        def blocks(cell: Cell) -> float | None:
            profile = cell.final_profile()
            return float(np.mean(profile["mean_cosine"][1:])) if profile and len(profile["mean_cosine"]) > 1 else None

        def last(cell: Cell) -> float | None:
            profile = cell.final_profile()
            return float(profile["mean_cosine"][-1]) if profile else None

        wanted = [
            ("mean cosine, all blocks", blocks, "cosine"),
            ("mean cosine, last layer", last, "cosine"),
            ("Spearman of mean cosine with depth", _trend_of("spearman"), ""),
            ("Kendall of mean cosine with depth", _trend_of("kendall"), ""),
        ]
        # less condensation is what the method aims at, but it is no good in itself: no direction
        found = (self.measure(name, of, unit=unit) for name, of, unit in wanted)
        return tuple(measure for measure in found if measure.values)

    def values(self, arm: str, of: Callable[[Cell], float | None]) -> Values | None:
        """One quantity of an arm's runs, of those that have it."""
        cells = [self.cells[arm, seed] for seed in self.seeds if (arm, seed) in self.cells]
        found = [(cell.seed, value) for cell in cells if (value := of(cell)) is not None]
        return Values.of(arm, found) if found else None

    def condensation_by_arm(self) -> tuple[ArmCondensation, ...]:
        found = []
        for arm in self.arms:
            cells = [self.cells[arm, seed] for seed in self.seeds if (arm, seed) in self.cells]
            blocks = {len(profile["mean_cosine"]) - 1 for cell in cells if (profile := cell.final_profile())}
            if not blocks:
                continue
            depth = min(blocks)
            widths = {str(n): n for n in range(1, 6) if n <= depth} | {"L/2": max(1, depth // 2)}
            last = {name: self.values(arm, _last_of(n)) for name, n in widths.items()}
            found.append(
                ArmCondensation(
                    arm=arm,
                    parameters=_common(cell.said("parameters") for cell in cells),
                    blocks=depth if len(blocks) == 1 else None,
                    last={name: values for name, values in last.items() if values is not None},
                    spearman=self.values(arm, _trend_of("spearman")),
                    kendall=self.values(arm, _trend_of("kendall")),
                )
            )
        return tuple(found)

    def size(self) -> SizeTrend | None:
        """Condensation against size, when arms have models of their own and these differ in size."""
        if not any(self.study.has_own_model(arm) for arm in self.arms):
            return None
        points = []
        for entry in self.condensation_by_arm():
            if entry.parameters is None:
                continue
            means = [None if v is None else v.mean for v in (entry.spearman, entry.kendall, entry.last.get("1"))]
            points.append(SizePoint(entry.arm, family_of(self.study, entry.arm), entry.parameters, *means))
        if len({point.parameters for point in points}) < 2:
            return None
        families = list(dict.fromkeys(point.family for point in points))
        groups = [(name, [p for p in points if p.family == name]) for name in families]
        wanted = [*groups, *([(None, points)] if len(families) > 1 else [])]
        correlations = []
        for family, group in wanted:
            for quantity in SIZE_QUANTITIES:
                pairs = [(p.parameters, value) for p in group if (value := p.value(quantity)) is not None]
                # two models always lie on a line
                if len({size for size, _ in pairs}) > 2:
                    rho, p = _rank_correlation([float(size) for size, _ in pairs], [value for _, value in pairs])
                    correlations.append(SizeCorrelation(family, quantity, len(pairs), rho, p))
        return SizeTrend(tuple(points), tuple(correlations))

    def untrained(self, arm: str) -> bool:
        return all(self.cells[arm, seed].untrained for seed in self.seeds if (arm, seed) in self.cells)

    def other_starts(self) -> list[str]:
        own = [arm for arm in self.arms if arm != self.base and self.study.has_own_model(arm)]
        if self.study.has_own_model(self.base) and not self.study.measured:
            return [arm for arm in self.arms if arm != self.base]
        return own

    def trials(self) -> list[Sweep]:
        found = []
        for arm in self.arms:
            # a trial that was repeated after a failure counts as it ended last
            rows = {float(row["learning_rate"]): row for row in self.study.trials if row["arm"] == arm}
            if rows:
                trials = tuple(
                    Trial(
                        learning_rate=rate,
                        steps=int(row["steps"]),
                        seed=int(row["seed"]),
                        value=None if row["value"] is None or row["status"] == "failed" else float(row["value"]),
                        chosen=bool(row["chosen"]),
                        error=(row["error"] or "no reason recorded") if row["status"] == "failed" else None,
                    )
                    for rate, row in sorted(rows.items())
                )
                found.append(Sweep(arm, trials))
        return found

    def learning_rates(self) -> dict[str, tuple[float, ...]]:
        swept = {sweep.arm for sweep in self.trials()}
        common = self.study.config.get("train", {}).get("learning_rate")
        found: dict[str, tuple[float, ...]] = {}
        for arm in self.arms:
            rates: dict[float, None] = {}
            for seed in self.seeds:
                cell = self.cells.get((arm, seed))
                if cell is None or cell.untrained:
                    continue
                rate = cell.said("learning_rate")
                if rate is None and arm not in swept:  # rows of older studies leave it to the configuration
                    rate = self.study.entry(arm).get("learning_rate") or common
                if rate is not None:
                    rates[float(rate)] = None
            if rates:
                found[arm] = tuple(rates)
        return found

    def layers(self) -> Layers | None:
        profiles = {place: cell.final_profile() for place, cell in self.cells.items()}
        labels = Counter(tuple(profile["layers"]) for profile in profiles.values() if profile)
        if not labels:
            return None
        names = labels.most_common(1)[0][0]
        values: dict[str, list[Values]] = {}
        differences: dict[str, list[Difference]] = {}
        for number, label in enumerate(names):

            def of(cell: Cell, number: int = number) -> float | None:
                profile = cell.final_profile()
                return float(profile["mean_cosine"][number]) if profile and tuple(profile["layers"]) == names else None

            measure = self.measure(f"mean cosine, {label}", of, unit="cosine")
            for entry in measure.values:
                values.setdefault(entry.arm, []).append(entry)
            for d in measure.differences:
                differences.setdefault(d.arm, []).append(d)
        return Layers(
            tuple(str(name) for name in names),
            {arm: tuple(entries) for arm, entries in values.items()},
            {arm: tuple(entries) for arm, entries in differences.items()},
        )

    def means(self, keys: Sequence[Key]) -> tuple[TaskMean, ...]:
        groups: dict[tuple[str, bool], list[Key]] = {}
        for key in keys:
            if key != VALIDATION:
                groups.setdefault((key[1], self.direction(key)), []).append(key)
        return tuple(self.task_mean(metric, group, up) for (metric, up), group in groups.items() if len(group) > 1)

    def task_mean(self, metric: str, keys: list[Key], higher_is_better: bool) -> TaskMean:
        def of(cell: Cell) -> float | None:
            scores = [cell.final_score(key) for key in keys]
            return None if None in scores else float(np.mean([score for score in scores if score is not None]))

        def items(arm: str, seeds: Sequence[int]) -> tuple[list[Items] | None, str]:
            found = [self.per_item(key, arm, seeds) for key in keys]
            whole = [entry for entry in found if entry is not None]
            return (whole, "") if len(whole) == len(found) else (None, _NO_ITEMS)

        measure = self.measure(
            f"mean {metric} of {len(keys)} tasks", of, higher_is_better=higher_is_better, items=items
        )
        ranks: dict[str, list[float]] = {arm: [] for arm in self.arms}
        for seed in self.seeds:
            for key in keys:
                scores = {a: self.cells[a, seed].final_score(key) for a in self.arms if (a, seed) in self.cells}
                if len(scores) < len(self.arms) or None in scores.values():
                    continue  # a rank among fewer arms is another rank
                numbers = np.array([score for score in scores.values() if score is not None])
                for arm, rank in zip(scores, stats.rankdata(-numbers if higher_is_better else numbers), strict=True):
                    ranks[arm].append(float(rank))
        mean_rank = {arm: float(np.mean(entries)) for arm, entries in ranks.items() if entries}
        return TaskMean(metric, tuple(task for task, _ in keys), measure, mean_rank)

    def speed(self) -> tuple[Speed, ...]:
        found = []
        for arm in self.arms:
            seeds = [
                seed
                for seed in self.pairs[arm]
                if arm != self.base
                and self.cells[self.base, seed].final_score(VALIDATION) is not None
                # what was not trained reads no tokens, and there is nothing to reach it with
                and not (self.cells[arm, seed].untrained or self.cells[self.base, seed].untrained)
            ]
            if not seeds:
                continue
            targets, tokens, brackets, token_ratios, time_ratios = [], [], [], [], []
            for seed in seeds:
                cell, rival = self.cells[arm, seed], self.cells[self.base, seed]
                target = rival.final_score(VALIDATION)
                assert target is not None
                total = float(rival.curve()[0][-1])
                at, bracket = tokens_to_reach(*cell.curve(), target)
                ratio = total / at if at else None
                pace, rival_pace = cell.timing("step_wall_ms"), rival.timing("step_wall_ms")
                targets.append(target)
                tokens.append(at)
                brackets.append(bracket)
                token_ratios.append(ratio)
                time_ratios.append(ratio * rival_pace / pace if ratio and pace and rival_pace else None)
            in_tokens = [ratio for ratio in token_ratios if ratio is not None]
            in_time = [ratio for ratio in time_ratios if ratio is not None]
            total = float(self.cells[self.base, seeds[0]].curve()[0][-1])
            resolved = all(b[1] - b[0] <= _WIDEST_BRACKET * total for b in brackets if b is not None)
            everyone = len(in_tokens) == len(seeds) and resolved
            found.append(
                Speed(
                    arm=arm,
                    n=len(seeds),
                    reached=len(in_tokens),
                    seeds=tuple(seeds),
                    targets=tuple(targets),
                    tokens=tuple(tokens),
                    brackets=tuple(brackets),
                    token_ratios=tuple(token_ratios),
                    time_ratios=tuple(time_ratios),
                    # a median over the seeds that got there would hide those that did not
                    median_token_ratio=float(np.median(in_tokens)) if everyone else None,
                    median_time_ratio=float(np.median(in_time)) if everyone and len(in_time) == len(seeds) else None,
                    resolved=resolved,
                )
            )
        return tuple(found)

    def cost(self) -> tuple[Cost, ...]:
        found = []
        for arm in self.arms:
            cells = [self.cells[arm, seed] for seed in self.seeds if (arm, seed) in self.cells]
            untrained = self.untrained(arm)

            def of(what: str, cells: list[Cell] = cells) -> tuple[float | None, ...]:
                # the memory of an evaluation is not that of a training
                return tuple(None if cell.untrained else cell.timing(what) for cell in cells)

            def ratio(what: str, arm: str = arm) -> tuple[float, float, float] | None:
                ratios = []
                for seed in self.pairs[arm]:
                    cell, rival = self.cells[arm, seed], self.cells[self.base, seed]
                    mine, theirs = cell.timing(what), rival.timing(what)
                    if mine and theirs and not cell.untrained and not rival.untrained:
                        ratios.append(mine / theirs)
                return (float(np.median(ratios)), min(ratios), max(ratios)) if ratios else None

            found.append(
                Cost(
                    arm=arm,
                    n=len(self.pairs[arm]),
                    seeds=tuple(cell.seed for cell in cells),
                    step_wall_ms=of("step_wall_ms"),
                    step_cpu_ms=of("step_cpu_ms"),
                    train_wall_s=of("train_wall_s"),
                    peak_rss_bytes=of("peak_rss_bytes"),
                    peak_cuda_bytes=of("peak_cuda_bytes"),
                    wall_ratio=None if arm == self.base else ratio("step_wall_ms"),
                    cpu_ratio=None if arm == self.base else ratio("step_cpu_ms"),
                    cuda_ratio=None if arm == self.base else ratio("peak_cuda_bytes"),
                    resumed=sum(cell.resumed > 0 for cell in cells),
                    untrained=untrained,
                )
            )
        return tuple(found)

    def selection(self, keys: Sequence[Key]) -> tuple[Selection, ...]:
        found = []
        for key in keys:
            up = self.direction(key)
            best: dict[str, dict[int, float]] = {}
            final: dict[str, dict[int, float]] = {}
            count = 0
            for (arm, seed), cell in self.cells.items():
                score = cell.final_score(key)
                values = cell.curve(key)[1]
                if score is None or len(values) < 2:
                    continue
                count = max(count, len(values))
                best.setdefault(arm, {})[seed] = float(values.max() if up else values.min())
                final.setdefault(arm, {})[seed] = score
            for arm in self.arms:
                if arm not in best:
                    continue
                shared = [seed for seed in self.pairs[arm] if seed in best[arm] and seed in best.get(self.base, {})]
                treated = arm != self.base and bool(shared)
                mean_final = float(np.mean(list(final[arm].values())))
                mean_best = float(np.mean(list(best[arm].values())))
                found.append(
                    Selection(
                        arm=arm,
                        quantity=f"{key[0]} {key[1]}",
                        checkpoints=count,
                        final=mean_final,
                        best=mean_best,
                        gain=mean_best - mean_final,
                        difference_final=float(np.mean([final[arm][s] - final[self.base][s] for s in shared]))
                        if treated
                        else None,
                        difference_best=float(np.mean([best[arm][s] - best[self.base][s] for s in shared]))
                        if treated
                        else None,
                    )
                )
        return tuple(found)

    def pairing(self) -> tuple[Pairing, ...]:
        found = []
        for seed in self.seeds:
            cells = [self.cells[arm, seed] for arm in self.arms if (arm, seed) in self.cells]
            others = set(self.other_starts())

            def shared(what: str, cells: list[Cell] = cells) -> str | None:
                said = (cell.said(what) for cell in cells)
                return next((str(value) for value in said if value is not None), None)

            found.append(
                Pairing(
                    seed=seed,
                    arms=tuple(cell.arm for cell in cells),
                    # what is measured as it is has no start to share
                    init_hash=None
                    if self.study.measured
                    else shared("init_hash", [cell for cell in cells if cell.arm not in others]),
                    order_hash=shared("order_hash"),
                    corpus_hash=shared("corpus_hash"),
                    other_starts=tuple(cell.arm for cell in cells if cell.arm in others),
                )
            )
        return tuple(found)

    def notes(self) -> list[str]:
        found = []
        for (arm, seed), cell in self.cells.items():
            for key, curve in cell.scores.items():
                items = cell.final_items(key)
                score = cell.final_score(key)
                if not items or score is None or cell.final_step is None:
                    continue
                values, weights = np.array(list(items.values())).T
                mean = float(values @ weights / weights.sum()) if weights.sum() else score
                if not math.isclose(mean, score, rel_tol=1e-6, abs_tol=1e-9):
                    row = curve[cell.final_step]
                    found.append(
                        f"{arm} (seed {seed}): the {row['task']} {row['metric']} of {score:.6g} is not the weighted "
                        f"mean of its items ({mean:.6g}); the item part of its interval is approximate."
                    )
        found += self.start_notes()
        found += self.rate_notes()
        labels = {tuple(p["layers"]) for cell in self.cells.values() if (p := cell.final_profile())}
        if len(labels) > 1:
            found.append("The arms have different layers; the table by layer holds only the most frequent set.")
        return found

    def named(self, arms: Iterable[str]) -> str:
        words = [self.study.labels[arm] for arm in arms]
        return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]

    def start_notes(self) -> list[str]:
        """What is no pair from the same start, in words."""
        if self.study.measured:
            return [
                "Nothing was trained: the arms are different models, measured as they are; a seed is one choice of "
                "passages, so that the differences pair models by passages, and their intervals say how much other "
                "passages would change them, not how much other trainings would."
            ]
        found = []
        others = self.other_starts()
        if others:
            verb = "starts" if len(others) == 1 else "start"
            pronoun = "it is" if len(others) == 1 else "they are"
            found.append(
                f"{self.named(others)} {verb} from other weights than the baseline by design; {pronoun} paired with it "
                "by data order only, so that what the seed's start adds to a difference does not cancel."
            )
        idle = [arm for arm in self.arms if self.untrained(arm)]
        if idle:
            verb = "is" if len(idle) == 1 else "are"
            found.append(f"{self.named(idle)} {verb} untrained: the start as it is, which reads no data.")
        return found

    def rate_notes(self) -> list[str]:
        """How the learning rates came about, and what is doubtful about them."""
        rates, sweeps = self.learning_rates(), {sweep.arm: sweep for sweep in self.trials()}
        swept = self.study.config.get("sweep") is not None
        found = []
        for arm, several in rates.items():
            if len(several) > 1:
                listed = ", ".join(f"{rate:g}" for rate in several)
                found.append(f"The seeds of {self.study.labels[arm]} have different learning rates: {listed}.")
        if not sweeps and not swept:
            different = {rate for several in rates.values() for rate in several}
            if len(rates) > 1 and len(different) == 1:
                found.append(
                    f"Every arm was trained at the same learning rate, {different.pop():g}; another rate may be better "
                    "for some of them."
                )
            elif len(rates) > 1:
                listed = ", ".join(
                    f"{self.study.labels[arm]} {' and '.join(f'{rate:g}' for rate in several)}"
                    for arm, several in rates.items()
                )
                found.append(f"The arms have different learning rates without a sweep: {listed}.")
            return found
        if not sweeps:
            found.append("The study chooses learning rates by a sweep, but the rows hold none of its trials.")
        fixed = [arm for arm in rates if arm not in sweeps]
        if sweeps and fixed:
            listed = ", ".join(f"{self.study.labels[arm]} {rates[arm][0]:g}" for arm in fixed)
            found.append(f"Learning rates that no sweep chose: {listed}.")
        for arm, sweep in sweeps.items():
            name, chosen = self.study.labels[arm], sweep.chosen
            finished = [trial for trial in sweep.trials if trial.value is not None]
            if chosen is None:
                why = "every trial failed" if not finished else "no trial is marked as chosen"
                found.append(f"No learning rate was chosen for {name}: {why}.")
                continue
            if sweep.edge is not None:
                found.append(
                    f"The learning rate chosen for {name}, {chosen.learning_rate:g}, is the {sweep.edge} tried: the "
                    "best rate may lie outside."
                )
            best = min(finished, key=lambda trial: trial.value or 0.0, default=None)
            if best is not None and (chosen.value is None or (best.value or 0.0) < chosen.value):
                found.append(
                    f"The learning rate chosen for {name}, {chosen.learning_rate:g}, is not the one with the least "
                    f"loss, {best.learning_rate:g}."
                )
            if arm in rates and rates[arm] != (chosen.learning_rate,):
                listed = ", ".join(f"{rate:g}" for rate in rates[arm])
                found.append(f"{name} was trained at {listed}, but its sweep chose {chosen.learning_rate:g}.")
        return found

    def task_notes(self) -> list[str]:
        """What the evaluation says about its scores (limits, data that are not the official ones), with the tasks."""
        found: dict[str, dict[str, None]] = {}
        for cell in self.cells.values():
            for (task, _), curve in cell.scores.items():
                row = curve.get(-1 if cell.final_step is None else cell.final_step, {})
                for note in row.get("notes", ()):
                    found.setdefault(note, {})[task] = None
        return [f"{', '.join(tasks)}: {note}" for note, tasks in found.items()]


def _item_notes(tasks: Sequence[TaskMeasure]) -> list[str]:
    """Which benchmarks were scored on another number of items than they officially have."""
    odd = {task.task: f"{task.task} {task.deviation}" for task in tasks if task.deviation}
    return [f"not scored on the official number of items: {', '.join(odd.values())}"] if odd else []


def _trend_of(name: str) -> Callable[[Cell], float | None]:
    def of(cell: Cell) -> float | None:
        profile = cell.final_profile()
        return float(profile[name]) if profile and profile[name] is not None else None

    return of


def _last_of(n: int) -> Callable[[Cell], float | None]:
    def of(cell: Cell) -> float | None:
        profile = cell.final_profile()
        return float(np.mean(profile["mean_cosine"][-n:])) if profile else None

    return of


def _rank_correlation(x: Sequence[float], y: Sequence[float]) -> tuple[float | None, float | None]:
    """Spearman's rho and its two-sided p: over all orders up to 8 pairs, by Student's t beyond, none below 5."""
    a, b = (stats.rankdata(values) - (len(x) + 1) / 2 for values in (x, y))
    scale = math.sqrt(float(a @ a) * float(b @ b))
    if scale == 0:
        return None, None
    rho = float(a @ b) / scale
    if len(x) < FEWEST_MODELS:
        return rho, None
    if len(x) <= 8:
        orders = np.array(list(itertools.permutations(range(len(x)))))
        return rho, float(np.mean(np.abs(b[orders] @ a) >= abs(float(a @ b)) - 1e-9))
    return rho, float(stats.spearmanr(x, y).pvalue)


_SIZE_WORDS = re.compile(
    r"\d+(\.\d+)?[kmbt]|x{0,3}(small|large|xl)|nano|micro|mini|tiny|small|medium|base|big|large|huge", re.IGNORECASE
)
_TREATMENTS = {
    "dispersion": "dispersion",
    "noisy_embedding": "noisy embedding",
    "active_forgetting": "active forgetting",
    "distillation": "distillation",
}


def family_of(study: Study, arm: str) -> str:
    """What the arms of a family have in common besides their size: the architecture, and what is done to it.

    A start is a hub id or a folder: its name without what tells the size (``Qwen/Qwen3-0.6B-Base`` is of the family
    ``Qwen3-Base``).
    """
    entry, base = study.entry(arm), study.config.get("model") or {}
    own = entry.get("model") or {}
    start = own.get("start") or (None if own.get("architecture") else base.get("start"))
    if start and str(start).startswith(PREPARED):
        prepared = (study.config.get("prepared") or {}).get(str(start)[len(PREPARED) :], {}).get("model") or {}
        name = str(prepared.get("architecture") or start)
    elif start:
        words = str(start).rstrip("/").rsplit("/", 1)[-1].split("-")
        # the last "base" of a name says that a model was not tuned, not how large it is
        kept = [w for i, w in enumerate(words) if not _SIZE_WORDS.fullmatch(w) or (w.lower() == "base" and i > 1)]
        name = "-".join(kept) or "-".join(words)
    else:
        name = str(own.get("architecture") or base.get("architecture") or "model")
    treated = [words for key, words in _TREATMENTS.items() if entry.get(key) is not None]
    return " + ".join([name, *treated]) + (" (untrained)" if entry.get("untrained") and not study.measured else "")


def tokens_to_reach(
    tokens: Sequence[float] | Array, values: Sequence[float] | Array, target: float
) -> tuple[float | None, tuple[float, float] | None]:
    """Tokens at which a loss curve first is at or below ``target``, and the two points between which that happens.

    Linear between the points: a loss that falls steeply first and slowly later is reached earlier than that, so the
    number errs on the late side. ``(None, None)``: not reached.
    """
    for number, value in enumerate(values):
        if value <= target:
            if number == 0:
                return float(tokens[0]), (float(tokens[0]), float(tokens[0]))
            left, right = float(tokens[number - 1]), float(tokens[number])
            before = float(values[number - 1])
            return left + (right - left) * (before - target) / (before - float(value)), (left, right)
    return None, None
