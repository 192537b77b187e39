r"""Unit vectors, their norms, and the rule for zero vectors: the same for what is trained and what is measured.

Shape suffixes: ``N`` vectors of a set, ``D`` features.

A vector whose largest element is at most :data:`ZERO_NORM` counts as the zero vector: it has no direction, its cosine
with every vector, itself included, is 0, and it receives no gradient.

The angle that is trained is *smoothed*,

.. math:: \theta_\delta(c) = \arccos\!\big(c / \sqrt{1 + \delta^2}\big), \qquad
          \theta_\delta'(c) = -1 / \sqrt{1 + \delta^2 - c^2},

because the slope of :math:`\arccos` is infinite at :math:`c = 1`, which repeated tokens reach. The smoothing equals
shrinking every unit vector by :math:`(1 + \delta^2)^{-1/4}`; ``docs/math.md`` tabulates what it costs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["ZERO_NORM", "inverse_norm", "shrink", "statistics_dtype", "unit"]


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
    present = ~(largest <= ZERO_NORM)  # NaN is not a zero vector: it stays NaN
    largest = torch.where(present, largest, 1.0)
    scaled = z / largest
    # the inner where keeps the gradient of sqrt at 0 away from the rows that the outer where drops
    square = scaled.square().sum(dim=-1, keepdim=True)
    norm = torch.where(present, square, 1.0).sqrt()
    return torch.where(present, scaled / (norm + epsilon / largest), 0.0)


def inverse_norm(z: Tensor, *, epsilon: float = 0.0, wait: bool | None = None) -> tuple[Tensor, Tensor]:
    r""":math:`1/(|z| + \epsilon)` and :math:`|z|` along the last dimension, in the dtype of ``z``; not differentiated.

    Both are 0 for a zero vector (see above).

    Args:
        z: float32 or float64, ``[..., D]``.
        epsilon: added to the norm before it is inverted.
        wait: look at the norms, which waits for the device, and omit the guard against over- and underflow of squares
            where none is near. None: on a CPU only.
    """
    norm = torch.linalg.vector_norm(z, dim=-1)
    look = z.device.type == "cpu" if wait is None else wait
    if look and bool(((norm > 1e-15) & (norm < 1e18)).all()):
        return (norm + epsilon).reciprocal_(), norm
    # lengths whose squares over- or underflow: measure relative to the largest element
    largest = torch.maximum(z.amax(dim=-1), -z.amin(dim=-1))
    present = ~(largest <= ZERO_NORM)  # NaN is not a zero vector: it stays NaN
    largest = torch.where(present, largest, 1.0)
    relative = torch.linalg.vector_norm(z / largest.unsqueeze(-1), dim=-1)
    inverse = torch.where(present, 1.0 / (relative + epsilon / largest) / largest, 0.0)
    return inverse, torch.where(present, relative * largest, 0.0)


def shrink(delta: float) -> float:
    r"""Return :math:`\kappa = 1/\sqrt{1 + \delta^2}`, the factor on the cosine inside the smoothed angle."""
    return 1.0 / math.sqrt(1.0 + delta * delta)
