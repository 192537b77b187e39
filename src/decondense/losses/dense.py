"""Building blocks of the definitions of the forms: dense matrices and plain autograd, never optimised.

Shape suffixes: ``U`` segments, ``N`` tokens of a segment, ``D`` features. ``z_UND`` are the hidden states,
``pairs_UNN`` the ordered pairs that count (bool), ``valid_UN`` the real tokens (bool).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from decondense.config import LossConfig
from decondense.geometry import unit
from decondense.losses.pair_forms import compat_epsilon, shrink


def mean(values_UNN: Tensor, pairs_UNN: Tensor) -> Tensor:
    """Mean over the pairs that count, ``[U]``."""
    return torch.where(pairs_UNN, values_UNN, 0.0).sum(dim=(1, 2)) / pairs_UNN.sum(dim=(1, 2))


def log_mean_exp(logits_UNN: Tensor, pairs_UNN: Tensor) -> Tensor:
    """Logarithm of the mean of exponentials over the pairs that count, ``[U]``."""
    summed = logits_UNN.masked_fill(~pairs_UNN, -math.inf).logsumexp(dim=(1, 2))
    return summed - pairs_UNN.sum(dim=(1, 2)).to(summed.dtype).log()


def cosine(z_UND: Tensor, pairs_UNN: Tensor, s: LossConfig) -> Tensor:
    """Cosines ``[U, N, N]``, 0 for pairs that do not count."""
    u = unit(z_UND, epsilon=compat_epsilon(s))
    # pairs that do not count must not send an infinite slope times zero backwards (delta = 0)
    return (u @ u.mT).masked_fill(~pairs_UNN, 0.0)


def angle(z_UND: Tensor, pairs_UNN: Tensor, s: LossConfig) -> Tensor:
    """theta / pi, smoothed; or, in compatibility mode, clamped with the slope of the boundary kept beyond it."""
    c = cosine(z_UND, pairs_UNN, s)
    if s.clamp is not None:
        c = c + (c.clamp(-1 + s.clamp, 1 - s.clamp) - c).detach()
    return torch.arccos((c * shrink(s)).clamp(-1, 1)) / math.pi


def square_distance(z_UND: Tensor, valid_UN: Tensor) -> Tensor:
    """|z_i - z_j|^2; around the mean of the segment, where less cancels."""
    x, _ = centred(z_UND, valid_UN)
    q = x.square().sum(dim=-1)
    return (q.unsqueeze(2) + q.unsqueeze(1) - 2 * (x @ x.mT)).clamp(min=0)


def real(z_UND: Tensor, valid_UN: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens, zero where not real, and the number of real tokens ``[U, 1, 1]``."""
    return torch.where(valid_UN.unsqueeze(-1), z_UND, 0.0), valid_UN.sum(dim=1)[:, None, None].to(z_UND.dtype)


def centred(z_UND: Tensor, valid_UN: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens minus their mean, zero where not real, and the number of real tokens ``[U, 1, 1]``."""
    x, n = real(z_UND, valid_UN)
    return torch.where(valid_UN.unsqueeze(-1), x - x.sum(dim=1, keepdim=True) / n, 0.0), n


def correlation(z_UND: Tensor, valid_UN: Tensor) -> Tensor:
    """Correlation matrix ``[U, D, D]`` of the features over the tokens; a constant feature correlates with nothing."""
    x, _ = centred(z_UND, valid_UN)
    x = unit(x.mT).mT
    return x.mT @ x


def off_diagonal_square(matrix_UDD: Tensor) -> Tensor:
    """Sum over a != b of the squared elements, ``[U]``."""
    return matrix_UDD.square().sum(dim=(1, 2)) - matrix_UDD.diagonal(dim1=1, dim2=2).square().sum(dim=1)
