"""Redundancy term of Barlow Twins over tokens."""

from __future__ import annotations

from torch import Tensor

from decondense.config import LossConfig
from decondense.losses import dense, features
from decondense.losses.form import Form
from decondense.losses.pair_mask import PairMask


def definition(z_UND: Tensor, pairs_UNN: Tensor, valid_UN: Tensor, s: LossConfig) -> Tensor:
    r""":math:`\frac1D \sum_{a \ne b} r_{ab}^2` of the correlations r between features, arXiv:2103.03230, one view."""
    return dense.off_diagonal_square(dense.correlation(z_UND, valid_UN)) / z_UND.shape[-1]


def per_segment(z_RND: Tensor, pairs: PairMask, s: LossConfig) -> Tensor:
    """The same with no matrix larger than the smaller of D x D and N x N."""
    value_U = features.correlation_square(features.real_tokens(z_RND, pairs), pairs) / z_RND.shape[-1]
    return features.or_zero(value_U, pairs)


FORM = Form(definition=definition, per_segment=per_segment)
