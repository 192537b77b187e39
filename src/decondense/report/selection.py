"""Which measures and arms a report shows, and what qualifies their names and captions."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable
from typing import Any, TypeVar

from decondense.compare import Comparison, Measure, TaskMeasure
from decondense.compare.quantity import METRIC_TITLES

T = TypeVar("T")

MANY = 3
"""With more arms than that beside the baseline, sentences group them, and tables have a row instead of columns for
each."""
MOST_SHOWN = 13
"""With more arms, figures and the terminal show the extremes: colours tell no more than 13 apart."""


def _ranked(comparison: Comparison) -> Measure | None:
    """The first main measure that compares the arms: the held-out loss where there is one."""
    return next((measure for measure in main_measures(comparison) if measure.differences), None)


def shown_arms(comparison: Comparison, most: int = MOST_SHOWN) -> tuple[str, ...]:
    """All arms, or where they are more than ``most``, the baseline and the lowest and highest differences."""
    measure = _ranked(comparison)
    if len(comparison.arms) <= most or measure is None:
        return comparison.arms[:most]
    ordered = [d.arm for d in sorted(measure.differences, key=lambda d: d.mean)]
    kept = {comparison.baseline, *ordered[: most // 2], *ordered[most // 2 - most + 1 :]}
    return tuple(arm for arm in comparison.arms if arm in kept)


def shown_in_words(comparison: Comparison, most: int = MOST_SHOWN) -> str:
    """What :func:`shown_arms` omits, as a sentence; empty: nothing."""
    if len(comparison.arms) <= most:
        return ""
    measure, low = _ranked(comparison), most // 2
    if measure is None:
        return f"Shown: the first {most} of {len(comparison.arms)} arms."
    return (
        f"Shown of {len(comparison.treated)} arms: the {low} with the lowest and the {most - 1 - low} with the highest "
        f"difference in {measure.title}, beside the baseline."
    )


def only(comparison: Comparison, arms: Collection[str]) -> Comparison:
    """What is drawn or printed of some arms and the baseline; p-values stay corrected over all arms."""
    kept = {*arms, comparison.baseline}

    def of(entries: Iterable[Any]) -> Any:
        return tuple(entry for entry in entries if entry.arm in kept)

    def cut(measure: Any) -> Any:
        return dataclasses.replace(measure, values=of(measure.values), differences=of(measure.differences))

    def by_arm(groups: dict[str, T]) -> dict[str, T]:
        return {arm: entries for arm, entries in groups.items() if arm in kept}

    layers, timed = comparison.layers, comparison.equal_time
    return dataclasses.replace(
        comparison,
        arms=tuple(arm for arm in comparison.arms if arm in kept),
        tasks=tuple(map(cut, comparison.tasks)),
        condensation=tuple(map(cut, comparison.condensation)),
        means=tuple(dataclasses.replace(mean, measure=cut(mean.measure)) for mean in comparison.means),
        layers=layers
        and dataclasses.replace(layers, values=by_arm(layers.values), differences=by_arm(layers.differences)),
        equal_time=timed and dataclasses.replace(timed, differences=of(timed.differences)),
        speed=of(comparison.speed),
        cost=of(comparison.cost),
        trials=of(comparison.trials),
    )


def measures(comparison: Comparison) -> list[Measure]:
    """Every measure of the comparison."""
    return [*comparison.tasks, *(mean.measure for mean in comparison.means), *comparison.condensation]


def main_measures(comparison: Comparison) -> list[Measure]:
    """Without the single benchmarks, which have a table of their own."""
    validation = [comparison.validation] if comparison.validation is not None else []
    return [*validation, *(mean.measure for mean in comparison.means), *comparison.condensation]


def names_of(comparison: Comparison) -> dict[str, str]:
    """Titles by id of the quantity: a benchmark of which other items were scored than it officially has says so."""
    names = {measure.quantity: measure.title for measure in measures(comparison)}
    names |= {task.quantity: f"{task.title} ({task.deviation})" for task in comparison.tasks if task.deviation}
    odd = {(task.task, task.metric) for task in comparison.tasks if task.deviation}
    for mean in comparison.means:
        count = sum((task, mean.metric) in odd for task in mean.tasks)
        if count:
            names[mean.measure.quantity] = f"{mean.measure.title} ({count} not official)"
    return names


def qualified(caption: str, comparison: Comparison) -> str:
    """The caption of a table that shows benchmarks, with what qualifies their scores."""
    return f"{caption} Benchmarks: {'; '.join(comparison.task_notes)}." if comparison.task_notes else caption


def task_head(task: TaskMeasure) -> str:
    """How a column or a row of a benchmark is called; an accuracy that hardly decides at this size has a dagger."""
    metric = METRIC_TITLES.get(task.metric, task.metric) + (" †" if task.hardly_decides else "")
    return f"{task.task} ({metric}{f'; {task.deviation}' if task.deviation else ''})"


def flags(tasks: Iterable[TaskMeasure]) -> tuple[str, ...]:
    """The line below a table that explains its daggers."""
    if not any(task.hardly_decides for task in tasks):
        return ()
    return ("† an accuracy that is known to decide hardly anything at this size (arXiv:2508.13144).",)
