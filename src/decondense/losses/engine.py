"""Chooses the implementation that computes a loss, and calls it."""

from __future__ import annotations

import importlib.util
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

from decondense.config import LossConfig
from decondense.geometry import statistics_dtype
from decondense.losses import chunked, operator, reference
from decondense.losses.forms import form_of
from decondense.losses.online import log_sums
from decondense.losses.pair_forms import loss_from_sums, needs_maximum
from decondense.losses.pair_mask import PairMask

# found once, not by a function with a cache, of which torch.compile warns
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def choose(s: LossConfig, z: Tensor) -> str:
    """The implementation that a call gets: ``reference``, ``chunked`` or ``fused``."""
    covered = s.info.fused and s.compat is None and z.dtype != torch.float64
    if s.impl == "auto":
        if not s.info.tiled:
            return "reference"
        able = covered and z.device.type == "cuda" and _TRITON_INSTALLED
        return "fused" if able and kernels_agree(str(z.device), z.dtype) else "chunked"
    if s.impl != "fused":
        return s.impl
    if not covered:
        raise ValueError(
            f"impl='fused' covers bfloat16, float16 and float32, got {z.dtype}. Use impl='auto' or 'chunked'."
        )
    if not _TRITON_INSTALLED:
        raise ValueError("impl='fused' needs triton, which is not installed: pip install 'decondense[kernels]'.")
    from decondense.losses import fused

    if not fused.available(z.device):
        raise ValueError(f"impl='fused' needs a CUDA tensor, got one on {z.device}; use impl='auto' or 'chunked'.")
    return "fused"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def kernels_agree(device: str, dtype: torch.dtype) -> bool:
    """Whether the compiled kernels give the tiled engine's value and gradient; tested once per device and dtype.

    Kernels are compiled on the user's machine with its versions of triton and the driver, so ``impl="auto"`` tests
    them on a small input first. No random number is drawn, and the caller's modes (no gradients, inference, autocast)
    have no effect.
    """
    return _kernels_agree_once(device, dtype)


@cache
def _kernels_agree_once(device: str, dtype: torch.dtype) -> bool:
    s = LossConfig()
    try:
        # a tensor made in inference mode, as in a trainer's first validation, could not be differentiated
        kind = torch.device(device).type
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(kind, enabled=False):
            angles = torch.arange(2 * 70 * 40, device=device, dtype=torch.float32).reshape(2, 70, 40)
            z = (angles.sin() + 0.3 * (angles * 0.37).cos() + 0.5).to(dtype)  # condensed, T and D divided by no tile
            mask = torch.ones(2, 70, dtype=torch.bool, device=device)
            mask[0, 61:] = False
            pairs = PairMask.of((2, 70), mask, None, dtype=statistics_dtype(dtype), device=z.device)
            results = {}
            for engine in ("fused", "chunked"):
                leaf = z.detach().clone().requires_grad_()
                value = per_segment(leaf, pairs, s, engine).mean()
                (gradient,) = torch.autograd.grad(value, leaf)
                results[engine] = (value.detach().float(), gradient.float())
        (value, gradient), (expected, exact) = results["fused"], results["chunked"]
        agree = bool((value - expected).abs() < 1e-3) and bool((gradient - exact).norm() < 3e-2 * exact.norm())
        reason = "they do not agree with the tiled engine"
    except Exception as error:  # a compiler, a driver or a kernel can raise anything
        agree, reason = False, failure(error)
    if not agree:
        warnings.warn(
            f"the Triton kernels are not used on {device} in {dtype}: {reason}. impl='auto' takes the tiled engine "
            "instead, which is exact but slower; impl='fused' forces the kernels.",
            RuntimeWarning,
            stacklevel=2,
        )
    return agree


def failure(error: Exception) -> str:
    """What stopped the kernels, in one line."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def per_segment(
    z_RND: Tensor,
    pairs: PairMask,
    s: LossConfig,
    engine: str,
    generator: torch.Generator | None = None,
    width: int = 0,
) -> Tensor:
    """Loss of each segment by an implementation, ``[U]``; 0 for segments without a pair.

    ``width``: of forms with a teacher, whose states stand beside the others, the number of features before them.
    """
    form = form_of(s)
    drawn: tuple[Any, ...] = (width,) if s.info.teacher else ()
    if form.draw is not None:
        assert generator is not None
        drawn = (form.draw(z_RND.shape[-1], s, generator, z_RND),)
    if engine == "reference":
        return reference.per_segment(z_RND, pairs, s, *drawn)
    if form.per_segment is not None:
        return form.per_segment(z_RND, pairs, s, *drawn)
    assert form.pair_form is not None, s.form
    pair = form.pair_form(s)
    if needs_maximum(pair, pairs.pairs_U.dtype):
        log_U = log_sums(z_RND, pairs, pair, gradient=s.gradient)
        value_U = loss_from_sums(log_U, pairs, pair, is_log=True)
    else:
        if engine == "fused" or torch.compiler.is_compiling():
            sum_U = operator.pair_sums(z_RND, pairs, s, engine=engine)
        else:
            sum_U = chunked.pair_sums(z_RND, pairs, pair, gradient=s.gradient)
        value_U = loss_from_sums(sum_U, pairs, pair, is_log=False)
    return value_U if form.extra is None else value_U + form.extra(z_RND, pairs, s)
