"""Cells of the tables: the text and the number behind it."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median

from decondense.compare import Measure, Values
from decondense.formatting import NONE, Interval, interval, number
from decondense.table import Entry


def bounds(pair: Interval | None, digits: int = 3) -> Entry:
    """``[low, high]``."""
    return NONE if pair is None else (interval(pair, digits), pair)


def mean_and_sd(measure: Measure, arm: str, digits: int = 3) -> Entry:
    """Mean ± standard deviation of an arm's values of ``measure``."""
    return spread(measure.of(arm), digits)


def spread(values: Values | None, digits: int = 3) -> Entry:
    """Mean ± standard deviation; a single value alone."""
    if values is None:
        return NONE
    tail = f" ± {number(values.sd, digits)}" if values.sd is not None else ""
    return (number(values.mean, digits) + tail, values.mean)


def mebibytes(values: Iterable[float | None]) -> Entry:
    """The median of sizes in bytes, in MiB."""
    memory = median_of(values)
    return NONE if memory is None else (f"{memory / 2**20:,.0f}", memory / 2**20)


def median_of(values: Iterable[float | None]) -> float | None:
    """The median of what is known; None when nothing is."""
    known = [value for value in values if value is not None]
    return median(known) if known else None


def ratio(triple: tuple[float, float, float] | None) -> Entry:
    """A ratio with its range over seeds."""
    return NONE if triple is None else (f"{triple[0]:.3f} [{triple[1]:.3f}, {triple[2]:.3f}]", triple[0])
