"""Scores of a run's items as arrays: nearly all rows of a study with benchmarks are theirs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from decondense.records import ItemRows, Row

Array = npt.NDArray[np.float64]


class ItemArrays(NamedTuple):
    """Items of a task in the order of their names."""

    names: tuple[str, ...]
    value_I: Array
    weight_I: Array

    def same_items(self, other: ItemArrays) -> bool:
        """Whether names and weights are equal."""
        return self.names == other.names and np.array_equal(self.weight_I, other.weight_I)

    def only(self, kept_I: npt.NDArray[np.bool_]) -> ItemArrays:
        """The items that a mask keeps."""
        if kept_I.all():
            return self
        names = tuple(name for name, kept in zip(self.names, kept_I, strict=True) if kept)
        return ItemArrays(names, self.value_I[kept_I], self.weight_I[kept_I])


NO_ITEMS = ItemArrays((), np.zeros(0), np.zeros(0))


class ItemPlace(NamedTuple):
    """What items are scored by together."""

    arm: str
    seed: int
    task: str
    metric: str
    step: int


class Scored(NamedTuple):
    """The items of one place: their scores, the likelihoods of their right answers where these are known, and the names
    of those that were scored twice, differently."""

    items: ItemArrays
    gold: tuple[ItemArrays, ItemArrays]
    """Bits per byte, and margin in bits of those that have one."""
    conflicts: tuple[str, ...]


class ItemTaker:
    """Takes rows of items, in any order, and gives arrays when all were taken."""

    def __init__(self) -> None:
        self._parts: dict[ItemPlace, list[tuple[list[str], Array]]] = {}
        self._place: ItemPlace | None = None
        self._open: tuple[list[Any], ...] = ()
        self._orders: dict[tuple[str, ...], tuple[tuple[str, ...], npt.NDArray[np.intp]]] = {}

    def take(self, rows: Row | ItemRows) -> None:
        """Take one row, or rows that came together."""
        row, columns = (rows.common, rows[1:]) if isinstance(rows, ItemRows) else (rows, _one(rows))
        place = ItemPlace(row["arm"], row["seed"], row["task"], row["metric"], row["step"])
        if place != self._place:
            self._close()
            self._place, self._open = place, ([], [], [], [], [])
        for column, new in zip(self._open, columns, strict=True):
            column.extend(new)

    def _close(self) -> None:
        if self._place is not None:
            names, *numbers = self._open
            self._parts.setdefault(self._place, []).append((names, np.array(numbers, float)))  # None becomes NaN
        self._place = None

    def scored(self) -> Iterator[tuple[ItemPlace, Scored]]:
        """All that was taken, by place."""
        self._close()
        for place, parts in self._parts.items():
            names = tuple(name for part, _ in parts for name in part)
            number_4I = np.concatenate([numbers for _, numbers in parts], axis=1)
            ordered, places = self._order(names)
            value_I, weight_I, bits_I, margin_I = number_4I[:, places]
            known_I = ~np.isnan(bits_I)
            gold = (
                ItemArrays(ordered, bits_I, weight_I).only(known_I),
                ItemArrays(ordered, margin_I, weight_I).only(known_I & ~np.isnan(margin_I)),
            )
            conflicts = _conflicts(names, number_4I[:2]) if len(ordered) < len(names) else ()
            yield place, Scored(ItemArrays(ordered, value_I, weight_I), gold, conflicts)

    def _order(self, names: tuple[str, ...]) -> tuple[tuple[str, ...], npt.NDArray[np.intp]]:
        """The names in order, one object for equal ones, and where each stands first."""
        if names not in self._orders:
            first = {name: place for place, name in reversed(list(enumerate(names)))}
            ordered = tuple(sorted(first))
            # runs may name the same items in different orders
            known = next((other for other, _ in self._orders.values() if other == ordered), ordered)
            self._orders[names] = known, np.array([first[name] for name in ordered], np.intp)
        return self._orders[names]


def _one(row: Row) -> tuple[Sequence[Any], ...]:
    return tuple((row[name],) for name in ItemRows._fields[1:])


def _conflicts(names: Sequence[str], number_2I: Array) -> tuple[str, ...]:
    first: dict[str, int] = {}
    return tuple(
        name
        for place, name in enumerate(names)
        if (number_2I[:, first.setdefault(name, place)] != number_2I[:, place]).any()
    )
