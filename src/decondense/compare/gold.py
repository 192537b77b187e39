"""How likely the right answers of benchmarks are: a score besides the task's own that is decisive for smaller models.

The rows of a benchmark's items hold, from the requests that its own score needed, the bits per byte of the right answer
and its margin over the best wrong one in bits. Here they become two further metrics of the task, over the items for
which every run has them. They are continuous, while an accuracy near chance is nearly a count of coin tosses.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from decondense.compare.items import ItemArrays
from decondense.records import Row

METRICS = {"bits_per_byte": False, "margin_bits": True}
"""Field of an item's row -> whether a higher value is better; these are the ids of the two metrics."""

DECISION_ACCURACY = {
    "winogrande": 0.50, "medmcqa": 0.61, "openbookqa": 0.65, "piqa": 0.74, "arc_challenge": 0.83, "mmlu": 0.89,
    "arc_easy": 0.93, "boolq": 0.48, "commonsense_qa": 0.69, "gsm8k": 0.46,
}  # fmt: skip
"""Share of the pairs of training sets that models of 150 M parameters rank by the task's accuracy as models of 1 B do:
0.5 is a coin. Heineman et al. 2025, "Signal and Noise", arXiv:2508.13144; table of github.com/allenai/signal-and-noise.
It was measured for training sets, so for losses it is only a guide."""
LARGEST = 300e6
"""The table applies to models with fewer parameters than this."""
HARDLY = 0.66
"""A decision accuracy below this flags the task."""


def decision_accuracy(task: str, metric: str, parameters: Iterable[int | None]) -> float | None:
    """The decision accuracy of a task's accuracy; None: not known for the task, or for models of this size."""
    sizes = [size for size in parameters if size is not None]
    if not metric.startswith("acc") or not sizes or max(sizes) >= LARGEST:
        return None
    return DECISION_ACCURACY.get(task)


GoldItems = dict[str, dict[int, tuple[ItemArrays, ItemArrays]]]
"""The right answers of a run's items: task -> step -> bits per byte, margin in bits."""
Scores = dict[tuple[str, str], dict[int, Row]]
"""Task and metric -> step -> row."""
_Made = dict[tuple[str, str], dict[int, tuple[Row, ItemArrays]]]


def gold_scores(runs: Sequence[tuple[GoldItems, Scores]]) -> list[_Made]:
    """For each run the scores of the two metrics: (task, metric) -> step -> row and items.

    Args:
        runs: of each run its right answers and its scores. A task is left out unless every run that was scored on it
            has its right answers.
    """
    made: list[_Made] = [{} for _ in runs]
    for task in dict.fromkeys(task for gold, _ in runs for task in gold):
        scored = [place for place, (_, scores) in enumerate(runs) if any(key[0] == task for key in scores)]
        for column, (metric, higher) in enumerate(METRICS.items()):
            values = {
                place: {step: both[column] for step, both in runs[place][0].get(task, {}).items()} for place in scored
            }
            sets = {items.names for steps in values.values() for items in steps.values()}
            if not values or not all(values.values()) or not (shared := set.intersection(*map(set, sets))):
                continue
            for place in scored:
                first = next(curve for key, curve in runs[place][1].items() if key[0] == task)
                for step, items in values[place].items():
                    kept = items.only(np.array([name in shared for name in items.names]))
                    value = float(kept.value_I @ kept.weight_I / kept.weight_I.sum())
                    row = {**first.get(step, {}), "metric": metric, "value": value}
                    row |= {"higher_is_better": higher, "items": len(kept.names), "stderr": None}
                    made[place].setdefault((task, metric), {})[step] = row, kept
    return made
