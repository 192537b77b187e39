r"""Straight trajectories: the opposite prior to dispersion.

Semantic Tube Prediction (Huang, LeCun, Balestriero 2026, arXiv:2602.22617) takes three positions s < r < t and lowers
:math:`1 - \cos(z_r - z_s, z_t - z_r)`, drawn at random once a sequence. Here every token with two neighbours counts,
and s, r, t are neighbours, the smallest spans: nothing is drawn, and all of a sequence is seen. It is what the
curvature of a trajectory is measured by.

Neighbours are the real tokens of one document in their order. A step of length zero has no direction and the cosine 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from decondense.config import LossConfig
from decondense.geometry import unit
from decondense.losses import features
from decondense.losses.form import Form
from decondense.losses.pair_mask import PairMask


def definition(z_UND: Tensor, pairs_UNN: Tensor, valid_UN: Tensor, s: LossConfig) -> Tensor:
    r""":math:`\mathrm{mean}_i (1 - \cos(z_i - z_{i-1}, z_{i+1} - z_i))`; 0 for two tokens. All tokens are real here."""
    step = unit(z_UND[:, 1:] - z_UND[:, :-1])
    bend = 1 - (step[:, 1:] * step[:, :-1]).sum(dim=-1)
    return bend.sum(dim=1) / max(1, bend.shape[1])


def per_segment(z_RND: Tensor, pairs: PairMask, s: LossConfig) -> Tensor:
    """The same for all segments of a row at once: the tokens of each are brought together, in their order."""
    x = features.real_tokens(z_RND, pairs)
    key = pairs.label_RN
    if key is None and pairs.valid_RN is not None:
        key = torch.where(pairs.valid_RN, 0, -1)
    order = None if key is None else key.argsort(dim=1, stable=True)
    if order is not None:
        x = x.gather(1, order.unsqueeze(-1).expand_as(x))
    step = unit(x[:, 1:] - x[:, :-1])
    bend = 1 - (step[:, 1:] * step[:, :-1]).sum(dim=-1)
    inner = torch.ones_like(bend)
    if key is not None and order is not None:
        ordered = key.gather(1, order)  # -1: tokens that are not real
        inner = ((ordered[:, 2:] == ordered[:, :-2]) & (ordered[:, 2:] >= 0)).to(bend.dtype)
    shape, middle = x.shape[:2], slice(1, -1)
    sums = []
    for values in (bend * inner, inner):
        if order is None:
            sums.append(values.sum(dim=1))
        else:
            sums.append(pairs.to_segments(values.new_zeros(shape).scatter(1, order[:, middle], values)))
    return features.or_zero(sums[0] / sums[1].clamp(min=1), pairs)


FORM = Form(definition=definition, per_segment=per_segment)
