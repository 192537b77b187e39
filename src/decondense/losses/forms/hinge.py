"""Squared hinge of cosines, Diffuse and Disperse."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from decondense.config import LossConfig
from decondense.losses import dense
from decondense.losses.form import Form
from decondense.losses.pair_forms import Kernel, PairForm


def definition(z_UND: Tensor, pairs_UNN: Tensor, valid_UN: Tensor, s: LossConfig) -> Tensor:
    r""":math:`\mathrm{mean}_{ij} \max(0, \epsilon + c_{ij})^2`, diagonal included, arXiv:2506.09027."""
    return dense.mean((s.margin + dense.cosine(z_UND, pairs_UNN, s)).clamp(min=0).square(), pairs_UNN)


@dataclass(frozen=True)
class _Hinge(PairForm):
    slope: float = 2.0
    log: bool = False
    margin: float = 0.0

    def kernel(self) -> Kernel | None:
        return Kernel("hinge", slope=self.slope, margin=self.margin)

    def value(self, S: Tensor, out: Tensor) -> None:
        torch.neg(S, out=out).add_(1.0 + self.margin).clamp_(min=0.0).square_()

    def weight(self, S: Tensor, E: Tensor) -> None:
        E.sqrt_()


def pair_form(s: LossConfig) -> PairForm:
    """max(0, margin + c)^2, its mean."""
    return _Hinge(diagonal=s.diagonal, margin=s.margin)


FORM = Form(definition=definition, pair_form=pair_form)
