r"""Mediation: what share of an arm's gain is associated with the cosine.

For seed s let :math:`y_s` be the paired difference arm - baseline of the final held-out loss, and :math:`x_s` that of
the mean cosine over the blocks at a point of training. With the line :math:`y_s = c + b x_s + e_s` through the seeds
the gain splits exactly, :math:`\bar y = c + b \bar x`: b times the difference in cosine that the treatment
causes, and c, which remains if it causes none (two-condition mediation: Judd, Kenny, McClelland 2001). The share is
:math:`\theta = b \bar x / \bar y`.

**Interval.** Given x, :math:`b \bar x` and :math:`\bar y` are independent, so Fieller's theorem is exact:
:math:`b\bar x - \theta \bar y` is normal around 0 at the true share. Other seeds have other cosines too, which adds the
last term:

.. math:: (b\bar x - \theta\bar y)^2 \le t^2 \Big[\hat\sigma^2\Big(\frac{\bar x^2}{S_{xx}} + \frac{\theta^2}{n}\Big)
          + (1 - \theta)^2 \frac{b^2 s_x^2}{n}\Big],

a quadratic in :math:`\theta`, with n - 2 degrees of freedom. It is bounded exactly if the gain is significantly
different from 0; otherwise there is no share. If seeds were added until a study was decided, t is the multiplier of
the confidence sequence (:mod:`decondense.compare.sequential`).

**Interpretation.** The slope comes from differences between seeds of one arm. It does not prove a cause: whatever
lowers both the cosine and the loss of a seed is attributed to the cosine, a slope that changes between 0 and
:math:`\bar x` is missed, and noise in the cosine makes the share too small. A control that changes the cosine but not
the loss, or the loss but not the cosine, is stronger evidence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import special

from decondense.compare import profiles
from decondense.compare.context import Context
from decondense.compare.results import Mediation, Undefined
from decondense.compare.sequential import multiplier
from decondense.compare.statistics import CONFIDENCE
from decondense.compare.study import VALIDATION, Cell

POINTS = (0.1, 0.5, 1.0)
"""Fractions of training at which the cosine is taken."""
FEWEST_SEEDS = 5
"""A line through fewer seeds has less than three degrees of freedom."""


def share_explained(
    cosines: Sequence[float],
    losses: Sequence[float],
    *,
    arm: str = "arm",
    at: float = 1.0,
    seeds: Sequence[int] | None = None,
    arms: int | None = None,
) -> Mediation:
    """The share of a gain that is associated with the cosine, from paired differences, one of each per seed.

    Args:
        cosines: differences of the mean cosine.
        losses: differences of the held-out loss.
        arm: id of the arm.
        at: point of training of the cosines.
        seeds: names of the pairs (default 0, 1, ...).
        arms: the number of arms of a study whose seeds were added until it was decided; None: planned seeds.

    Raises:
        ValueError: no values, or not the same number of both.
    """
    x, y = np.asarray(cosines, float), np.asarray(losses, float)
    n = len(x)
    if not n or len(y) != n:
        raise ValueError(f"{n} cosines and {len(y)} losses do not pair; give one of each per seed.")
    pairs = tuple(range(n) if seeds is None else seeds)
    mean_x, mean_y = float(x.mean()), float(y.mean())

    def undefined(why: Undefined, slope: float | None = None, correlation: float | None = None) -> Mediation:
        return Mediation(arm, at, pairs, mean_x, mean_y, slope, correlation, undefined=why)

    if n < FEWEST_SEEDS:
        return undefined("few seeds")
    spread, product = float(((x - mean_x) ** 2).sum()), float((x - mean_x) @ (y - mean_y))
    if spread <= 1e-24 * max(1.0, float(np.abs(x).max()) ** 2):
        return undefined("equal cosines")
    slope = product / spread
    total = float(((y - mean_y) ** 2).sum())
    residual = max(0.0, total - slope * product)
    correlation = product / math.sqrt(spread * total) if total else None
    if residual <= 1e-24 * max(1.0, float(np.abs(y).max()) ** 2):
        return undefined("on a line", slope, correlation)
    if arms is None:
        t_y, t = (float(special.stdtrit(df, 0.5 + CONFIDENCE / 2)) for df in (n - 1, n - 2))
    else:
        t_y, t = (multiplier(count, 1 - (1 - CONFIDENCE) / arms) for count in (n, n - 1))
    noise, moved = residual / (n - 2), slope**2 * spread / (n - 1) / n
    square = mean_y**2 - t**2 * (noise / n + moved)
    # by Student's interval of the gain too, so that no table has a share of a gain that another one does not see
    if not math.isfinite(t) or square <= 0 or mean_y**2 <= t_y**2 * total / (n - 1) / n:
        return undefined("no gain", slope, correlation)
    by_cosine = slope * mean_x
    middle = (by_cosine * mean_y - t**2 * moved) / square
    constant = by_cosine**2 - t**2 * (noise * mean_x**2 / spread + moved)
    half = math.sqrt(max(0.0, middle**2 - constant / square))
    bounds = (middle - half, middle + half)
    return Mediation(arm, at, pairs, mean_x, mean_y, slope, correlation, by_cosine / mean_y, bounds)


def mediations(context: Context) -> tuple[Mediation, ...]:
    """Every trained arm at every point; empty if no arm has enough seeds."""
    if all(len(context.pairs.get(arm, ())) < FEWEST_SEEDS for arm in context.arms if arm != context.base):
        return ()
    found = []
    arms = None if context.study.until is None else len(context.study.arms) - 1
    for arm in context.arms:
        if arm == context.base or context.study.measured or context.untrained(arm):
            continue
        for at in POINTS:
            known: dict[int, tuple[float, float]] = {}
            for seed in context.pairs[arm]:
                values = [_values(context.cells[name, seed], at) for name in (arm, context.base)]
                if values[0] is not None and values[1] is not None:
                    (own, loss), (theirs, base) = values[0], values[1]
                    known[seed] = (own - theirs, loss - base)
            if known:
                x, y = zip(*known.values(), strict=True)
                found.append(share_explained(x, y, arm=arm, at=at, seeds=tuple(known), arms=arms))
    return tuple(found) if any(entry.undefined != "few seeds" for entry in found) else ()


def _values(cell: Cell, at: float) -> tuple[float, float] | None:
    """Mean cosine at a fraction of training, linear between the evaluated checkpoints, and the final loss."""
    loss, last = cell.final_score(VALIDATION), cell.final_step
    curve = [
        (step, value)
        for step, profile in sorted(cell.profiles.items())
        if (value := profiles.blocks(profile)) is not None
    ]
    if loss is None or not last or not curve or not curve[0][0] <= at * last <= curve[-1][0]:
        return None
    steps, cosines = zip(*curve, strict=True)
    return float(np.interp(at * last, steps, cosines)), loss
