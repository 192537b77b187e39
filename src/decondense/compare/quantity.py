"""A quantity of a checkpoint: an id for programs, a title for people, and how to get its value from a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from decondense.compare.study import VALIDATION, Cell, Key

Place = Literal["summary", "size"]


@dataclass(frozen=True)
class Quantity:
    """One number of a run's final checkpoint."""

    id: str
    """Identifies the quantity in code and JSON: ``mean_cosine.blocks``."""
    title: str
    of: Callable[[Cell], float | None]
    """The value of a run; None if its rows do not have it."""
    unit: str = ""
    higher_is_better: bool | None = None
    """None: neither direction is better."""
    short: str = ""
    """Title for narrow columns and axes."""
    shown: frozenset[Place] = frozenset({"summary"})
    """``summary``: compared with the baseline in every table of results. ``size``: drawn and tested against model size.
    """

    @property
    def short_title(self) -> str:
        """The short title, or the title where there is none."""
        return self.short or self.title


LOSS_UNIT = "nats/token"
_TASK_UNITS = {"loss": LOSS_UNIT, "mean_cosine": "cosine", "bits_per_byte": "bits/byte", "margin_bits": "bits"}
METRIC_TITLES = {"bits_per_byte": "bits per byte", "margin_bits": "margin in bits"}
"""Titles of metrics whose title is not their id."""


def task_id(key: Key) -> str:
    """The id of a task's score: ``validation.loss``."""
    return f"{key[0]}.{key[1]}"


def task_quantity(key: Key, *, higher_is_better: bool) -> Quantity:
    """A task's score as a quantity."""
    return Quantity(
        id=task_id(key),
        title=f"{key[0]} {METRIC_TITLES.get(key[1], key[1])}",
        of=lambda cell: cell.final_score(key),
        unit=_TASK_UNITS.get(key[1], ""),
        higher_is_better=higher_is_better,
    )


VALIDATION_ID = task_id(VALIDATION)
