r"""Memory linear in the number of tokens: tiles of pairs over several sequences at once, in plain torch, on any device.

One engine for every form that is a sum over pairs. With x_i the (unit) vectors, s_ij = <x_i, x_j> and
:math:`S_u = \sum_{i,j \in u} f(s_{ij})` for a unit u, the gradient of :math:`S_u` in :math:`x_i` is
:math:`2 \sum_j f'(s_{ij}) x_j`: one product of a tile of weights with the tile of vectors that made it. So the sweep over
the tiles that yields the value yields the gradient too; backward only has to multiply by what comes in from above, a
number per unit, and nothing of size T x T outlives its tile. Tiles above the diagonal serve twice.

Weights (per pair) and what is made of :math:`g_i = \sum_j W_{ij} x_j`:

======================  ==========================================  ===============================================
form                    W_ij = f'(s_ij)                             gradient in z_i of the unit's sum
======================  ==========================================  ===============================================
on the sphere           e.g. angular: exp(-theta/(pi tau)) kappa    :math:`2\,(g_i - \hat z_i \langle g_i, \hat z_i
                        / (pi tau sqrt(1 - kappa^2 c^2))            \rangle)/|z_i|`
squared distances       exp(-d_ij / tau)                            :math:`(4/\tau)\,(g_i - z_i \sum_j W_{ij})`
======================  ==========================================  ===============================================

Double backward raises: the gradient is a saved number, not a graph. ``impl="reference"`` differentiates twice.

Shape suffixes: ``R`` rows, ``N`` tokens of a row, ``D`` features, ``U`` units, ``C`` rows of a chunk, ``I``/``J`` tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Callable, Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from decondense.geometry import ZERO_NORM, statistics_dtype
from decondense.losses.forms import COMPAT_EPSILON, Settings
from decondense.losses.scope import Scope

__all__ = ["per_unit"]


# --------------------------------------------------------------------------------------------------------------------
# What a form is to the engine
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairForm:
    """A sum over pairs of a function of the inner product of two prepared vectors."""

    value: Callable[[Tensor, Tensor], None]
    """``value(S, out)``: f of the inner products into ``out``; may use neither more memory nor change S."""
    weight: Callable[[Tensor, Tensor], None] | None
    """``weight(S, E)``: turn E = f(S) into f'(S) (up to ``slope``); may overwrite S. None: f' is proportional to f."""
    slope: float
    """Constant left out of ``weight``."""
    log: bool
    """The unit's loss is log-mean-exp (``value`` is the exponential) rather than the mean."""
    scale: float = 1.0
    """What the unit vectors are multiplied by, so that the inner product comes out as ``scale**2 * cosine``."""


def _pair_form(s: Settings) -> PairForm:
    kappa = s.shrink
    if s.form == "angular":
        rate = -1.0 / (math.pi * s.tau)

        def angular(S: Tensor, out: Tensor) -> None:
            _clamped(S, out, s)
            out.arccos_().mul_(rate).exp_()

        return PairForm(angular, lambda S, E: _over_sine(S, E, s), -rate * kappa, True, math.sqrt(kappa))
    if s.form == "orthogonalization":

        def orthogonalization(S: Tensor, out: Tensor) -> None:
            _clamped(S, out, s)
            # arcsin(c) = pi/2 - arccos(c)
            out.arcsin_().mul_(1 / math.pi).clamp_(min=0).square_()

        def orthogonalization_weight(S: Tensor, E: Tensor) -> None:
            E.sqrt_()
            _over_sine(S, E, s)

        return PairForm(orthogonalization, orthogonalization_weight, 2 * kappa / math.pi, False, math.sqrt(kappa))
    if s.form == "cosine_infonce":

        def cosine_infonce(S: Tensor, out: Tensor) -> None:
            torch.sub(S, 1.0, out=out).mul_(1 / s.tau).exp_()

        return PairForm(cosine_infonce, None, 1 / s.tau, True)
    if s.form == "uniformity":

        def uniformity(S: Tensor, out: Tensor) -> None:
            torch.sub(S, 1.0, out=out).mul_(4 / s.tau).exp_()

        return PairForm(uniformity, None, 4 / s.tau, True)
    assert s.form == "hinge", s.form

    def hinge(S: Tensor, out: Tensor) -> None:
        torch.add(S, s.margin, out=out).clamp_(min=0).square_()

    return PairForm(hinge, lambda S, E: _set(E.sqrt_()), 2.0, False)


def _set(_: Tensor) -> None:
    return None


def _clamped(S: Tensor, out: Tensor, s: Settings) -> None:
    limit = 1.0 if s.clamp is None else 1.0 - s.clamp
    torch.clamp(S, -limit, limit, out=out)


def _over_sine(S: Tensor, E: Tensor, s: Settings) -> None:
    """E / sqrt(1 - S^2), S overwritten."""
    if s.clamp is not None:
        limit = 1.0 - s.clamp
        S.clamp_(-limit, limit)
        floor = 0.0
    else:
        # rounding may put a duplicate's shrunk cosine a few ulp above kappa
        floor = max(0.25 * s.delta * s.delta, torch.finfo(S.dtype).tiny)
    S.square_().neg_().add_(1.0)
    if floor:
        S.clamp_(min=floor)
    E.mul_(S.rsqrt_())


# --------------------------------------------------------------------------------------------------------------------
# The sweep
# --------------------------------------------------------------------------------------------------------------------


def _tile_size(n: int, device: torch.device) -> int:
    """Edge of a tile: on a CPU what stays in the second-level cache, on a GPU what fills it."""
    return min(n, 256 if device.type == "cpu" else 1024)


def _chunk_rows(rows: int, rows_per_unit: int, tile: int, device: torch.device) -> int:
    """Rows swept at once; whole units, so that a chunk's scale is known when it ends."""
    if device.type == "cpu":
        budget = 2 * torch.get_num_threads() * 65536
    else:
        budget = 16 * 1024 * 1024
    chunk = max(1, budget // (tile * tile))
    return min(rows, max(1, chunk // rows_per_unit) * rows_per_unit)


def _tiles(n: int, tile: int) -> Iterator[tuple[slice, slice]]:
    """Tiles on and above the diagonal."""
    for i in range(0, n, tile):
        for j in range(i, n, tile):
            yield slice(i, min(i + tile, n)), slice(j, min(j + tile, n))


def _prepare(
    z_CND: Tensor, valid_CN: Tensor | None, scale: float, epsilon: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Unit vectors times ``scale`` (0 where not real), 1 / (|z| + epsilon) ``[C, N, 1]``, and epsilon's share in the radial direction."""
    x = z_CND.to(statistics_dtype(z_CND.dtype))
    largest = torch.linalg.vector_norm(x, math.inf, dim=-1, keepdim=True)
    present = largest > ZERO_NORM
    if valid_CN is not None:
        present &= valid_CN.unsqueeze(-1)
    largest = torch.where(present, largest, 1.0)
    x = x / largest
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    inverse = torch.where(present, 1.0 / (norm + epsilon / largest), 0.0)
    x.mul_(inverse * scale)
    radial = None
    if epsilon:
        # d(z/(r+e)) = dz/(r+e) - z (z.dz)/(r (r+e)^2): relative to zhat' = z/(r+e), the radial factor is (r+e)/r
        radial = torch.where(present, 1.0 + epsilon / (norm * largest), 0.0)
    return x, inverse / largest, radial


def _sweep(z_RND: Tensor, scope: Scope, s: Settings, want_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Sums over pairs per token ``[R, N]``, and per token the gradient of its unit's sum ``[R, N, D]``."""
    form = _pair_form(s)
    rows, n, width = z_RND.shape
    dtype, device = statistics_dtype(z_RND.dtype), z_RND.device
    tile = _tile_size(n, device)
    chunk = _chunk_rows(rows, 1, tile, device)
    sums_RN = torch.zeros(rows, n, dtype=dtype, device=device)
    kept = z_RND.dtype if z_RND.dtype == torch.bfloat16 else dtype
    gradient = torch.empty(rows, n, width, dtype=kept, device=device) if want_gradient else None
    for start in range(0, rows, chunk):
        part = slice(start, min(start + chunk, rows))
        label = None if scope.label_RN is None else scope.label_RN[part]
        valid = None if scope.valid_RN is None else scope.valid_RN[part]
        x, inverse, radial = _prepare(z_RND[part], valid, form.scale, s.epsilon)
        G = None
        if gradient is not None:
            G = gradient[part] if kept == dtype else torch.empty(x.shape, dtype=dtype, device=device)
            G.zero_()
        _sweep_chunk(x, G, sums_RN[part], form, s, label, valid, tile)
        if G is not None:
            # x = scale * zhat: G holds scale * sum_j W zhat_j, and one factor of scale is the chain rule's
            G.mul_(2.0 * form.slope / form.scale)
            rad = (G * x).sum(dim=-1, keepdim=True) / (form.scale * form.scale)
            if radial is not None:
                rad.mul_(radial)
            G.addcmul_(rad, x, value=-1).mul_(inverse)
            if gradient is not None and kept != dtype:
                gradient[part] = G
    return sums_RN, gradient


def _sweep_chunk(
    x: Tensor, G: Tensor | None, sums: Tensor, form: PairForm, s: Settings, label: Tensor | None, valid: Tensor | None, tile: int
) -> None:
    count, n, _ = x.shape
    buffer_S = x.new_empty(count * tile * tile)
    buffer_E = x.new_empty(count * tile * tile)
    real = None if valid is None else valid.to(x.dtype).unsqueeze(2)
    for i, j in _tiles(n, tile):
        height, breadth = i.stop - i.start, j.stop - j.start
        size = count * height * breadth
        S = buffer_S[:size].view(count, height, breadth)
        E = buffer_E[:size].view(count, height, breadth)
        torch.bmm(x[:, i], x[:, j].mT, out=S)
        form.value(S, E)
        above = i.start != j.start
        if not above and not s.diagonal:
            E.diagonal(dim1=1, dim2=2).zero_()
        if label is not None:
            E.masked_fill_(label[:, i].unsqueeze(2) != label[:, j].unsqueeze(1), 0.0)
        if real is None:
            sums[:, i] += E.sum(dim=2)
            if above:
                sums[:, j] += E.sum(dim=1)
        else:
            sums[:, i] += torch.bmm(E, real[:, j]).squeeze(2)
            if above:
                sums[:, j] += torch.bmm(E.mT, real[:, i]).squeeze(2)
        if G is not None:
            if form.weight is not None:
                form.weight(S, E)
            G[:, i].baddbmm_(E, x[:, j])
            if above:
                G[:, j].baddbmm_(E.mT, x[:, i])


class _PairSum(torch.autograd.Function):
    """Unit losses of a pair form; the gradient is produced in the forward sweep."""

    @staticmethod
    def forward(ctx: Any, z_RND: Tensor, scope: Scope, s: Settings, in_forward: bool) -> Tensor:
        sums_RN, gradient = _sweep(z_RND, scope, s, in_forward)
        sum_U = scope.to_units(sums_RN)
        value_U, factor_U = _close(sum_U, scope, s)
        ctx.save_for_backward(z_RND, factor_U)
        ctx.scope, ctx.settings, ctx.gradient = scope, s, gradient
        return value_U

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above_U: Tensor) -> tuple[Tensor | None, ...]:
        z_RND, factor_U = ctx.saved_tensors
        scope: Scope = ctx.scope
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            # recompute mode, or a second backward through a retained graph: the first one used the buffer up
            gradient = _sweep(z_RND, scope, ctx.settings, True)[1]
            assert gradient is not None
        scale_RN = scope.to_tokens(above_U * factor_U)
        if scope.valid_RN is not None:
            scale_RN = torch.where(scope.valid_RN, scale_RN, 0.0)
        gradient.mul_(scale_RN.unsqueeze(-1))
        return gradient.to(z_RND.dtype), None, None, None


def _close(sum_U: Tensor, scope: Scope, s: Settings) -> tuple[Tensor, Tensor]:
    """Loss of each unit from its sum over pairs, and the factor that its gradient still needs."""
    pairs_U = scope.pairs_U + scope.tokens_U if s.diagonal else scope.pairs_U
    some = scope.pairs_U > 0
    pairs_U = torch.where(some, pairs_U, 1.0)
    form = _pair_form(s)
    if not form.log:
        return torch.where(some, sum_U / pairs_U, 0.0), torch.where(some, 1.0 / pairs_U, 0.0)
    sum_U = torch.where(some, sum_U, 1.0)
    value = sum_U.log() - pairs_U.log()
    if s.form == "cosine_infonce":
        value = value + 1.0 / s.tau
    if s.clamp is not None:
        value = value + COMPAT_EPSILON
    return torch.where(some, value, 0.0), torch.where(some, 1.0 / sum_U, 0.0)


def per_unit(
    z_RND: Tensor, scope: Scope, s: Settings, directions_DM: Tensor | None = None, *, gradient: str = "forward"
) -> Tensor:
    """Loss of each unit, ``[U]``; 0 for units without a pair. Differentiable once."""
    in_forward = gradient == "forward" and z_RND.requires_grad and torch.is_grad_enabled()
    result: Tensor = _PairSum.apply(z_RND, scope, s, in_forward)  # type: ignore[no-untyped-call]
    return result
