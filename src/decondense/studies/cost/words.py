"""Hours of a GPU, as numbers and as text."""

from __future__ import annotations

GPUS = {"A100": 312e12, "H100": 989e12}
"""Peak operations a second in bfloat16 without sparsity, from the makers' data sheets."""
UTILISATION = 0.4
"""Fraction of the peak that training is assumed to reach."""


def gpu_hours(flops: float, gpu: str) -> float:
    """Hours of one GPU at :data:`UTILISATION` of its peak."""
    return flops / (UTILISATION * GPUS[gpu]) / 3600


def gpu_hours_of(flops: float) -> str:
    """``1.2 A100-hours or 0.4 H100-hours``."""
    return " or ".join(f"{hours(gpu_hours(flops, gpu))} {gpu}-hours" for gpu in GPUS)


def hours(value: float) -> str:
    """Hours with two digits."""
    return "<0.01" if value < 0.01 else f"{value:,.0f}" if value >= 99.5 else f"{value:.2g}"
