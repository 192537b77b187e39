"""Squared correlations between features, a rival form of Liu et al. 2026."""

from __future__ import annotations

import torch
from torch import Tensor

from decondense.config import LossConfig
from decondense.geometry import unit
from decondense.losses import dense, features
from decondense.losses.form import Form
from decondense.losses.pair_mask import PairMask


def definition(z_UND: Tensor, pairs_UNN: Tensor, valid_UN: Tensor, s: LossConfig) -> Tensor:
    r""":math:`\mathrm{mean}_{a \ne b} r_{ab}^2` of the correlations r between features, arXiv:2602.00217.

    Compatibility mode standardises every token over its features and correlates tokens, as the research code does.
    """
    if s.clamp is not None:
        x = unit(z_UND - z_UND.mean(dim=-1, keepdim=True))
        return dense.mean((x @ x.mT).square(), pairs_UNN)
    width = z_UND.shape[-1]
    return dense.off_diagonal_square(dense.correlation(z_UND, valid_UN)) / (width * (width - 1))


def per_segment(z_RND: Tensor, pairs: PairMask, s: LossConfig) -> Tensor:
    """The same with no matrix larger than the smaller of D x D and N x N."""
    width, x = z_RND.shape[-1], features.real_tokens(z_RND, pairs)
    if s.clamp is None:
        return features.or_zero(features.correlation_square(x, pairs) / (width * (width - 1)), pairs)
    n_U = features.safe_count(pairs)
    x = unit(x - x.mean(dim=-1, keepdim=True))
    diagonal_U = pairs.to_segments(torch.linalg.vecdot(x, x).square())
    return features.or_zero((features.gram_square(x, pairs) - diagonal_U) / (n_U * (n_U - 1)), pairs)


FORM = Form(definition=definition, per_segment=per_segment)
