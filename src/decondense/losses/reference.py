r"""Every form as it is written on paper: dense, plain autograd, never optimised. The oracle of the other two.

Each function takes a batch of units and returns one loss per unit.

Shape suffixes: ``U`` units, ``N`` tokens of a unit, ``D`` features. ``z_UND`` are the hidden states, ``pairs_UNN`` the
ordered pairs that count (bool), ``valid_UN`` the real tokens (bool), ``n_U`` their number.
Memory is a few ``U x N x N`` matrices; that is the point of the other implementations.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from decondense.geometry import unit
from decondense.losses.forms import COMPAT_EPSILON, Settings
from decondense.losses.scope import Scope

__all__ = ["DEFINITIONS", "per_unit", "sigreg_knots"]


def _mean(values_UNN: Tensor, pairs_UNN: Tensor) -> Tensor:
    return torch.where(pairs_UNN, values_UNN, 0.0).sum(dim=(1, 2)) / pairs_UNN.sum(dim=(1, 2))


def _log_mean_exp(logits_UNN: Tensor, pairs_UNN: Tensor) -> Tensor:
    summed = logits_UNN.masked_fill(~pairs_UNN, -math.inf).logsumexp(dim=(1, 2))
    return summed - pairs_UNN.sum(dim=(1, 2)).to(summed.dtype).log()


def _cosine(z_UND: Tensor, pairs_UNN: Tensor, s: Settings) -> Tensor:
    u = unit(z_UND, epsilon=s.epsilon)
    # pairs that do not count must not send an infinite slope times zero backwards (delta = 0)
    return (u @ u.mT).masked_fill(~pairs_UNN, 0.0)


def _angle(z_UND: Tensor, pairs_UNN: Tensor, s: Settings) -> Tensor:
    """theta / pi, smoothed; or, in compatibility mode, clamped with the slope of the boundary kept beyond it."""
    c = _cosine(z_UND, pairs_UNN, s)
    if s.clamp is not None:
        c = c + (c.clamp(-1 + s.clamp, 1 - s.clamp) - c).detach()
    return torch.arccos((c * s.shrink).clamp(-1, 1)) / math.pi


def _square_distance(z_UND: Tensor, valid_UN: Tensor) -> Tensor:
    """|z_i - z_j|^2; around the mean of the unit, where less cancels."""
    n = valid_UN.sum(dim=1).clamp(min=1)[:, None, None]
    x = torch.where(valid_UN.unsqueeze(-1), z_UND, 0.0)
    x = torch.where(valid_UN.unsqueeze(-1), x - x.sum(dim=1, keepdim=True) / n, 0.0)
    q = x.square().sum(dim=-1)
    return (q.unsqueeze(2) + q.unsqueeze(1) - 2 * (x @ x.mT)).clamp(min=0)


def angular(z_UND: Tensor, pairs_UNN: Tensor, valid_UN: Tensor, s: Settings) -> Tensor:
    r""":math:`\log \mathrm{mean}_{i \ne j} \exp(-\theta_{ij}/(\pi\tau))`, arXiv:2602.00217.

    tau to 0: the closest pair alone; tau to infinity: the mean angle. delta to 0: the exact angle, whose slope at c = 1
    is infinite.
    """
    value = _log_mean_exp(-_angle(z_UND, pairs_UNN, s) / s.tau, pairs_UNN)
    return value if s.clamp is None else value + COMPAT_EPSILON


def orthogonalization(z_UND: Tensor, pairs_UNN: Tensor, valid_UN: Tensor, s: Settings) -> Tensor:
    r""":math:`\mathrm{mean}_{i \ne j} \max(0, 1/2 - \theta_{ij}/\pi)^2`, arXiv:2602.00217."""
    return _mean((0.5 - _angle(z_UND, pairs_UNN, s)).clamp(min=0).square(), pairs_UNN)


def l2_repel(z_UND: Tensor, pairs_UNN: Tensor, valid_UN: Tensor, s: Settings) -> Tensor:
    r""":math:`\log \mathrm{mean}_{i \ne j} \exp(-|z_i - z_j|^2/\tau) + \lambda_{norm} \mathrm{mean}(z^2)`, 2602.00217.

    Compatibility mode keeps the pairs i = j, whose exp(0) hides every other pair at real hidden states' distances.
    """
    value = _log_mean_exp(-_square_distance(z_UND, valid_UN) / s.tau, pairs_UNN)
    if s.clamp is not None:
        value = value + COMPAT_EPSILON
    square = torch.where(valid_UN.unsqueeze(-1), z_UND, 0.0).square().sum(dim=(1, 2))
    return value + s.norm_weight * square / (valid_UN.sum(dim=1) * z_UND.shape[-1])


def _centred(z_UND: Tensor, valid_UN: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens minus their mean, zero where not real, and the number of real tokens ``[U, 1, 1]``."""
    n = valid_UN.sum(dim=1)[:, None, None].to(z_UND.dtype)
    x = torch.where(valid_UN.unsqueeze(-1), z_UND, 0.0)
    return torch.where(valid_UN.unsqueeze(-1), x - x.sum(dim=1, keepdim=True) / n, 0.0), n


def _correlation(z_UND: Tensor, valid_UN: Tensor) -> Tensor:
    """Correlation matrix ``[U, D, D]`` of the features over the tokens; a constant feature correlates with nothing."""
    x, _ = _centred(z_UND, valid_UN)
    x = unit(x.mT).mT
    return x.mT @ x


def _off_diagonal_square(matrix_UDD: Tensor) -> Tensor:
    return matrix_UDD.square().sum(dim=(1, 2)) - matrix_UDD.diagonal(dim1=1, dim2=2).square().sum(dim=1)


def decorrelation(z_UND: Tensor, pairs_UNN: Tensor, valid_UN: Tensor, s: Settings) -> Tensor:
    r""":math:`\mathrm{mean}_{a \ne b} r_{ab}^2` of the correlations r between features, arXiv:2602.00217.

    Compatibility mode standardises every token over its features and correlates tokens, as the research code does.
    """
    if s.clamp is not None:
        x = unit(z_UND - z_UND.mean(dim=-1, keepdim=True))
        return _mean((x @ x.mT).square(), pairs_UNN)
    width = z_UND.shape[-1]
    return _off_diagonal_square(_correlation(z_UND, valid_UN)) / (width * (width - 1))


def perplexity_entropy(z_UND: Tensor, pairs_UNN: Tensor, valid_UN: Tensor, s: Settings) -> Tensor:
    r""":math:`-\mathrm{mean}_i H(\mathrm{softmax}_{j \ne i}(-|z_i - z_j|^2/\tau))`; no partner: 0."""
    logits = (-_square_distance(z_UND, valid_UN) / s.tau).masked_fill(~pairs_UNN, -math.inf)
    alone = ~pairs_UNN.any(dim=2, keepdim=True)
    log_p = logits.masked_fill(alone, 0.0).log_softmax(dim=2).masked_fill(~pairs_UNN, 0.0)
    entropy = -torch.where(pairs_UNN, log_p.exp() * log_p, 0.0).sum(dim=2)
    return -entropy.sum(dim=1) / valid_UN.sum(dim=1)


def cosine_infonce(z_UND: Tensor, pairs_UNN: Tensor, valid_UN: Tensor, s: Settings) -> Tensor:
    r""":math:`\log \mathrm{mean}_{ij} \exp(c_{ij}/\tau)`, diagonal included, arXiv:2506.09027."""
    return _log_mean_exp(_cosine(z_UND, pairs_UNN, s) / s.tau, pairs_UNN)


def l2_infonce(z_UND: Tensor, pairs_UNN: Tensor, valid_UN: Tensor, s: Settings) -> Tensor:
    r""":math:`\log \mathrm{mean}_{ij} \exp(-|z_i - z_j|^2/\tau)`, diagonal included, arXiv:2506.09027."""
    return _log_mean_exp(-_square_distance(z_UND, valid_UN) / s.tau, pairs_UNN)


def hinge(z_UND: Tensor, pairs_UNN: Tensor, valid_UN: Tensor, s: Settings) -> Tensor:
    r""":math:`\mathrm{mean}_{ij} \max(0, \epsilon + c_{ij})^2`, diagonal included, arXiv:2506.09027."""
    return _mean((s.margin + _cosine(z_UND, pairs_UNN, s)).clamp(min=0).square(), pairs_UNN)


def covariance(z_UND: Tensor, pairs_UNN: Tensor, valid_UN: Tensor, s: Settings) -> Tensor:
    r""":math:`\frac1D \sum_{a \ne b} \mathrm{Cov}_{ab}^2` of unit vectors times :math:`\sqrt D`, arXiv:2506.09027."""
    x, n = _centred(unit(z_UND) * math.sqrt(z_UND.shape[-1]), valid_UN)
    return _off_diagonal_square(x.mT @ x / (n - 1)) / z_UND.shape[-1]


def mean_cosine(z_UND: Tensor, pairs_UNN: Tensor, valid_UN: Tensor, s: Settings) -> Tensor:
    r""":math:`\mathrm{mean}_{i \ne j} c_{ij}`, Gao et al. 2019."""
    return _mean(_cosine(z_UND, pairs_UNN, s), pairs_UNN)


def uniformity(z_UND: Tensor, pairs_UNN: Tensor, valid_UN: Tensor, s: Settings) -> Tensor:
    r""":math:`\log \mathrm{mean}_{i \ne j} \exp(-2 |\hat z_i - \hat z_j|^2/\tau)`, arXiv:2005.10242."""
    return _log_mean_exp(-4 * (1 - _cosine(z_UND, pairs_UNN, s)) / s.tau, pairs_UNN)


def vicreg(z_UND: Tensor, pairs_UNN: Tensor, valid_UN: Tensor, s: Settings) -> Tensor:
    r"""Variance hinge and off-diagonal covariance of VICReg, arXiv:2105.04906, over the tokens of a unit."""
    x, n = _centred(z_UND, valid_UN)
    cov = x.mT @ x / (n - 1)
    std = (cov.diagonal(dim1=1, dim2=2) + 1e-4).sqrt()
    variance = (s.target_std - std).clamp(min=0).mean(dim=1)
    return s.variance_weight * variance + s.covariance_weight * _off_diagonal_square(cov) / z_UND.shape[-1]


def barlow(z_UND: Tensor, pairs_UNN: Tensor, valid_UN: Tensor, s: Settings) -> Tensor:
    r""":math:`\frac1D \sum_{a \ne b} r_{ab}^2` of the correlations r between features, arXiv:2103.03230, one view."""
    return _off_diagonal_square(_correlation(z_UND, valid_UN)) / z_UND.shape[-1]


def koleo(z_UND: Tensor, pairs_UNN: Tensor, valid_UN: Tensor, s: Settings) -> Tensor:
    r""":math:`-\mathrm{mean}_i \log \min_{j \ne i} |\hat z_i - \hat z_j|`, arXiv:1806.03198; smoothed."""
    nearest = _cosine(z_UND, pairs_UNN, s).masked_fill(~pairs_UNN, -math.inf).max(dim=2).values
    paired = nearest > -math.inf
    chord = 2 - 2 * s.shrink * torch.where(paired, nearest, 0.0)
    return torch.where(paired, -0.5 * chord.log(), 0.0).sum(dim=1) / valid_UN.sum(dim=1)


def sigreg_knots(knots: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    r"""Points t on [0, 3], trapezoidal weights on [-3, 3] times :math:`e^{-t^2/2}`, and :math:`e^{-t^2/2}`."""
    t = torch.linspace(0.0, 3.0, knots, dtype=dtype, device=device)
    weights = torch.full_like(t, 2 * 3.0 / (knots - 1))
    weights[0] = weights[-1] = 3.0 / (knots - 1)
    target = torch.exp(-0.5 * t.square())
    return t, weights * target, target


def sigreg(z_UND: Tensor, valid_UN: Tensor, s: Settings, directions_DM: Tensor) -> Tensor:
    r"""Sketched isotropic Gaussian regularisation of LeJEPA, arXiv:2511.08544, over the tokens of a unit."""
    t, weights, target = sigreg_knots(s.knots, z_UND.dtype, z_UND.device)
    n = valid_UN.sum(dim=1)
    x_UNMK = (z_UND @ directions_DM).unsqueeze(-1) * t
    real = valid_UN[:, :, None, None]
    cos = torch.where(real, x_UNMK.cos(), 0.0).sum(dim=1) / n[:, None, None]
    sin = torch.where(real, x_UNMK.sin(), 0.0).sum(dim=1) / n[:, None, None]
    return (((cos - target).square() + sin.square()) @ weights).mean(dim=1) * n


Definition = Callable[[Tensor, Tensor, Tensor, Settings], Tensor]

DEFINITIONS: dict[str, Definition] = {
    f.__name__: f
    for f in (
        angular,
        orthogonalization,
        l2_repel,
        decorrelation,
        perplexity_entropy,
        cosine_infonce,
        l2_infonce,
        hinge,
        covariance,
        mean_cosine,
        uniformity,
        vicreg,
        barlow,
        koleo,
    )
}


def per_unit(z_RND: Tensor, scope: Scope, s: Settings, directions_DM: Tensor | None = None) -> Tensor:
    """Loss of each unit, ``[U]``; 0 for units without a pair. Differentiable, twice too."""
    z_RND = z_RND.to(scope.pairs_U.dtype)
    device = z_RND.device
    valid_RN = scope.valid_RN
    if valid_RN is None:
        valid_RN = torch.ones(scope.rows, scope.row_size, dtype=torch.bool, device=device)
    pairs_RNN = scope.pairs_RNN(diagonal=s.diagonal, device=device)

    def evaluate(z_UND: Tensor, pairs_UNN: Tensor, valid_UN: Tensor) -> Tensor:
        if directions_DM is not None:
            return sigreg(z_UND, valid_UN, s, directions_DM)
        return DEFINITIONS[s.form](z_UND, pairs_UNN, valid_UN, s)

    if scope.unit_RN is None and scope.rows_per_unit == 1 and scope.valid_RN is None and scope.row_size > 1:
        return evaluate(z_RND, pairs_RNN, valid_RN)

    # the general case, one unit at a time: its tokens, which may lie in several rows, and the pairs within its rows
    unit_RN = scope.unit_RN
    if unit_RN is None:
        unit_RN = torch.arange(scope.rows, device=device).div(scope.rows_per_unit, rounding_mode="floor")
        unit_RN = unit_RN.unsqueeze(1).expand(scope.rows, scope.row_size)
    row_RN = torch.arange(scope.rows, device=device).unsqueeze(1).expand(scope.rows, scope.row_size)
    values = [z_RND.sum() * 0.0] * scope.n_units
    for u in sorted(set(unit_RN[valid_RN].tolist())):
        if scope.pairs_U[u] == 0:
            continue
        member = valid_RN & (unit_RN == u)
        row, place = row_RN[member], member.nonzero()[:, 1]
        same_row = row.unsqueeze(1) == row.unsqueeze(0)
        pairs = same_row & pairs_RNN[row.unsqueeze(1), place.unsqueeze(1), place.unsqueeze(0)]
        one = torch.ones(1, len(row), dtype=torch.bool, device=device)
        values[u] = evaluate(z_RND[member].unsqueeze(0), pairs.unsqueeze(0), one).squeeze(0)
    return torch.stack(values)
