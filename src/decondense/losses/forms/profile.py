"""Squared difference of the mean cosine from a target: no pairs are formed."""

from __future__ import annotations

from torch import Tensor

from decondense.config import LossConfig
from decondense.losses import features
from decondense.losses.form import Form
from decondense.losses.forms import mean_cosine
from decondense.losses.pair_mask import PairMask


def definition(z_UND: Tensor, pairs_UNN: Tensor, valid_UN: Tensor, s: LossConfig) -> Tensor:
    r""":math:`(\mathrm{mean}_{i \ne j} c_{ij} - c^*)^2`; over sequences the mean has their variance in it."""
    return (mean_cosine.definition(z_UND, pairs_UNN, valid_UN, s) - s.target_cosine).square()


def per_segment(z_RND: Tensor, pairs: PairMask, s: LossConfig) -> Tensor:
    """From the sum of the unit vectors of each segment."""
    return features.or_zero((mean_cosine.per_segment(z_RND, pairs, s) - s.target_cosine).square(), pairs)


FORM = Form(definition=definition, per_segment=per_segment)
