"""InfoNCE of cosines, Diffuse and Disperse."""

from __future__ import annotations

from torch import Tensor

from decondense.config import LossConfig
from decondense.losses import dense
from decondense.losses.form import Form
from decondense.losses.pair_forms import Exponential, PairForm


def definition(z_UND: Tensor, pairs_UNN: Tensor, valid_UN: Tensor, s: LossConfig) -> Tensor:
    r""":math:`\log \mathrm{mean}_{ij} \exp(c_{ij}/\tau)`, diagonal included, arXiv:2506.09027."""
    return dense.log_mean_exp(dense.cosine(z_UND, pairs_UNN, s) / s.tau, pairs_UNN)


def pair_form(s: LossConfig) -> PairForm:
    """exp((c - 1)/tau), its logarithm."""
    return Exponential(diagonal=s.diagonal, slope=1 / s.tau, max_exponent=2 / s.tau, offset=1.0 / s.tau)


FORM = Form(definition=definition, pair_form=pair_form)
