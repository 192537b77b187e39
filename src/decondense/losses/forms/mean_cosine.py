"""Mean cosine of the pairs, from the sum of the unit vectors: no pairs are formed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from decondense.config import LossConfig
from decondense.losses import dense, features
from decondense.losses.form import Form
from decondense.losses.pair_mask import PairMask, differentiated_once
from decondense.losses.vectors import unit_rows


def definition(z_UND: Tensor, pairs_UNN: Tensor, valid_UN: Tensor, s: LossConfig) -> Tensor:
    r""":math:`\mathrm{mean}_{i \ne j} c_{ij}`, Gao et al. 2019."""
    return dense.mean(dense.cosine(z_UND, pairs_UNN, s), pairs_UNN)


class _MeanCosine(torch.autograd.Function):
    r""":math:`|\sum_i \hat z_i|^2 - \sum_i |\hat z_i|^2` of each segment; saves one vector per segment for backward."""

    @staticmethod
    def forward(ctx: Any, z_RND: Tensor, pairs: PairMask) -> Tensor:
        u, _, _ = unit_rows(z_RND, pairs.valid_RN)
        total_UD = pairs.to_segments(u)
        ctx.save_for_backward(z_RND, total_UD)
        ctx.pairs = pairs
        return total_UD.square().sum(dim=1) - pairs.to_segments(torch.linalg.vecdot(u, u))

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, grad_output_U: Tensor) -> tuple[Tensor | None, ...]:
        z_RND, total_UD = ctx.saved_tensors
        pairs: PairMask = ctx.pairs
        u, inverse_RN, _ = unit_rows(z_RND, pairs.valid_RN)
        total_RND = pairs.to_tokens(total_UD)
        along_RN = torch.linalg.vecdot(total_RND, u)
        scale_RN = 2.0 * pairs.to_tokens(grad_output_U) * inverse_RN
        gradient = u.mul_(-along_RN.unsqueeze(-1)).add_(total_RND).mul_(scale_RN.unsqueeze(-1))
        return gradient.to(z_RND.dtype), None


def per_segment(z_RND: Tensor, pairs: PairMask, s: LossConfig) -> Tensor:
    """From the sum of the unit vectors of each segment."""
    n_U = features.safe_count(pairs)
    total_U: Tensor = _MeanCosine.apply(z_RND, pairs)  # type: ignore[no-untyped-call]
    return features.or_zero(total_U / (n_U * (n_U - 1)), pairs)


FORM = Form(definition=definition, per_segment=per_segment)
