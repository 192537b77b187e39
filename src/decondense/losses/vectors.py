r"""From hidden states to the vectors whose products the engines take, chunk by chunk, and from tiles to the gradient.

Rows are taken a few at a time (:func:`chunks`), and a chunk's pairs in tiles, so that what is computed stays in the
caches. :func:`assemble_gradient` turns :math:`g_i = \sum_j W_{ij} x_j`, W = f', into the gradient:

* directions (``sphere``): :math:`2\,(g_i - \hat z_i \langle g_i, \hat z_i\rangle)/|z_i|`, tangent to the sphere;
* squared distances (``euclid``): :math:`(4/\tau)\,(g_i - x_i \sum_j W_{ij})`, with x around the mean, where less
  cancels;
* inner products as they are (``raw``): :math:`2\,g_i`.

Shape suffixes: ``R`` rows, ``C`` rows of a chunk, ``N`` tokens of a row, ``D`` features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from decondense import geometry
from decondense.geometry import statistics_dtype
from decondense.losses.pair_forms import PairForm


def tile_size(n: int, device: torch.device) -> int:
    """Edge of a tile: two tiles of 256 x 256 stay in a CPU's second-level cache; a GPU wants larger products."""
    return min(n, 256 if device.type == "cpu" else 1024)


def chunk_rows(rows: int, n: int, device: torch.device) -> int:
    """Rows swept at once: few enough for the caches, enough to keep the threads of a batched product busy."""
    tile = tile_size(n, device)
    budget = 2 * 256 * 256 if device.type == "cpu" else 32 * 1024 * 1024
    return max(1, min(rows, budget // (tile * tile)))


def rounds_products(x: Tensor) -> bool:
    """Whether products of float32 tensors are taken of operands rounded to TF32 (the process's choice, CUDA only)."""
    if x.device.type != "cuda" or x.dtype != torch.float32:
        return False
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # set through torch's newer switch, which the older question does not understand
        return True


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of a saved gradient: float16 lacks the range for one that a loss scale has not multiplied yet."""
    return torch.bfloat16 if dtype == torch.bfloat16 else statistics_dtype(dtype)


def to_tf32(x: Tensor) -> Tensor:
    """Round to TF32 (10 bits of mantissa, nearest even), in place.

    A product that rounds its operands internally would use other numbers than the sums around it, and equal tokens
    would no longer cancel. With operands rounded beforehand the products are exact.
    """
    bits = x.view(torch.int32)
    bits.add_(((bits >> 13) & 1) + 0xFFF).bitwise_and_(-0x2000)
    return x


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products along the last dimension, ``[C, N]``; row by row where the elementwise product would be large."""
    if a.device.type == "cpu" and a.numel() > 2**18:
        return torch.stack([torch.linalg.vecdot(x, y) for x, y in zip(a, b, strict=True)])
    product: Tensor = torch.linalg.vecdot(a, b)
    return product


@dataclass
class Prepared:
    """Vectors of a chunk, and the constants that the gradient needs."""

    x: Tensor
    """``[C, N, D]``, zero for tokens that are not real; around the row's mean on the sphere and for distances."""
    half: Tensor | None = None
    """``[C, N, 1]``: |x|^2 / 2, on the sphere with the constants of S."""
    factor: Tensor | None = None
    """``[C, N]``: the gradient in z is this times the result of :func:`assemble_gradient`. None: 1."""
    mean: Tensor | None = None
    """``[C, 1, D]``: what was subtracted from ``scale`` times the unit vectors."""
    radial: Tensor | None = None
    """``[C, N]``: factor on the radial part of g where a norm has an epsilon."""


def _centre(x: Tensor, valid_CN: Tensor | None) -> tuple[Tensor, Tensor]:
    """Real tokens minus their mean ``[C, N, D]`` (in place), and the mean ``[C, 1, D]``."""
    if valid_CN is None:
        mean = x.mean(dim=1, keepdim=True)
        return x.sub_(mean), mean
    count = valid_CN.sum(dim=1).clamp(min=1)[:, None, None]
    mean = x.sum(dim=1, keepdim=True) / count
    return x.sub_(mean).masked_fill_(~valid_CN.unsqueeze(-1), 0.0), mean


def unit_rows(z: Tensor, valid_CN: Tensor | None, epsilon: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """z / (|z| + epsilon), zero where not real; 1 / (|z| + epsilon) and |z|, ``[C, N]``."""
    x = z.to(statistics_dtype(z.dtype))
    if valid_CN is not None:
        # not a product: padding may hold anything, infinities too
        x = torch.where(valid_CN.unsqueeze(-1), x, 0.0)
    inverse, norm = geometry.inverse_norm(x, epsilon=epsilon)
    if valid_CN is not None:
        inverse = torch.where(valid_CN, inverse, 0.0)
    return x * inverse.unsqueeze(-1), inverse, norm


def prepare(z: Tensor, valid_CN: Tensor | None, form: PairForm) -> Prepared:
    """The vectors whose products a form takes."""
    if form.space == "sphere":
        x, inverse, norm = unit_rows(z, valid_CN, form.epsilon)
        if form.scale != 1.0:
            x.mul_(form.scale)
        # 1 - |zhat|^2: 0, or 1 for a zero vector, whose cosines are 0
        missing = torch.where(inverse > 0, 0.0, 1.0).to(x.dtype)
        radial = None
        if form.epsilon:
            present = norm > 0
            missing = torch.where(present, 1.0 - (norm * inverse).square(), 1.0)
            # d(z/(r+e)) = dz/(r+e) - z <z,dz>/(r (r+e)^2), in terms of z/(r+e)
            radial = torch.where(present, 1.0 + form.epsilon / norm, 0.0)
        x, mean = _centre(x, valid_CN)
        if rounds_products(x):
            to_tf32(x)
        half = 0.5 * (_dot(x, x) + form.scale**2 * missing + form.gap)
        return Prepared(x, half.unsqueeze(-1), inverse * (2.0 * form.slope * form.scale), mean, radial)
    x = z.to(statistics_dtype(z.dtype), copy=form.space == "euclid")
    if valid_CN is not None:
        x = torch.where(valid_CN.unsqueeze(-1), x, 0.0)
    if form.space == "raw":
        return Prepared(x)
    x, _ = _centre(x, valid_CN)
    return Prepared(x, 0.5 * _dot(x, x).unsqueeze(-1))


def products(p: Prepared, i: slice, j: slice, form: PairForm, S: Tensor) -> None:
    """The number per pair (see :class:`PairForm`) of a tile."""
    x_i, x_jt = p.x[:, i], p.x[:, j].mT
    if p.half is None:
        torch.bmm(x_i, x_jt, out=S)
        return
    torch.add(p.half[:, i], p.half[:, j].mT, out=S)
    S.baddbmm_(x_i, x_jt, alpha=-1.0)
    if form.space == "euclid":
        S.clamp_(min=0.0).mul_(-form.slope)
    else:
        # rounding may leave [0, 2]; the floor keeps the slope at duplicates bounded, delta or not
        S.clamp_(min=max(0.5 * form.gap, torch.finfo(S.dtype).eps ** 2), max=2.0 - torch.finfo(S.dtype).eps)


def assemble_gradient(G: Tensor, p: Prepared, form: PairForm, weight_sum: Tensor, gap_sum: Tensor) -> None:
    """Turn G, g_i = sum_j W_ij x_j, into the gradient, up to a factor; the sums over j are of W_ij and W_ij S_ij."""
    if form.space == "raw":
        G.mul_(2.0 * form.slope)
        return
    if form.space == "euclid":
        G.addcmul_(weight_sum.unsqueeze(-1), p.x, value=-1.0).mul_(2.0 * form.slope)
        return
    assert p.mean is not None
    # sum_j W_ij (zhat_j - c_ij zhat_i) with zhat = x + m: equal tokens have equal x, which cancel however large their
    # weight; orthogonal ones leave the mean, which is exact
    on_m = (gap_sum - form.gap * weight_sum) / form.scale**2
    on_x = on_m - weight_sum
    if p.radial is not None:
        # a norm with an epsilon sees the radial part, which the projection would otherwise remove
        on_x, on_m = torch.zeros_like(weight_sum), weight_sum
    xx, xm = _dot(p.x, p.x), torch.matmul(p.x, p.mean.mT).squeeze(-1)
    mm = p.mean.square().sum(dim=-1)
    along = _dot(G, p.x) + torch.matmul(G, p.mean.mT).squeeze(-1)
    along.addcmul_(on_x, xx + xm).addcmul_(on_m, xm + mm).div_(form.scale**2)
    if p.radial is not None:
        along.mul_(p.radial)
    G.addcmul_((on_x - along).unsqueeze(-1), p.x).addcmul_((on_m - along).unsqueeze(-1), p.mean)


@dataclass
class Chunk:
    """A few prepared rows, and which of their pairs count."""

    rows: slice
    """Rows of the input."""
    p: Prepared
    valid: Tensor | None
    """``[C, N]``, true for real tokens; None: all."""
    label: Tensor | None
    """``[C, N]``: pairs need equal labels; None: all pairs."""
    tile: int

    def buffers(self, count: int) -> Tensor:
        """Memory for ``count`` tiles ``[count, C * tile * tile]``; :meth:`view` cuts a tile out of one."""
        return self.p.x.new_empty(count, self.p.x.shape[0] * self.tile * self.tile)

    def view(self, buffer: Tensor, i: slice, j: slice) -> Tensor:
        """The part of a buffer for a tile, ``[C, |i|, |j|]``."""
        shape = (self.p.x.shape[0], i.stop - i.start, j.stop - j.start)
        return buffer[: math.prod(shape)].view(shape)

    def exclude(self, E: Tensor, i: slice, j: slice, *, diagonal: bool, fill: float = -math.inf) -> None:
        """Set the partners in a tile that do not count to ``fill``, in place; ``diagonal``: the pairs i = i too."""
        if diagonal and i.start == j.start:
            E.diagonal(dim1=1, dim2=2).fill_(fill)
        if self.valid is not None:
            E.masked_fill_(~self.valid[:, j].unsqueeze(1), fill)
        if self.label is not None:
            E.masked_fill_(self.label[:, i].unsqueeze(2) != self.label[:, j].unsqueeze(1), fill)

    def clear(self, E: Tensor, i: slice, j: slice) -> None:
        """Set the pairs of a tile that do not count to 0, those of tokens that are not real and the diagonal too."""
        self.exclude(E, i, j, diagonal=True, fill=0.0)
        if self.valid is not None:
            E.masked_fill_(~self.valid[:, i].unsqueeze(2), 0.0)

    def tiles(self, *, symmetric: bool) -> Iterator[tuple[slice, slice]]:
        """Tiles row by row; ``symmetric``: on and above the diagonal only."""
        n = self.p.x.shape[1]
        for i in range(0, n, self.tile):
            for j in range(i if symmetric else 0, n, self.tile):
                yield slice(i, min(i + self.tile, n)), slice(j, min(j + self.tile, n))


def chunks(z_RND: Tensor, valid_RN: Tensor | None, label_RN: Tensor | None, form: PairForm) -> Iterator[Chunk]:
    """The rows a few at a time, prepared; a chunk's vectors are freed before the next chunk's are made."""
    rows, n, _ = z_RND.shape
    size = chunk_rows(rows, n, z_RND.device)
    for start in range(0, rows, size):
        part = slice(start, min(start + size, rows))
        valid = None if valid_RN is None else valid_RN[part]
        label = None if label_RN is None else label_RN[part]
        chunk = Chunk(part, prepare(z_RND[part], valid, form), valid, label, tile_size(n, z_RND.device))
        yield chunk
        del chunk.p
