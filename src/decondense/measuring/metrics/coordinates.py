"""Metrics of single coordinates, outlier dimensions; equations and sources: the registry, :mod:`decondense.metrics`."""

from __future__ import annotations

from torch import Tensor

from decondense.measuring.metrics.clouds import Cloud, as_cloud


def top_dimension_share(states: Cloud | Tensor, unit_ND: Tensor | None = None) -> float:
    """Share of the squared norm that the largest coordinate holds; 1/D .. 1."""
    squares_D = as_cloud(states).coordinate_squares
    total = float(squares_D.sum())
    return float(squares_D.max()) / total if total else 0.0


def outlier_kurtosis(states: Cloud | Tensor, unit_ND: Tensor | None = None) -> float:
    """Kurtosis of the coordinates' root mean squares: 1 when all are equal, D when one coordinate holds everything."""
    squares_D = as_cloud(states).coordinate_squares
    total = float(squares_D.sum())
    return float((squares_D / total).square().sum()) * len(squares_D) if total else float("nan")


def kurtosis(states: Cloud | Tensor, unit_ND: Tensor | None = None) -> float:
    """Kurtosis (not the excess) of the coordinates of a token, mean over tokens; 1 .. about D."""
    z_ND = as_cloud(states).z
    x_ND = z_ND - z_ND.mean(dim=1, keepdim=True)
    variance_N = x_ND.square().mean(dim=1)
    varied_N = variance_N > 1e-28 * z_ND.square().mean(dim=1)  # equal coordinates but for the rounding of their mean
    fourth_N = (x_ND[varied_N] / variance_N[varied_N, None].sqrt()).pow(4).mean(dim=1)
    return float(fourth_N.mean())
