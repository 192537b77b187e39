"""Sketched isotropic Gaussian regularisation, LeJEPA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from decondense.config import LossConfig
from decondense.geometry import statistics_dtype
from decondense.losses import features
from decondense.losses.form import Form
from decondense.losses.pair_mask import PairMask, differentiated_once, to_device


def _knots(knots: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    r"""Points t on [0, 3], trapezoidal weights on [-3, 3] times :math:`e^{-t^2/2}`, and :math:`e^{-t^2/2}`."""
    t = torch.linspace(0.0, 3.0, knots, dtype=dtype, device=device)
    weights = torch.full_like(t, 2 * 3.0 / (knots - 1))
    weights[0] = weights[-1] = 3.0 / (knots - 1)
    target = torch.exp(-0.5 * t.square())
    return t, weights * target, target


def definition(z_UND: Tensor, pairs_UNN: Tensor, valid_UN: Tensor, s: LossConfig, directions_DM: Tensor) -> Tensor:
    r"""Sketched isotropic Gaussian regularisation of LeJEPA, arXiv:2511.08544, over the tokens of a segment."""
    t, weights, target = _knots(s.knots, z_UND.dtype, z_UND.device)
    n = valid_UN.sum(dim=1)
    x_UNMK = (z_UND @ directions_DM).unsqueeze(-1) * t
    real = valid_UN[:, :, None, None]
    cos = torch.where(real, x_UNMK.cos(), 0.0).sum(dim=1) / n[:, None, None]
    sin = torch.where(real, x_UNMK.sin(), 0.0).sum(dim=1) / n[:, None, None]
    return (((cos - target).square() + sin.square()) @ weights).mean(dim=1) * n


class _SigReg(torch.autograd.Function):
    """Epps-Pulley statistic of each segment, averaged over the directions; gradient in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, z_RND: Tensor, pairs: PairMask, s: LossConfig, directions_DM: Tensor, want_gradient: bool
    ) -> Tensor:
        x = pairs.real(z_RND.to(directions_DM.dtype))
        projected_RNM = x @ directions_DM
        t, weights, target = _knots(s.knots, x.dtype, x.device)
        count_U1 = pairs.tokens_U.clamp(min=1).unsqueeze(1)
        value_U = x.new_zeros(pairs.n_segments)
        slope_RNM = torch.zeros_like(projected_RNM) if want_gradient else None
        for k in range(s.knots):
            angle_RNM = projected_RNM * t[k]
            cos_RNM, sin_RNM = angle_RNM.cos(), angle_RNM.sin()
            cos_UM = pairs.to_segments(cos_RNM) / count_U1 - target[k]
            sin_UM = pairs.to_segments(sin_RNM) / count_U1
            value_U += weights[k] * (cos_UM.square() + sin_UM.square()).mean(dim=1) * pairs.tokens_U
            if slope_RNM is not None:
                scale = 2.0 * weights[k] * t[k] / s.slices
                slope_RNM += scale * (pairs.to_tokens(sin_UM) * cos_RNM - pairs.to_tokens(cos_UM) * sin_RNM)
        ctx.save_for_backward(slope_RNM, directions_DM)
        ctx.pairs, ctx.dtype = pairs, z_RND.dtype
        return value_U

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, grad_output_U: Tensor) -> tuple[Tensor | None, ...]:
        slope_RNM, directions_DM = ctx.saved_tensors
        pairs: PairMask = ctx.pairs
        scale_RN = pairs.real(pairs.to_tokens(grad_output_U))
        gradient = (slope_RNM * scale_RN.unsqueeze(-1)) @ directions_DM.mT
        return gradient.to(ctx.dtype), None, None, None, None


def per_segment(z_RND: Tensor, pairs: PairMask, s: LossConfig, directions_DM: Tensor) -> Tensor:
    """The characteristic function of all directions, one knot at a time."""
    want = z_RND.requires_grad and torch.is_grad_enabled()
    value_U: Tensor = _SigReg.apply(z_RND, pairs, s, directions_DM, want)  # type: ignore[no-untyped-call]
    return features.or_zero(value_U, pairs)


def draw(width: int, s: LossConfig, generator: torch.Generator, like: Tensor) -> Tensor:
    """Random unit directions ``[D, M]``."""
    directions = torch.randn(width, s.slices, generator=generator, device=generator.device, dtype=torch.float64)
    directions = torch.nn.functional.normalize(directions, dim=0)
    return to_device(directions.to(statistics_dtype(like.dtype)), like.device)


FORM = Form(definition=definition, per_segment=per_segment, draw=draw)
