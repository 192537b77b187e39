"""InfoNCE of squared distances, Diffuse and Disperse."""

from __future__ import annotations

from torch import Tensor

from decondense.config import LossConfig
from decondense.losses import dense
from decondense.losses.form import Form
from decondense.losses.pair_forms import Distance, PairForm


def definition(z_UND: Tensor, pairs_UNN: Tensor, valid_UN: Tensor, s: LossConfig) -> Tensor:
    r""":math:`\log \mathrm{mean}_{ij} \exp(-|z_i - z_j|^2/\tau)`, diagonal included, arXiv:2506.09027."""
    return dense.log_mean_exp(-dense.square_distance(z_UND, valid_UN) / s.tau, pairs_UNN)


def pair_form(s: LossConfig) -> PairForm:
    """exp(-d/tau), its logarithm."""
    return Distance(diagonal=s.diagonal, slope=2 / s.tau)


FORM = Form(definition=definition, pair_form=pair_form)
