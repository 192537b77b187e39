"""Variance and covariance terms of VICReg over tokens."""

from __future__ import annotations

from torch import Tensor

from decondense.config import LossConfig
from decondense.losses import dense, features
from decondense.losses.form import Form
from decondense.losses.pair_mask import PairMask


def definition(z_UND: Tensor, pairs_UNN: Tensor, valid_UN: Tensor, s: LossConfig) -> Tensor:
    r"""Variance hinge and off-diagonal covariance of VICReg, arXiv:2105.04906, over the tokens of a segment."""
    x, n = dense.centred(z_UND, valid_UN)
    cov = x.mT @ x / (n - 1)
    std = (cov.diagonal(dim1=1, dim2=2) + 1e-4).sqrt()
    variance = (s.target_std - std).clamp(min=0).mean(dim=1)
    return s.variance_weight * variance + s.covariance_weight * dense.off_diagonal_square(cov) / z_UND.shape[-1]


def per_segment(z_RND: Tensor, pairs: PairMask, s: LossConfig) -> Tensor:
    """The same with no matrix larger than the smaller of D x D and N x N."""
    n_U = features.safe_count(pairs)
    x = features.centred(features.real_tokens(z_RND, pairs), pairs)
    variance_UD = pairs.to_segments(x.square()) / (n_U - 1).unsqueeze(1)
    hinge_U = (s.target_std - (variance_UD + 1e-4).sqrt()).clamp(min=0).mean(dim=1)
    covariance_U = features.off_diagonal(x, pairs) / (z_RND.shape[-1] * (n_U - 1).square())
    return features.or_zero(s.variance_weight * hinge_U + s.covariance_weight * covariance_U, pairs)


FORM = Form(definition=definition, per_segment=per_segment)
