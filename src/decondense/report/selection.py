"""Which measures a report shows, and what qualifies their names and captions."""

from __future__ import annotations

from decondense.compare import Comparison, Measure, TaskMeasure

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
    """How a column or a row of a benchmark is called."""
    return f"{task.task} ({task.metric}{f'; {task.deviation}' if task.deviation else ''})"
