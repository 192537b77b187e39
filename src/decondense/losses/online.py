r"""The sweep with a running maximum per token, for log-mean-exp forms whose exponents could underflow.

A token's sum is complete within its row of tiles, so the symmetry of the pairs is not used.

Shape suffixes: ``R`` rows, ``N`` tokens of a row, ``D`` features, ``U`` segments.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from decondense.geometry import statistics_dtype
from decondense.losses import vectors
from decondense.losses.chunked import scale_gradient
from decondense.losses.pair_forms import PairForm
from decondense.losses.pair_mask import PairMask, differentiated_once
from decondense.losses.vectors import Chunk, assemble_gradient, chunks, products


def _masked_logits(chunk: Chunk, form: PairForm, i: slice, j: slice, S: Tensor, E: Tensor) -> None:
    """Exponents of a tile into E, -inf for pairs that do not count; S keeps the products."""
    products(chunk.p, i, j, form, S)
    form.logit(S, E)
    if form.diagonal and form.space == "euclid" and i.start == j.start:
        E.diagonal(dim1=1, dim2=2).zero_()
    chunk.exclude(E, i, j, diagonal=not form.diagonal)


def _sweep(
    z_RND: Tensor, valid_RN: Tensor | None, label_RN: Tensor | None, form: PairForm, want_gradient: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Log-sum over partners per token ``[R, N]`` (-inf: none); gradient relative to that sum; its factor."""
    rows, n, width = z_RND.shape
    dtype, device = statistics_dtype(z_RND.dtype), z_RND.device
    logs_RN = torch.empty(rows, n, dtype=dtype, device=device)
    gradient = torch.empty(rows, n, width, dtype=dtype, device=device) if want_gradient else None
    factor_RN = torch.ones(rows, n, dtype=dtype, device=device)
    for chunk in chunks(z_RND, valid_RN, label_RN, form):
        if chunk.p.factor is not None:
            factor_RN[chunk.rows] = chunk.p.factor
        G = None if gradient is None else gradient[chunk.rows].zero_()
        logs_RN[chunk.rows] = _sweep_chunk(chunk, form, G)
    return logs_RN, gradient, factor_RN


def _sweep_chunk(chunk: Chunk, form: PairForm, G: Tensor | None) -> Tensor:
    """Log-sum over partners per token ``[C, N]``; G becomes the gradient relative to that sum."""
    x = chunk.p.x
    count, n, _ = x.shape
    buffer_S, buffer_E = chunk.buffers(2)
    total, weight_sum, gap_sum = x.new_zeros(3, count, n)
    top = x.new_full((count, n), -math.inf)
    for i, j in chunk.tiles(symmetric=False):
        S, E = chunk.view(buffer_S, i, j), chunk.view(buffer_E, i, j)
        _masked_logits(chunk, form, i, j, S, E)
        higher = torch.maximum(top[:, i], E.amax(dim=2))
        shift = torch.where(higher == -math.inf, 0.0, higher)
        E.sub_(shift.unsqueeze(2)).exp_()
        fade = (top[:, i] - shift).exp_()
        top[:, i] = higher
        total[:, i] = total[:, i] * fade + E.sum(dim=2)
        if G is not None:
            K = S.clone()
            form.weight(S, E)
            if form.space == "sphere" and vectors.rounds_products(E):
                vectors.to_tf32(E)
            weight_sum[:, i] = weight_sum[:, i] * fade + E.sum(dim=2)
            gap_sum[:, i] = gap_sum[:, i] * fade + K.mul_(E).sum(dim=2)
            G[:, i].mul_(fade.unsqueeze(2)).baddbmm_(E, x[:, j])
    if G is not None:
        assemble_gradient(G, chunk.p, form, weight_sum, gap_sum)
        # relative to the token's own sum: no factor underflows, however far apart the tokens are
        G.div_(torch.where(total > 0, total, 1.0).unsqueeze(2))
    return torch.where(total > 0, top + total.log(), -math.inf)


class _LogSums(torch.autograd.Function):
    """Log-sum over the pairs of each segment; as the symmetric sweep, with a running maximum."""

    @staticmethod
    def forward(ctx: Any, z_RND: Tensor, pairs: PairMask, form: PairForm, in_forward: bool) -> Tensor:
        logs_RN, gradient, factor_RN = _sweep(z_RND, pairs.valid_RN, pairs.label_RN, form, in_forward)
        if pairs.valid_RN is not None:
            logs_RN = torch.where(pairs.valid_RN, logs_RN, -math.inf)
        if pairs.segment_RN is None:
            logs_U = logs_RN.reshape(pairs.n_segments, -1).logsumexp(dim=1)
        else:
            index = pairs.segment_RN.reshape(-1)
            top_U = logs_RN.new_full((pairs.n_segments,), -math.inf)
            top_U = top_U.scatter_reduce(0, index, logs_RN.reshape(-1), "amax")
            top_U = torch.where(top_U == -math.inf, 0.0, top_U)
            logs_U = pairs.to_segments((logs_RN - pairs.to_tokens(top_U)).exp()).log() + top_U
        logs_U = torch.where(pairs.pairs_U > 0, logs_U, 0.0)
        share_RN = (logs_RN - pairs.to_tokens(logs_U)).exp()
        ctx.save_for_backward(z_RND, share_RN)
        ctx.pairs, ctx.form, ctx.made = pairs, form, (gradient, factor_RN)
        return logs_U

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, grad_output_U: Tensor) -> tuple[Tensor | None, ...]:
        z_RND, share_RN = ctx.saved_tensors
        gradient, factor_RN = ctx.made
        ctx.made = (None, None)
        if gradient is None:
            _, gradient, factor_RN = _sweep(z_RND, ctx.pairs.valid_RN, ctx.pairs.label_RN, ctx.form, True)
        assert gradient is not None
        grad_output_RN = ctx.pairs.to_tokens(grad_output_U) * share_RN
        return scale_gradient(gradient, grad_output_RN, factor_RN, ctx.pairs.valid_RN, z_RND.dtype), None, None, None


def log_sums(z_RND: Tensor, pairs: PairMask, form: PairForm, *, gradient: str = "forward") -> Tensor:
    """Log of the sum over pairs of each segment, ``[U]`` (0 for segments without pairs); differentiable once."""
    in_forward = gradient == "forward" and z_RND.requires_grad and torch.is_grad_enabled()
    result: Tensor = _LogSums.apply(z_RND, pairs, form, in_forward)  # type: ignore[no-untyped-call]
    return result
