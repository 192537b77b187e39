r"""The forms that need no pairs: mean cosine, and what is made of the features' means, variances and covariances.

Gram matrices are taken over the smaller side: :math:`\|X^\top X\|_F^2 = \|X X^\top\|_F^2`, features against features
(D x D) when there are more tokens than features, else tokens against tokens in tiles; packed documents always in tiles.

Shape suffixes: ``R`` rows, ``N`` tokens of a row, ``D`` features, ``U`` units, ``M`` random directions, ``K`` knots.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from decondense.geometry import statistics_dtype, unit
from decondense.losses.chunked import SQUARE, pair_sums, unit_rows
from decondense.losses.forms import Settings
from decondense.losses.reference import sigreg_knots
from decondense.losses.scope import Scope, differentiated_once

__all__ = ["draw_directions", "per_unit"]


def draw_directions(width: int, s: Settings, generator: torch.Generator, like: Tensor) -> Tensor:
    """Random unit directions ``[D, M]`` from a generator of one's own."""
    drawn = torch.randn(width, s.slices, generator=generator, device=generator.device, dtype=torch.float64)
    drawn = torch.nn.functional.normalize(drawn, dim=0)
    return drawn.to(device=like.device, dtype=statistics_dtype(like.dtype))


class _GramSquare(torch.autograd.Function):
    """Squared Frobenius norm of X'X for each row ``[R]``, one D x D matrix at a time; gradient 4 X (X'X)."""

    @staticmethod
    def forward(ctx: Any, x_RND: Tensor, want_gradient: bool) -> Tensor:
        gradient = torch.empty_like(x_RND) if want_gradient else None
        values = []
        for row, x_ND in enumerate(x_RND):
            gram_DD = x_ND.mT @ x_ND
            values.append(torch.linalg.vector_norm(gram_DD).square())
            if gradient is not None:
                torch.mm(x_ND, gram_DD, out=gradient[row])
        ctx.save_for_backward(gradient)
        return torch.stack(values)

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, above_R: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * (4.0 * above_R)[:, None, None], None


def _gram_square(x_RND: Tensor, scope: Scope) -> Tensor:
    r""":math:`\sum_{ij} \langle x_i, x_j\\rangle^2` over the tokens of each unit, i = j included, ``[U]``."""
    if scope.unit_RN is None and scope.rows_per_unit == 1 and x_RND.shape[1] > x_RND.shape[2]:
        value: Tensor = _GramSquare.apply(x_RND, x_RND.requires_grad)  # type: ignore[no-untyped-call]
        return value
    return pair_sums(x_RND, scope, SQUARE)


class _MeanCosine(torch.autograd.Function):
    r""":math:`|\sum_i \hat z_i|^2 - \sum_i |\hat z_i|^2` of each unit; keeps one vector per unit for backward."""

    @staticmethod
    def forward(ctx: Any, z_RND: Tensor, scope: Scope) -> Tensor:
        u, _, _ = unit_rows(z_RND, scope.valid_RN)
        total_UD = scope.features_to_units(u)
        ctx.save_for_backward(z_RND, total_UD)
        ctx.scope = scope
        return total_UD.square().sum(dim=1) - scope.to_units(torch.linalg.vecdot(u, u))

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, above_U: Tensor) -> tuple[Tensor | None, ...]:
        z_RND, total_UD = ctx.saved_tensors
        scope: Scope = ctx.scope
        u, inverse_RN, _ = unit_rows(z_RND, scope.valid_RN)
        total_RND = scope.to_tokens(total_UD)
        along_RN = torch.linalg.vecdot(total_RND, u)
        scale_RN = 2.0 * scope.to_tokens(above_U) * inverse_RN
        gradient = u.mul_(-along_RN.unsqueeze(-1)).add_(total_RND).mul_(scale_RN.unsqueeze(-1))
        return gradient.to(z_RND.dtype), None


def _centred(x_RND: Tensor, scope: Scope) -> Tensor:
    """Tokens minus the mean of their unit; zero where not real."""
    mean_UD = scope.features_to_units(x_RND) / scope.tokens_U.clamp(min=1).unsqueeze(1)
    x = x_RND - scope.to_tokens(mean_UD)
    return x if scope.valid_RN is None else torch.where(scope.valid_RN.unsqueeze(-1), x, 0.0)


def _off_diagonal(x_RND: Tensor, scope: Scope) -> Tensor:
    """Sum over a != b of the squared elements of X'X of each unit, ``[U]``."""
    diagonal_UD = scope.features_to_units(x_RND.square())
    return _gram_square(x_RND, scope) - diagonal_UD.square().sum(dim=1)


def _correlation_square(x_RND: Tensor, scope: Scope) -> Tensor:
    x = _centred(x_RND, scope)
    square_UD = scope.features_to_units(x.square())
    varies = square_UD > 0
    inverse_UD = torch.where(varies, torch.where(varies, square_UD, 1.0).rsqrt(), 0.0)
    return _off_diagonal(x * scope.to_tokens(inverse_UD), scope)


class _SigReg(torch.autograd.Function):
    """Epps-Pulley statistic of each unit, averaged over the directions; gradient in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, z_RND: Tensor, scope: Scope, s: Settings, directions_DM: Tensor, want_gradient: bool
    ) -> Tensor:
        x = z_RND.to(directions_DM.dtype)
        if scope.valid_RN is not None:
            x = torch.where(scope.valid_RN.unsqueeze(-1), x, 0.0)
        projected_RNM = x @ directions_DM
        t, weights, target = sigreg_knots(s.knots, x.dtype, x.device)
        count_U1 = scope.tokens_U.clamp(min=1).unsqueeze(1)
        value_U = x.new_zeros(scope.n_units)
        slope_RNM = torch.zeros_like(projected_RNM) if want_gradient else None
        for k in range(s.knots):
            angle_RNM = projected_RNM * t[k]
            cos_RNM, sin_RNM = angle_RNM.cos(), angle_RNM.sin()
            cos_UM = scope.features_to_units(cos_RNM) / count_U1 - target[k]
            sin_UM = scope.features_to_units(sin_RNM) / count_U1
            value_U += weights[k] * (cos_UM.square() + sin_UM.square()).mean(dim=1) * scope.tokens_U
            if slope_RNM is not None:
                scale = 2.0 * weights[k] * t[k] / s.slices
                slope_RNM += scale * (scope.to_tokens(sin_UM) * cos_RNM - scope.to_tokens(cos_UM) * sin_RNM)
        ctx.save_for_backward(slope_RNM, directions_DM)
        ctx.scope, ctx.dtype = scope, z_RND.dtype
        return value_U

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, above_U: Tensor) -> tuple[Tensor | None, ...]:
        slope_RNM, directions_DM = ctx.saved_tensors
        scope: Scope = ctx.scope
        scale_RN = scope.to_tokens(above_U)
        if scope.valid_RN is not None:
            scale_RN = torch.where(scope.valid_RN, scale_RN, 0.0)
        gradient = (slope_RNM * scale_RN.unsqueeze(-1)) @ directions_DM.mT
        return gradient.to(ctx.dtype), None, None, None, None


def per_unit(z_RND: Tensor, scope: Scope, s: Settings, directions_DM: Tensor | None = None) -> Tensor:
    """Loss of each unit of a form of kind ``features``, ``[U]``; 0 for units with fewer than two tokens."""
    some = scope.pairs_U > 0
    n_U = torch.where(some, scope.tokens_U, 2.0)
    width = z_RND.shape[-1]
    if s.form == "mean_cosine":
        total_U: Tensor = _MeanCosine.apply(z_RND, scope)  # type: ignore[no-untyped-call]
        return torch.where(some, total_U / (n_U * (n_U - 1)), 0.0)
    if s.form == "sigreg":
        assert directions_DM is not None
        want = z_RND.requires_grad and torch.is_grad_enabled()
        value_U: Tensor = _SigReg.apply(z_RND, scope, s, directions_DM, want)  # type: ignore[no-untyped-call]
        return torch.where(some, value_U, 0.0)
    x = z_RND.to(scope.pairs_U.dtype)
    if scope.valid_RN is not None:
        x = torch.where(scope.valid_RN.unsqueeze(-1), x, 0.0)
    if s.form == "decorrelation" and s.clamp is not None:
        x = unit(x - x.mean(dim=-1, keepdim=True))
        diagonal_U = scope.to_units(torch.linalg.vecdot(x, x).square())
        value_U = (_gram_square(x, scope) - diagonal_U) / (n_U * (n_U - 1))
    elif s.form == "decorrelation":
        value_U = _correlation_square(x, scope) / (width * (width - 1))
    elif s.form == "barlow":
        value_U = _correlation_square(x, scope) / width
    elif s.form == "covariance":
        x = _centred(unit(x) * math.sqrt(width), scope)
        value_U = _off_diagonal(x, scope) / (width * (n_U - 1).square())
    else:
        assert s.form == "vicreg", s.form
        x = _centred(x, scope)
        variance_UD = scope.features_to_units(x.square()) / (n_U - 1).unsqueeze(1)
        hinge_U = (s.target_std - (variance_UD + 1e-4).sqrt()).clamp(min=0).mean(dim=1)
        covariance_U = _off_diagonal(x, scope) / (width * (n_U - 1).square())
        value_U = s.variance_weight * hinge_U + s.covariance_weight * covariance_U
    return torch.where(some, value_U, 0.0)
