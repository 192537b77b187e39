r"""Running statistics of one layer: everything about token geometry that one pass can compute.

With unit rows :math:`\hat z_i = z_i / \lvert z_i \rvert` the mean over all N x N cosines needs no pairs,

.. math:: \frac1{N^2} \sum_{ij} \langle \hat z_i, \hat z_j \rangle = \Bigl\lvert \frac1N \sum_i \hat z_i \Bigr\rvert^2,

so the means cost O(N D) a layer. Histograms do need the pairs; they are taken tile by tile above the diagonal and
reduced at once to integer counts, so that memory depends neither on the number of passages nor on N squared
(except for the position-wise average, which is an N x N object by definition).

Shape suffixes: B passages of a batch, N tokens of a passage, D width, K histogram cells, P all passages.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from decondense.geometry import inverse_norm
from decondense.layers import LOGITS
from decondense.measuring.metrics import Cloud, MomentStream
from decondense.measuring.sinks import sink_tokens
from decondense.metrics import Metric

FINE_BINS = 2048
"""Cells of the counted histogram on [-1, 1]. Any coarser power of two is an exact sum of them."""
_HALF = FINE_BINS // 2
UNIT_SCALE = 32.0
"""What unit rows are multiplied by, so that their products are cosines in cells: UNIT_SCALE^2 = FINE_BINS / 2."""
# cosines of rounded unit vectors reach 1 + 1e-7: one spare cell at either end catches them and is folded inwards
_CELLS = FINE_BINS + 3
_ROWS = 32
_TILE_CPU = 128
_TILE_GPU = 1024

Array = NDArray[np.float64]


class NotFiniteError(ValueError):
    """A hidden state is NaN or infinite; the message names the layer and the passage."""


@contextlib.contextmanager
def exact_matmul(device: torch.device) -> Iterator[None]:
    """Full float32 products, whatever the caller has allowed for the model (autocast, TF32, bf16 products)."""
    precision = torch.get_float32_matmul_precision()
    try:
        if precision != "highest":
            torch.set_float32_matmul_precision("highest")
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if precision != "highest":
            torch.set_float32_matmul_precision(precision)


def fold(counts_K: NDArray[np.int64]) -> NDArray[np.int64]:
    """Counts with the spare end cells folded into the first and the last bin of [-1, 1]."""
    folded: NDArray[np.int64] = counts_K[..., 1 : FINE_BINS + 1].copy()
    folded[..., 0] += counts_K[..., 0]
    folded[..., -1] += counts_K[..., FINE_BINS + 1 :].sum(axis=-1)
    return folded


class PairStream:
    """Pair statistics of one layer: pooled counts and, if wanted, the sum of the matrices over passages."""

    def __init__(self, *, pooled: bool, averaged: bool, tokens: int, device: torch.device) -> None:
        self.tile = _TILE_CPU if device.type == "cpu" else _TILE_GPU
        # one row each: pairs right of a diagonal square, inside one, of a token with itself
        self.pooled = torch.zeros(3 * _CELLS, dtype=torch.int64, device=device) if pooled else None
        self.strips: list[Tensor] | None = None
        if averaged:
            # float64 where there is: the sum then does not depend on the order of the passages
            dtype = torch.float32 if device.type == "mps" else torch.float64
            self.strips = [
                torch.zeros(min(self.tile, tokens - row), tokens - row, dtype=dtype, device=device)
                for row in range(0, tokens, self.tile)
            ]

    def add(self, units: Sequence[Tensor]) -> None:
        """Take in the unit rows [N, D], times :data:`UNIT_SCALE`, of the passages of a batch."""
        tokens = units[0].shape[0]
        cells = min(self.tile, tokens) * tokens
        # one piece of memory for all tiles: fresh pages for each would cost as much as the products
        products = {dtype: units[0].new_empty(cells, dtype=dtype) for dtype in {unit_ND.dtype for unit_ND in units}}
        indices = units[0].new_empty(cells if self.pooled is not None else 0, dtype=torch.int16)
        # passages innermost: a strip of the sum is then in the cache for all of them
        strips = enumerate(range(0, tokens, self.tile))
        for (strip, row), unit_ND in itertools.product(strips, units):
            # rows of a block against everything from the block's own start on: the upper triangle by blocks
            rows_RD, columns_MD = unit_ND[row : row + self.tile], unit_ND[row:]
            shape = (len(rows_RD), len(columns_MD))
            cos = torch.mm(rows_RD, columns_MD.T, out=products[unit_ND.dtype][: shape[0] * shape[1]].view(shape))
            if self.strips is not None:
                self.strips[strip] += cos
            if self.pooled is not None:
                # floor(c * bins / 2) is exact for a power of two; int16 halves the memory traffic of the count
                index = indices[: cos.numel()].view(shape).copy_(cos.floor_())
                index[:, shape[0] :] += _HALF + 1
                square = index[:, : shape[0]]
                square += _HALF + 1 + _CELLS
                square.diagonal().add_(_CELLS)
                self.pooled += torch.bincount(index.view(-1), minlength=3 * _CELLS)

    def pooled_counts(self) -> NDArray[np.int64] | None:
        """Counts [FINE_BINS] of the ordered pairs i != j of all passages."""
        if self.pooled is None:
            return None
        right, square, _ = self.pooled.cpu().numpy().reshape(3, _CELLS)
        # right of the square each pair stands for (i, j) and (j, i); inside it both are there already
        return fold(2 * right + square)

    def packed_sum(self) -> Array | None:
        """The upper triangle (diagonal included) of the summed cosine matrix, row by row."""
        if self.strips is None:
            return None
        parts: list[Array] = []
        for strip in self.strips:
            full = strip.cpu().numpy().astype(np.float64, copy=False)
            parts.extend(full[row, row:] for row in range(full.shape[0]))
        packed: Array = np.concatenate(parts)
        packed /= _HALF
        return packed


_BY_PASSAGE = ("cosine_P", "cosine_others_P", "norm_P", "norm_sd_P", "norm_max_P", "sinks_P", "kept_P", "kept_norm_P")


class LayerStatistics:
    """All statistics of one layer over the passages seen so far, addressed by passage number.

    ``first``: tokens at the beginning of each passage that were left out; positions are counted with them.
    """

    def __init__(
        self,
        name: str,
        *,
        passages: int,
        device: torch.device,
        pooled: bool,
        averaged: bool,
        tokens: int,
        metrics: Mapping[str, Metric],
        first: int = 0,
    ) -> None:
        self.name, self.first = name, first
        empty = (passages,)
        self.cosine_P = np.full(empty, np.nan)
        self.cosine_others_P = np.full(empty, np.nan)
        self.norm_P = np.full(empty, np.nan)
        self.norm_sd_P = np.full(empty, np.nan)
        self.norm_max_P = np.full(empty, np.nan)
        self.sinks_P = np.full(empty, np.nan)
        self.kept_P = np.full(empty, np.nan)
        self.kept_norm_P = np.full(empty, np.nan)
        self.sink_positions_N = np.zeros(first + tokens, dtype=np.int64)
        self.metrics = [metric for metric in metrics.values() if metric.scope == "passage"]
        self.metric_P = {column: np.full(empty, np.nan) for metric in self.metrics for column in metric.columns}
        # a vocabulary squared is no matrix to keep: the logits have no corpus metrics
        self.corpus = any(metric.scope == "corpus" for metric in metrics.values()) and name != LOGITS.label
        self.moments: MomentStream | None = None
        self.pairs = (
            PairStream(pooled=pooled, averaged=averaged, tokens=tokens, device=device) if pooled or averaged else None
        )

    def resize(self, passages: int) -> None:
        """Make room for as many passages, or give back what was not used."""
        owned = [(vars(self), name) for name in _BY_PASSAGE] + [(self.metric_P, name) for name in self.metric_P]
        for owner, name in owned:
            have = owner[name][:passages]
            owner[name] = np.concatenate([have, np.full(passages - len(have), np.nan)])

    def add(self, z_BND: Tensor, passages: Sequence[int]) -> None:
        """Take in the states of a batch of passages of one length; ``passages`` are their numbers."""
        z_BND = z_BND.detach()
        if z_BND.dtype not in (torch.float32, torch.float64):
            z_BND = z_BND.float()
        with exact_matmul(z_BND.device):
            units = [self._add_passage(z_ND, passage) for z_ND, passage in zip(z_BND, passages, strict=True)]
            if self.pairs is not None:
                self.pairs.add([unit_ND for unit_ND in units if unit_ND is not None])

    def _add_passage(self, z_ND: Tensor, passage: int) -> Tensor | None:
        """The statistics that need no pairs; returns the unit rows, scaled, if pairs are wanted."""
        n = z_ND.shape[0]
        inverse_N, norm_N = inverse_norm(z_ND, wait=True)
        norms = norm_N.cpu().numpy()
        if not (norms.min() > 1e-15 and norms.max() < np.inf):
            # in float32 the squares of very large and very small states overflow and vanish, in float64 they do not
            z_ND = z_ND.double()
            inverse_N, norm_N = inverse_norm(z_ND, wait=True)
            norms = norm_N.cpu().numpy()
            finite = torch.isfinite(z_ND).all(dim=-1).cpu().numpy()
            if not finite.all():
                raise NotFiniteError(
                    f"the hidden states of layer '{self.name}' are NaN or infinite for passage {passage} (first at "
                    f"token {int(np.argmin(finite))} of {n}). The model itself produces them: load it in float32 or "
                    "bfloat16 instead of float16, or check its weights."
                )
        # a zero row has no direction: its cosine with everything, itself included, counts as 0
        total_D = _weighted_sum(inverse_N, z_ND)
        square = float(total_D @ total_D)
        self.cosine_P[passage] = square / n**2
        self.cosine_others_P[passage] = (square - int((inverse_N > 0).sum())) / (n * (n - 1))
        norms = norms.astype(np.float64)
        self.norm_P[passage] = norms.mean()
        self.norm_sd_P[passage] = norms.std()
        self.norm_max_P[passage] = norms.max()
        self._add_sinks(z_ND, inverse_N, norms, passage)
        if self.metrics or self.corpus:
            self._add_metrics(Cloud(z_ND, z_ND * inverse_N[:, None]), passage)
        return None if self.pairs is None else z_ND * (inverse_N * UNIT_SCALE)[:, None]

    def _add_metrics(self, cloud: Cloud, passage: int) -> None:
        for metric in self.metrics:
            values = np.atleast_1d(metric(cloud))
            for column, value in zip(metric.columns, values, strict=True):
                self.metric_P[column][passage] = value
        if self.corpus:
            self.moments = self.moments or MomentStream(cloud.width, cloud.z.device)
            self.moments.add(cloud, passage)

    def _add_sinks(self, z_ND: Tensor, inverse_N: Tensor, norms_N: Array, passage: int) -> None:
        sink_N = sink_tokens(norms_N)
        count = int(sink_N.sum())
        self.sinks_P[passage] = count
        if not count:
            self.kept_P[passage], self.kept_norm_P[passage] = self.cosine_P[passage], self.norm_P[passage]
            return
        at = self.first + np.flatnonzero(sink_N)
        if at[-1] >= len(self.sink_positions_N):
            self.sink_positions_N = np.pad(self.sink_positions_N, (0, int(at[-1]) + 1 - len(self.sink_positions_N)))
        self.sink_positions_N[at] += 1
        total_D = _weighted_sum(inverse_N * torch.from_numpy(~sink_N).to(inverse_N), z_ND)
        self.kept_P[passage] = float(total_D @ total_D) / (len(norms_N) - count) ** 2
        self.kept_norm_P[passage] = norms_N[~sink_N].mean()


def _weighted_sum(weight_N: Tensor, z_ND: Tensor) -> Array:
    """The sum of the rows times their weights: products of 32 rows as one each, their sums added up in float64.

    Converting every row to float64 first would cost more than all other means together, and gain nothing over the
    rounding of the rows themselves.
    """
    n, width = z_ND.shape
    whole = n - n % _ROWS
    blocks = torch.bmm(weight_N[:whole].reshape(-1, 1, _ROWS), z_ND[:whole].reshape(-1, _ROWS, width))[:, 0]
    total: Array = blocks.cpu().numpy().sum(axis=0, dtype=np.float64)
    if whole < n:
        total += (weight_N[whole:] @ z_ND[whole:]).cpu().numpy()
    return total
