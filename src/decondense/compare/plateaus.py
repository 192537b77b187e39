"""The condensed plateau: how much of its training a run spends above a mean cosine of 0.9, and when it escapes.

While a model is on the plateau, its held-out loss hardly falls, and seeds leave it at different times. A difference
measured then reflects the time of escape. No interval of a mean covers a plateau that is rare and in only one arm.
"""

from __future__ import annotations

import itertools

from decondense.compare import profiles
from decondense.compare.context import Context
from decondense.compare.results import Plateau

THRESHOLD = 0.9
"""Mean cosine over the blocks above which a state counts as condensed."""


def plateaus(context: Context) -> tuple[Plateau, ...]:
    """Every trained run of the comparison that has profiles of two steps at least."""
    found = []
    for arm in context.arms:
        for seed in context.seeds:
            cell = context.cells.get((arm, seed))
            if cell is None or cell.untrained:
                continue
            curve = [
                (float(step), value)
                for step, profile in sorted(cell.profiles.items())
                if (value := profiles.blocks(profile)) is not None
            ]
            if len(curve) > 1:
                found.append(_plateau(arm, seed, curve))
    return tuple(found)


def _plateau(arm: str, seed: int, curve: list[tuple[float, float]]) -> Plateau:
    """From (step, mean cosine), linear between the evaluated checkpoints."""
    above = 0.0
    escape: float | None = None
    between: tuple[float, float] | None = None
    for (left, before), (right, after) in itertools.pairwise(curve):
        if before > THRESHOLD and after > THRESHOLD:
            above += right - left
        elif before > THRESHOLD:
            escape = left + (right - left) * (before - THRESHOLD) / (before - after)
            between = (left, right)
            above += escape - left
        elif after > THRESHOLD:
            above += (right - left) * (after - THRESHOLD) / (after - before)
            escape = between = None  # back above: what counts is the last escape
    stuck = curve[-1][1] > THRESHOLD
    share = above / (curve[-1][0] - curve[0][0])
    return Plateau(arm, seed, share, None if stuck else escape, None if stuck else between, stuck)
