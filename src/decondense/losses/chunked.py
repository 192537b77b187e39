r"""Memory linear in the number of tokens: tiles of pairs over several sequences at once, in plain torch, on any device.

One engine for every form that is a sum over pairs. With x_i the prepared vectors, s_ij = <x_i, x_j> and
:math:`S_u = \sum_{i,j \in u} f(s_{ij})` for a unit u, the gradient of :math:`S_u` in :math:`x_i` is
:math:`2 \sum_j f'(s_{ij}) x_j`: one product of a tile of weights with the vectors that made the tile. So the sweep over
the tiles that yields the value yields the gradient too; backward only multiplies by what comes in from above, one
number per unit, and nothing of size T x T outlives its tile. Tiles above the diagonal serve twice.

What is made of :math:`g_i = \sum_j W_{ij} x_j`, W = f':

* directions (``sphere``): :math:`2\,(g_i - \hat z_i \langle g_i, \hat z_i\rangle)/|z_i|`, tangent to the sphere;
* squared distances (``euclid``): :math:`(4/\tau)\,(g_i - x_i \sum_j W_{ij})`, with x around the mean, where less
cancels;
* inner products as they are (``raw``): :math:`2\,g_i`.

Log-mean-exp forms whose exponents could underflow (distances, or a very small tau) run row by row with a running
maximum per token instead (:func:`log_sums`); a token's sum is then complete within its row of tiles, and symmetry is
not used.

Double backward raises: the gradient is a saved number, not a graph. ``impl="reference"`` differentiates twice.

Shape suffixes: ``R`` rows, ``N`` tokens of a row, ``D`` features, ``U`` units, ``C`` rows of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from decondense.geometry import ZERO_NORM, statistics_dtype, unit
from decondense.losses.forms import COMPAT_EPSILON, Settings
from decondense.losses.scope import Scope, differentiated_once

__all__ = ["log_sums", "pair_form", "pair_sums", "per_unit", "sweep", "tile_size", "unit_rows"]

Space = Literal["sphere", "euclid", "raw"]


# --------------------------------------------------------------------------------------------------------------------
# What a form is to the engine
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairForm:
    """A sum over pairs of a function of a number per pair. Tiles are changed in place.

    The number S is, on the sphere, ``(1 - kappa) + kappa (1 - c)``, kappa = ``scale**2``: the distance of the shrunk
    cosine from 1, which has digits left where the cosine has none; for distances, ``-d slope / 2``; raw, the product.
    """

    space: Space = "sphere"
    diagonal: bool = False
    """Pairs i = j count."""
    scale: float = 1.0
    """Unit vectors are multiplied by this (the square root of the shrinking of the cosine)."""
    gap: float = 0.0
    """1 - kappa."""
    epsilon: float = 0.0
    """Added to the norms (compatibility)."""
    slope: float = 1.0
    """Constant factor of df/dc that :meth:`weight` leaves out."""
    log: bool = True
    """The unit's loss is a log-mean-exp; else a mean."""
    reach: float = 0.0
    """Greatest magnitude of the exponent of a log form."""
    proportional: bool = False
    """f' is a constant times f: :meth:`weight` has nothing to do."""

    def logit(self, S: Tensor, out: Tensor) -> None:
        """Write the exponent of a log form."""
        raise NotImplementedError

    def value(self, S: Tensor, out: Tensor) -> None:
        """Write f."""
        self.logit(S, out)
        out.exp_()

    def weight(self, S: Tensor, E: Tensor) -> None:
        """Turn E = f into its derivative by the cosine, without ``slope``; S may be used up."""


@dataclass(frozen=True)
class _Angular(PairForm):
    rate: float = -1.0 / math.pi
    clamp: float | None = None

    def half_angle(self, S: Tensor, out: Tensor) -> Tensor:
        """theta/2 = arcsin sqrt(S/2)."""
        if self.clamp is None:
            torch.mul(S, 0.5, out=out)
        else:
            torch.clamp(S, self.clamp, 2.0 - self.clamp, out=out).mul_(0.5)
        return out.sqrt_().arcsin_()

    def logit(self, S: Tensor, out: Tensor) -> None:
        self.half_angle(S, out).mul_(2.0 * self.rate)

    def weight(self, S: Tensor, E: Tensor) -> None:
        E.mul_(self.inverse_sine(S))

    def inverse_sine(self, S: Tensor) -> Tensor:
        """sqrt(2) / sin(theta) in place: sin^2 = S (2 - S)."""
        if self.clamp is not None:
            S.clamp_(self.clamp, 2.0 - self.clamp)
        return S.addcmul_(S, S, value=-0.5).rsqrt_()


@dataclass(frozen=True)
class _Orthogonalization(_Angular):
    def value(self, S: Tensor, out: Tensor) -> None:
        self.half_angle(S, out).mul_(-2.0 / math.pi).add_(0.5).clamp_(min=0.0).square_()

    def weight(self, S: Tensor, E: Tensor) -> None:
        E.sqrt_().mul_(self.inverse_sine(S))


@dataclass(frozen=True)
class _Exponential(PairForm):
    """exp(-slope (1 - c)): cosine InfoNCE and uniformity."""

    proportional: bool = True

    def logit(self, S: Tensor, out: Tensor) -> None:
        torch.mul(S, -self.slope, out=out)


@dataclass(frozen=True)
class _Distance(PairForm):
    """exp(-d / tau); S is -d / tau already."""

    proportional: bool = True

    def logit(self, S: Tensor, out: Tensor) -> None:
        out.copy_(S)


@dataclass(frozen=True)
class _Hinge(PairForm):
    margin: float = 0.0

    def value(self, S: Tensor, out: Tensor) -> None:
        torch.neg(S, out=out).add_(1.0 + self.margin).clamp_(min=0.0).square_()

    def weight(self, S: Tensor, E: Tensor) -> None:
        E.sqrt_()


@dataclass(frozen=True)
class _Square(PairForm):
    """The squared product: Frobenius norms of Gram matrices without the D x D one."""

    def value(self, S: Tensor, out: Tensor) -> None:
        torch.mul(S, S, out=out)

    def weight(self, S: Tensor, E: Tensor) -> None:
        # E carries the pairs that do not count as zeros and the magnitude of the others
        torch.copysign(E.sqrt_(), S, out=E)


SQUARE = _Square(space="raw", diagonal=True, slope=2.0, log=False)


def pair_form(s: Settings) -> PairForm:
    """The engine's description of a form of kind ``pairs``."""
    tau = s.tau
    if s.form in ("angular", "orthogonalization"):
        kappa = s.shrink
        # 1 - 1/sqrt(1 + delta^2) without the cancellation
        gap = s.delta**2 * kappa * kappa / (1.0 + kappa) if s.clamp is None else 0.0
        # f' carries 1/sin; the engine's inverse sine is sqrt(2) of it
        slope = 1.0 / (math.pi * tau) if s.form == "angular" else 2.0 / math.pi
        common: dict[str, Any] = {
            "scale": math.sqrt(kappa),
            "gap": gap,
            "epsilon": s.epsilon,
            "slope": slope / math.sqrt(2.0),
            "clamp": s.clamp,
        }
        if s.form == "angular":
            return _Angular(reach=1 / tau, rate=-1.0 / (math.pi * tau), **common)
        return _Orthogonalization(log=False, **common)
    if s.form == "cosine_infonce":
        return _Exponential(diagonal=True, slope=1 / tau, reach=2 / tau)
    if s.form == "uniformity":
        return _Exponential(slope=4 / tau, reach=8 / tau)
    if s.form in ("l2_repel", "l2_infonce"):
        return _Distance(space="euclid", diagonal=s.diagonal, slope=2 / tau, reach=math.inf)
    assert s.form == "hinge", s.form
    return _Hinge(diagonal=True, slope=2.0, log=False, margin=s.margin)


# --------------------------------------------------------------------------------------------------------------------
# Preparation: from hidden states to the vectors of the products, and from g back to the gradient
# --------------------------------------------------------------------------------------------------------------------


def tile_size(n: int, device: torch.device) -> int:
    """Edge of a tile: two tiles of 256 x 256 stay in a CPU's second-level cache; a GPU wants larger products."""
    return min(n, 256 if device.type == "cpu" else 1024)


def _chunk_rows(rows: int, n: int, device: torch.device) -> int:
    """Rows swept at once: few enough for the caches, enough to keep the threads of a batched product busy."""
    tile = tile_size(n, device)
    budget = 2 * 256 * 256 if device.type == "cpu" else 32 * 1024 * 1024
    return max(1, min(rows, budget // (tile * tile)))


def _tiles(n: int, tile: int) -> Iterator[tuple[slice, slice]]:
    """Tiles on and above the diagonal, row by row."""
    for i in range(0, n, tile):
        for j in range(i, n, tile):
            yield slice(i, min(i + tile, n)), slice(j, min(j + tile, n))


def rounds_products(x: Tensor) -> bool:
    """Whether products of float32 tensors are taken of operands rounded to TF32 (the process's choice, CUDA only)."""
    if x.device.type != "cuda" or x.dtype != torch.float32:
        return False
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # set through torch's newer switch, which the older question does not understand
        return True


def to_tf32(x: Tensor) -> Tensor:
    """Round to TF32 (10 bits of mantissa, nearest even), in place.

    Products that round their operands behind our back would leave the sums around them with other numbers, and equal
    tokens would no longer cancel; rounded beforehand, the products are exact.
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


def _inverse_norm(x: Tensor, valid_CN: Tensor | None, epsilon: float) -> tuple[Tensor, Tensor]:
    """1 / (|x| + epsilon) and |x|, ``[C, N]``; both 0 for zero vectors and for tokens that are not real."""
    norm = torch.linalg.vector_norm(x, dim=-1)
    if x.device.type == "cpu" and bool(((norm > 1e-15) & (norm < 1e18)).all()):
        inverse = (norm + epsilon).reciprocal_()
    else:
        # lengths whose squares over- or underflow: measure relative to the largest element
        largest = torch.maximum(x.amax(dim=-1), -x.amin(dim=-1))
        present = largest > ZERO_NORM
        largest = torch.where(present, largest, 1.0)
        relative = torch.linalg.vector_norm(x / largest.unsqueeze(-1), dim=-1)
        inverse = torch.where(present, 1.0 / (relative + epsilon / largest) / largest, 0.0)
        norm = torch.where(present, relative * largest, 0.0)
    if valid_CN is not None:
        inverse = torch.where(valid_CN, inverse, 0.0)
    return inverse, norm


@dataclass
class _Prepared:
    """Vectors of a chunk and what the gradient needs of their making."""

    x: Tensor
    """``[C, N, D]``, zero for tokens that are not real; around the row's mean on the sphere and for distances."""
    half: Tensor | None = None
    """``[C, N, 1]``: |x|^2 / 2, on the sphere with the constants of S."""
    factor: Tensor | None = None
    """``[C, N]``: the gradient in z is this times what :func:`_finish` leaves. None: 1."""
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
    inverse, norm = _inverse_norm(x, valid_CN, epsilon)
    return x * inverse.unsqueeze(-1), inverse, norm


def prepare(z: Tensor, valid_CN: Tensor | None, form: PairForm) -> _Prepared:
    """Make the vectors whose products a form takes."""
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
        return _Prepared(x, half.unsqueeze(-1), inverse * (2.0 * form.slope * form.scale), mean, radial)
    x = z.to(statistics_dtype(z.dtype), copy=form.space == "euclid")
    if valid_CN is not None:
        x = torch.where(valid_CN.unsqueeze(-1), x, 0.0)
    if form.space == "raw":
        return _Prepared(x)
    x, _ = _centre(x, valid_CN)
    return _Prepared(x, 0.5 * _dot(x, x).unsqueeze(-1))


def _products(p: _Prepared, i: slice, j: slice, form: PairForm, S: Tensor) -> None:
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


def _finish(G: Tensor, p: _Prepared, form: PairForm, pull: Tensor, gaps: Tensor) -> None:
    """Turn g_i = sum_j W_ij x_j into the gradient, up to a factor; pull = sum_j W_ij, gaps = sum_j W_ij S_ij."""
    if form.space == "raw":
        G.mul_(2.0 * form.slope)
        return
    if form.space == "euclid":
        G.addcmul_(pull.unsqueeze(-1), p.x, value=-1.0).mul_(2.0 * form.slope)
        return
    assert p.mean is not None
    # sum_j W_ij (zhat_j - c_ij zhat_i) with zhat = x + m: equal tokens have equal x, which cancel however large their
    # weight; orthogonal ones leave the mean, which is exact
    on_m = (gaps - form.gap * pull) / form.scale**2
    on_x = on_m - pull
    if p.radial is not None:
        # a norm with an epsilon sees the radial part, which the projection would otherwise remove
        on_x, on_m = torch.zeros_like(pull), pull
    xx, xm = _dot(p.x, p.x), torch.matmul(p.x, p.mean.mT).squeeze(-1)
    mm = p.mean.square().sum(dim=-1)
    along = _dot(G, p.x) + torch.matmul(G, p.mean.mT).squeeze(-1)
    along.addcmul_(on_x, xx + xm).addcmul_(on_m, xm + mm).div_(form.scale**2)
    if p.radial is not None:
        along.mul_(p.radial)
    G.addcmul_((on_x - along).unsqueeze(-1), p.x).addcmul_((on_m - along).unsqueeze(-1), p.mean)


# --------------------------------------------------------------------------------------------------------------------
# The symmetric sweep
# --------------------------------------------------------------------------------------------------------------------


def _overlap(label_RN: Tensor, tile: int) -> list[list[bool]]:
    """Whether any row's label ranges of two blocks of tokens overlap (CPU only: it looks at values)."""
    blocks = torch.split(label_RN, tile, dim=1)
    low = [block.masked_fill(block < 0, 2**62).amin(dim=1) for block in blocks]
    high = [block.amax(dim=1) for block in blocks]
    return [[bool(((low[a] <= high[b]) & (low[b] <= high[a])).any()) for b in range(len(low))] for a in range(len(low))]


def sweep(
    z_RND: Tensor, valid_RN: Tensor | None, label_RN: Tensor | None, form: PairForm, want_gradient: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Sum over pairs per token, ``[R, N]``; the gradient of the sum of a token's unit, ``[R, N, D]``, and its factor.

    The gradient in z is the second times the third times whatever comes from above.
    """
    rows, n, width = z_RND.shape
    dtype, device = statistics_dtype(z_RND.dtype), z_RND.device
    tile = tile_size(n, device)
    chunk = _chunk_rows(rows, n, device)
    sums_RN = torch.zeros(rows, n, dtype=dtype, device=device)
    # half precision has too little range for a gradient that a loss scale has not multiplied yet
    kept = torch.bfloat16 if z_RND.dtype == torch.bfloat16 else dtype
    gradient = torch.empty(rows, n, width, dtype=kept, device=device) if want_gradient else None
    factor_RN = None
    if want_gradient and form.space == "sphere":
        factor_RN = torch.empty(rows, n, dtype=dtype, device=device)
    for start in range(0, rows, chunk):
        part = slice(start, min(start + chunk, rows))
        valid = None if valid_RN is None else valid_RN[part]
        label = None if label_RN is None else label_RN[part]
        p = prepare(z_RND[part], valid, form)
        G = None
        if gradient is not None:
            G = gradient[part] if kept == dtype else torch.empty(p.x.shape, dtype=dtype, device=device)
        pull = sums_RN[part]
        if G is not None and not form.proportional:
            pull = torch.zeros_like(pull)
        gaps = torch.zeros_like(pull)
        _sweep_chunk(p, G, sums_RN[part], pull, gaps, form, valid, label, tile)
        if G is not None and gradient is not None:
            _finish(G, p, form, pull, gaps)
            if factor_RN is not None and p.factor is not None:
                factor_RN[part] = p.factor
            if kept != dtype:
                gradient[part] = G
        del p  # before the next chunk's takes its place
    return sums_RN, gradient, factor_RN


def _sweep_chunk(
    p: _Prepared,
    G: Tensor | None,
    sums: Tensor,
    pull: Tensor,
    gaps: Tensor,
    form: PairForm,
    valid: Tensor | None,
    label: Tensor | None,
    tile: int,
) -> None:
    x = p.x
    count, n, _ = x.shape
    buffer_S, buffer_E, buffer_K = x.new_empty(3, count * tile * tile)
    real = None if valid is None else valid.to(x.dtype).unsqueeze(2)
    overlap = None
    if label is not None and x.device.type == "cpu":
        overlap = _overlap(label, tile)
        if G is not None:
            G.zero_()
    for i, j in _tiles(n, tile):
        if overlap is not None and not overlap[i.start // tile][j.start // tile]:
            continue
        height, breadth = i.stop - i.start, j.stop - j.start
        size = count * height * breadth
        S = buffer_S[:size].view(count, height, breadth)
        E = buffer_E[:size].view(count, height, breadth)
        _products(p, i, j, form, S)
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
                K = buffer_K[:size].view(count, height, breadth).copy_(S)
            form.weight(S, E)
            if form.space == "sphere":
                S = K
                if rounds_products(E):
                    to_tf32(E)
                _accumulate(pull, E, real, i, j)
        if form.space == "sphere":
            _accumulate(gaps, S.mul_(E), real, i, j)
        # tiles come row by row: the first row touches every block for the first time, so nothing has to be zeroed
        fresh = i.start == 0 and overlap is None
        G[:, i].baddbmm_(E, x[:, j], beta=0 if fresh and not above else 1)
        if above:
            G[:, j].baddbmm_(E.mT, x[:, i], beta=0 if fresh else 1)


def _accumulate(sums: Tensor, E: Tensor, real: Tensor | None, i: slice, j: slice) -> None:
    """Add a tile's sums over partners to its tokens' and, above the diagonal, over tokens to its partners'."""
    above = i.start != j.start
    if real is None:
        sums[:, i] += E.sum(dim=2)
        if above:
            sums[:, j] += E.sum(dim=1)
    else:
        sums[:, i] += torch.bmm(E, real[:, j]).squeeze(2)
        if above:
            sums[:, j] += torch.bmm(E.mT, real[:, i]).squeeze(2)


class _PairSums(torch.autograd.Function):
    """Sums over pairs per token, differentiated once.

    The backward formula holds for an incoming gradient that is the same for all tokens of a unit, which is what comes
    back through the sum over a unit.
    """

    @staticmethod
    def forward(ctx: Any, z_RND: Tensor, scope: Scope, form: PairForm, in_forward: bool) -> Tensor:
        sums_RN, gradient, factor_RN = sweep(z_RND, scope.valid_RN, scope.label_RN, form, in_forward)
        ctx.save_for_backward(z_RND)
        ctx.scope, ctx.form, ctx.made = scope, form, (gradient, factor_RN)
        return sums_RN

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, above_RN: Tensor) -> tuple[Tensor | None, ...]:
        (z_RND,) = ctx.saved_tensors
        gradient, factor_RN = ctx.made
        ctx.made = (None, None)
        if gradient is None:
            # recompute mode, or a second backward through a retained graph: the first one used the buffer up
            _, gradient, factor_RN = sweep(z_RND, ctx.scope.valid_RN, ctx.scope.label_RN, ctx.form, True)
        assert gradient is not None
        return _scaled(gradient, above_RN, factor_RN, ctx.scope.valid_RN, z_RND.dtype), None, None, None


def _scaled(
    gradient: Tensor, above_RN: Tensor, factor_RN: Tensor | None, valid_RN: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``gradient * above * factor``, in place; exactly zero for tokens that are not real."""
    scale_RN = above_RN if factor_RN is None else above_RN * factor_RN
    if valid_RN is not None:
        scale_RN = torch.where(valid_RN, scale_RN, 0.0)
    return gradient.mul_(scale_RN.unsqueeze(-1)).to(dtype)


def pair_sums(z_RND: Tensor, scope: Scope, form: PairForm, *, gradient: str = "forward") -> Tensor:
    """Sum over pairs of each unit, ``[U]``, through the symmetric sweep; differentiable once."""
    in_forward = gradient == "forward" and z_RND.requires_grad and torch.is_grad_enabled()
    sums_RN: Tensor = _PairSums.apply(z_RND, scope, form, in_forward)  # type: ignore[no-untyped-call]
    return scope.to_units(sums_RN)


# --------------------------------------------------------------------------------------------------------------------
# The sweep with a running maximum per token
# --------------------------------------------------------------------------------------------------------------------


def _masked_logits(
    p: _Prepared, form: PairForm, i: slice, j: slice, S: Tensor, E: Tensor, valid: Tensor | None, label: Tensor | None
) -> None:
    """Exponents of a tile into E, -inf for pairs that do not count; S keeps the products."""
    _products(p, i, j, form, S)
    form.logit(S, E)
    if i.start == j.start:
        diagonal = E.diagonal(dim1=1, dim2=2)
        if not form.diagonal:
            diagonal.fill_(-math.inf)
        elif form.space == "euclid":
            diagonal.zero_()
    if valid is not None:
        E.masked_fill_(~valid[:, j].unsqueeze(1), -math.inf)
    if label is not None:
        E.masked_fill_(label[:, i].unsqueeze(2) != label[:, j].unsqueeze(1), -math.inf)


def _online(
    z_RND: Tensor, valid_RN: Tensor | None, label_RN: Tensor | None, form: PairForm, want_gradient: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Log-sum over partners per token ``[R, N]`` (-inf: none); gradient relative to that sum; its factor."""
    rows, n, width = z_RND.shape
    dtype, device = statistics_dtype(z_RND.dtype), z_RND.device
    tile = tile_size(n, device)
    chunk = _chunk_rows(rows, n, device)
    logs_RN = torch.empty(rows, n, dtype=dtype, device=device)
    gradient = torch.empty(rows, n, width, dtype=dtype, device=device) if want_gradient else None
    factor_RN = torch.ones(rows, n, dtype=dtype, device=device)
    for start in range(0, rows, chunk):
        part = slice(start, min(start + chunk, rows))
        valid = None if valid_RN is None else valid_RN[part]
        label = None if label_RN is None else label_RN[part]
        p = prepare(z_RND[part], valid, form)
        count = p.x.shape[0]
        if p.factor is not None:
            factor_RN[part] = p.factor
        buffer_S, buffer_E = p.x.new_empty(2, count * tile * tile)
        total, pull, gaps = p.x.new_zeros(3, count, n)
        top = p.x.new_full((count, n), -math.inf)
        G = None if gradient is None else gradient[part].zero_()
        for a in range(0, n, tile):
            i = slice(a, min(a + tile, n))
            for b in range(0, n, tile):
                j = slice(b, min(b + tile, n))
                shape = (count, i.stop - a, j.stop - b)
                S, E = (buffer[: math.prod(shape)].view(shape) for buffer in (buffer_S, buffer_E))
                _masked_logits(p, form, i, j, S, E, valid, label)
                higher = torch.maximum(top[:, i], E.amax(dim=2))
                shift = torch.where(higher == -math.inf, 0.0, higher)
                E.sub_(shift.unsqueeze(2)).exp_()
                fade = (top[:, i] - shift).exp_()
                top[:, i] = higher
                total[:, i] = total[:, i] * fade + E.sum(dim=2)
                if G is not None:
                    K = S.clone()
                    form.weight(S, E)
                    if form.space == "sphere" and rounds_products(E):
                        to_tf32(E)
                    pull[:, i] = pull[:, i] * fade + E.sum(dim=2)
                    gaps[:, i] = gaps[:, i] * fade + K.mul_(E).sum(dim=2)
                    G[:, i].mul_(fade.unsqueeze(2)).baddbmm_(E, p.x[:, j])
        if G is not None:
            _finish(G, p, form, pull, gaps)
            # relative to the token's own sum: all factors stay moderate however far the tokens are apart
            G.div_(torch.where(total > 0, total, 1.0).unsqueeze(2))
        logs_RN[part] = torch.where(total > 0, top + total.log(), -math.inf)
    return logs_RN, gradient, factor_RN


class _LogSums(torch.autograd.Function):
    """Log-sum over the pairs of each unit; as :class:`_PairSums`, with a running maximum."""

    @staticmethod
    def forward(ctx: Any, z_RND: Tensor, scope: Scope, form: PairForm, in_forward: bool) -> Tensor:
        logs_RN, gradient, factor_RN = _online(z_RND, scope.valid_RN, scope.label_RN, form, in_forward)
        if scope.valid_RN is not None:
            logs_RN = torch.where(scope.valid_RN, logs_RN, -math.inf)
        if scope.unit_RN is None:
            logs_U = logs_RN.reshape(scope.n_units, -1).logsumexp(dim=1)
        else:
            index = scope.unit_RN.reshape(-1)
            top_U = logs_RN.new_full((scope.n_units,), -math.inf)
            top_U = top_U.scatter_reduce(0, index, logs_RN.reshape(-1), "amax")
            top_U = torch.where(top_U == -math.inf, 0.0, top_U)
            logs_U = scope.to_units((logs_RN - scope.to_tokens(top_U)).exp()).log() + top_U
        logs_U = torch.where(scope.pairs_U > 0, logs_U, 0.0)
        share_RN = (logs_RN - scope.to_tokens(logs_U)).exp()
        ctx.save_for_backward(z_RND, share_RN)
        ctx.scope, ctx.form, ctx.made = scope, form, (gradient, factor_RN)
        return logs_U

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, above_U: Tensor) -> tuple[Tensor | None, ...]:
        z_RND, share_RN = ctx.saved_tensors
        gradient, factor_RN = ctx.made
        ctx.made = (None, None)
        if gradient is None:
            _, gradient, factor_RN = _online(z_RND, ctx.scope.valid_RN, ctx.scope.label_RN, ctx.form, True)
        assert gradient is not None
        above_RN = ctx.scope.to_tokens(above_U) * share_RN
        return _scaled(gradient, above_RN, factor_RN, ctx.scope.valid_RN, z_RND.dtype), None, None, None


def log_sums(z_RND: Tensor, scope: Scope, form: PairForm, *, gradient: str = "forward") -> Tensor:
    """Log of the sum over pairs of each unit, ``[U]`` (0 for units without pairs); differentiable once."""
    in_forward = gradient == "forward" and z_RND.requires_grad and torch.is_grad_enabled()
    result: Tensor = _LogSums.apply(z_RND, scope, form, in_forward)  # type: ignore[no-untyped-call]
    return result


# --------------------------------------------------------------------------------------------------------------------
# Forms of kind "rows"
# --------------------------------------------------------------------------------------------------------------------


class _Entropies(torch.autograd.Function):
    """Entropy of each token's softmax over its partners; two sweeps (its statistics, then the symmetric weights)."""

    @staticmethod
    def forward(ctx: Any, z_RND: Tensor, scope: Scope, form: PairForm) -> Tensor:
        rows, n, _ = z_RND.shape
        dtype, device = statistics_dtype(z_RND.dtype), z_RND.device
        tile, chunk = tile_size(n, device), _chunk_rows(rows, n, device)
        log_RN = torch.zeros(rows, n, dtype=dtype, device=device)
        entropy_RN = torch.zeros_like(log_RN)
        for part, valid, label, p, S, E in _chunks(z_RND, scope, form, tile, chunk):
            count = p.x.shape[0]
            for a in range(0, n, tile):
                i = slice(a, min(a + tile, n))
                top = p.x.new_full((count, i.stop - a), -math.inf)
                total, moment = torch.zeros_like(top), torch.zeros_like(top)
                for b in range(0, n, tile):
                    j = slice(b, min(b + tile, n))
                    shape = (count, i.stop - a, j.stop - b)
                    s, e = S[: math.prod(shape)].view(shape), E[: math.prod(shape)].view(shape)
                    _masked_logits(p, form, i, j, s, e, valid, label)
                    higher = torch.maximum(top, e.amax(dim=2))
                    shift = torch.where(higher == -math.inf, 0.0, higher)
                    # exp(-1e4) is 0, and 0 times -1e4 is 0, which 0 times -inf is not
                    e.sub_(shift.unsqueeze(2)).clamp_(min=-1e4)
                    torch.exp(e, out=s)
                    drop = torch.where(top == -math.inf, 0.0, top - shift)
                    fade = torch.where(top == -math.inf, 0.0, drop.exp())
                    moment = fade * (moment + drop * total) + (s * e).sum(dim=2)
                    total = fade * total + s.sum(dim=2)
                    top = higher
                some = total > 0
                safe = torch.where(some, total, 1.0)
                log_RN[part, i] = torch.where(some, top + safe.log(), math.inf)
                entropy_RN[part, i] = torch.where(some, safe.log() - moment / safe, 0.0)
        ctx.save_for_backward(z_RND, log_RN, entropy_RN)
        ctx.scope, ctx.form = scope, form
        return entropy_RN

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, above_RN: Tensor) -> tuple[Tensor | None, ...]:
        z_RND, log_RN, entropy_RN = ctx.saved_tensors
        scope: Scope = ctx.scope
        form: PairForm = ctx.form
        n = z_RND.shape[1]
        gradient = torch.zeros(z_RND.shape, dtype=log_RN.dtype, device=z_RND.device)
        tile, chunk = tile_size(n, z_RND.device), _chunk_rows(z_RND.shape[0], n, z_RND.device)
        for part, valid, label, p, S, E in _chunks(z_RND, scope, form, tile, chunk):
            G, count = gradient[part], p.x.shape[0]
            pull = log_RN.new_zeros(count, n)
            log, entropy = log_RN[part], entropy_RN[part]
            for i, j in _tiles(n, tile):
                shape = (count, i.stop - i.start, j.stop - j.start)
                s, e = S[: math.prod(shape)].view(shape), E[: math.prod(shape)].view(shape)
                _masked_logits(p, form, i, j, s, e, valid, label)
                if valid is not None:
                    e.masked_fill_(~valid[:, i].unsqueeze(2), -math.inf)
                e.clamp_(min=-1e30)
                # P_ij (log P_ij + H_i) + P_ji (log P_ji + H_j)
                weight = torch.zeros_like(e)
                for lse, h in (
                    (log[:, i].unsqueeze(2), entropy[:, i].unsqueeze(2)),
                    (log[:, j].unsqueeze(1), entropy[:, j].unsqueeze(1)),
                ):
                    log_p = (e - lse).clamp(min=-1e4)
                    weight.addcmul_(log_p.exp(), log_p.add_(h))
                pull[:, i] += weight.sum(dim=2)
                G[:, i].baddbmm_(weight, p.x[:, j])
                if i.start != j.start:
                    pull[:, j] += weight.sum(dim=1)
                    G[:, j].baddbmm_(weight.mT, p.x[:, i])
            G.addcmul_(pull.unsqueeze(-1), p.x, value=-1.0).mul_(-form.slope)
        return _scaled(gradient, above_RN, None, scope.valid_RN, z_RND.dtype), None, None


def _chunks(
    z_RND: Tensor, scope: Scope, form: PairForm, tile: int, chunk: int
) -> Iterator[tuple[slice, Tensor | None, Tensor | None, _Prepared, Tensor, Tensor]]:
    rows = z_RND.shape[0]
    for start in range(0, rows, chunk):
        part = slice(start, min(start + chunk, rows))
        valid = None if scope.valid_RN is None else scope.valid_RN[part]
        label = None if scope.label_RN is None else scope.label_RN[part]
        p = prepare(z_RND[part], valid, form)
        S, E = p.x.new_empty(2, p.x.shape[0] * tile * tile)
        yield part, valid, label, p, S, E


@torch.no_grad()
def _nearest(z_RND: Tensor, scope: Scope) -> tuple[Tensor, Tensor]:
    """Place of each token's nearest partner by cosine ``[R, N]``, and whether it has a partner."""
    form = PairForm()
    n = z_RND.shape[1]
    tile, chunk = tile_size(n, z_RND.device), _chunk_rows(z_RND.shape[0], n, z_RND.device)
    place_RN = torch.zeros(z_RND.shape[:2], dtype=torch.long, device=z_RND.device)
    best_RN = torch.full(z_RND.shape[:2], -math.inf, dtype=statistics_dtype(z_RND.dtype), device=z_RND.device)
    for part, valid, label, p, S, _ in _chunks(z_RND, scope, form, tile, chunk):
        for a in range(0, n, tile):
            i = slice(a, min(a + tile, n))
            for b in range(0, n, tile):
                j = slice(b, min(b + tile, n))
                shape = (p.x.shape[0], i.stop - a, j.stop - b)
                s = S[: math.prod(shape)].view(shape)
                _products(p, i, j, form, s)
                s.neg_()
                if a == b:
                    s.diagonal(dim1=1, dim2=2).fill_(-math.inf)
                if valid is not None:
                    s.masked_fill_(~valid[:, j].unsqueeze(1), -math.inf)
                if label is not None:
                    s.masked_fill_(label[:, i].unsqueeze(2) != label[:, j].unsqueeze(1), -math.inf)
                value, where = s.max(dim=2)
                closer = value > best_RN[part, i]
                best_RN[part, i] = torch.where(closer, value, best_RN[part, i])
                place_RN[part, i] = torch.where(closer, where + b, place_RN[part, i])
    paired = best_RN > -math.inf
    return place_RN, paired if scope.valid_RN is None else paired & scope.valid_RN


def _koleo(z_RND: Tensor, scope: Scope, s: Settings) -> Tensor:
    place_RN, paired_RN = _nearest(z_RND, scope)
    if scope.valid_RN is not None:
        z_RND = torch.where(scope.valid_RN.unsqueeze(-1), z_RND, 0.0)
    u = unit(z_RND)
    partner = u.gather(1, place_RN.unsqueeze(-1).expand(-1, -1, u.shape[-1]))
    # 2 - 2 kappa c from the difference, which has the digits when c is close to 1; a zero vector has c = 0
    square, other = torch.linalg.vecdot(u, u), torch.linalg.vecdot(partner, partner)
    chord = 2 - s.shrink * (square + other - (u - partner).square().sum(dim=-1))
    term_RN = torch.where(paired_RN, -0.5 * torch.where(paired_RN, chord, 1.0).log(), 0.0)
    return scope.to_units(term_RN) / scope.tokens_U.clamp(min=1)


# --------------------------------------------------------------------------------------------------------------------
# Losses
# --------------------------------------------------------------------------------------------------------------------


def _mean_square(z_RND: Tensor, scope: Scope) -> Tensor:
    """Mean squared element of each unit's tokens, ``[U]``."""
    if scope.valid_RN is not None:
        z_RND = torch.where(scope.valid_RN.unsqueeze(-1), z_RND, 0.0)
    norm_RN = torch.linalg.vector_norm(z_RND, dim=-1, dtype=scope.pairs_U.dtype)
    return scope.to_units(norm_RN.square()) / (scope.tokens_U.clamp(min=1) * z_RND.shape[-1])


def close(sum_U: Tensor, scope: Scope, s: Settings, *, is_log: bool) -> Tensor:
    """Loss of each unit from the sum (or log-sum) over its pairs; 0 for units without a pair."""
    form = pair_form(s)
    some = scope.pairs_U > 0
    pairs_U = torch.where(some, scope.pairs_U + scope.tokens_U if form.diagonal else scope.pairs_U, 1.0)
    if not form.log:
        return torch.where(some, sum_U / pairs_U, 0.0)
    log_U = sum_U if is_log else torch.where(some, sum_U, 1.0).log()
    value = log_U - pairs_U.log()
    if s.form == "cosine_infonce":
        # the engine's exponent is (c - 1)/tau
        value = value + 1.0 / s.tau
    if s.clamp is not None:
        value = value + COMPAT_EPSILON
    return torch.where(some, value, 0.0)


PerUnitSums = Callable[[Tensor, Scope, Settings, str], Tensor]


def needs_maximum(form: PairForm, dtype: torch.dtype) -> bool:
    """Whether a log form's exponents reach far enough down to underflow."""
    return form.log and form.reach > (600.0 if dtype == torch.float64 else 60.0)


def per_unit(
    z_RND: Tensor, scope: Scope, s: Settings, *, gradient: str = "forward", sums: PerUnitSums | None = None
) -> Tensor:
    """Loss of each unit of a form of kind ``pairs`` or ``rows``, ``[U]``; 0 for units without a pair.

    ``sums`` replaces the symmetric sweep (:func:`pair_sums`) by another implementation of it.
    """
    if s.form == "koleo":
        return _koleo(z_RND, scope, s)
    if s.form == "perplexity_entropy":
        form: PairForm = _Distance(space="euclid", slope=2 / s.tau)
        entropy_RN: Tensor = _Entropies.apply(z_RND, scope, form)  # type: ignore[no-untyped-call]
        return -scope.to_units(entropy_RN) / scope.tokens_U.clamp(min=1)
    form = pair_form(s)
    if needs_maximum(form, scope.pairs_U.dtype):
        value_U = close(log_sums(z_RND, scope, form, gradient=gradient), scope, s, is_log=True)
    else:
        sum_U = pair_sums(z_RND, scope, form, gradient=gradient) if sums is None else sums(z_RND, scope, s, gradient)
        value_U = close(sum_U, scope, s, is_log=False)
    if s.form == "l2_repel":
        some = scope.pairs_U > 0
        value_U = value_U + torch.where(some, s.norm_weight * _mean_square(z_RND, scope), 0.0)
    return value_U
