"""Entropy of each token's softmax over its partners. Dense only: its least value is the collapse of all tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from decondense.config import LossConfig
from decondense.losses import dense
from decondense.losses.form import Form


def definition(z_UND: Tensor, pairs_UNN: Tensor, valid_UN: Tensor, s: LossConfig) -> Tensor:
    r""":math:`-\mathrm{mean}_i H(\mathrm{softmax}_{j \ne i}(-|z_i - z_j|^2/\tau))`; no partner: 0."""
    logits = (-dense.square_distance(z_UND, valid_UN) / s.tau).masked_fill(~pairs_UNN, -math.inf)
    alone = ~pairs_UNN.any(dim=2, keepdim=True)
    log_p = logits.masked_fill(alone, 0.0).log_softmax(dim=2).masked_fill(~pairs_UNN, 0.0)
    entropy = -torch.where(pairs_UNN, log_p.exp() * log_p, 0.0).sum(dim=2)
    return -entropy.sum(dim=1) / valid_UN.sum(dim=1)


FORM = Form(definition=definition)
