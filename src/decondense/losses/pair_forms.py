r"""A sum over pairs as the engines see it: a function of one number per pair, its derivative, its constants.

:mod:`chunked <decondense.losses.chunked>` and :mod:`online <decondense.losses.online>` read a :class:`PairForm`, the
Triton kernels its :class:`Kernel`. A form's file in ``losses/forms`` makes one from the options.

Shape suffixes: ``U`` segments.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from decondense import geometry
from decondense.config import LossConfig
from decondense.forms import COMPAT_EPSILON
from decondense.losses.pair_mask import PairMask

Space = Literal["sphere", "euclid", "raw"]


def shrink(s: LossConfig) -> float:
    """Factor of the smoothing on the cosine inside the angle; 1 with ``compat``, which clamps instead."""
    return geometry.shrink(s.delta) if s.clamp is None else 1.0


def compat_epsilon(s: LossConfig) -> float:
    """Added to a norm before dividing by it, and to the log-sum-exp; 0 without ``compat``."""
    return 0.0 if s.clamp is None else COMPAT_EPSILON


@dataclass(frozen=True)
class Kernel:
    """A form for the Triton kernel: one of its functions of 1 - c, and the constants."""

    function: Literal["angular", "orthogonalization", "exponential", "hinge"]
    slope: float
    """Constant factor of f'(c) that the kernel omits."""
    rate: float = 0.0
    """Rate of the exponential, per radian or per unit of 1 - c."""
    kappa: float = 1.0
    """Factor on the cosine inside the angle."""
    delta: float = 0.0
    """Smoothing of the angle."""
    margin: float = 0.0
    """Of the hinge."""


@dataclass(frozen=True)
class PairForm:
    """A sum over pairs of a function of a number per pair. Tiles are changed in place.

    The number S is, on the sphere, ``(1 - kappa) + kappa (1 - c)``, kappa = ``scale**2``: the distance of the shrunk
    cosine from 1, which keeps its precision near 1; for distances, ``-d slope / 2``; raw, the product.
    """

    space: Space = "sphere"
    diagonal: bool = False
    """Pairs i = j count."""
    scale: float = 1.0
    """Unit vectors are multiplied by this (the square root of the shrinking of the cosine)."""
    gap: float = 0.0
    """1 - kappa."""
    epsilon: float = 0.0
    """Added to the norms (compatibility)."""
    slope: float = 1.0
    """Constant factor of df/dc that :meth:`weight` omits."""
    log: bool = True
    """The segment's loss is a log-mean-exp; else a mean."""
    max_exponent: float = 0.0
    """Greatest magnitude of the exponent of a log form."""
    offset: float = 0.0
    """Added to the logarithm: the constant that the engine's exponents omit."""
    proportional: bool = False
    """f' is a constant times f: :meth:`weight` does nothing."""

    def kernel(self) -> Kernel | None:
        """The form for the Triton kernels; None: not supported there."""
        return None

    def logit(self, S: Tensor, out: Tensor) -> None:
        """Write the exponent of a log form."""
        raise NotImplementedError

    def value(self, S: Tensor, out: Tensor) -> None:
        """Write f."""
        self.logit(S, out)
        out.exp_()

    def weight(self, S: Tensor, E: Tensor) -> None:
        """Turn E = f into its derivative by the cosine, without ``slope``; S may be used up."""


@dataclass(frozen=True)
class SmoothedAngle(PairForm):
    """Functions of theta = arccos(kappa c), or, with a clamp, of the clamped cosine with the slope of the boundary."""

    kappa: float = 1.0
    delta: float = 0.0
    clamp: float | None = None

    def half_angle(self, S: Tensor, out: Tensor) -> Tensor:
        """theta/2 = arcsin sqrt(S/2)."""
        if self.clamp is None:
            torch.mul(S, 0.5, out=out)
        else:
            torch.clamp(S, self.clamp, 2.0 - self.clamp, out=out).mul_(0.5)
        return out.sqrt_().arcsin_()

    def inverse_sine(self, S: Tensor) -> Tensor:
        """sqrt(2) / sin(theta) in place: sin^2 = S (2 - S)."""
        if self.clamp is not None:
            S.clamp_(self.clamp, 2.0 - self.clamp)
        return S.addcmul_(S, S, value=-0.5).rsqrt_()

    @staticmethod
    def options(s: LossConfig, slope: float) -> dict[str, Any]:
        """Fields that every function of the angle sets; ``slope``: constant factor of -f'(theta)."""
        kappa = shrink(s)
        # 1 - 1/sqrt(1 + delta^2) without the cancellation
        gap = s.delta**2 * kappa * kappa / (1.0 + kappa) if s.clamp is None else 0.0
        # f' carries 1/sin; the engine's inverse sine is sqrt(2) of it
        return {
            "scale": math.sqrt(kappa),
            "gap": gap,
            "epsilon": compat_epsilon(s),
            "slope": slope / math.sqrt(2.0),
            "kappa": kappa,
            "delta": s.delta,
            "clamp": s.clamp,
        }


@dataclass(frozen=True)
class Exponential(PairForm):
    """exp(-slope (1 - c)): cosine InfoNCE and uniformity."""

    proportional: bool = True

    def logit(self, S: Tensor, out: Tensor) -> None:
        """Write -slope (1 - c)."""
        torch.mul(S, -self.slope, out=out)

    def kernel(self) -> Kernel | None:
        """The same exponential."""
        return Kernel("exponential", slope=self.slope, rate=self.slope)


@dataclass(frozen=True)
class Distance(PairForm):
    """exp(-d / tau) of squared distances d; S is -d / tau already."""

    space: Space = "euclid"
    max_exponent: float = math.inf
    proportional: bool = True

    def logit(self, S: Tensor, out: Tensor) -> None:
        """Write -d / tau, which S is."""
        out.copy_(S)


@dataclass(frozen=True)
class _Square(PairForm):
    """The squared product: Frobenius norms of Gram matrices without the D x D one."""

    def value(self, S: Tensor, out: Tensor) -> None:
        torch.mul(S, S, out=out)

    def weight(self, S: Tensor, E: Tensor) -> None:
        # E carries the pairs that do not count as zeros and the magnitude of the others
        torch.copysign(E.sqrt_(), S, out=E)


SQUARE = _Square(space="raw", diagonal=True, slope=2.0, log=False)


def loss_from_sums(sum_U: Tensor, pairs: PairMask, form: PairForm, *, is_log: bool) -> Tensor:
    """Loss of each segment from the sum (or log-sum) over its pairs; 0 for segments without a pair."""
    some = pairs.pairs_U > 0
    count_U = torch.where(some, pairs.pairs_U + pairs.tokens_U if form.diagonal else pairs.pairs_U, 1.0)
    if not form.log:
        return torch.where(some, sum_U / count_U, 0.0)
    log_U = sum_U if is_log else torch.where(some, sum_U, 1.0).log()
    value = log_U - count_U.log()
    if form.offset:
        value = value + form.offset
    return torch.where(some, value, 0.0)


def needs_maximum(form: PairForm, dtype: torch.dtype) -> bool:
    """Whether a log form's exponents reach far enough down to underflow."""
    return form.log and form.max_exponent > (600.0 if dtype == torch.float64 else 60.0)
