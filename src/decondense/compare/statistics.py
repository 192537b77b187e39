r"""Paired differences: their interval, tests, power and outcome.

**Interval.** Let d_s be the difference arm - baseline of seed s of S, and p_i the weight of item i; weights sum to one.
The 95 % interval of the mean difference is ``mean +- t(nu) sqrt(v)`` with

    v = v_seeds + max(0, v_items - v_residual)

* ``v_seeds = sd(d)^2 / S`` accounts for other seeds *on the same items*; alone it gives Student's interval, nu = S - 1.
* ``v_items = sum_i p_i^2 (m_i - mean)^2 / c_i``, m_i the mean over seeds of item i and
  ``c_i = 1 - 2 p_i + sum_j p_j^2``, accounts for other items; the division by c_i makes it unbiased for items of equal
  variance whatever their weights.
* ``v_residual = sum_i p_i^2 s_i^2 / (c_i S)``, s_i^2 the variance over seeds of item i's difference minus d_s:
  what seeds and items do not explain is in both other terms but must count once (Owen 2007, "The pigeonhole
  bootstrap").
* nu follows Satterthwaite: ``v^2 / sum of (term^2 / degrees of freedom of the term)``, with S - 1 for seeds, n - 1 for
  items and (S-1)(n-1) for the residual, where ``n = 1 / sum_i p_i^2`` is Kish's effective number of items;
  it is never below the least of S - 1 and n - 1.

Student's interval over the seeds alone is shown if it is the wider of the two: a variance estimated from few seeds may
be far too small, and the items' part must not add degrees of freedom to it. Simulated coverage is 94 to 98 % over the
conditions of ``tests/compare/test_paired_statistics.py``: unequal weights, heavy tails; seeds, items or their
interaction dominating. No interval of a mean covers a rare plateau in only one arm.

**Tests.** ``p`` belongs to the interval; ``p_sign_flip`` is the exact two-sided permutation test over all 2^S sign
patterns, which assumes only that a difference is symmetric under the null, and can never fall below 2^(1-S). Both are
corrected over arms by Holm's method. One seed, or differences that are equal in every seed, are *not tested*:
they do not show how much another seed would differ.

**Power.** ``detectable`` is the smallest true difference that this many seeds detect in 80 % of studies;
``seeds_needed`` is the number of seeds that would detect a difference as large as the margin.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import special  # scipy.stats takes longer to import than a small study to compare

Array = npt.NDArray[np.float64]
Interval = tuple[float, float]
Outcome = Literal["better", "worse", "lower", "higher", "equivalent", "undecided", "not tested"]
CONFIDENCE = 0.95
POWER = 0.8
MARGIN = 0.02
"""Differences of a loss below this, in nats per token, count as equal in practice unless the study says otherwise."""
_EXACT_SEEDS = 16
"""Up to this number of seeds every sign pattern is enumerated (65 536); beyond it they are drawn."""
_MOST_SEEDS = 10_000


def sign_flip_p(differences: Sequence[float] | Array, *, draws: int = 100_000, seed: int = 0) -> float:
    """Two-sided permutation p of paired differences: the share of sign patterns whose |mean| is at least the observed.

    Exact up to 16 differences (all 2^n patterns, so never below 2^(1-n)); beyond that over ``draws`` random patterns
    and the observed one.
    """
    d = np.abs(np.asarray(differences, float))
    observed = abs(float(np.sum(differences)))
    n = len(d)
    if n == 0:
        raise ValueError("no differences to permute; give at least one.")
    if n <= _EXACT_SEEDS:
        # scipy.stats.permutation_test loops over the patterns in Python: seconds instead of milliseconds for 16 seeds
        sums = np.abs(d[0] + _signs(n - 1) @ d[1:])
        return float(np.mean(sums >= observed * (1 - 1e-12)))
    rng = np.random.default_rng(seed)
    sums = np.abs(rng.choice((-1.0, 1.0), size=(draws, n)) @ d)
    return float((1 + np.sum(sums >= observed * (1 - 1e-12))) / (1 + draws))


@cache
def _signs(n: int) -> Array:
    """All 2^n sign patterns [2^n, n]. The overall sign does not matter in a two-sided test: the first is fixed."""
    return np.asarray(1.0 - 2.0 * (np.arange(2**n)[:, None] >> np.arange(n) & 1))


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

    @cached_property
    def share_I(self) -> Array:
        """Weights that sum to 1."""
        return np.asarray(self.weight_I / self.weight_I.sum(), float)

    @cached_property
    def effective(self) -> float:
        """Kish's effective number of items, 1 / sum p_i^2: what equal weights would need for the same precision."""
        return float(1 / np.sum(self.share_I**2))


@dataclass(frozen=True)
class Spread:
    """Variance of a mean difference and its degrees of freedom."""

    variance: float
    degrees: float
    fixed: float = 0.0
    """The part of the variance that more seeds do not reduce: the items'."""

    @cached_property
    def half_width(self) -> float:
        """Half of the 95 % interval."""
        return float(special.stdtrit(self.degrees, 0.5 + CONFIDENCE / 2)) * math.sqrt(self.variance)

    def p(self, mean: float) -> float:
        """Two-sided p of a mean of zero."""
        return float(2 * special.stdtr(self.degrees, -abs(mean) / math.sqrt(self.variance)))

    def detectable(self) -> float:
        """The smallest true difference that is detected with probability 0.8."""
        # below one degree of freedom scipy's noncentral t has no values
        return _noncentrality(max(1.0, round(self.degrees, 1))) * math.sqrt(self.variance)


def spread_over_items(seeds: Spread, tasks: Sequence[Items]) -> Spread | None:
    """Variance over seeds and items of the mean over tasks (equation: the module's text).

    Args:
        seeds: the spread over seeds alone, with S - 1 degrees of freedom.
        tasks: per-item differences of each task, all of the same S seeds.

    Returns:
        None where a task has fewer than two items, or one item has all of the weight.
    """
    if min(task.effective for task in tasks) <= 1 + 1e-9:
        return None
    items = residual = items_df = residual_df = 0.0
    for task in tasks:
        p_I, n_seeds = task.share_I, len(task.difference_SI)
        by_seed_S1 = (task.difference_SI @ p_I)[:, None]
        item_mean_I = task.difference_SI.mean(0)
        factor_I = p_I**2 / (1 - 2 * p_I + np.sum(p_I**2)) / len(tasks) ** 2
        v_items = float(factor_I @ (item_mean_I - item_mean_I @ p_I) ** 2)
        v_residual = float(factor_I @ (task.difference_SI - by_seed_S1).var(0, ddof=1)) / n_seeds
        items, residual = items + v_items, residual + v_residual
        items_df += v_items**2 / (task.effective - 1)
        residual_df += v_residual**2 / ((n_seeds - 1) * (task.effective - 1))
    added = items - residual
    if added <= 0:
        return seeds
    variance = seeds.variance + added
    degrees = variance**2 / (seeds.variance**2 / seeds.degrees + items_df + residual_df)
    # the residual is subtracted, so that the formula alone could fall below the degrees of freedom of every term
    fewest = min(seeds.degrees, *(task.effective - 1 for task in tasks))
    return Spread(variance, max(degrees, fewest), added)


def detectable(sd: float, n: int, *, fixed: float = 0.0) -> float:
    """The smallest true difference that ``n`` seeds detect with probability 0.8; ``fixed``: the items' variance."""
    return _noncentrality(float(n - 1)) * math.sqrt(sd**2 / n + fixed)


@cache
def _noncentrality(degrees: float) -> float:
    """The standardised effect at which a two-sided t test at 5 % has a power of 0.8."""
    critical = float(special.stdtrit(degrees, 0.5 + CONFIDENCE / 2))
    # the other tail is negligible at this power
    return float(special.nctdtrinc(degrees, 1 - POWER, critical))


def average_ranks(values: Sequence[float] | Array) -> Array:
    """Ranks from 1; equal values share the mean of theirs."""
    _, place, counts = np.unique(np.asarray(values, float), return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[place], float)


def seeds_needed(sd: float, effect: float, *, fixed: float = 0.0) -> int | None:
    """Seeds with which a paired t test at 5 % detects ``effect`` in 80 % of studies.

    Args:
        sd: standard deviation of the differences between seeds.
        effect: the true difference, positive.
        fixed: variance of the mean that more seeds do not reduce (the items').

    Returns:
        At least 2; None where not even 10 000 seeds suffice.
    """

    def detects(n: int) -> bool:
        return detectable(sd, n, fixed=fixed) <= effect

    if not detects(_MOST_SEEDS):
        return None
    low, high = 1, 2
    while not detects(high):
        low, high = high, min(2 * high, _MOST_SEEDS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if detects(middle) else (middle, high)
    return high


@dataclass(frozen=True)
class Difference:
    """Paired difference arm - baseline of one quantity of the final checkpoints."""

    quantity: str
    """Id of the quantity."""
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
    """The 95 % interval: the wider of the two below; if seeds were added until a study was decided, the confidence
    sequence (:func:`decondense.compare.sequential.anytime`). None: not tested, or no finite one."""
    interval_kind: Literal["over seeds", "over seeds and items", "over seeds, at every look"] | None
    interval_reason: str
    interval_over_seeds: Interval | None
    interval_over_seeds_and_items: Interval | None
    items: int | None
    effective_items: float | None
    """Kish's effective number of items, of the task that has fewest."""
    p: float | None
    """Two-sided, of the interval. None: not tested."""
    p_holm: float | None
    p_sign_flip: float | None
    p_sign_flip_holm: float | None
    p_sign_flip_smallest: float | None
    """The smallest value that the sign-flip test can take with n pairs."""
    effect_size: float | None
    """Hedges' g of the paired differences: mean / sd, times 1 - 3 / (4 (n-1) - 1); none below 3 pairs."""
    relative: float | None
    """Mean difference over the baseline's mean."""
    margin: float | None = None
    """Differences up to this count as equal in practice; None: no such margin."""
    detectable: float | None = None
    """The smallest true difference that n seeds detect in 80 % of studies."""
    seeds_needed: int | None = None
    """Seeds that detect a difference of ``margin`` in 80 % of studies; None: no margin, not tested, or impossible."""
    item_variance: float = 0.0
    """What the items add to the variance of the mean, which more seeds do not reduce."""

    @property
    def tested(self) -> bool:
        """Whether there is an interval and a test: two seeds at least, and differences that vary."""
        return self.p is not None

    @property
    def detected(self) -> bool:
        """Whether the p of the interval, corrected over arms, is at most 0.05."""
        return self.p_holm is not None and self.p_holm <= 1 - CONFIDENCE + 1e-12

    @property
    def within_margin(self) -> bool:
        """Whether the whole interval lies within the margin."""
        if self.interval is None or self.margin is None:
            return False
        return -self.margin < self.interval[0] and self.interval[1] < self.margin

    @property
    def outcome(self) -> Outcome:
        """The result of the test; a detected difference counts however small, even if it lies within the margin."""
        if not self.tested:
            return "not tested"
        if self.detected:
            if self.higher_is_better is None:
                return "lower" if self.mean < 0 else "higher"
            return "better" if (self.mean > 0) == self.higher_is_better else "worse"
        return "equivalent" if self.within_margin else "undecided"


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
    margin: float | None = None,
) -> Difference:
    """The paired difference of two arms, one value per seed (see the module's text for interval and tests).

    Args:
        baseline_values: baseline, one value per seed.
        arm_values: arm, in the same order of seeds.
        quantity: id of what the values are.
        unit: their unit.
        arm: id of the arm.
        baseline: id of the baseline.
        seeds: names of the pairs (default 0, 1, ...).
        higher_is_better: direction, None when there is none.
        items: per-item differences, one entry per task (their weighted means average to the differences).
        no_items: why there are none, shown in ``interval_reason``.
        margin: differences up to this count as equal in practice.

    Raises:
        ValueError: no values, or not the same number for both.
    """
    if len(baseline_values) != len(arm_values) or not len(arm_values):
        raise ValueError(
            f"{len(baseline_values)} baseline values and {len(arm_values)} arm values do not pair; give one of each "
            "per seed."
        )
    base = np.asarray(baseline_values, float)
    treated = np.asarray(arm_values, float)
    d = treated - base
    n = len(d)
    mean = float(d.mean())
    base_mean = float(base.mean())
    plain = Difference(
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
        sd=None if n < 2 else float(d.std(ddof=1)),
        interval=None,
        interval_kind=None,
        interval_reason="one seed: no interval, because nothing says how much another seed would differ",
        interval_over_seeds=None,
        interval_over_seeds_and_items=None,
        items=sum(len(task.weight_I) for task in items) if items else None,
        effective_items=min(task.effective for task in items) if items else None,
        p=None,
        p_holm=None,
        p_sign_flip=None,
        p_sign_flip_holm=None,
        p_sign_flip_smallest=None,
        effect_size=None,
        relative=mean / base_mean if base_mean else None,
        margin=margin,
    )
    if plain.sd is None:
        return plain
    # differences that are equal but for rounding have no spread either
    if plain.sd <= 1e-12 * max(float(np.abs(base).max()), float(np.abs(treated).max())):
        return dataclasses.replace(plain, interval_reason=f"equal in all {n} seeds: no spread to test against")
    over_seeds = Spread(plain.sd**2 / n, n - 1)
    over_both = spread_over_items(over_seeds, items) if items else None
    # of few seeds the variance may come out far too small; then the items' part must not lend it degrees of freedom
    by_items = over_both is not None and over_both.half_width > over_seeds.half_width
    spread = over_both if over_both is not None and by_items else over_seeds
    flip = sign_flip_p(d)

    def around(found: Spread) -> Interval:
        return mean - found.half_width, mean + found.half_width

    if over_both is None:
        reason = f"Student t over {n} seeds; {no_items if not items else 'one item has all of the weight'}"
    elif not by_items:
        reason = f"Student t over {n} seeds: {plain.items} items do not widen it"
    else:
        reason = f"over {n} seeds and {plain.items} items (effective number {plain.effective_items:.1f})"
    p = spread.p(mean)
    return dataclasses.replace(
        plain,
        interval=around(spread),
        interval_kind="over seeds and items" if by_items else "over seeds",
        interval_reason=reason,
        interval_over_seeds=around(over_seeds),
        interval_over_seeds_and_items=None if over_both is None else around(over_both),
        p=p,
        p_holm=p,
        p_sign_flip=flip,
        p_sign_flip_holm=flip,
        p_sign_flip_smallest=smallest_sign_flip_p(n),
        effect_size=mean / plain.sd * (1 - 3 / (4 * (n - 1) - 1)) if n > 2 else None,
        detectable=spread.detectable(),
        seeds_needed=None if margin is None else seeds_needed(plain.sd, margin, fixed=spread.fixed),
        item_variance=spread.fixed,
    )


def holm_over_arms(differences: Sequence[Difference]) -> list[Difference]:
    """The differences with their p-values corrected over the arms (Holm); those that are not tested do not count."""
    tested = [d for d in differences if d.p is not None and d.p_sign_flip is not None]
    by_p = holm([d.p for d in tested if d.p is not None])
    by_flip = holm([d.p_sign_flip for d in tested if d.p_sign_flip is not None])
    corrected = {
        id(d): dataclasses.replace(d, p_holm=p, p_sign_flip_holm=flip)
        for d, p, flip in zip(tested, by_p, by_flip, strict=True)
    }
    return [corrected.get(id(d), d) for d in differences]
