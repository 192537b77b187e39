r"""The geometry that is trained and plotted: unit vectors, cosines, angles, and the cases with a closed form.

Shape suffixes: ``B`` sequences, ``T`` tokens, ``D`` features, ``N`` vectors of a set.

The angle is *smoothed*,

.. math:: \theta_\delta(c) = \arccos\!\big(c / \sqrt{1 + \delta^2}\big), \qquad
          \theta_\delta'(c) = -1 / \sqrt{1 + \delta^2 - c^2},

because the slope of :math:`\arccos` is infinite at :math:`c = 1`, which repeated tokens reach. The smoothing equals
shrinking every unit vector by :math:`(1 + \delta^2)^{-1/4}`; ``docs/math.md`` tabulates what it costs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "ZERO_NORM",
    "angle",
    "antipodal",
    "cosine",
    "mean_cosine",
    "orthonormal",
    "shrink",
    "simplex",
    "statistics_dtype",
    "unit",
    "valid_pairs",
]


ZERO_NORM = 1e-30
"""A vector whose largest element is not beyond this counts as the zero vector."""


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of all statistics: float64 for float64 input, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit(z: Tensor, *, epsilon: float = 0.0) -> Tensor:
    r"""Unit vectors :math:`\hat z = z / (|z| + \epsilon)` along the last dimension, in float32 (float64 for float64).

    A zero vector stays zero and its gradient is zero, so nothing here can make a NaN from finite input.
    Differentiable with respect to ``z``.

    The squared norm is taken of ``z / max|z|``, so neither huge nor tiny vectors over- or underflow. A vector without
    an element beyond ``ZERO_NORM`` counts as zero: the gradient goes with 1 / |z| and has to stay finite.
    """
    z = z.to(statistics_dtype(z.dtype))
    largest = z.detach().abs().amax(dim=-1, keepdim=True)
    present = largest > ZERO_NORM
    largest = torch.where(present, largest, 1.0)
    scaled = z / largest
    # the inner where keeps the gradient of sqrt at 0 away from the rows that the outer where drops
    square = scaled.square().sum(dim=-1, keepdim=True)
    norm = torch.where(present, square, 1.0).sqrt()
    return torch.where(present, scaled / (norm + epsilon / largest), 0.0)


def shrink(delta: float) -> float:
    r"""Return :math:`\kappa = 1/\sqrt{1 + \delta^2}`, the factor on the cosine inside the smoothed angle."""
    return 1.0 / math.sqrt(1.0 + delta * delta)


def cosine(z: Tensor, other: Tensor | None = None) -> Tensor:
    r"""Pairwise cosine similarity :math:`c_{ij} = \langle \hat z_i, \hat z_j\rangle`, shape ``[..., N, N]``.

    Liu et al. 2026, arXiv:2602.00217, section on embedding condensation. A zero vector is orthogonal to everything.
    """
    u = unit(z)
    v = u if other is None else unit(other)
    return u @ v.mT


def angle(cos: Tensor, delta: float = 0.0) -> Tensor:
    r"""Smoothed angle in units of :math:`\pi`: :math:`\arccos(c/\sqrt{1+\delta^2})/\pi` in [0, 1]; 1/2 is orthogonal.

    With ``delta=0`` this is the angular distance of arXiv:2602.00217; values outside [-1, 1] are rounding and are
    clamped.
    """
    return torch.arccos((cos * shrink(delta)).clamp(-1.0, 1.0)) / math.pi


def mean_cosine(z: Tensor, mask: Tensor | None = None, *, diagonal: bool = False) -> Tensor:
    r"""Mean cosine of the pairs of a set, without forming the pairs, in float64; shape ``[...]``.

    .. math:: \frac{1}{N^2}\sum_{ij} c_{ij} = \frac{|\sum_i \hat z_i|^2}{N^2}
        \qquad\text{or, over } i \ne j,\qquad \frac{|\sum_i \hat z_i|^2 - \sum_i |\hat z_i|^2}{N (N - 1)}

    ``z`` is ``[..., N, D]``, ``mask`` ``[..., N]`` (true = counts). Fewer vectors than a pair needs give NaN.
    """
    u = unit(z).double()
    count = torch.full(u.shape[:-2], u.shape[-2], dtype=u.dtype, device=u.device)
    if mask is not None:
        u = u * mask.unsqueeze(-1)
        count = mask.sum(dim=-1).double()
    total = u.sum(dim=-2).square().sum(dim=-1)
    if diagonal:
        return total / count.square()
    return (total - u.square().sum(dim=(-2, -1))) / (count * (count - 1))


def valid_pairs(mask_BT: Tensor, segments_BT: Tensor | None = None) -> Tensor:
    """Ordered pairs i != j of real tokens, of the same segment where given: bool ``[B, T, T]`` (small inputs only)."""
    mask_BT = mask_BT.bool()
    pairs = mask_BT.unsqueeze(2) & mask_BT.unsqueeze(1)
    pairs &= ~torch.eye(mask_BT.shape[1], dtype=torch.bool, device=mask_BT.device)
    if segments_BT is not None:
        pairs &= segments_BT.unsqueeze(2) == segments_BT.unsqueeze(1)
    return pairs


def orthonormal(count: int, features: int, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """``count`` orthonormal vectors ``[count, features]``: every cosine 0, every angle 1/2."""
    if count > features:
        raise ValueError(f"{count} orthonormal vectors do not fit in {features} dimensions; use features >= {count}.")
    return torch.eye(count, features, dtype=dtype)


def simplex(count: int, features: int, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """Vertices of a regular simplex ``[count, features]``: every cosine -1/(count - 1), the least mean."""
    if count > features:
        raise ValueError(f"a simplex of {count} vertices is built in {count} coordinates; use features >= {count}.")
    return unit(torch.eye(count, features, dtype=dtype) - orthonormal(count, features, dtype=dtype).mean(dim=0))


def antipodal(count: int, features: int, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """Vectors +e, -e in turn ``[count, features]``: about half of the pairs at cosine -1, the rest at +1."""
    z = torch.zeros(count, features, dtype=dtype)
    z[0::2, 0] = 1.0
    z[1::2, 0] = -1.0
    return z
