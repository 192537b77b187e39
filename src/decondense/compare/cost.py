"""Time and memory, and the tokens to the loss with which the baseline ended."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from decondense.compare.context import Context
from decondense.compare.results import Cost, Speed
from decondense.compare.study import VALIDATION, Cell

Array = npt.NDArray[np.float64]
_WIDEST_BRACKET = 0.6


def speeds(context: Context) -> tuple[Speed, ...]:
    """Tokens and time that each trained arm needed to reach its baseline's final validation loss."""
    found = []
    for arm in context.arms:
        seeds = [
            seed
            for seed in context.pairs[arm]
            if arm != context.base
            and context.cells[context.base, seed].final_score(VALIDATION) is not None
            # what was not trained reads no tokens, and there is nothing to reach it with
            and not (context.cells[arm, seed].untrained or context.cells[context.base, seed].untrained)
        ]
        if not seeds:
            continue
        targets, tokens, brackets, token_ratios, time_ratios = [], [], [], [], []
        for seed in seeds:
            cell, rival = context.cells[arm, seed], context.cells[context.base, seed]
            target = rival.final_score(VALIDATION)
            assert target is not None
            total = float(rival.curve()[0][-1])
            at, bracket = tokens_to_reach(*cell.curve(), target)
            # a start that already has the loss needs no tokens at all
            ratio = None if at is None else total / at if at else math.inf
            pace, rival_pace = cell.timing("step_wall_ms"), rival.timing("step_wall_ms")
            targets.append(target)
            tokens.append(at)
            brackets.append(bracket)
            token_ratios.append(ratio)
            time_ratios.append(ratio * rival_pace / pace if ratio and pace and rival_pace else None)
        in_tokens = [ratio for ratio in token_ratios if ratio is not None]
        in_time = [ratio for ratio in time_ratios if ratio is not None]
        total = float(context.cells[context.base, seeds[0]].curve()[0][-1])
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


def costs(context: Context) -> tuple[Cost, ...]:
    """Time and memory of every arm, and their ratios to the baseline's."""
    found = []
    for arm in context.arms:
        cells = [context.cells[arm, seed] for seed in context.seeds if (arm, seed) in context.cells]
        untrained = context.untrained(arm)

        def of(what: str, cells: list[Cell] = cells) -> tuple[float | None, ...]:
            # the memory of an evaluation is not that of a training
            return tuple(None if cell.untrained else cell.timing(what) for cell in cells)

        def ratio(what: str, arm: str = arm) -> tuple[float, float, float] | None:
            ratios = []
            for seed in context.pairs[arm]:
                cell, rival = context.cells[arm, seed], context.cells[context.base, seed]
                mine, theirs = cell.timing(what), rival.timing(what)
                if mine and theirs and not cell.untrained and not rival.untrained:
                    ratios.append(mine / theirs)
            return (float(np.median(ratios)), min(ratios), max(ratios)) if ratios else None

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
                wall_ratio=None if arm == context.base else ratio("step_wall_ms"),
                cpu_ratio=None if arm == context.base else ratio("step_cpu_ms"),
                cuda_ratio=None if arm == context.base else ratio("peak_cuda_bytes"),
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
