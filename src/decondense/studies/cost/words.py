"""Costs in words: counts, durations, sizes on disk, hours of a GPU."""

from __future__ import annotations

import math

GPUS = {"A100": 312e12, "H100": 989e12}
"""Peak operations a second in bfloat16 without sparsity, from the makers' data sheets."""
UTILISATION = 0.4
"""Share of the peak that training is assumed to reach."""


def count(value: float | None) -> str:
    """``1.7M``, ``156B``; ``?`` for what is unknown."""
    if value is None or math.isnan(value):
        return "?"
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.0f}"


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
    """``12 MB``, ``1.4 TB``."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if size >= limit:
            return f"{size / limit:.3g} {unit}"
    return f"{size / 1e3:.0f} kB"


def gpu_hours(flops: float, gpu: str) -> float:
    """Hours of one GPU at :data:`UTILISATION` of its peak."""
    return flops / (UTILISATION * GPUS[gpu]) / 3600


def cost_of(flops: float) -> str:
    """``5.8e13``, ``?`` for what is unknown."""
    return "?" if math.isnan(flops) else f"{flops:.1e}".replace("e+", "e")


def gpu_hours_of(flops: float) -> str:
    """``1.2 A100-hours or 0.4 H100-hours``."""
    return " or ".join(f"{hours(gpu_hours(flops, gpu))} {gpu}-hours" for gpu in GPUS)


def hours(value: float) -> str:
    """Hours in two digits."""
    return "<0.01" if value < 0.01 else f"{value:,.0f}" if value >= 99.5 else f"{value:.2g}"


def number(value: int, noun: str) -> str:
    """``3 runs``, ``1 run``."""
    return f"{value} {noun}{'' if value == 1 else 's'}"
