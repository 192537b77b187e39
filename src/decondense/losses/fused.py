# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (the kernels are Triton's language, not Python's: their arguments are pointers and blocks)
r"""CUDA: two batched matrix products with one elementwise Triton kernel between them.

For each chunk of rows, with :math:`\hat z` the unit vectors, m a row's mean unit vector and d = :math:`\hat z` - m:

1. ``_norms``, ``_operand``: 1/|z|, then d rounded to the operand's dtype;
2. S = d d' with float32 accumulation and output;
3. ``_weights``: 1 - c_ij from S and the |d_i|^2, then f (summed per token) and W = f'(c), in the operand's dtype;
4. A = W d;
5. ``_tangent``: :math:`\sum_j W_{ij} (\hat z_j - c_{ij} \hat z_i)` from A, tangent at :math:`\hat z_i`, in float32.

Precision. The operands are bfloat16 for bfloat16 and float16 input; for float32 input they are float32, multiplied
with the precision that the process chose (``torch.set_float32_matmul_precision``: IEEE or TF32). Low precision is safe
because of the centring: c = 1 is a small difference of small vectors, :math:`1 - c_{ij} = |d_i - d_j|^2/2`, instead of
the rounding of two numbers close to 1; the sums of the weights use the same rounded weights as their product; equal
tokens have equal operands, whose forces cancel; and what remains along :math:`\hat z_i` is projected out in float32.
``docs/math.md`` has the errors.

No atomics: bit-identical from run to run as far as the BLAS is. Double backward is not defined (the gradient is saved,
not its graph). float64 and the forms without a :class:`decondense.losses.pair_forms.Kernel` are the chunked
implementation's.

With ``TRITON_INTERPRET=1`` set before triton is imported the kernels run on a CPU, which is how the tests prove them;
the interpreter cannot multiply bfloat16, so there the (already rounded) operands are upcast, which changes no product.

Shape suffixes: ``R`` rows, ``N`` tokens of a row, ``D`` features. A program of a kernel takes ``BM`` tokens, and ``BC``
features (``_weights``: other tokens) at a time; ``LAUNCHES`` has their sizes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from decondense.geometry import ZERO_NORM
from decondense.losses import vectors
from decondense.losses.pair_forms import PairForm

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_PI = tl.constexpr(math.pi)
_ZERO_NORM = tl.constexpr(ZERO_NORM)
# arccos(x) / sqrt(1 - x) on [0, 1], Chebyshev fit of degree 8; arccos is then within 4e-9. An own polynomial, because
# libdevice differs between Triton's versions and is absent from its interpreter.
_ARCCOS = (
    1.5707963231771758,
    -0.21460122624982622,
    0.08903147164332977,
    -0.05060400373282589,
    0.03261138407104677,
    -0.02081215070339352,
    0.011126960113916047,
    -0.004034589391459607,
    0.0006993961346809173,
)
_A0, _A1, _A2, _A3, _A4, _A5, _A6, _A7, _A8 = (tl.constexpr(c) for c in _ARCCOS)

_ANGULAR = tl.constexpr(0)
_ORTHOGONALIZATION = tl.constexpr(1)
_EXPONENTIAL = tl.constexpr(2)
_HINGE = tl.constexpr(3)
_FUNCTIONS = {"angular": 0, "orthogonalization": 1, "exponential": 2, "hinge": 3}


class Launch(NamedTuple):
    """How a kernel is started: its block sizes (powers of two; ``across`` shrinks with the input), warps, stages."""

    tokens: int
    across: int
    warps: int
    stages: int


LAUNCHES = {
    "_norms": Launch(16, 128, 8, 2),
    "_operand": Launch(16, 128, 8, 2),
    "_weights": Launch(16, 64, 8, 2),
    "_tangent": Launch(16, 128, 8, 2),
}
"""Chosen so that nothing spills and the registers leave room for half of a multiprocessor's warps or more, as compiled
for sm_90 and dimensions that 16 divides (``benchmarks/bench_kernels_static.py --sweep sm_90``). Not timed on a GPU."""


def available(device: torch.device) -> bool:
    """Whether the kernels can run on tensors of this device."""
    return device.type == "cuda" or (_INTERPRETED and device.type == "cpu")


@triton.jit
def _narrow(x, dtype: tl.constexpr, TF32: tl.constexpr):
    """x in the dtype of its destination, rounded to nearest even (the interpreter's own cast to bfloat16 truncates).

    TF32: a float32 destination gets what a TF32 product would make of it anyway, so that the sums see the same number.
    NaN stays NaN: NVIDIA's own has all bits set, which the addition would turn into zero.
    """
    if dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), float("nan"))
    elif TF32:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0xFFF + ((bits >> 13) & 1)) & -8192
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), float("nan"))
    return x.to(dtype)


@triton.jit
def _norms(
    z_p, valid_p, inverse_p, partial_p, N, D, blocks, HAS_VALID: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr
):
    """1/|z| per token (0 for zero vectors and tokens that are not real), and the sum of unit vectors of BM tokens."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    i = block * BM + tl.arange(0, BM)
    here = i < N
    base = z_p + (row * N + i[:, None]) * D
    largest = tl.zeros((BM,), tl.float32)
    lost = tl.zeros((BM,), tl.int32)  # maxima ignore NaN, which must not pass for a zero vector
    for k in range(0, D, BC):
        d = k + tl.arange(0, BC)
        z = tl.load(base + d[None, :], mask=here[:, None] & (d[None, :] < D), other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(z), 1))
        lost += tl.sum((z != z).to(tl.int32), 1)
    present = ((largest > _ZERO_NORM) | (lost > 0)) & here
    if HAS_VALID:
        present = present & (tl.load(valid_p + row * N + i, mask=here, other=0) != 0)
    scale = 1.0 / tl.where(present, largest, 1.0)
    square = tl.zeros((BM,), tl.float32)
    for k in range(0, D, BC):
        d = k + tl.arange(0, BC)
        z = tl.load(base + d[None, :], mask=here[:, None] & (d[None, :] < D), other=0.0).to(tl.float32)
        z = tl.where(present[:, None], z, 0.0) * scale[:, None]
        square += tl.sum(z * z, 1)
    inverse = tl.where(present, scale / tl.sqrt(tl.where(present, square, 1.0)), 0.0)
    tl.store(inverse_p + row * N + i, inverse, mask=here)
    for k in range(0, D, BC):
        d = k + tl.arange(0, BC)
        z = tl.load(base + d[None, :], mask=here[:, None] & (d[None, :] < D), other=0.0).to(tl.float32)
        total = tl.sum(tl.where(present[:, None], z, 0.0) * inverse[:, None], 0)
        tl.store(partial_p + (row * blocks + block) * D + d, total, mask=d < D)


@triton.jit
def _operand(
    z_p, valid_p, inverse_p, mean_p, out_p, square_p, N, D,
    HAS_VALID: tl.constexpr, TF32: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """d = z/|z| - mean in the operand's dtype (0 where not real), and |d|^2 of what was stored."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BM + tl.arange(0, BM)
    here = i < N
    real = here
    if HAS_VALID:
        real = real & (tl.load(valid_p + row * N + i, mask=here, other=0) != 0)
    inverse = tl.load(inverse_p + row * N + i, mask=here, other=0.0)
    place = (row * N + i[:, None]) * D
    square = tl.zeros((BM,), tl.float32)
    for k in range(0, D, BC):
        d = k + tl.arange(0, BC)
        inside = here[:, None] & (d[None, :] < D)
        z = tl.load(z_p + place + d[None, :], mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(mean_p + row * D + d, mask=d < D, other=0.0)
        # a vector that counts as zero must not come back through 0 times infinity
        x = tl.where(inverse[:, None] > 0, z * inverse[:, None], 0.0) - mean[None, :]
        x = _narrow(tl.where(real[:, None] & (d[None, :] < D), x, 0.0), out_p.dtype.element_ty, TF32)
        tl.store(out_p + place + d[None, :], x, mask=inside)
        rounded = x.to(tl.float32)
        square += tl.sum(rounded * rounded, 1)
    tl.store(square_p + row * N + i, square, mask=here)


@triton.jit
def _arccos(one_minus, x):
    """arccos(x) from 1 - x and x: the former has the digits where x is close to 1."""
    a = tl.abs(x)
    p = _A8 * a + _A7
    p = p * a + _A6
    p = p * a + _A5
    p = p * a + _A4
    p = p * a + _A3
    p = p * a + _A2
    p = p * a + _A1
    p = p * a + _A0
    root = tl.sqrt(tl.maximum(tl.where(x >= 0, one_minus, 2.0 - one_minus), 0.0)) * p
    return tl.where(x >= 0, root, _PI - root)


@triton.jit
def _weights(
    s_p, w_p, valid_p, label_p, inverse_p, square_p, sum_p, weight_sum_p, gap_sum_p, N, rate, kappa, floor, margin,
    KIND: tl.constexpr, DIAGONAL: tl.constexpr, HAS_VALID: tl.constexpr, HAS_LABEL: tl.constexpr,
    GRADIENT: tl.constexpr, TF32: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """For BM tokens against all of their row: f summed per token, W = f'/slope stored and summed per token."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BM + tl.arange(0, BM)
    here_i = i < N
    unit_i = tl.where(tl.load(inverse_p + row * N + i, mask=here_i, other=0.0) > 0, 1.0, 0.0)
    square_i = tl.load(square_p + row * N + i, mask=here_i, other=0.0)
    real_i = here_i
    if HAS_VALID:
        real_i = real_i & (tl.load(valid_p + row * N + i, mask=here_i, other=0) != 0)
    if HAS_LABEL:
        label_i = tl.load(label_p + row * N + i, mask=here_i, other=-1)
    total = tl.zeros((BM,), tl.float32)
    weight_total = tl.zeros((BM,), tl.float32)
    gap_total = tl.zeros((BM,), tl.float32)
    for start in range(0, N, BC):
        j = start + tl.arange(0, BC)
        here_j = j < N
        inside = here_i[:, None] & here_j[None, :]
        place = (row * N + i[:, None]) * N + j[None, :]
        s = tl.load(s_p + place, mask=inside, other=0.0)
        unit_j = tl.where(tl.load(inverse_p + row * N + j, mask=here_j, other=0.0) > 0, 1.0, 0.0)
        square_j = tl.load(square_p + row * N + j, mask=here_j, other=0.0)
        counts = real_i[:, None] & here_j[None, :]
        if HAS_VALID:
            counts = counts & (tl.load(valid_p + row * N + j, mask=here_j, other=0) != 0)[None, :]
        if HAS_LABEL:
            label_j = tl.load(label_p + row * N + j, mask=here_j, other=-1)
            counts = counts & (label_i[:, None] == label_j[None, :])
        if not DIAGONAL:
            counts = counts & (i[:, None] != j[None, :])
        # 1 - c; the first term is 0 unless a vector is zero, whose cosines are 0
        excess = 0.5 * (square_i[:, None] + square_j[None, :]) - s
        lost = excess != excess  # NaN, which maxima and minima ignore on a GPU
        gap = (1.0 - 0.5 * (unit_i[:, None] + unit_j[None, :])) + tl.maximum(excess, 0.0)
        if KIND == _EXPONENTIAL:
            f = tl.exp(-rate * gap)
            w = f
        elif KIND == _HINGE:
            push = tl.maximum(margin + 1.0 - gap, 0.0)
            f = push * push
            w = push
        else:
            one_minus = (1.0 - kappa) + kappa * gap
            one_minus = tl.minimum(one_minus, 2.0)
            theta = _arccos(one_minus, 1.0 - one_minus)
            slope = 1.0 / tl.sqrt(tl.maximum(one_minus * (2.0 - one_minus), floor))
            if KIND == _ANGULAR:
                f = tl.exp(-rate * theta)
                w = f * slope
            else:
                push = tl.maximum(0.5 - theta / _PI, 0.0)
                f = push * push
                w = push * slope
        f = tl.where(lost, excess, f)
        total += tl.sum(tl.where(counts, f, 0.0), 1)
        if GRADIENT:
            w = tl.where(lost, excess, w)
            w = _narrow(tl.where(counts, w, 0.0), w_p.dtype.element_ty, TF32)
            tl.store(w_p + place, w, mask=inside)
            w = w.to(tl.float32)
            weight_total += tl.sum(w, 1)
            gap_total += tl.sum(w * gap, 1)
    tl.store(sum_p + row * N + i, total, mask=here_i)
    if GRADIENT:
        tl.store(weight_sum_p + row * N + i, weight_total, mask=here_i)
        tl.store(gap_sum_p + row * N + i, gap_total, mask=here_i)


@triton.jit
def _tangent(
    z_p, x_p, a_p, inverse_p, weight_sum_p, gap_sum_p, mean_p, out_p, N, D, BM: tl.constexpr, BC: tl.constexpr
):
    """sum_j W_ij (zhat_j - c_ij zhat_i), tangent at zhat_i, into the gradient's dtype.

    With zhat = d + m it is a_i - (sum_j W_ij c_ij) d_i + (sum_j W_ij (1 - c_ij)) m: equal tokens have equal
    rounded d, which cancel however large their weight; where they are orthogonal, m is exact.
    """
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BM + tl.arange(0, BM)
    here = i < N
    inverse = tl.load(inverse_p + row * N + i, mask=here, other=0.0)
    weight = tl.load(weight_sum_p + row * N + i, mask=here, other=0.0)
    on_m = tl.load(gap_sum_p + row * N + i, mask=here, other=0.0)
    on_x = on_m - weight
    place = (row * N + i[:, None]) * D
    along = tl.zeros((BM,), tl.float32)
    for k in range(0, D, BC):
        d = k + tl.arange(0, BC)
        inside = here[:, None] & (d[None, :] < D)
        z = tl.load(z_p + place + d[None, :], mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_p + place + d[None, :], mask=inside, other=0.0).to(tl.float32)
        a = tl.load(a_p + place + d[None, :], mask=inside, other=0.0).to(tl.float32)
        m = tl.load(mean_p + row * D + d, mask=d < D, other=0.0)
        u = tl.where(inverse[:, None] > 0, z * inverse[:, None], 0.0)
        along += tl.sum((a + on_x[:, None] * x + on_m[:, None] * m[None, :]) * u, 1)
    for k in range(0, D, BC):
        d = k + tl.arange(0, BC)
        inside = here[:, None] & (d[None, :] < D)
        z = tl.load(z_p + place + d[None, :], mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_p + place + d[None, :], mask=inside, other=0.0).to(tl.float32)
        a = tl.load(a_p + place + d[None, :], mask=inside, other=0.0).to(tl.float32)
        m = tl.load(mean_p + row * D + d, mask=d < D, other=0.0)
        u = tl.where(inverse[:, None] > 0, z * inverse[:, None], 0.0)
        g = a + on_x[:, None] * x + on_m[:, None] * m[None, :] - along[:, None] * u
        tl.store(out_p + place + d[None, :], _narrow(g, out_p.dtype.element_ty, False), mask=inside)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Batched product with float32 accumulation and output."""
    if a.dtype == torch.float32:
        return torch.bmm(a, b)
    if a.device.type == "cuda":
        try:
            return torch.bmm(a, b, out_dtype=torch.float32)
        except TypeError:  # torch < 2.8 has no out_dtype; rounding the product to bfloat16 would lose the cosines
            pass
    return torch.bmm(a.float(), b.float())


def _chunk_rows(rows: int, n: int, width: int, operand_bytes: int) -> int:
    """Rows at once: the chunk's S, W, d and A together stay below half of the hidden states or 64 MiB, if larger."""
    per_row = n * n * (4 + operand_bytes) + n * width * (4 + operand_bytes)
    budget = max(64 * 2**20, rows * n * width * operand_bytes // 2)
    return max(1, min(rows, budget // per_row))


def _run(kernel: Any, grid: tuple[int, int], *arguments: Any, **constants: Any) -> None:
    kernel[grid](*arguments, **constants)


def _launch(run: Callable[..., Any], kernel: Any, count: int, n: int, across: int, *arguments: Any, **constants: Any):
    """Start a kernel over ``count`` rows of n tokens as ``LAUNCHES`` has it."""
    chosen = LAUNCHES[kernel.__name__]
    blocks = {"BM": chosen.tokens, "BC": min(chosen.across, triton.next_power_of_2(across))}
    options = {"num_warps": chosen.warps, "num_stages": chosen.stages}
    run(kernel, (count, triton.cdiv(n, chosen.tokens)), *arguments, **constants, **blocks, **options)


def sweep(
    z_RND: Tensor,
    valid_RN: Tensor | None,
    label_RN: Tensor | None,
    form: PairForm,
    want_gradient: bool,
    run: Callable[..., Any] = _run,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As :func:`decondense.losses.chunked.sweep`: sums per token, gradient of the segment's sum per token, its
    factor.

    ``run(kernel, grid, *arguments, **constants)`` starts a kernel; with one that only compiles, z may be on ``meta``.
    """
    # Triton starts kernels on the current device, which need not be that of a layer of a model on several
    with torch.cuda.device_of(z_RND):  # type: ignore[no-untyped-call]
        return _sweep(z_RND, valid_RN, label_RN, form, want_gradient, run)


def _sweep(
    z_RND: Tensor,
    valid_RN: Tensor | None,
    label_RN: Tensor | None,
    form: PairForm,
    want_gradient: bool,
    run: Callable[..., Any],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    kernel = form.kernel()
    assert kernel is not None, form
    assert z_RND.dtype != torch.float64
    assert available(z_RND.device) or z_RND.is_meta, z_RND.device
    z_RND = z_RND.contiguous()
    rows, n, width = z_RND.shape
    device = z_RND.device
    operand = torch.float32 if z_RND.dtype == torch.float32 else torch.bfloat16
    new = {"dtype": torch.float32, "device": device}
    sums_RN, inverse_RN = torch.empty(rows, n, **new), torch.empty(rows, n, **new)  # type: ignore[call-overload]
    saved = vectors.gradient_dtype(z_RND.dtype)
    gradient = torch.empty(rows, n, width, dtype=saved, device=device) if want_gradient else None
    valid = None if valid_RN is None else valid_RN.to(torch.uint8).contiguous()
    label = None if label_RN is None else label_RN.to(torch.int32).contiguous()
    narrow = operand == torch.float32 and vectors.rounds_products(z_RND)
    # where rounding (of products to 24, or of operands to 8 bits) may put a pair below delta
    floor = max(0.25 * kernel.delta**2, 1e-12)
    blocks = triton.cdiv(n, LAUNCHES["_norms"].tokens)
    chunk = _chunk_rows(rows, n, width, operand.itemsize)
    none: Any = inverse_RN  # a pointer for arguments that the kernel does not read
    for start in range(0, rows, chunk):
        part = slice(start, min(start + chunk, rows))
        z, inverse, sums = z_RND[part], inverse_RN[part], sums_RN[part]
        count = z.shape[0]
        v = none if valid is None else valid[part]
        q = none if label is None else label[part]
        has_valid, has_label = valid is not None, label is not None
        partial = torch.empty(count, blocks, width, **new)  # type: ignore[call-overload]
        _launch(run, _norms, count, n, width, z, v, inverse, partial, n, width, blocks, HAS_VALID=has_valid)
        present = (inverse > 0).sum(dim=1, keepdim=True).clamp(min=1)
        mean = partial.sum(dim=1).div_(present)
        x = torch.empty(z.shape, dtype=operand, device=device)
        square = torch.empty(count, n, **new)  # type: ignore[call-overload]
        _launch(
            run, _operand, count, n, width, z, v, inverse, mean, x, square, n, width, HAS_VALID=has_valid, TF32=narrow
        )
        S = _product(x, x.mT)
        # float32 weights go where the products were; narrower ones need a place of their own
        W = S if operand == torch.float32 else torch.empty(S.shape, dtype=operand, device=device)
        weight_sum, gap_sum = torch.empty(2, count, n, **new)  # type: ignore[call-overload]
        _launch(
            run, _weights, count, n, n,
            S, W, v, q, inverse, square, sums, weight_sum, gap_sum,
            n, kernel.rate, kernel.kappa, floor, kernel.margin,
            KIND=_FUNCTIONS[kernel.function], DIAGONAL=form.diagonal, HAS_VALID=has_valid, HAS_LABEL=has_label,
            GRADIENT=want_gradient, TF32=narrow,
        )  # fmt: skip
        if gradient is not None:
            A = _product(W, x)
            _launch(
                run, _tangent, count, n, width, z, x, A, inverse, weight_sum, gap_sum, mean, gradient[part], n, width
            )
    factor_RN = inverse_RN.mul_(2.0 * kernel.slope) if want_gradient else None
    return sums_RN, gradient, factor_RN
