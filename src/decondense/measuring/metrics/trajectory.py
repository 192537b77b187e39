"""Metrics of the order of the tokens; equations and sources stand in the registry, :mod:`decondense.metrics`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from decondense.measuring.metrics.clouds import Array, Cloud, as_cloud
from decondense.metrics import find_metric


def cosine_lag(states: Cloud | Tensor, unit_ND: Tensor | None = None) -> Array:
    """Mean cosine of the tokens k apart, for each k of the metric's ``parts``; nan where a passage has no such pair."""
    units_ND = as_cloud(states, unit_ND).units
    lags = [int(part) for part in find_metric("cosine_lag").parts]
    n = len(units_ND)
    sums = [(units_ND[lag:] * units_ND[:-lag]).sum() / (n - lag) if lag < n else torch.nan for lag in lags]
    return np.array([float(value) for value in sums])


def curvature(states: Cloud | Tensor, unit_ND: Tensor | None = None) -> float:
    r"""Mean angle in radians between successive differences of the tokens; 0 on a straight line, pi back and forth.

    Route: :math:`2\,\mathrm{atan2}(\lvert u - v \rvert, \lvert u + v \rvert)` of unit differences, which keeps small
    angles where arccos loses half of the digits (Kahan 2006).
    """
    steps_ND = as_cloud(states).z.diff(dim=0)
    norms_N = steps_ND.norm(dim=1)
    moved_N = norms_N > 0
    u_ND = steps_ND / torch.where(moved_N, norms_N, 1.0)[:, None]
    angles_N = 2 * torch.atan2((u_ND[1:] - u_ND[:-1]).norm(dim=1), (u_ND[1:] + u_ND[:-1]).norm(dim=1))
    return float(angles_N[moved_N[1:] & moved_N[:-1]].mean())
