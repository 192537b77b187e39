r"""Memory linear in the number of tokens: tiles of pairs over several sequences at once, in plain torch, on any device.

One engine for every form that is a sum over pairs. With x_i the prepared vectors, s_ij = <x_i, x_j> and
:math:`S_u = \sum_{i,j \in u} f(s_{ij})` for a segment u, the gradient of :math:`S_u` in :math:`x_i` is
:math:`2 \sum_j f'(s_{ij}) x_j`: one product of a tile of weights with the vectors that made the tile. So the sweep over
the tiles that yields the value yields the gradient too; backward only multiplies by the incoming gradient, one number
per segment, and nothing of size T x T outlives its tile. Tiles above the diagonal serve twice.

Log-mean-exp forms whose exponents could underflow (distances, or a very small tau) run row by row with a running
maximum per token instead (:func:`decondense.losses.online.log_sums`).

Double backward raises: the gradient is a saved number, not a graph. ``impl="reference"`` differentiates twice.

Shape suffixes: ``R`` rows, ``N`` tokens of a row, ``D`` features, ``U`` segments, ``C`` rows of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from decondense.geometry import statistics_dtype
from decondense.losses import vectors
from decondense.losses.pair_forms import PairForm
from decondense.losses.pair_mask import PairMask, differentiated_once
from decondense.losses.vectors import Chunk, assemble_gradient, chunks, products


def _overlap(label_RN: Tensor, tile: int) -> list[list[bool]]:
    """Whether any row's label ranges of two blocks of tokens overlap (CPU only: it looks at values)."""
    blocks = torch.split(label_RN, tile, dim=1)
    low = [block.masked_fill(block < 0, 2**62).amin(dim=1) for block in blocks]
    high = [block.amax(dim=1) for block in blocks]
    return [[bool(((low[a] <= high[b]) & (low[b] <= high[a])).any()) for b in range(len(low))] for a in range(len(low))]


def sweep(
    z_RND: Tensor, valid_RN: Tensor | None, label_RN: Tensor | None, form: PairForm, want_gradient: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Sum over pairs per token, ``[R, N]``; the gradient of the sum of a token's segment, ``[R, N, D]``; its factor.

    The gradient in z is the second times the third times the incoming gradient.
    """
    rows, n, width = z_RND.shape
    dtype, device = statistics_dtype(z_RND.dtype), z_RND.device
    sums_RN = torch.zeros(rows, n, dtype=dtype, device=device)
    saved = vectors.gradient_dtype(z_RND.dtype)
    gradient = torch.empty(rows, n, width, dtype=saved, device=device) if want_gradient else None
    factor_RN = None
    if want_gradient and form.space == "sphere":
        factor_RN = torch.empty(rows, n, dtype=dtype, device=device)
    for chunk in chunks(z_RND, valid_RN, label_RN, form):
        G = None
        if gradient is not None:
            G = gradient[chunk.rows] if saved == dtype else torch.empty(chunk.p.x.shape, dtype=dtype, device=device)
        weight_sum = sums_RN[chunk.rows]
        if G is not None and not form.proportional:
            weight_sum = torch.zeros_like(weight_sum)
        gap_sum = torch.zeros_like(weight_sum)
        _sweep_chunk(chunk, form, sums_RN[chunk.rows], G, weight_sum, gap_sum)
        if G is not None and gradient is not None:
            assemble_gradient(G, chunk.p, form, weight_sum, gap_sum)
            if factor_RN is not None and chunk.p.factor is not None:
                factor_RN[chunk.rows] = chunk.p.factor
            if saved != dtype:
                gradient[chunk.rows] = G
    return sums_RN, gradient, factor_RN


def _sweep_chunk(
    chunk: Chunk, form: PairForm, sums: Tensor, G: Tensor | None, weight_sum: Tensor, gap_sum: Tensor
) -> None:
    """Add a chunk's sums over partners: of f, of the weights, of weights times gaps, of weights times vectors (G)."""
    x, label = chunk.p.x, chunk.label
    buffer_S, buffer_E, buffer_K = chunk.buffers(3)
    real = None if chunk.valid is None else chunk.valid.to(x.dtype).unsqueeze(2)
    overlap = None
    if label is not None and x.device.type == "cpu":
        overlap = _overlap(label, chunk.tile)
        if G is not None:
            G.zero_()
    for i, j in chunk.tiles(symmetric=True):
        if overlap is not None and not overlap[i.start // chunk.tile][j.start // chunk.tile]:
            continue
        S, E = chunk.view(buffer_S, i, j), chunk.view(buffer_E, i, j)
        products(chunk.p, i, j, form, S)
        form.value(S, E)
        above = i.start != j.start
        if not above and not form.diagonal:
            E.diagonal(dim1=1, dim2=2).zero_()
        if label is not None:
            E.masked_fill_(label[:, i].unsqueeze(2) != label[:, j].unsqueeze(1), 0.0)
        _accumulate(sums, E, real, i, j)
        if G is None:
            continue
        if not form.proportional:
            if form.space == "sphere":
                K = chunk.view(buffer_K, i, j).copy_(S)
            form.weight(S, E)
            if form.space == "sphere":
                S = K
                if vectors.rounds_products(E):
                    vectors.to_tf32(E)
                _accumulate(weight_sum, E, real, i, j)
        if form.space == "sphere":
            _accumulate(gap_sum, S.mul_(E), real, i, j)
        # tiles come row by row: the first row writes every block for the first time, so no zeroing is needed
        fresh = i.start == 0 and overlap is None
        G[:, i].baddbmm_(E, x[:, j], beta=0 if fresh and not above else 1)
        if above:
            G[:, j].baddbmm_(E.mT, x[:, i], beta=0 if fresh else 1)


def _accumulate(sums: Tensor, E: Tensor, real: Tensor | None, i: slice, j: slice) -> None:
    """Add a tile's sums over partners to its tokens' and, above the diagonal, over tokens to its partners'."""
    above = i.start != j.start
    sums[:, i] += E.sum(dim=2) if real is None else torch.bmm(E, real[:, j]).squeeze(2)
    if above:
        sums[:, j] += E.sum(dim=1) if real is None else torch.bmm(E.mT, real[:, i]).squeeze(2)


class _PairSums(torch.autograd.Function):
    """Sums over pairs per token, differentiated once.

    The backward formula holds for an incoming gradient that is the same for all tokens of a segment, as it is after the
    sum over a segment.
    """

    @staticmethod
    def forward(ctx: Any, z_RND: Tensor, pairs: PairMask, form: PairForm, in_forward: bool) -> Tensor:
        sums_RN, gradient, factor_RN = sweep(z_RND, pairs.valid_RN, pairs.label_RN, form, in_forward)
        ctx.save_for_backward(z_RND)
        ctx.pairs, ctx.form, ctx.made = pairs, form, (gradient, factor_RN)
        return sums_RN

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, grad_output_RN: Tensor) -> tuple[Tensor | None, ...]:
        (z_RND,) = ctx.saved_tensors
        gradient, factor_RN = ctx.made
        ctx.made = (None, None)
        if gradient is None:
            # recompute mode, or a second backward through a retained graph: the first one consumed the buffer
            _, gradient, factor_RN = sweep(z_RND, ctx.pairs.valid_RN, ctx.pairs.label_RN, ctx.form, True)
        assert gradient is not None
        return scale_gradient(gradient, grad_output_RN, factor_RN, ctx.pairs.valid_RN, z_RND.dtype), None, None, None


def scale_gradient(
    gradient: Tensor, grad_output_RN: Tensor, factor_RN: Tensor | None, valid_RN: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``gradient * grad_output * factor``, in place; exactly zero for tokens that are not real."""
    scale_RN = grad_output_RN if factor_RN is None else grad_output_RN * factor_RN
    if valid_RN is not None:
        scale_RN = torch.where(valid_RN, scale_RN, 0.0)
    return gradient.mul_(scale_RN.unsqueeze(-1)).to(dtype)


def pair_sums(z_RND: Tensor, pairs: PairMask, form: PairForm, *, gradient: str = "forward") -> Tensor:
    """Sum over pairs of each segment, ``[U]``, through the symmetric sweep; differentiable once."""
    in_forward = gradient == "forward" and z_RND.requires_grad and torch.is_grad_enabled()
    sums_RN: Tensor = _PairSums.apply(z_RND, pairs, form, in_forward)  # type: ignore[no-untyped-call]
    return pairs.to_segments(sums_RN)
