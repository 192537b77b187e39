"""Repulsion by squared distance, a rival form of Liu et al. 2026."""

from __future__ import annotations

import torch
from torch import Tensor

from decondense.config import LossConfig
from decondense.losses import dense
from decondense.losses.form import Form
from decondense.losses.pair_forms import Distance, PairForm, compat_epsilon
from decondense.losses.pair_mask import PairMask


def definition(z_UND: Tensor, pairs_UNN: Tensor, valid_UN: Tensor, s: LossConfig) -> Tensor:
    r""":math:`\log \mathrm{mean}_{i \ne j} \exp(-|z_i - z_j|^2/\tau) + \lambda_{norm} \mathrm{mean}(z^2)`, 2602.00217.

    Compatibility mode keeps the pairs i = j, whose exp(0) hides every other pair at real hidden states' distances.
    """
    value = dense.log_mean_exp(-dense.square_distance(z_UND, valid_UN) / s.tau, pairs_UNN)
    if s.clamp is not None:
        value = value + compat_epsilon(s)
    square = torch.where(valid_UN.unsqueeze(-1), z_UND, 0.0).square().sum(dim=(1, 2))
    return value + s.norm_weight * square / (valid_UN.sum(dim=1) * z_UND.shape[-1])


def pair_form(s: LossConfig) -> PairForm:
    """exp(-d/tau), its logarithm."""
    return Distance(diagonal=s.diagonal, slope=2 / s.tau, offset=compat_epsilon(s))


def _norm_term(z_RND: Tensor, pairs: PairMask, s: LossConfig) -> Tensor:
    norm_RN = torch.linalg.vector_norm(pairs.real(z_RND), dim=-1, dtype=pairs.pairs_U.dtype)
    mean_U = pairs.to_segments(norm_RN.square()) / (pairs.tokens_U.clamp(min=1) * z_RND.shape[-1])
    return torch.where(pairs.pairs_U > 0, s.norm_weight * mean_U, 0.0)


FORM = Form(definition=definition, pair_form=pair_form, extra=_norm_term)
