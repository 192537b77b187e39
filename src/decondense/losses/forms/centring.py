r"""Centring: the common direction is removed, and no token is repelled from another. A control.

.. math:: C = |\bar z|^2 / q, \qquad \bar z = \frac1n \sum_i z_i, \quad q = \frac1n \sum_i |z_i|^2,

with q held constant in the gradient :math:`\partial C/\partial z_i = 2 \bar z / (n q)`, which is the *same vector for
every token* of a sequence: the states are shifted against their mean as one, and all differences :math:`z_i - z_j`
stay. In ``mean_cosine`` every token has a force of its own, tangent to the sphere, :math:`\propto (\bar u - \langle
\bar u, \hat z_i \rangle \hat z_i)/|z_i|` with the mean :math:`\bar u` of the unit vectors: it turns tokens relative to
each other, which is repulsion. (The mean of unit vectors alone would be no control: :math:`|\bar u|^2` is the mean
cosine except for the diagonal.) For states of equal length C is that mean cosine too, so the two fall together, by
different means.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from decondense.config import LossConfig
from decondense.geometry import ZERO_NORM
from decondense.losses import dense, features
from decondense.losses.form import Form
from decondense.losses.pair_mask import PairMask


def _relative(x: Tensor) -> Tensor:
    """Relative to the largest element of each row, whose squares neither over- nor underflow; a zero row stays zero."""
    largest = x.detach().abs().amax(dim=(1, 2), keepdim=True)
    return x / torch.where(largest <= ZERO_NORM, math.inf, largest)


def definition(z_UND: Tensor, pairs_UNN: Tensor, valid_UN: Tensor, s: LossConfig) -> Tensor:
    r""":math:`|\bar z|^2` over the mean squared length, the latter a constant of the gradient; 0 for zero vectors."""
    x, n = dense.real(_relative(z_UND), valid_UN)
    square = (x.square().sum(dim=(1, 2)) / n[:, 0, 0]).detach()
    return (x.sum(dim=1) / n[:, 0]).square().sum(dim=1) / square.clamp(min=1e-30)


def per_segment(z_RND: Tensor, pairs: PairMask, s: LossConfig) -> Tensor:
    """From the sum of the states of each segment."""
    x, n_U = _relative(features.real_tokens(z_RND, pairs)), features.safe_count(pairs)
    square_U = pairs.to_segments(x.detach().square()).sum(dim=1) / n_U
    mean_UD = pairs.to_segments(x) / n_U.unsqueeze(1)
    return features.or_zero(mean_UD.square().sum(dim=1) / square_U.clamp(min=1e-30), pairs)


FORM = Form(definition=definition, per_segment=per_segment)
