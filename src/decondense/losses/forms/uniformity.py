"""Gaussian potential of the pairs, Wang & Isola 2020."""

from __future__ import annotations

from torch import Tensor

from decondense.config import LossConfig
from decondense.losses import dense
from decondense.losses.form import Form
from decondense.losses.pair_forms import Exponential, PairForm


def definition(z_UND: Tensor, pairs_UNN: Tensor, valid_UN: Tensor, s: LossConfig) -> Tensor:
    r""":math:`\log \mathrm{mean}_{i \ne j} \exp(-2 |\hat z_i - \hat z_j|^2/\tau)`, arXiv:2005.10242."""
    return dense.log_mean_exp(-4 * (1 - dense.cosine(z_UND, pairs_UNN, s)) / s.tau, pairs_UNN)


def pair_form(s: LossConfig) -> PairForm:
    """exp(-4 (1 - c)/tau), its logarithm."""
    return Exponential(slope=4 / s.tau, max_exponent=8 / s.tau)


FORM = Form(definition=definition, pair_form=pair_form)
