"""The sweep over pairs as one operator of torch: opaque to ``torch.compile``, with shapes and a derivative of its own.

Inside ``torch.compile(fullgraph=True)`` the tiles must not be traced; the operator hides either engine, the chunked or
the Triton one, from the tracer. It returns a sum per token; the incoming gradient must be the same for all tokens of a
segment, as it is after the sum over a segment.

``options`` are the values of the options that the form uses, in the order of :attr:`decondense.forms.FormInfo.uses`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from decondense.config import LossConfig
from decondense.geometry import statistics_dtype
from decondense.losses import chunked
from decondense.losses.forms import FORMS, form_of
from decondense.losses.pair_forms import PairForm
from decondense.losses.pair_mask import DOUBLE_BACKWARD, PairMask
from decondense.losses.vectors import gradient_dtype


@torch.library.custom_op(
    "decondense::pair_sums",
    mutates_args=(),
    schema="(Tensor z, Tensor? valid, Tensor? label, str form, float[] options, str? compat, str engine, "
    "bool want_gradient) -> (Tensor, Tensor, Tensor)",
)
def _pair_sums(
    z: Tensor,
    valid: Tensor | None,
    label: Tensor | None,
    form: str,
    options: list[float],
    compat: str | None,
    engine: str,
    want_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    pair = _pair_form(form, tuple(options), compat)
    # also in a backward that recomputes and is called inside autocast
    with torch.autocast(z.device.type, enabled=False):
        if engine == "fused":
            from decondense.losses import fused

            sums, gradient, factor = fused.sweep(z, valid, label, pair, want_gradient)
        else:
            sums, gradient, factor = chunked.sweep(z, valid, label, pair, want_gradient)
            if factor is None and want_gradient:
                factor = torch.ones_like(sums)
    return sums, sums.new_empty(0) if gradient is None else gradient, sums.new_empty(0) if factor is None else factor


@lru_cache
def _pair_form(form: str, options: tuple[float, ...], compat: str | None) -> PairForm:
    config = LossConfig.model_validate(
        {"form": form, "compat": compat, **dict(zip(FORMS[form].uses, options, strict=True))}
    )
    pair_form = form_of(config).pair_form
    assert pair_form is not None, form
    return pair_form(config)


@_pair_sums.register_fake
def _(z: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, want_gradient = inputs
    dtype = statistics_dtype(z.dtype)
    sums = z.new_empty(z.shape[:2], dtype=dtype)
    if not want_gradient:
        return sums, z.new_empty(0, dtype=dtype), z.new_empty(0, dtype=dtype)
    return sums, z.new_empty(z.shape, dtype=gradient_dtype(z.dtype)), z.new_empty(z.shape[:2], dtype=dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    z, valid, label, *ctx.rest, ctx.made = inputs
    # not materialised: the zero gradient of an output that is not differentiated would be as large as z
    ctx.set_materialize_grads(False)
    if ctx.made:
        ctx.save_for_backward(None, valid, None, output[1], output[2])
    else:
        ctx.save_for_backward(z, valid, label, None, None)
    ctx.dtype = z.dtype


def _backward(ctx: Any, grad_output_RN: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(DOUBLE_BACKWARD)
    if grad_output_RN is None:
        return (None,) * 8
    z, valid, label, gradient, factor = ctx.saved_tensors
    if gradient is None:
        _, gradient, factor = _pair_sums(z, valid, label, *ctx.rest, True)
    scale_RN = grad_output_RN * factor
    if valid is not None:
        scale_RN = torch.where(valid, scale_RN, 0.0)
    return (gradient * scale_RN.unsqueeze(-1)).to(ctx.dtype), *(None,) * 7


_pair_sums.register_autograd(_backward, setup_context=_setup)


def pair_sums(z_RND: Tensor, pairs: PairMask, s: LossConfig, *, engine: str) -> Tensor:
    """Sum over pairs of each segment of a form of kind ``pairs``, ``[U]``; differentiable once."""
    want = s.gradient == "forward" and z_RND.requires_grad and torch.is_grad_enabled()
    options = [getattr(s, name) for name in s.info.uses]
    sums_RN = _pair_sums(z_RND, pairs.valid_RN, pairs.label_RN, s.form, options, s.compat, engine, want)[0]
    return pairs.to_segments(sums_RN)
