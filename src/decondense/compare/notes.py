"""What qualifies a comparison, in words."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from decondense.compare.context import Context
from decondense.compare.rates import learning_rates, sweeps
from decondense.compare.results import TaskMeasure


def notes(context: Context) -> list[str]:
    """What qualifies the comparison as a whole."""
    found = []
    for (arm, seed), cell in context.cells.items():
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
    found += start_notes(context)
    found += rate_notes(context)
    labels = {tuple(p["layers"]) for cell in context.cells.values() if (p := cell.final_profile())}
    if len(labels) > 1:
        found.append("The arms have different layers; the table by layer holds only the most frequent set.")
    return found


def start_notes(context: Context) -> list[str]:
    """What is no pair from the same start, in words."""
    if context.study.measured:
        return [
            "Nothing was trained: the arms are different models, measured as they are; a seed is one choice of "
            "passages, so that the differences pair models by passages, and their intervals say how much other "
            "passages would change them, not how much other trainings would."
        ]
    found = []
    others = context.other_starts()
    if others:
        verb = "starts" if len(others) == 1 else "start"
        pronoun = "it is" if len(others) == 1 else "they are"
        found.append(
            f"{context.named(others)} {verb} from other weights than the baseline by design; {pronoun} paired with it "
            "by data order only, so that what the seed's start adds to a difference does not cancel."
        )
    idle = [arm for arm in context.arms if context.untrained(arm)]
    if idle:
        verb = "is" if len(idle) == 1 else "are"
        found.append(f"{context.named(idle)} {verb} untrained: the start as it is, which reads no data.")
    return found


def rate_notes(context: Context) -> list[str]:
    """How the learning rates came about, and what is doubtful about them."""
    rates, tried = learning_rates(context), {sweep.arm: sweep for sweep in sweeps(context)}
    swept = context.study.config is not None and context.study.config.sweep is not None
    found = []
    for arm, several in rates.items():
        if len(several) > 1:
            listed = ", ".join(f"{rate:g}" for rate in several)
            found.append(f"The seeds of {context.study.labels[arm]} have different learning rates: {listed}.")
    if not tried and not swept:
        different = {rate for several in rates.values() for rate in several}
        if len(rates) > 1 and len(different) == 1:
            found.append(
                f"Every arm was trained at the same learning rate, {different.pop():g}; another rate may be better "
                "for some of them."
            )
        elif len(rates) > 1:
            listed = ", ".join(
                f"{context.study.labels[arm]} {' and '.join(f'{rate:g}' for rate in several)}"
                for arm, several in rates.items()
            )
            found.append(f"The arms have different learning rates without a sweep: {listed}.")
        return found
    if not tried:
        found.append("The study chooses learning rates by a sweep, but the rows hold none of its trials.")
    fixed = [arm for arm in rates if arm not in tried]
    if tried and fixed:
        listed = ", ".join(f"{context.study.labels[arm]} {rates[arm][0]:g}" for arm in fixed)
        found.append(f"Learning rates that no sweep chose: {listed}.")
    for arm, sweep in tried.items():
        name, chosen = context.study.labels[arm], sweep.chosen
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
