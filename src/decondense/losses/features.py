r"""Tools of the forms without pairs: centred features, and norms of Gram matrices by the smaller side.

:math:`\|X^\top X\|_F^2 = \|X X^\top\|_F^2`, features against features (D x D) when there are more tokens than
features, else tokens against tokens in tiles; packed documents always in tiles.

Shape suffixes: ``R`` rows, ``N`` tokens of a row, ``D`` features, ``U`` segments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from decondense.losses.chunked import pair_sums
from decondense.losses.pair_forms import SQUARE
from decondense.losses.pair_mask import PairMask, differentiated_once


def real_tokens(z_RND: Tensor, pairs: PairMask) -> Tensor:
    """The states in the dtype of the statistics, zero where not real."""
    return pairs.real(z_RND.to(pairs.pairs_U.dtype))


def safe_count(pairs: PairMask) -> Tensor:
    """Real tokens of each segment, ``[U]``; 2 where there are fewer, whose values :func:`or_zero` drops."""
    return torch.where(pairs.pairs_U > 0, pairs.tokens_U, 2.0)


def or_zero(value_U: Tensor, pairs: PairMask) -> Tensor:
    """The value of segments that have a pair, else 0."""
    return torch.where(pairs.pairs_U > 0, value_U, 0.0)


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
    def backward(ctx: Any, grad_output_R: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * (4.0 * grad_output_R)[:, None, None], None


def gram_square(x_RND: Tensor, pairs: PairMask) -> Tensor:
    r""":math:`\sum_{ij} \langle x_i, x_j\\rangle^2` over the tokens of each segment, i = j included, ``[U]``."""
    if pairs.segment_RN is None and pairs.rows_per_segment == 1 and x_RND.shape[1] > x_RND.shape[2]:
        value: Tensor = _GramSquare.apply(x_RND, x_RND.requires_grad)  # type: ignore[no-untyped-call]
        return value
    return pair_sums(x_RND, pairs, SQUARE)


def centred(x_RND: Tensor, pairs: PairMask) -> Tensor:
    """Tokens minus the mean of their segment; zero where not real."""
    mean_UD = pairs.to_segments(x_RND) / pairs.tokens_U.clamp(min=1).unsqueeze(1)
    return pairs.real(x_RND - pairs.to_tokens(mean_UD))


def off_diagonal(x_RND: Tensor, pairs: PairMask) -> Tensor:
    """Sum over a != b of the squared elements of X'X of each segment, ``[U]``."""
    diagonal_UD = pairs.to_segments(x_RND.square())
    return gram_square(x_RND, pairs) - diagonal_UD.square().sum(dim=1)


def correlation_square(x_RND: Tensor, pairs: PairMask) -> Tensor:
    """Sum over a != b of the squared correlations of the features of each segment, ``[U]``."""
    x = centred(x_RND, pairs)
    square_UD = pairs.to_segments(x.square())
    varies = square_UD > 0
    inverse_UD = torch.where(varies, torch.where(varies, square_UD, 1.0).rsqrt(), 0.0)
    return off_diagonal(x * pairs.to_tokens(inverse_UD), pairs)
