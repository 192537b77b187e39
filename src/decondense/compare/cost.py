"""Time and memory, the difference at equal time, and the tokens and the time to a loss that both arms reach.

Time is measured by a run's median step, without evaluation; the arm's pace is the median over seeds of its ratio to the
baseline. It is wall time if a GPU was used, and otherwise CPU time, which other work disturbs less.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from decondense.compare.context import Context
from decondense.compare.quantity import LOSS_UNIT, VALIDATION_ID
from decondense.compare.results import Clock, Cost, EqualTime, Speed
from decondense.compare.statistics import Difference, paired_difference
from decondense.compare.study import VALIDATION, Cell

Array = npt.NDArray[np.float64]
_WIDEST_BRACKET = 0.6
_ONE_VALUE = "items are scored at the final checkpoint alone"


def clock_of(context: Context) -> Clock:
    """The clock by which times are compared."""
    on_gpu = any(cell.timing("peak_cuda_bytes") for cell in context.cells.values())
    timed = any(cell.timing("step_cpu_ms") for cell in context.cells.values())
    return "wall" if on_gpu or not timed else "cpu"


def paces(context: Context) -> dict[str, float]:
    """Median over seeds of each arm's step time over the baseline's, by :func:`clock_of`."""
    clock = clock_of(context)  # it looks at every run
    found = {arm: _ratio(context, arm, f"step_{clock}_ms") for arm in context.arms if arm != context.base}
    return {arm: ratio[0] for arm, ratio in found.items() if ratio is not None}


def _ratio(context: Context, arm: str, what: str) -> tuple[float, float, float] | None:
    """Median, least and greatest over seeds of the arm's timing over the baseline's."""
    ratios = []
    for seed in context.pairs[arm]:
        cell, rival = context.cells[arm, seed], context.cells[context.base, seed]
        mine, theirs = cell.timing(what), rival.timing(what)
        if mine and theirs and not cell.untrained and not rival.untrained:
            ratios.append(mine / theirs)
    return (float(np.median(ratios)), min(ratios), max(ratios)) if ratios else None


def _pairs(context: Context, arm: str) -> list[tuple[int, Cell, Cell]]:
    """Seed, baseline and arm where both were trained and have a final held-out loss."""
    found = []
    for seed in context.pairs[arm] if arm != context.base else ():
        base, own = context.cells[context.base, seed], context.cells[arm, seed]
        if all(not cell.untrained and cell.final_score(VALIDATION) is not None for cell in (base, own)):
            found.append((seed, base, own))
    return found


def loss_at(cell: Cell, share: float) -> float | None:
    """Held-out loss after ``share`` of the run's tokens, linear in their logarithm between evaluated checkpoints.

    A loss that falls ever more slowly lies below such a chord, so the loss of a run that is cut short is overestimated,
    not underestimated; a chord over the tokens themselves is less accurate, and a cubic may err on either side. None if
    the checkpoints around it lie more than 60 % of training apart.
    """
    tokens, loss = cell.curve()
    if share >= 1:
        return float(loss[-1])
    at = share * float(tokens[-1])
    right = int(np.searchsorted(tokens, at))
    if right == 0 or tokens[right] - tokens[right - 1] > _WIDEST_BRACKET * tokens[-1]:
        return None
    left, scale = right - 1, (np.log if tokens[right - 1] > 0 else np.asarray)
    return float(np.interp(scale(at), scale(tokens[left : right + 1]), loss[left : right + 1]))


def equal_time(context: Context) -> EqualTime | None:
    """Held-out loss of each trained arm at the baseline's total training time, less the baseline's final loss.

    A faster arm has no rows beyond its own end: it is compared there, with the baseline at that time.
    """
    pace, differences = paces(context), []
    for arm in context.arms:
        pairs = _pairs(context, arm)
        if not pairs or arm not in pace:
            continue
        base = [loss_at(cell, pace[arm]) for _, cell, _ in pairs]
        own = [loss_at(cell, 1 / pace[arm]) for _, _, cell in pairs]
        if None in base or None in own:
            continue
        differences.append(
            paired_difference(
                [value for value in base if value is not None],
                [value for value in own if value is not None],
                quantity=f"{VALIDATION_ID}.equal_time",
                unit=LOSS_UNIT,
                arm=arm,
                baseline=context.base,
                seeds=[seed for seed, _, _ in pairs],
                higher_is_better=False,
                no_items=_ONE_VALUE,
                margin=context.margin,
            )
        )
    return EqualTime(clock_of(context), pace, tuple(context.over_arms(differences))) if differences else None


def speeds(context: Context) -> tuple[Speed, ...]:
    r"""Tokens and time of each trained arm until the loss that it and its baseline of the same seed both reach.

    The target of a seed is the higher of the two final losses, so one of the two needs the whole training and the
    other at most that. Exchanging the arms changes the sign of log(tokens of the arm / tokens of the baseline): under
    the null it is symmetric about 0 and its Student interval has no bias, while the time to the *baseline's* final loss
    is known only where the arm does better.
    """
    pace, clock, found = paces(context), clock_of(context), []
    for arm in context.arms:
        pairs = _pairs(context, arm)
        if not pairs:
            continue
        targets: list[float] = []
        base_tokens: list[float] = []
        own_tokens: list[float] = []
        resolved, reached = True, 0
        for _, base, own in pairs:
            finals = [cell.final_score(VALIDATION) or 0.0 for cell in (base, own)]
            targets.append(max(finals))
            reached += finals[1] <= finals[0]
            for cell, into in ((base, base_tokens), (own, own_tokens)):
                at, bracket = tokens_to_reach(*cell.curve(), targets[-1])
                assert at is not None
                assert bracket is not None
                into.append(at)
                wide = bracket[1] - bracket[0] > _WIDEST_BRACKET * float(cell.curve()[0][-1])
                resolved &= not (wide and at < bracket[1])
        known = resolved and min(*base_tokens, *own_tokens) > 0  # a start that has the loss needs no tokens at all
        in_tokens = in_time = None
        if known:
            in_tokens = _log_difference(context, arm, [seed for seed, _, _ in pairs], base_tokens, own_tokens, "tokens")
            if arm in pace:
                slower = [pace[arm] * at for at in own_tokens]
                in_time = _log_difference(context, arm, [seed for seed, _, _ in pairs], base_tokens, slower, "time")
        found.append(
            Speed(
                arm=arm,
                n=len(pairs),
                reached=reached,
                seeds=tuple(seed for seed, _, _ in pairs),
                targets=tuple(targets),
                baseline_tokens=tuple(base_tokens),
                tokens=tuple(own_tokens),
                resolved=resolved,
                clock=clock,
                in_tokens=in_tokens,
                in_time=in_time,
            )
        )
    by_tokens = _corrected(context, [speed.in_tokens for speed in found])
    by_time = _corrected(context, [speed.in_time for speed in found])
    return tuple(
        dataclasses.replace(speed, in_tokens=by_tokens.get(speed.arm), in_time=by_time.get(speed.arm))
        for speed in found
    )


def _log_difference(
    context: Context, arm: str, seeds: Sequence[int], base: Sequence[float], own: Sequence[float], what: str
) -> Difference:
    return paired_difference(
        [math.log(value) for value in base],
        [math.log(value) for value in own],
        quantity=f"same_loss.{what}",
        unit="log",
        arm=arm,
        baseline=context.base,
        seeds=seeds,
        higher_is_better=False,
        no_items=_ONE_VALUE,
    )


def _corrected(context: Context, differences: Sequence[Difference | None]) -> dict[str, Difference]:
    return {d.arm: d for d in context.over_arms([d for d in differences if d is not None])}


def costs(context: Context) -> tuple[Cost, ...]:
    """Time and memory of every arm, and their ratios to the baseline's."""
    found = []
    for arm in context.arms:
        cells = [context.cells[arm, seed] for seed in context.seeds if (arm, seed) in context.cells]
        untrained = context.untrained(arm)

        def of(what: str, cells: list[Cell] = cells) -> tuple[float | None, ...]:
            # the memory of an evaluation is not that of a training
            return tuple(None if cell.untrained else cell.timing(what) for cell in cells)

        found.append(
            Cost(
                arm=arm,
                n=len(context.pairs[arm]),
                seeds=tuple(cell.seed for cell in cells),
                step_wall_ms=of("step_wall_ms"),
                step_cpu_ms=of("step_cpu_ms"),
                train_wall_s=of("train_wall_s"),
                peak_rss_bytes=of("peak_rss_bytes"),
                peak_cuda_bytes=of("peak_cuda_bytes"),
                wall_ratio=None if arm == context.base else _ratio(context, arm, "step_wall_ms"),
                cpu_ratio=None if arm == context.base else _ratio(context, arm, "step_cpu_ms"),
                cuda_ratio=None if arm == context.base else _ratio(context, arm, "peak_cuda_bytes"),
                resumed=sum(cell.resumed > 0 for cell in cells),
                untrained=untrained,
            )
        )
    return tuple(found)


def tokens_to_reach(
    tokens: Sequence[float] | Array, values: Sequence[float] | Array, target: float
) -> tuple[float | None, tuple[float, float] | None]:
    """Tokens at which a loss curve first is at or below ``target``, and the two points between which that happens.

    Linear between the points: a loss that falls steeply first and slowly later is reached earlier than that, so the
    number is too high rather than too low. ``(None, None)``: not reached.
    """
    for number, value in enumerate(values):
        if value <= target:
            if number == 0:
                return float(tokens[0]), (float(tokens[0]), float(tokens[0]))
            left, right = float(tokens[number - 1]), float(tokens[number])
            before = float(values[number - 1])
            return left + (right - left) * (before - target) / (before - float(value)), (left, right)
    return None, None
