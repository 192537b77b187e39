"""Covariance of unit vectors, Diffuse and Disperse."""

from __future__ import annotations

import math

from torch import Tensor

from decondense.config import LossConfig
from decondense.geometry import unit
from decondense.losses import dense, features
from decondense.losses.form import Form
from decondense.losses.pair_mask import PairMask


def definition(z_UND: Tensor, pairs_UNN: Tensor, valid_UN: Tensor, s: LossConfig) -> Tensor:
    r""":math:`\frac1D \sum_{a \ne b} \mathrm{Cov}_{ab}^2` of unit vectors times :math:`\sqrt D`, arXiv:2506.09027."""
    x, n = dense.centred(unit(z_UND) * math.sqrt(z_UND.shape[-1]), valid_UN)
    return dense.off_diagonal_square(x.mT @ x / (n - 1)) / z_UND.shape[-1]


def per_segment(z_RND: Tensor, pairs: PairMask, s: LossConfig) -> Tensor:
    """The same with no matrix larger than the smaller of D x D and N x N."""
    width, n_U = z_RND.shape[-1], features.safe_count(pairs)
    x = features.centred(unit(features.real_tokens(z_RND, pairs)) * math.sqrt(width), pairs)
    return features.or_zero(features.off_diagonal(x, pairs) / (width * (n_U - 1).square()), pairs)


FORM = Form(definition=definition, per_segment=per_segment)
