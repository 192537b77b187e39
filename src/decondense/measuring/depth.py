r"""Condensation of a whole model in one number: rank correlation of the mean cosine with depth, and its interval.

Liu et al. 2026, arXiv:2602.00217: Spearman's rho and Kendall's tau-b between :math:`\mu^{(0..L)}` and :math:`0..L`;
+1 says that the mean cosine rises at every layer. The intervals resample passages.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

Array = NDArray[np.float64]


def spearman(mu_L: Any) -> Array:
    """Spearman's rho of the last axis against its index; ties get mean ranks; nan when all values are equal."""
    ranks = rankdata(np.asarray(mu_L, dtype=np.float64), axis=-1)
    depth = np.arange(ranks.shape[-1], dtype=np.float64)
    ranks = ranks - ranks.mean(axis=-1, keepdims=True)
    depth -= depth.mean()
    scale = np.sqrt((ranks**2).sum(axis=-1) * (depth**2).sum())
    with np.errstate(invalid="ignore", divide="ignore"):
        rho: Array = (ranks * depth).sum(axis=-1) / scale
    return rho


def kendall(mu_L: Any) -> Array:
    """Kendall's tau-b of the last axis against its index; nan when all values are equal."""
    mu = np.asarray(mu_L, dtype=np.float64)
    low, high = np.triu_indices(mu.shape[-1], k=1)
    sign = np.sign(mu[..., high] - mu[..., low])
    untied = np.abs(sign).sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        tau: Array = sign.sum(axis=-1) / np.sqrt(untied * low.size)  # depth itself has no ties
    return tau


def resample_weights(passages: int, resamples: int, seed: int) -> Array:
    """Bootstrap weights [resamples, passages], each row summing to 1, from their own generator."""
    rng = np.random.default_rng([seed, passages])
    draws = rng.multinomial(passages, np.full(passages, 1 / passages), size=resamples)
    return draws / passages


def percentile_interval(samples: Array, confidence: float) -> tuple[Any, Any]:
    """The central ``confidence`` share of bootstrap samples along the first axis, as (low, high)."""
    tail = 100 * (1 - confidence) / 2
    finite = np.isfinite(samples).all()
    function = np.percentile if finite else np.nanpercentile
    low, high = function(samples, [tail, 100 - tail], axis=0)
    return low, high
