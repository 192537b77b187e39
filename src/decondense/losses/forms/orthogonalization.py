"""Squared lack of orthogonality, a rival form of Liu et al. 2026."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from decondense.config import LossConfig
from decondense.losses import dense
from decondense.losses.form import Form
from decondense.losses.pair_forms import Kernel, PairForm, SmoothedAngle


def definition(z_UND: Tensor, pairs_UNN: Tensor, valid_UN: Tensor, s: LossConfig) -> Tensor:
    r""":math:`\mathrm{mean}_{i \ne j} \max(0, 1/2 - \theta_{ij}/\pi)^2`, arXiv:2602.00217."""
    return dense.mean((0.5 - dense.angle(z_UND, pairs_UNN, s)).clamp(min=0).square(), pairs_UNN)


@dataclass(frozen=True)
class _Orthogonalization(SmoothedAngle):
    """max(0, 1/2 - theta/pi)^2."""

    log: bool = False

    def kernel(self) -> Kernel | None:
        if self.clamp is not None:
            return None
        return Kernel("orthogonalization", slope=2.0 * self.kappa / math.pi, kappa=self.kappa, delta=self.delta)

    def value(self, S: Tensor, out: Tensor) -> None:
        self.half_angle(S, out).mul_(-2.0 / math.pi).add_(0.5).clamp_(min=0.0).square_()

    def weight(self, S: Tensor, E: Tensor) -> None:
        E.sqrt_().mul_(self.inverse_sine(S))


def pair_form(s: LossConfig) -> PairForm:
    """max(0, 1/2 - theta/pi)^2, its mean."""
    return _Orthogonalization(**SmoothedAngle.options(s, 2.0 / math.pi))


FORM = Form(definition=definition, pair_form=pair_form)
