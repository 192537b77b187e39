r"""Mean squared difference of the cosines of two models' states, tile by tile.

The states arrive side by side, ``[..., D + D']``: the first ``width`` features are differentiated, the others are the
teacher's. With c and c' the cosines of a pair, the tiles of 1 - c and 1 - c' are made from centred vectors, where less
cancels, and the gradient is :math:`\frac{4}{n(n-1)|z_i|} \sum_j (c_{ij} - c'_{ij})(\hat z_j - c_{ij} \hat z_i)`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from decondense.config import LossConfig
from decondense.geometry import statistics_dtype
from decondense.losses import dense, vectors
from decondense.losses.form import Form
from decondense.losses.pair_forms import PairForm
from decondense.losses.pair_mask import PairMask, differentiated_once
from decondense.losses.vectors import Chunk, assemble_gradient, chunks, products

_SQUARE = PairForm(log=False, slope=2.0)


def definition(both_UNE: Tensor, pairs_UNN: Tensor, valid_UN: Tensor, s: LossConfig, width: int) -> Tensor:
    r""":math:`\mathrm{mean}_{i \ne j} (c_{ij} - c'_{ij})^2`."""
    own, other = both_UNE[..., :width], both_UNE[..., width:]
    return dense.mean((dense.cosine(own, pairs_UNN, s) - dense.cosine(other, pairs_UNN, s)).square(), pairs_UNN)


class _Gram(torch.autograd.Function):
    """Sum over partners of (c - c')^2 for each token ``[R, N]``; gradient in the forward pass."""

    @staticmethod
    def forward(ctx: Any, z_RND: Tensor, other_RNE: Tensor, pairs: PairMask, want_gradient: bool) -> Tensor:
        dtype = statistics_dtype(z_RND.dtype)
        sums_RN = z_RND.new_zeros(z_RND.shape[:2], dtype=dtype)
        gradient = z_RND.new_zeros(z_RND.shape, dtype=dtype) if want_gradient else None
        for own, other in zip(
            chunks(z_RND, pairs.valid_RN, pairs.label_RN, _SQUARE),
            chunks(other_RNE.to(dtype), pairs.valid_RN, pairs.label_RN, _SQUARE),
            strict=True,
        ):
            _sweep(own, other, sums_RN[own.rows], None if gradient is None else gradient[own.rows])
        ctx.save_for_backward(gradient)
        ctx.pairs, ctx.dtype = pairs, z_RND.dtype
        return sums_RN

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, grad_output_RN: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        scale_RN = ctx.pairs.real(grad_output_RN)
        return (gradient * scale_RN.unsqueeze(-1)).to(ctx.dtype), None, None, None


def _sweep(own: Chunk, other: Chunk, sums: Tensor, G: Tensor | None) -> None:
    """Add a chunk's sums over partners, and write its gradient."""
    x = own.p.x
    weight_sum, gap_sum = torch.zeros_like(sums), torch.zeros_like(sums)
    buffer_S, buffer_W = own.buffers(2)
    for i, j in own.tiles(symmetric=True):
        S, W = own.view(buffer_S, i, j), own.view(buffer_W, i, j)
        products(own.p, i, j, _SQUARE, S)
        products(other.p, i, j, _SQUARE, W)
        W.sub_(S)  # c - c'
        own.clear(W, i, j)
        above = i.start != j.start
        if G is not None and vectors.rounds_products(W):
            vectors.to_tf32(W)
        for total, values in ((weight_sum, W), (gap_sum, S.mul_(W)), (sums, W.square())):
            total[:, i] += values.sum(dim=2)
            if above:
                total[:, j] += values.sum(dim=1)
        if G is not None:
            G[:, i].baddbmm_(W, x[:, j])
            if above:
                G[:, j].baddbmm_(W.mT, x[:, i])
    if G is not None:
        assemble_gradient(G, own.p, _SQUARE, weight_sum, gap_sum)
        assert own.p.factor is not None
        G.mul_(own.p.factor.unsqueeze(-1))


def per_segment(both_RNE: Tensor, pairs: PairMask, s: LossConfig, width: int) -> Tensor:
    """Tile by tile, memory linear in the tokens."""
    z_RND, other_RNE = both_RNE[..., :width], both_RNE[..., width:].detach()
    want = z_RND.requires_grad and torch.is_grad_enabled()
    sums_RN: Tensor = _Gram.apply(z_RND, other_RNE, pairs, want)  # type: ignore[no-untyped-call]
    return pairs.to_segments(sums_RN) / pairs.pairs_U.clamp(min=1)


FORM = Form(definition=definition, per_segment=per_segment)
