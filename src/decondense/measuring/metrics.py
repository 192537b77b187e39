r"""Side metrics of a set of token vectors, each by its cheapest exact route.

All are functions of one passage's states :math:`Z \in \mathbb R^{N \times D}` (rows are tokens) and are averaged over
passages afterwards. :math:`\sigma_1 \ge \sigma_2 \ge \dots` are the singular values of Z, :math:`X_c` is Z minus the
mean row :math:`\bar z`. Nothing here needs an SVD of Z: the smaller of :math:`Z^T Z` and :math:`Z Z^T` has the squared
singular values as its eigenvalues, and all arithmetic is in float64.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable

import numpy as np
import torch
from scipy.sparse.linalg import ArpackError, eigsh
from torch import Tensor

from decondense.config import METRIC_NAMES, one_of
from decondense.geometry import unit

Metric = Callable[[Tensor, Tensor], float]


def _wide(z: Tensor) -> Tensor:
    # a device without float64 (Apple's) computes these few matrices on the CPU
    return z.cpu().double() if z.device.type == "mps" else z.double()


def _gram(z_ND: Tensor) -> Tensor:
    n, d = z_ND.shape
    return z_ND.T @ z_ND if d <= n else z_ND @ z_ND.T


def _largest_eigenvalue(gram_MM: Tensor) -> float:
    m = gram_MM.shape[0]
    if m >= 32:
        # Lanczos to machine precision from a fixed start: O(M^2) an iteration instead of the O(M^3) of all eigenvalues
        start = np.cos(np.arange(m) + 0.5)
        with contextlib.suppress(ArpackError):  # a matrix of zeros, or a start that an eigenspace does not contain
            largest = eigsh(gram_MM.cpu().numpy(), k=1, which="LA", tol=0, v0=start, return_eigenvectors=False)
            return float(largest[0])
    return float(torch.linalg.eigvalsh(gram_MM)[-1])


def _singular_values(z_ND: Tensor) -> Tensor:
    values: Tensor = torch.linalg.eigvalsh(_gram(_wide(z_ND)))
    return values.clamp_min(0).sqrt()


def singular_value_entropy(z_ND: Tensor, unit_ND: Tensor | None = None) -> float:
    r"""Entropy in nats of the normalised singular values, :math:`-\sum_k p_k \ln p_k,\ p_k = \sigma_k / \sum \sigma`.

    0 for rank one, :math:`\ln \min(N, D)` when all singular values are equal. Roy and Vetterli, "The effective rank",
    EUSIPCO 2007. Route: eigenvalues of the smaller Gram matrix, O(N D min(N, D)).
    """
    sigma = _singular_values(z_ND)
    total = sigma.sum()
    if total == 0:
        return 0.0
    return float(torch.special.entr(sigma / total).sum())


def effective_rank(z_ND: Tensor, unit_ND: Tensor | None = None) -> float:
    r"""Effective rank :math:`e^H` with H the :func:`singular_value_entropy` (Roy and Vetterli 2007); 1 .. min(N, D)."""
    return float(np.exp(singular_value_entropy(z_ND)))


def explainable_variance(z_ND: Tensor, unit_ND: Tensor | None = None) -> float:
    r"""Maximum explainable variance :math:`\sigma_1^2 / \lVert Z \rVert_F^2`: the share of the best single direction.

    A side metric of Liu et al. 2026, arXiv:2602.00217 (the top singular value's share of the squared Frobenius norm).
    1 for rank one. Route: the largest eigenvalue of the smaller Gram matrix by Lanczos.
    """
    z = _wide(z_ND)
    total = float(z.square().sum())
    return _largest_eigenvalue(_gram(z)) / total if total else 0.0


def hfc_lfc(z_ND: Tensor, unit_ND: Tensor | None = None) -> float:
    r"""High- over low-frequency component: :math:`\lVert X_c \rVert_2 / \lVert 1 \bar z^T \rVert_2`.

    Equal to :math:`\sigma_1(X_c) / (\sqrt N \lvert \bar z \rvert)`.

    The low-frequency component of a sequence of tokens is its constant part, the mean row (Wang et al., "Anti-
    oversmoothing in deep vision transformers via the Fourier domain analysis", ICLR 2022); matrix 2-norms as in Liu et
    al. 2026, arXiv:2602.00217. 0 when all tokens are equal, infinite when the mean row is zero.
    """
    z = _wide(z_ND)
    mean = z.mean(dim=0)
    low = float(torch.linalg.vector_norm(mean)) * z.shape[0] ** 0.5
    high = max(_largest_eigenvalue(_gram(z - mean)), 0.0) ** 0.5
    return high / low if low else float("inf")


def participation_ratio(z_ND: Tensor, unit_ND: Tensor | None = None) -> float:
    r"""Participation ratio :math:`(\sum_k \lambda_k)^2 / \sum_k \lambda_k^2` of the covariance's eigenvalues; 1 .. D.

    Gao et al., "A theory of multineuronal dimensionality, dynamics and measurement", bioRxiv 214262, 2017. Route:
    :math:`\lVert X_c \rVert_F^4 / \lVert X_c^T X_c \rVert_F^2`, no eigenvalues. 0 when all tokens are equal.
    """
    z = _wide(z_ND)
    centred = z - z.mean(dim=0)
    square = float(_gram(centred).square().sum())
    return float(centred.square().sum()) ** 2 / square if square else 0.0


def isoscore(z_ND: Tensor, unit_ND: Tensor | None = None) -> float:
    r"""IsoScore: 1 when the covariance is isotropic, 0 when one direction holds all variance.

    Rudman, Gillman, Rayne and Eickhoff, "IsoScore: measuring the uniformity of embedding space utilization", Findings
    of ACL 2022. Their algorithm (PCA, normalised variances, isotropy defect, rescaling) equals
    :math:`(\mathrm{PR} - 1)/(D - 1)` with PR the :func:`participation_ratio`. nan for width 1.
    """
    width = z_ND.shape[1]
    if width < 2:
        return float("nan")
    ratio = participation_ratio(z_ND)
    return (ratio - 1) / (width - 1) if ratio else 0.0


def mean_square_cosine(z_ND: Tensor, unit_ND: Tensor | None = None) -> float:
    r"""Mean squared cosine over all N x N pairs, :math:`\lVert \hat Z^T \hat Z \rVert_F^2 / N^2`.

    With the mean cosine it gives the standard deviation of the cosines. Route: the smaller Gram matrix of unit rows.
    """
    if unit_ND is None:
        unit_ND = unit(z_ND)
    return float(_gram(_wide(unit_ND)).square().sum()) / z_ND.shape[0] ** 2


METRICS: dict[str, Metric] = {name: globals()[name] for name in METRIC_NAMES}
"""Side metrics by name; ``measure(metrics=...)`` takes any of them, or ``"all"``."""


def resolve_metrics(names: str | Iterable[str]) -> dict[str, Metric]:
    """The metrics of a choice of names (or ``"all"``); an unknown name raises ValueError and says what was meant."""
    chosen = [one_of("metric", name, [*METRICS, "all"]) for name in ([names] if isinstance(names, str) else names)]
    return {name: METRICS[name] for name in (METRICS if "all" in chosen else chosen)}
