"""What qualifies a comparison, as ids; :mod:`decondense.report.notes` has their texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from decondense.compare.context import Context
from decondense.compare.quantity import task_quantity
from decondense.compare.rates import learning_rates, sweeps
from decondense.compare.results import Note, Plateau, TaskMeasure
from decondense.compare.sequential import open_arms
from decondense.compare.study import VALIDATION

FEWEST_DOCUMENTS = 30
"""Fewer held-out documents (Kish's effective number) say little about other text."""
WIDEST_SPREADS = 5.0
"""Standard deviations over seeds of two arms that differ more than that are not of one kind of run."""
FEWEST_FOR_SPREADS = 3


def notes(context: Context) -> list[Note]:
    """What qualifies the comparison as a whole."""
    found = []
    for (arm, seed), cell in context.cells.items():
        for key in cell.scores:
            items = cell.final_items(key)
            score = cell.final_score(key)
            if not items.names or score is None:
                continue
            weight = items.weight_I.sum()
            mean = float(items.value_I @ items.weight_I / weight) if weight else score
            if not math.isclose(mean, score, rel_tol=1e-6, abs_tol=1e-9):
                facts = {"seed": seed, "task": key[0], "metric": key[1], "score": score, "mean": mean}
                found.append(Note("not the mean of items", (arm,), facts))
    found += start_notes(context)
    found += seed_notes(context)
    found += setting_notes(context)
    labels = {tuple(p["layers"]) for cell in context.cells.values() if (p := cell.final_profile())}
    if len(labels) > 1:
        found.append(Note("different layers"))
    return found


def start_notes(context: Context) -> list[Note]:
    """What is no pair from the same start."""
    if context.study.measured:
        return [Note("measured")]
    others = tuple(context.other_starts())
    idle = tuple(arm for arm in context.arms if context.untrained(arm))
    found = [Note("other start", others)] if others else []
    return [*found, Note("untrained", idle)] if idle else found


def seed_notes(context: Context) -> list[Note]:
    """How many seeds were added until the contrasts were decided, and which contrasts are not."""
    config = context.study.config
    if config is None or config.until is None:
        return []
    arms = len(context.study.arms) - 1
    facts = {"seeds": len(config.every_seed), "added": len(config.added_seeds), "margin": context.margin}
    found = [Note("seeds added", (), facts)]
    held_out = context.measure(task_quantity(VALIDATION, higher_is_better=False))
    left = open_arms(held_out.differences, arms)
    return [*found, Note("not decided", left, {"most": config.most_seeds})] if left else found


def setting_notes(context: Context) -> list[Note]:
    """How learning rates, warm-ups and clippings came about, and what is doubtful about them."""
    rates, tried = learning_rates(context), {sweep.arm: sweep for sweep in sweeps(context)}
    config = context.study.config
    sweep_config = config.sweep if config is not None else None
    found = [Note("rates by seed", (arm,), {"rates": several}) for arm, several in rates.items() if len(several) > 1]
    found += not_swept(context, rates)
    if not tried and sweep_config is None:
        if len({rate for several in rates.values() for rate in several}) > 1:
            found.append(Note("rates without a sweep", tuple(rates), {"rates": rates}))
        return found
    if not tried:
        found.append(Note("no trials"))
    if config is not None and sweep_config is not None and sweep_config.warmup_unit == "fraction":
        trial, run = sweep_config.steps or config.train.steps, config.train.steps
        if trial < run and (warmup := config.train.warmup):
            warmed = {"trial": round(warmup * trial), "run": round(warmup * run)}
            found.append(Note("scaled-down trials", tuple(tried), warmed))
    fixed = {arm: several for arm, several in rates.items() if arm not in tried}
    if tried and fixed:
        found.append(Note("rates that no sweep chose", tuple(fixed), {"rates": fixed}))
    for arm, sweep in tried.items():
        chosen = sweep.chosen
        finished = [trial for trial in sweep.trials if trial.value is not None]
        if chosen is None:
            found.append(Note("no choice" if finished else "no trial finished", (arm,)))
            continue
        for knob, side in sweep.edges.items():
            facts = {"knob": knob, "value": getattr(chosen, knob), "side": side}
            found.append(Note("edge of the grid", (arm,), facts))
        best = min(finished, key=lambda trial: trial.value or 0.0, default=None)
        if best is not None and (chosen.value is None or (best.value or 0.0) < chosen.value):
            facts = {"chosen": chosen.learning_rate, "best": best.learning_rate}
            found.append(Note("not the least loss", (arm,), facts))
        if arm in rates and rates[arm] != (chosen.learning_rate,):
            found.append(Note("not as chosen", (arm,), {"rates": rates[arm], "chosen": chosen.learning_rate}))
    return found


def not_swept(context: Context, rates: dict[str, tuple[float, ...]]) -> list[Note]:
    """The settings that move a baseline and were tried for no arm: a longer warm-up alone may take a lead away."""
    config = context.study.config
    if config is None or not rates or not any(arm != context.base for arm in rates):
        return []
    knobs: dict[str, Any] = {}
    if config.sweep is None or len(config.sweep.learning_rates) < 2:
        knobs["learning_rate"] = config.train.learning_rate
        common = {rate for several in rates.values() for rate in several}
        if len(common) == 1:
            knobs["learning_rate"] = common.pop()
    if config.sweep is None or len(config.sweep.warmups) < 2:
        knobs["warmup"] = config.train.warmup
    return [Note("not swept", tuple(rates), {"knobs": knobs})] if knobs else []


def evidence_notes(context: Context, tasks: Sequence[TaskMeasure], plateaus: Sequence[Plateau]) -> list[Note]:
    """What weakens the intervals: plateaus in some arms only, spreads that differ between arms, few documents."""
    found = []
    stuck = tuple(arm for arm in context.arms if any(p.share > 0 for p in plateaus if p.arm == arm))
    free = tuple(arm for arm in dict.fromkeys(p.arm for p in plateaus) if arm not in stuck)
    if stuck and free:
        found.append(Note("plateaus in some arms", stuck, {"without": free}))
    coins = {task.task: task.decision_accuracy for task in tasks if task.hardly_decides}
    if coins:
        found.append(Note("hardly decides", (), {"tasks": coins}))
    held_out = next((task for task in tasks if (task.task, task.metric) == VALIDATION), None)
    base = held_out.of(context.base) if held_out is not None else None
    if held_out is None or base is None:
        return found
    for d in held_out.differences:
        values = held_out.of(d.arm)
        if values is None or d.n < FEWEST_FOR_SPREADS or not base.sd or not values.sd:
            continue
        ratio = values.sd / base.sd
        if max(ratio, 1 / ratio) > WIDEST_SPREADS:
            found.append(Note("spreads differ", (d.arm,), {"arm_sd": values.sd, "baseline_sd": base.sd}))
    effective = [d.effective_items for d in held_out.differences if d.effective_items is not None]
    if effective and min(effective) < FEWEST_DOCUMENTS:
        found.append(Note("few documents", (), {"effective": min(effective), "items": held_out.items}))
    return found


def task_notes(context: Context) -> list[str]:
    """What the evaluation says about its scores (limits, data that are not the official ones), with the tasks."""
    found: dict[str, dict[str, None]] = {}
    for cell in context.cells.values():
        for (task, _), curve in cell.scores.items():
            row = curve.get(-1 if cell.final_step is None else cell.final_step, {})
            for note in row.get("notes", ()):
                found.setdefault(note, {})[task] = None
    return [f"{', '.join(tasks)}: {note}" for note, tasks in found.items()]


def item_notes(tasks: Sequence[TaskMeasure]) -> list[str]:
    """Which benchmarks were scored on another number of items than they officially have."""
    odd = {task.task: f"{task.task} {task.deviation}" for task in tasks if task.deviation}
    return [f"not scored on the official number of items: {', '.join(odd.values())}"] if odd else []
