r"""Metrics of the singular values :math:`\sigma_k` and of the eigenvalues :math:`\lambda_k = \sigma_k^2`.

Each takes a passage or a corpus (:class:`Cloud`), or a tensor [N, D]; equations, sources and values where a definition
has none stand in the registry, :mod:`decondense.metrics`.
"""

from __future__ import annotations

import numpy as np
from scipy.special import entr
from torch import Tensor

from decondense.measuring.metrics.clouds import Array, Cloud, as_cloud

ALPHA_RANKS = (11, 500)
"""First and last rank of the fit of :func:`alpha_req` (Stringer et al. 2019)."""


def entropy(weights_M: Array) -> float:
    r""":math:`-\sum_k p_k \ln p_k` with :math:`p = w / \sum w`, in nats; 0 when all weights are 0."""
    total = weights_M.sum()
    return float(entr(weights_M / total).sum()) if total > 0 else 0.0


def singular_value_entropy(states: Cloud | Tensor, unit_ND: Tensor | None = None) -> float:
    r"""Entropy in nats of the normalised singular values; 0 for rank one, at most :math:`\ln \min(N, D)`."""
    return entropy(np.sqrt(as_cloud(states).spectrum(False)))


def effective_rank(states: Cloud | Tensor, unit_ND: Tensor | None = None) -> float:
    r"""Effective rank :math:`e^H` with H the :func:`singular_value_entropy`; 1 .. min(N, D)."""
    return float(np.exp(singular_value_entropy(states)))


def effective_rank_centred(states: Cloud | Tensor, unit_ND: Tensor | None = None) -> float:
    """:func:`effective_rank` of the centred states."""
    return float(np.exp(entropy(np.sqrt(as_cloud(states).spectrum(True)))))


def explainable_variance(states: Cloud | Tensor, unit_ND: Tensor | None = None) -> float:
    r"""Maximum explainable variance :math:`\sigma_1^2 / \lVert Z \rVert_F^2`: the share of the best direction."""
    return _top_share(as_cloud(states), False)


def top_direction_share(states: Cloud | Tensor, unit_ND: Tensor | None = None) -> float:
    """:func:`explainable_variance` of the centred states: the first principal component's share of the variance."""
    return _top_share(as_cloud(states), True)


def _top_share(cloud: Cloud, centred: bool) -> float:
    total = cloud.total(centred)
    return cloud.largest(centred) / total if total else 0.0


def stable_rank(states: Cloud | Tensor, unit_ND: Tensor | None = None) -> float:
    r"""Stable rank :math:`\lVert Z \rVert_F^2 / \sigma_1^2`; 1 .. rank."""
    share = explainable_variance(states)
    return 1 / share if share else 0.0


def stable_rank_centred(states: Cloud | Tensor, unit_ND: Tensor | None = None) -> float:
    """:func:`stable_rank` of the centred states."""
    share = top_direction_share(states)
    return 1 / share if share else 0.0


def hfc_lfc(states: Cloud | Tensor, unit_ND: Tensor | None = None) -> float:
    r"""High- over low-frequency component: :math:`\lVert X \rVert_2 / \lVert 1 \bar z^T \rVert_2`.

    The low-frequency component of a sequence of tokens is its constant part, the mean row; matrix 2-norms.
    """
    cloud = as_cloud(states)
    low = float(cloud.mean.norm()) * cloud.n**0.5
    return cloud.largest(True) ** 0.5 / low if low else float("inf")


def participation_ratio(states: Cloud | Tensor, unit_ND: Tensor | None = None) -> float:
    r"""Participation ratio :math:`(\sum_k \lambda_k)^2 / \sum_k \lambda_k^2` of the covariance's eigenvalues; 1 .. D.

    Route: :math:`\lVert X \rVert_F^4 / \lVert X^T X \rVert_F^2`, no eigenvalues.
    """
    cloud = as_cloud(states)
    square = float(cloud.gram(True).square().sum())
    return cloud.total(True) ** 2 / square if square else 0.0


def isoscore(states: Cloud | Tensor, unit_ND: Tensor | None = None) -> float:
    r"""IsoScore: 1 when the covariance is isotropic, 0 when one direction holds all variance.

    The published algorithm (PCA, normalised variances, isotropy defect, rescaling) equals
    :math:`(\mathrm{PR} - 1)/(D - 1)` with PR the :func:`participation_ratio`.
    """
    cloud = as_cloud(states)
    ratio = participation_ratio(cloud)
    if cloud.width < 2:
        return float("nan")
    return (ratio - 1) / (cloud.width - 1) if ratio else 0.0


def rankme(states: Cloud | Tensor, unit_ND: Tensor | None = None) -> float:
    r"""RankMe: :func:`effective_rank` with :math:`10^{-7}` added to each :math:`p_k`, as published."""
    sigma = np.sqrt(as_cloud(states).spectrum(False))
    total = sigma.sum()
    return float(np.exp(entr(sigma / total + 1e-7).sum())) if total > 0 else 1.0


def alpha_req(states: Cloud | Tensor, unit_ND: Tensor | None = None) -> float:
    r"""Exponent of :math:`\lambda_k \propto k^{-\alpha}`, eigenvalues of the covariance, by weighted least squares.

    :math:`\ln \lambda_k` on :math:`\ln k` over the ranks :data:`ALPHA_RANKS` that exist (above float32 rounding), with
    weights 1/k.
    """
    cloud = as_cloud(states)
    values = cloud.spectrum(True)
    # a layer norm leaves D - 1 directions; what float32 rounding puts into the last one would bend the fit
    rank = int((values > np.finfo(np.float32).eps ** 2 * cloud.total(False)).sum())
    first, last = ALPHA_RANKS
    if rank < first + 9:
        return float("nan")
    ranks = np.arange(first, min(rank, last) + 1)
    # polyfit's weights multiply the residuals, so their squares are those of the squares
    return -float(np.polyfit(np.log(ranks), np.log(values[ranks - 1]), 1, w=ranks**-0.5)[0])
