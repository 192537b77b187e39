"""Metrics of the unit rows; equations and sources stand in the registry, :mod:`decondense.metrics`."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from decondense.measuring.metrics.clouds import Cloud, Corpus, as_cloud, smaller_gram


def mean_square_cosine(states: Cloud | Tensor, unit_ND: Tensor | None = None) -> float:
    r"""Mean squared cosine over all N x N pairs, :math:`\lVert \hat Z^T \hat Z \rVert_F^2 / N^2`."""
    cloud = as_cloud(states, unit_ND)
    return float(smaller_gram(cloud.units).square().sum()) / cloud.n**2


def mean_cosine(corpus: Corpus) -> float:
    """Mean cosine of all pairs of tokens of the corpus, a token with itself included."""
    mean_D = corpus.moments.unit_D / corpus.n
    return float(np.dot(mean_D, mean_D))
