"""Which measures a report shows, and what qualifies their names and captions."""

from __future__ import annotations

from collections.abc import Iterable

from decondense.compare import Comparison, Measure, TaskMeasure
from decondense.compare.quantity import METRIC_TITLES

MANY = 3
"""With more arms than that beside the baseline, sentences group them, and tables have a row instead of columns for
each."""


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
