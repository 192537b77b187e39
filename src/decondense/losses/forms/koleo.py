"""Kozachenko-Leonenko entropy estimator: distance to the nearest token."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from decondense.config import LossConfig
from decondense.geometry import statistics_dtype, unit
from decondense.losses import dense
from decondense.losses.form import Form
from decondense.losses.pair_forms import PairForm, shrink
from decondense.losses.pair_mask import PairMask
from decondense.losses.vectors import chunks, products


def definition(z_UND: Tensor, pairs_UNN: Tensor, valid_UN: Tensor, s: LossConfig) -> Tensor:
    r""":math:`-\mathrm{mean}_i \log \min_{j \ne i} |\hat z_i - \hat z_j|`, arXiv:1806.03198; smoothed."""
    nearest = dense.cosine(z_UND, pairs_UNN, s).masked_fill(~pairs_UNN, -math.inf).max(dim=2).values
    paired = nearest > -math.inf
    chord = 2 - 2 * shrink(s) * torch.where(paired, nearest, 0.0)
    return torch.where(paired, -0.5 * chord.log(), 0.0).sum(dim=1) / valid_UN.sum(dim=1)


@torch.no_grad()
def _nearest(z_RND: Tensor, pairs: PairMask) -> tuple[Tensor, Tensor]:
    """Index of each token's nearest partner by cosine ``[R, N]``, and whether it has a partner."""
    place_RN = torch.zeros(z_RND.shape[:2], dtype=torch.long, device=z_RND.device)
    best_RN = torch.full(z_RND.shape[:2], -math.inf, dtype=statistics_dtype(z_RND.dtype), device=z_RND.device)
    form = PairForm()
    for chunk in chunks(z_RND, pairs.valid_RN, pairs.label_RN, form):
        place, best = place_RN[chunk.rows], best_RN[chunk.rows]
        (buffer,) = chunk.buffers(1)
        for i, j in chunk.tiles(symmetric=False):
            gap = chunk.view(buffer, i, j)
            products(chunk.p, i, j, form, gap)
            closeness = gap.neg_()
            chunk.exclude(closeness, i, j, diagonal=True)
            value, index = closeness.max(dim=2)
            closer = value > best[:, i]
            best[:, i] = torch.where(closer, value, best[:, i])
            place[:, i] = torch.where(closer, index + j.start, place[:, i])
    paired = best_RN > -math.inf
    return place_RN, paired if pairs.valid_RN is None else paired & pairs.valid_RN


def per_segment(z_RND: Tensor, pairs: PairMask, s: LossConfig) -> Tensor:
    """The nearest partners by tiles; then plain autograd of the distances to them."""
    place_RN, paired_RN = _nearest(z_RND, pairs)
    u = unit(pairs.real(z_RND))
    partner = u.gather(1, place_RN.unsqueeze(-1).expand(-1, -1, u.shape[-1]))
    # 2 - 2 kappa c from the difference, which does not cancel where c is close to 1; a zero vector has c = 0
    square, other = torch.linalg.vecdot(u, u), torch.linalg.vecdot(partner, partner)
    chord = 2 - shrink(s) * (square + other - (u - partner).square().sum(dim=-1))
    term_RN = torch.where(paired_RN, -0.5 * torch.where(paired_RN, chord, 1.0).log(), 0.0)
    return pairs.to_segments(term_RN) / pairs.tokens_U.clamp(min=1)


FORM = Form(definition=definition, per_segment=per_segment)
