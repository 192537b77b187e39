"""The angular form of Liu et al. 2026, the default."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from decondense.config import LossConfig
from decondense.losses import dense
from decondense.losses.form import Form
from decondense.losses.pair_forms import Kernel, PairForm, SmoothedAngle, compat_epsilon


def definition(z_UND: Tensor, pairs_UNN: Tensor, valid_UN: Tensor, s: LossConfig) -> Tensor:
    r""":math:`\log \mathrm{mean}_{i \ne j} \exp(-\theta_{ij}/(\pi\tau))`, arXiv:2602.00217.

    tau to 0: the closest pair alone; tau to infinity: the mean angle. delta to 0: the exact angle, whose slope at c = 1
    is infinite.
    """
    value = dense.log_mean_exp(-dense.angle(z_UND, pairs_UNN, s) / s.tau, pairs_UNN)
    return value if s.clamp is None else value + compat_epsilon(s)


@dataclass(frozen=True)
class _Angular(SmoothedAngle):
    """exp(rate theta)."""

    rate: float = -1.0 / math.pi

    def kernel(self) -> Kernel | None:
        if self.clamp is not None:
            return None
        return Kernel("angular", slope=-self.rate * self.kappa, rate=-self.rate, kappa=self.kappa, delta=self.delta)

    def logit(self, S: Tensor, out: Tensor) -> None:
        self.half_angle(S, out).mul_(2.0 * self.rate)

    def weight(self, S: Tensor, E: Tensor) -> None:
        E.mul_(self.inverse_sine(S))


def pair_form(s: LossConfig) -> PairForm:
    """exp(-theta/(pi tau)), its logarithm."""
    rate = 1.0 / (math.pi * s.tau)
    common = SmoothedAngle.options(s, rate)
    return _Angular(rate=-rate, max_exponent=1 / s.tau, offset=compat_epsilon(s), **common)


FORM = Form(definition=definition, pair_form=pair_form)
