"""The sweep over pairs as one operator of torch: opaque to ``torch.compile``, with shapes and a derivative of its own.

Inside ``torch.compile(fullgraph=True)`` the tiles must not be traced; the operator carries either engine, the chunked
one or the Triton one, past the tracer. The number that it differentiates is a sum per token; what comes back from
above must be the same for all tokens of a unit, which it is behind a sum over the unit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from decondense.geometry import statistics_dtype
from decondense.losses import chunked
from decondense.losses.forms import Settings
from decondense.losses.scope import DOUBLE_BACKWARD, Scope

__all__ = ["pair_sums"]


@torch.library.custom_op(
    "decondense::pair_sums",
    mutates_args=(),
    schema="(Tensor z, Tensor? valid, Tensor? label, str form, float tau, float delta, float margin, float clamp, "
    "str engine, bool want_gradient) -> (Tensor, Tensor, Tensor)",
)
def _pair_sums(
    z: Tensor,
    valid: Tensor | None,
    label: Tensor | None,
    form: str,
    tau: float,
    delta: float,
    margin: float,
    clamp: float,
    engine: str,
    want_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    settings = _settings(form, tau, delta, margin, clamp)
    if engine == "fused":
        from decondense.losses import fused

        sums, gradient, factor = fused.sweep(z, valid, label, settings, want_gradient)
    else:
        pair = chunked.pair_form(settings)
        sums, gradient, factor = chunked.sweep(z, valid, label, pair, want_gradient)
        if factor is None and want_gradient:
            factor = torch.ones_like(sums)
    nothing = sums.new_empty(0)
    return sums, nothing if gradient is None else gradient, nothing.clone() if factor is None else factor


def _settings(form: str, tau: float, delta: float, margin: float, clamp: float) -> Settings:
    base = Settings.of(form, tau=tau, delta=delta, margin=margin)
    if clamp < 0:
        return base
    return Settings(**{**base.__dict__, "clamp": clamp})


@_pair_sums.register_fake
def _(
    z: Tensor,
    valid: Tensor | None,
    label: Tensor | None,
    form: str,
    tau: float,
    delta: float,
    margin: float,
    clamp: float,
    engine: str,
    want_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = statistics_dtype(z.dtype)
    sums = z.new_empty(z.shape[:2], dtype=dtype)
    if not want_gradient:
        return sums, z.new_empty(0, dtype=dtype), z.new_empty(0, dtype=dtype)
    kept = torch.bfloat16 if z.dtype == torch.bfloat16 else dtype
    return sums, z.new_empty(z.shape, dtype=kept), z.new_empty(z.shape[:2], dtype=dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    z, valid, label, *ctx.rest, ctx.made = inputs
    # not materialised: a gradient buffer of zeros for an output that nobody differentiates would be as large as z
    ctx.set_materialize_grads(False)
    if ctx.made:
        ctx.save_for_backward(None, valid, None, output[1], output[2])
    else:
        ctx.save_for_backward(z, valid, label, None, None)
    ctx.dtype = z.dtype


def _backward(ctx: Any, above_RN: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(DOUBLE_BACKWARD)
    nothing = (None,) * 9
    if above_RN is None:
        return None, *nothing
    z, valid, label, gradient, factor = ctx.saved_tensors
    if gradient is None:
        _, gradient, factor = _pair_sums(z, valid, label, *ctx.rest, True)
    scale_RN = above_RN * factor
    if valid is not None:
        scale_RN = torch.where(valid, scale_RN, 0.0)
    return (gradient * scale_RN.unsqueeze(-1)).to(ctx.dtype), *nothing


_pair_sums.register_autograd(_backward, setup_context=_setup)


def pair_sums(z_RND: Tensor, scope: Scope, s: Settings, gradient: str, *, engine: str) -> Tensor:
    """Sum over pairs of each unit of a form of kind ``pairs``, ``[U]``; differentiable once."""
    want = gradient == "forward" and z_RND.requires_grad and torch.is_grad_enabled()
    clamp = -1.0 if s.clamp is None else s.clamp
    sums_RN = _pair_sums(z_RND, scope.valid_RN, scope.label_RN, s.form, s.tau, s.delta, s.margin, clamp, engine, want)[
        0
    ]
    return scope.to_units(sums_RN)
