"""What every part of a comparison needs: the cells that take part, their pairs, and one way to measure them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from decondense.compare.quantity import LOSS_UNIT, Quantity
from decondense.compare.results import Measure, Values
from decondense.compare.sequential import anytime
from decondense.compare.statistics import Difference, Items, holm_over_arms, paired_difference
from decondense.compare.study import Cell, Key, Study
from decondense.formatting import listed


def common(values: Iterable[Any]) -> int | None:
    """The value that all have in common, None where they differ."""
    found = {value for value in values if value is not None}
    return int(found.pop()) if len(found) == 1 else None


PairedItems = Callable[[str, Sequence[int]], tuple[list[Items] | None, str]]
"""Arm and seeds -> per-item differences, one entry a task, or None and why there are none."""


@dataclass(frozen=True)
class Context:
    """The runs of one comparison: ``cells`` take part, ``pairs`` are an arm's seeds that the baseline has too."""

    study: Study
    base: str
    arms: list[str]
    seeds: list[int]
    cells: dict[tuple[str, int], Cell]
    pairs: dict[str, list[int]]
    margin: float
    """For differences of a loss, in nats per token."""

    def measure(self, quantity: Quantity, items: PairedItems | None = None, *, corrected: bool = True) -> Measure:
        """The values of a quantity by arm, and every arm's paired difference to the baseline, corrected over arms."""
        known = {place: value for place, cell in self.cells.items() if (value := quantity.of(cell)) is not None}
        values: list[Values] = []
        differences: list[Difference] = []
        for arm in self.arms:
            own = [(seed, known[arm, seed]) for seed in self.seeds if (arm, seed) in known]
            if own:
                values.append(Values.of(arm, own))
            seeds = [seed for seed in self.pairs[arm] if (arm, seed) in known and (self.base, seed) in known]
            if arm == self.base or not seeds:
                continue
            per_item, why = items(arm, seeds) if items else (None, "a run has one value")
            differences.append(
                paired_difference(
                    [known[self.base, seed] for seed in seeds],
                    [known[arm, seed] for seed in seeds],
                    quantity=quantity.id,
                    unit=quantity.unit,
                    arm=arm,
                    baseline=self.base,
                    seeds=seeds,
                    higher_is_better=quantity.higher_is_better,
                    items=per_item,
                    no_items=why,
                    margin=self.margin if quantity.unit == LOSS_UNIT else None,
                )
            )
        count = next((d.items for d in differences if d.items), None)
        return Measure(
            quantity.id,
            quantity.title,
            quantity.unit,
            quantity.higher_is_better,
            tuple(values),
            tuple(self.over_arms(differences) if corrected else differences),
            count,
        )

    def over_arms(self, differences: Sequence[Difference], tasks: int = 1) -> list[Difference]:
        """One family (arms x tasks), corrected for its size; where seeds were added, for every look as well."""
        if self.study.until is None:
            return holm_over_arms(differences)
        return [anytime(d, tasks * (len(self.study.arms) - 1)) for d in differences]

    def per_item(self, key: Key, arm: str, seeds: Sequence[int]) -> Items | None:
        """Differences item by item, or None unless every run of both arms has the same items."""
        mine = [self.cells[arm, seed].final_items(key) for seed in seeds]
        theirs = [self.cells[self.base, seed].final_items(key) for seed in seeds]
        first = mine[0]
        if not first.names or not all(first.same_items(other) for other in [*mine, *theirs]):
            return None
        difference_SI = np.array([a.value_I - b.value_I for a, b in zip(mine, theirs, strict=True)])
        return Items(difference_SI, first.weight_I)

    def direction(self, key: Key) -> bool:
        """Whether a higher score is better."""
        rows = (row for cell in self.cells.values() for row in cell.scores.get(key, {}).values())
        return bool(next(rows)["higher_is_better"])

    def values(self, arm: str, of: Callable[[Cell], float | None]) -> Values | None:
        """One quantity of an arm's runs, of those that have it."""
        cells = [self.cells[arm, seed] for seed in self.seeds if (arm, seed) in self.cells]
        found = [(cell.seed, value) for cell in cells if (value := of(cell)) is not None]
        return Values.of(arm, found) if found else None

    def untrained(self, arm: str) -> bool:
        """Whether every run of the arm ended where it started."""
        return all(self.cells[arm, seed].untrained for seed in self.seeds if (arm, seed) in self.cells)

    def other_starts(self) -> list[str]:
        """Arms that start from other weights than the baseline by design."""
        own = [arm for arm in self.arms if arm != self.base and self.study.has_own_model(arm)]
        if self.study.has_own_model(self.base) and not self.study.measured:
            return [arm for arm in self.arms if arm != self.base]
        return own

    def named(self, arms: Iterable[str]) -> str:
        """Labels of arms as a list in words."""
        return listed([self.study.labels[arm] for arm in arms])
