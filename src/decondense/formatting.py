"""Formats numbers, counts, durations and lists as text, in one place for the whole package."""

from __future__ import annotations

import math
from collections.abc import Sequence

MINUS = "\N{MINUS SIGN}"
NONE = "\N{EN DASH}"
"""Shown where a value does not exist."""
NBSP = "\N{NO-BREAK SPACE}"

Interval = tuple[float, float]


def number(value: float | None, digits: int = 3, *, sign: bool = False) -> str:
    """``value`` with a fixed number of digits and a Unicode minus sign; a dash for None, NaN and infinities."""
    if value is None or not math.isfinite(value):
        return NONE
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", MINUS)


def fitting(value: float | None, *, sign: bool = False, among: Sequence[float] = ()) -> str:
    """A number with as many digits as fit a narrow column; ``among``: numbers that use the same digits."""
    largest = max((abs(v) for v in (value, *among) if v is not None and math.isfinite(v)), default=0.0)
    return number(value, 3 if largest < 100 else 1 if largest < 10_000 else 0, sign=sign)


def score(value: float | None) -> str:
    """A score of unknown magnitude: four digits, fewer when it is large, an exponent from 1e5 on."""
    if value is None or not math.isfinite(value):
        return NONE
    text = f"{value:.4f}" if abs(value) < 1000 else f"{value:,.1f}" if abs(value) < 1e5 else f"{value:.3e}"
    return text.replace("-", MINUS)


def interval(bounds: Interval | None, digits: int = 3) -> str:
    """``[low, high]``, signed."""
    if bounds is None:
        return NONE
    return f"[{number(bounds[0], digits, sign=True)}, {number(bounds[1], digits, sign=True)}]"


def fitting_interval(bounds: Interval | None) -> str:
    """``[low, high]`` in a narrow column."""
    if bounds is None:
        return NONE
    low, high = (fitting(bound, sign=True, among=bounds) for bound in bounds)
    return f"[{low}, {high}]"


def probability(p: float | None) -> str:
    """A p-value with three digits, or ``<0.001``."""
    return NONE if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def count(value: float | None, *, short: bool = False) -> str:
    """Parameters and tokens: ``614,400``, ``124M``, ``1.5B``; ``short``: ``614K`` too, for axes and narrow columns."""
    if value is None or not math.isfinite(value):
        return NONE
    for scale, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        # 999,950 is 1M and not 1000K
        if value >= 0.9995 * scale and (scale > 1e3 or (short and value >= 9_999.5)):
            return f"{value / scale:.3g}{unit}"
    return f"{value:,.0f}"


def flops(value: float) -> str:
    """``5.8e13``; a dash when unknown."""
    return NONE if not math.isfinite(value) else f"{value:.1e}".replace("e+", "e")


def duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3.4 h``, ``12 days``."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    if seconds < 2 * 86_400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86_400:,.0f} days"


def storage(size: float) -> str:
    """Bytes as ``12 kB``, ``340 MB``, ``1.4 TB`` (powers of 1000)."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if size >= limit:
            return f"{size / limit:.3g} {unit}"
    return f"{size / 1e3:.0f} kB"


def plural(n: int, noun: str) -> str:
    """``1 seed``, ``3 seeds``."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def shortened(words: Sequence[str], most: int = 12) -> list[str]:
    """The words; if there are more than ``most``, the first three, the last three and the number of the others."""
    if len(words) <= most:
        return list(words)
    return [*words[:3], f"{len(words) - 6} others", *words[-3:]]


def listed(words: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    if len(words) < 2:
        return "".join(words)
    return ", ".join(words[:-1]) + " and " + words[-1]
