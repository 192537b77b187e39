"""Which pairs of tokens a loss includes: masks, packed documents, random groups and subsets, one sequence or a batch.

Every implementation works on *rows* of tokens ``z_RND`` and a :class:`PairMask`, which defines the pairs of a row that
count and their *segment* (a sequence, or a document of a packed sequence: one log-mean-exp or one mean). Python never
reads the value of a tensor here, so no function waits for a device.

Shape suffixes: ``B`` sequences, ``T`` tokens of a sequence, ``D`` features, ``R`` rows, ``N`` tokens of a row,
``U`` segments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor

DOUBLE_BACKWARD = (
    "the dispersion loss can be differentiated only once: its gradient is saved without a graph, and "
    "create_graph=True would silently treat it as a constant. For a second derivative use impl='reference'."
)

Backward = Callable[..., "tuple[Tensor | None, ...]"]


def differentiated_once(backward: Backward) -> Backward:
    """Make a backward refuse ``create_graph=True``, and keep its dtypes inside autocast."""

    @wraps(backward)
    def checked(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(DOUBLE_BACKWARD)
        # recomputed products, where backward() is called inside autocast, would be taken in half precision
        with torch.autocast(grad_outputs[0].device.type, enabled=False):
            return backward(ctx, *grad_outputs)

    return checked


def to_device(drawn: Tensor, device: torch.device) -> Tensor:
    """What was drawn by a generator of the CPU, on ``device``; the CPU does not wait for a GPU."""
    if device.type == "cuda" and drawn.device.type == "cpu" and not torch.compiler.is_compiling():
        return drawn.pin_memory().to(device, non_blocking=True)
    return drawn.to(device)


def _dense(label_BT: Tensor) -> Tensor:
    """Renumber the labels of each row 0, 1, ... in sorted order; no shape depends on the data."""
    ordered, order = label_BT.sort(dim=1, stable=True)
    step = torch.zeros_like(ordered)
    step[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).to(step.dtype)
    return torch.empty_like(ordered).scatter_(1, order, step.cumsum(dim=1))


@dataclass(frozen=True)
class PairMask:
    """The pairs that count. ``None`` tensors: every token is real, a segment is a block of rows (the common case)."""

    rows: int
    row_size: int
    n_segments: int
    valid_RN: Tensor | None
    """True for real tokens."""
    label_RN: Tensor | None
    """Pairs need equal labels; -1 for tokens that are not real. None: all pairs of the row."""
    segment_RN: Tensor | None
    """Segment of each token, int64. None: segment u holds the rows ``u * rows_per_segment ...
    (u + 1) * rows_per_segment - 1``."""
    tokens_U: Tensor
    """Real tokens of each segment (float)."""
    pairs_U: Tensor
    """Ordered pairs i != j of each segment (float)."""

    @property
    def rows_per_segment(self) -> int:
        """Rows of a segment where segments are blocks of rows."""
        assert self.segment_RN is None
        return self.rows // self.n_segments

    def count_U(self) -> Tensor:
        """1.0 for segments that have a pair, else 0.0."""
        return (self.pairs_U >= 1).to(self.pairs_U.dtype)

    def real(self, values: Tensor) -> Tensor:
        """Values of tokens, ``[R, N]`` or ``[R, N, D]``, with zeros where a token is not real."""
        if self.valid_RN is None:
            return values
        return torch.where(self.valid_RN if values.dim() == 2 else self.valid_RN.unsqueeze(-1), values, 0.0)

    def to_segments(self, values: Tensor) -> Tensor:
        """Sum over the real tokens of each segment, deterministic on every device: ``[R, N, ...]`` to ``[U, ...]``."""
        values, rest = self.real(values), values.shape[2:]
        if self.segment_RN is None:
            return values.reshape(self.n_segments, -1, *rest).sum(dim=1)
        out, index = values.new_zeros(self.n_segments, *rest), self.segment_RN.reshape(-1)
        if out.device.type == "cpu":
            return out.index_add(0, index, values.reshape(-1, *rest))
        # index_add uses atomics on CUDA, whose order varies; accumulating index_put sorts first
        return out.index_put((index,), values.reshape(-1, *rest), accumulate=True)

    def to_tokens(self, values_U: Tensor) -> Tensor:
        """The value of each token's segment: ``[U, ...]`` to ``[R, N, ...]`` (a view where possible)."""
        if self.segment_RN is not None:
            return values_U[self.segment_RN]
        rest = values_U.shape[1:]
        rows = values_U.unsqueeze(1).expand(self.n_segments, self.rows_per_segment, *rest).reshape(self.rows, *rest)
        return rows.unsqueeze(1).expand(self.rows, self.row_size, *rest)

    def pairs_RNN(self, *, diagonal: bool = False, device: torch.device | None = None) -> Tensor:
        """The ordered pairs that count, bool ``[R, N, N]`` (the reference implementation only)."""
        n = self.row_size
        eye = torch.eye(n, dtype=torch.bool, device=device)
        pairs = (eye | ~eye) if diagonal else ~eye
        pairs = pairs.expand(self.rows, n, n)
        if self.valid_RN is not None:
            pairs = pairs & self.valid_RN.unsqueeze(2) & self.valid_RN.unsqueeze(1)
        if self.label_RN is not None:
            pairs = pairs & (self.label_RN.unsqueeze(2) == self.label_RN.unsqueeze(1))
        return pairs

    @classmethod
    def of(
        cls,
        shape: tuple[int, int],
        mask_BT: Tensor | None,
        segments_BT: Tensor | None,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> PairMask:
        """All pairs of each sequence, or of each segment of it."""
        rows, size = shape
        valid = None if mask_BT is None else mask_BT.bool()
        if segments_BT is None:
            every = torch.full((rows,), float(size), dtype=dtype, device=device)
            tokens = every if valid is None else valid.sum(dim=1).to(dtype)
            return cls(rows, size, rows, valid, None, None, tokens, tokens * (tokens - 1))
        label = _dense(segments_BT.long())
        real = torch.ones_like(label) if valid is None else valid.long()
        segment = label + size * torch.arange(rows, device=device).unsqueeze(1)
        # integers: the order of the atomics does not matter
        tokens_long = torch.zeros(rows * size, dtype=torch.long, device=device)
        tokens = tokens_long.scatter_add_(0, segment.reshape(-1), real.reshape(-1)).to(dtype)
        if valid is not None:
            label = torch.where(valid, label, -1)
        return cls(rows, size, rows * size, valid, label, segment, tokens, tokens * (tokens - 1))

    def grouped(self, group_size: int, generator: torch.Generator, device: torch.device) -> tuple[Tensor, PairMask]:
        """Random groups of ``group_size`` tokens, pairs within a group only.

        Returns the token that each place of a group takes, int64 ``[B, groups * group_size]``, and the pairs of the
        groups (one row per group). Tokens that are not real come last, segments stay together.
        """
        assert self.segment_RN is None or self.label_RN is not None
        rows, size = self.rows, self.row_size
        key = torch.rand(rows, size, generator=generator, device=generator.device, dtype=torch.float64)
        key = to_device(key, device)
        if self.label_RN is not None:
            key = key + self.label_RN
        if self.valid_RN is not None:
            key = torch.where(self.valid_RN, key, float(size) + 1.0)
        order = key.argsort(dim=1)
        group_size = min(group_size, size)
        groups = -(-size // group_size)
        padding = groups * group_size - size
        valid = None if self.valid_RN is None else self.valid_RN.gather(1, order)
        label = None if self.label_RN is None else self.label_RN.gather(1, order)
        segment = None if self.segment_RN is None else self.segment_RN.gather(1, order)
        if padding:
            if valid is None:
                valid = torch.ones(rows, size, dtype=torch.bool, device=device)
            pad = torch.nn.functional.pad
            order, valid = pad(order, (0, padding)), pad(valid, (0, padding))
            label = None if label is None else pad(label, (0, padding), value=-1)
            segment = None if segment is None else pad(segment, (0, padding))
        shape = (rows * groups, group_size)
        valid = None if valid is None else valid.reshape(shape)
        label = None if label is None else label.reshape(shape)
        if segment is None:
            if valid is None:
                in_group = torch.full((rows, groups), float(group_size), dtype=self.pairs_U.dtype, device=device)
            else:
                in_group = valid.sum(dim=1).to(self.pairs_U.dtype).reshape(rows, groups)
            pairs = (in_group * (in_group - 1)).sum(dim=1)
        else:
            segment = segment.reshape(shape)
            assert label is not None
            # a cell is a segment's share of a group; its tokens are counted, then its pairs go to the segment
            cell = _dense(label) + group_size * torch.arange(shape[0], device=device).unsqueeze(1)
            real = torch.ones_like(cell) if valid is None else valid.long()
            in_cell = torch.zeros(cell.numel(), dtype=torch.long, device=device)
            in_cell.scatter_add_(0, cell.reshape(-1), real.reshape(-1))
            partners = (in_cell[cell] - 1) * real
            pairs = torch.zeros(self.n_segments, dtype=torch.long, device=device)
            pairs = pairs.scatter_add_(0, segment.reshape(-1), partners.reshape(-1)).to(self.pairs_U.dtype)
        grouped = PairMask(shape[0], group_size, self.n_segments, valid, label, segment, self.tokens_U, pairs)
        return order, grouped


def gather_rows(z_BTD: Tensor, order_BS: Tensor, row_size: int) -> Tensor:
    """Take tokens ``order_BS`` of each sequence and cut them into rows: ``[B, T, D]`` to ``[R, N, D]``."""
    width = z_BTD.shape[-1]
    taken = z_BTD.gather(1, order_BS.unsqueeze(-1).expand(-1, -1, width))
    return taken.reshape(-1, row_size, width)
