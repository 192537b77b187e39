r"""An interval that stays valid however often the data are looked at: the t-mixture confidence sequence.

With n differences of mean m and sample standard deviation s, t = m sqrt(n) / s and nu = n - 1, the Bayes factor of a
mean of unknown sign against zero, with a normal prior of variance g on the standardised effect and the right-Haar prior
on the scale, is

    log B = -1/2 log(1 + n g) + n/2 [log(1 + t^2 / nu) - log(1 + t^2 / ((1 + n g) nu))]

Under the null B is a nonnegative martingale of mean 1, whatever the scale, so by Ville's inequality it ever exceeds
1/alpha with probability at most alpha: seeds may be added until it does (Lai 1976; Robbins 1970; Wang and Ramdas 2024,
arXiv:2310.03722). The interval contains every mean that is not rejected. It covers other seeds on the same items, for
approximately normal differences; a rare plateau in only one arm breaks it, like every other interval of a mean.

Several arms share a baseline, so each has confidence 1 - 0.05 / arms: with probability 0.95 all true means are in all
of their intervals at once. A study whose seeds were added by this rule shows these intervals, for every quantity.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from decondense.compare.statistics import CONFIDENCE, Difference, Interval

G = 16.0
"""Variance of the prior on the standardised effect. It must exceed 6.4 for a finite interval of three seeds."""
FEWEST_SEEDS = 3


def log_bayes_factor(
    differences: Sequence[float] | npt.NDArray[np.float64], *, null: float = 0.0, g: float = G
) -> float:
    """The logarithm of B against a mean of ``null``; its reciprocal is a p-value that is valid at every look.

    Raises:
        ValueError: fewer than two differences, or differences that do not vary.
    """
    d = np.asarray(differences, float) - null
    n = len(d)
    if n < 2 or d.std() == 0:
        raise ValueError(f"a sequence needs two or more differences that vary, got {d.tolist()}.")
    ratio = n * float(d.mean()) ** 2 / float(d.var(ddof=1)) / (n - 1)  # t^2 / nu
    return -0.5 * math.log1p(n * g) + n / 2 * (math.log1p(ratio) - math.log1p(ratio / (1 + n * g)))


def confidence_sequence(
    differences: Sequence[float] | npt.NDArray[np.float64], *, confidence: float = CONFIDENCE, g: float = G
) -> Interval:
    """The interval after these differences; with probability ``confidence`` the true mean is in all of them at once.

    Args:
        differences: arm - baseline, one value per seed, in the order in which the seeds were run.
        confidence: simultaneous coverage.
        g: variance of the prior on the standardised effect.

    Returns:
        Infinite bounds while no finite mean can be rejected: below three differences, or with a small g.

    Raises:
        ValueError: differences that do not vary.
    """
    d = np.asarray(differences, float)
    n = len(d)
    if n >= FEWEST_SEEDS and d.std() == 0:
        raise ValueError(f"the differences do not vary ({d[0]:g} in all {n} seeds), so no interval can be computed.")
    factor = multiplier(n, confidence, g)
    if not math.isfinite(factor):
        return -math.inf, math.inf
    half = factor * math.sqrt(float(d.var(ddof=1)) / n)
    return float(d.mean()) - half, float(d.mean()) + half


def multiplier(n: int, confidence: float = CONFIDENCE, g: float = G) -> float:
    """Half-width of the interval after n differences, in standard errors, like Student's t for a fixed number."""
    if n < FEWEST_SEEDS:
        return math.inf
    # B = 1 / alpha solved for x = t^2 / nu: (1 + x) / (1 + x / k) = root, k = 1 + n g
    k = 1 + n * g
    root = math.exp(2 / n * (0.5 * math.log(k) - math.log1p(-confidence)))
    return math.inf if root >= k else math.sqrt((n - 1) * (root - 1) / (1 - root / k))


def decided(
    differences: Sequence[float] | npt.NDArray[np.float64],
    *,
    margin: float,
    alpha: float = 1 - CONFIDENCE,
    g: float = G,
) -> Literal["lower", "higher", "equivalent"] | None:
    """Whether seeds may stop: the sequence excludes 0, or lies within the margin.

    For several arms, pass ``alpha`` divided by their number. None: not decided yet.
    """
    if len(differences) < FEWEST_SEEDS or np.std(differences) == 0:
        return None
    low, high = confidence_sequence(differences, confidence=1 - alpha, g=g)
    if low > 0 or high < 0:
        return "higher" if low > 0 else "lower"
    return "equivalent" if -margin < low and high < margin else None


def anytime(d: Difference, arms: int = 1) -> Difference:
    """The difference with the interval and p that are valid at every look and for ``arms`` contrasts at once.

    The wider of the sequence and the interval over seeds and items is shown. The sign-flip test and the power are those
    of a fixed number of seeds and are left out; p is the reciprocal of the Bayes factor, times ``arms`` (Bonferroni).
    """
    if d.p is None:
        return d
    level = 1 - (1 - CONFIDENCE) / arms
    low, high = confidence_sequence(d.differences, confidence=level)
    p = min(1.0, math.exp(-log_bayes_factor(d.differences)))
    finite = math.isfinite(high - low)
    both = d.interval_over_seeds_and_items
    by_items = both is not None and finite and both[1] - both[0] > high - low
    if by_items:
        p = max(p, d.p)
    reason = f"over {d.n} seeds, at every number of seeds at once ({100 * level:.4g} % each, over {arms} arms)"
    return dataclasses.replace(
        d,
        interval=both if by_items else (low, high) if finite else None,
        interval_kind="over seeds and items" if by_items else "over seeds, at every look",
        interval_reason=d.interval_reason if by_items else f"{reason}, on these items" if d.items else reason,
        p=p,
        p_holm=min(1.0, arms * p),
        p_sign_flip=None,
        p_sign_flip_holm=None,
        p_sign_flip_smallest=None,
        detectable=None,
        seeds_needed=None,
    )


def open_arms(differences: Sequence[Difference], arms: int) -> tuple[str, ...]:
    """The arms whose contrast with the baseline more seeds may decide.

    Arms whose differences are equal in every seed are left out: more seeds are not expected to change that.

    Args:
        differences: of the held-out loss, with a margin.
        arms: number of arms beside the baseline, over which alpha is divided.
    """
    alpha = (1 - CONFIDENCE) / arms
    return tuple(
        d.arm
        for d in differences
        if (d.n < FEWEST_SEEDS or d.p is not None)
        and d.margin is not None
        and decided(d.differences, margin=d.margin, alpha=alpha) is None
    )


def seeds_to_decide(mean: float, sd: float, *, margin: float, arms: int = 1, most: int = 10_000) -> int | None:
    """The number of seeds at which the sequence decides if mean and standard deviation stay the same.

    None: not within ``most`` seeds.
    """
    shape = np.array([-1.0, 1.0])
    for n in itertools.takewhile(lambda n: n <= most, itertools.count(FEWEST_SEEDS)):
        values = np.resize(shape, n)
        values = mean + sd * (values - values.mean()) / values.std(ddof=1)
        if decided(values, margin=margin, alpha=(1 - CONFIDENCE) / arms) is not None:
            return n
    return None
