"""The Triton kernels: compiled on a GPU, or, with TRITON_INTERPRET=1, on a CPU (started by test_fused.py)."""

from __future__ import annotations

import math
import os

import pytest
import torch
import triton
import triton.language as tl
from loss_inputs import INPUTS, randn, with_duplicates
from torch import Tensor

from decondense.config import LossConfig
from decondense.losses import FORMS, DispersionLoss, device_check, dispersion_loss, engine, fused, vectors
from decondense.losses.operator import _pair_sums

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FUSED = [name for name, info in FORMS.items() if info.fused]

on_device = pytest.mark.parametrize("device", ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)])


def value_and_gradient(z: Tensor, impl: str, **keywords: object) -> tuple[Tensor, Tensor]:
    z = z.clone().requires_grad_()
    value = dispersion_loss(z, impl=impl, generator=torch.Generator().manual_seed(1), **keywords)
    value.backward()
    assert z.grad is not None
    return value.detach().double(), z.grad.double()


def errors(z: Tensor, **keywords: object) -> tuple[float, float]:
    """Of value (absolute) and gradient (norm, relative) against the dense float64 implementation."""
    exact = value_and_gradient(z.double(), "reference", **keywords)
    ours = value_and_gradient(z, "fused", **keywords)
    norm = exact[1].norm()
    return (ours[0] - exact[0]).abs().item(), ((ours[1] - exact[1]).norm() / norm).item()


# the worst here: float32 pairs of duplicates, rounding over delta^2; bfloat16 its own rounding, 2^-8
TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 8e-3, torch.float16: 6e-3}


@on_device
@pytest.mark.parametrize("form", FUSED)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_every_form_and_dtype(device: str, form: str, dtype: torch.dtype) -> None:
    z = randn(2, 37, 20) + 0.4
    z[:, 5] = z[:, 9]
    z[0, 3] = 0
    mask = torch.rand(2, 37, generator=torch.Generator().manual_seed(0)) > 0.3
    z, mask = z.to(device, dtype), mask.to(device)
    value, gradient = errors(z, form=form, mask_BT=mask, tau=0.7)
    assert gradient < TOLERANCE[dtype]
    assert value < (1e-6 if dtype == torch.float32 else 2e-3)
    made = value_and_gradient(z, "fused", form=form, mask_BT=mask)[1]
    assert (made[~mask] == 0).all()
    assert (made[0, 3] == 0).all()


@on_device
@pytest.mark.parametrize("scope", ["segments", "groups", "batch", "recompute", "one token", "no token"])
def test_scopes(device: str, scope: str) -> None:
    z = (randn(2, 33, 16) + 0.4).to(device, torch.float32)
    mask = torch.ones(2, 33, dtype=torch.bool, device=device)
    mask[0, 20:] = False
    keywords = {
        "segments": {"segments_BT": (torch.arange(33) // 7).expand(2, 33).to(device)},
        "groups": {"pairs": "grouped", "group_size": 8, "mask_BT": mask},
        "batch": {"within": "batch", "mask_BT": mask},
        "recompute": {"gradient": "recompute", "mask_BT": mask},
        "one token": {"mask_BT": torch.arange(33, device=device).expand(2, 33) == 4},
        "no token": {"mask_BT": torch.zeros_like(mask)},
    }[scope]
    exact = value_and_gradient(z.double(), "reference", **keywords)
    ours = value_and_gradient(z, "fused", **keywords)
    torch.testing.assert_close(ours[0], exact[0], rtol=0, atol=2e-6)
    torch.testing.assert_close(ours[1], exact[1], rtol=1e-4, atol=1e-6 * (1e-6 + exact[1].abs().max().item()))


@on_device
@pytest.mark.parametrize("shape", [(1, 2, 4), (2, 5, 3), (1, 16, 16), (3, 17, 40), (1, 129, 9), (1, 20, 300)])
def test_shapes_that_no_block_divides(device: str, shape: tuple[int, int, int]) -> None:
    value, gradient = errors(randn(*shape).to(device, torch.float32))
    assert value < 3e-6
    assert gradient < 1e-5


@on_device
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("tau", [1.0, 0.1])
def test_low_precision_operands_on_condensed_tokens(device: str, name: str, tau: float) -> None:
    """bfloat16 operands cost little more than the rounding of the gradient to bfloat16 (4e-3) does.

    Without the centring, and without equal operands for equal tokens, they are wrong by factors on some of these.
    """
    z = INPUTS[name](2, 48, 64).to(device, torch.bfloat16)
    exact = value_and_gradient(z.double(), "reference", tau=tau)[1]
    ours = value_and_gradient(z, "fused", tau=tau)[1]
    typical = value_and_gradient(randn(2, 48, 64).to(device), "reference", tau=tau)[1].norm()
    scale = torch.maximum(exact.norm(), 1e-3 * typical)
    assert ((ours - exact).norm() / scale).item() < (1.2e-2 if name == "20% duplicates" else 6e-3)


@on_device
@pytest.mark.parametrize("name", INPUTS)
def test_tf32_operands(device: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Operands rounded beforehand to what a TF32 product takes of them: repeated tokens still cancel."""
    monkeypatch.setattr(vectors, "rounds_products", lambda x: True)
    z = INPUTS[name](2, 48, 64).to(device, torch.float32)
    exact = value_and_gradient(z.double(), "reference")[1]
    typical = value_and_gradient(randn(2, 48, 64).to(device), "reference")[1].norm()
    scale = torch.maximum(exact.norm(), 1e-3 * typical)
    assert ((value_and_gradient(z, "fused")[1] - exact).norm() / scale).item() < 1e-3


@on_device
def test_finite_for_extreme_lengths(device: str) -> None:
    for dtype, exponents in (
        (torch.float32, (-44, -20, 18, 38)),
        (torch.bfloat16, (-38, 38)),
        (torch.float16, (-7, 4)),
    ):
        for exponent in exponents:
            z = (randn(1, 9, 5) * 10.0**exponent).clamp(-6e4 if dtype == torch.float16 else -3.3e38, 3.3e38)
            value, gradient = value_and_gradient(z.clamp(max=6e4).to(device, dtype), "fused")
            assert math.isfinite(value.item())
            assert not gradient.isnan().any()


@on_device
def test_runs_are_bit_identical(device: str) -> None:
    z = with_duplicates(randn(2, 40, 24)).to(device, torch.bfloat16)
    first, second = (value_and_gradient(z, "fused") for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@on_device
def test_fullgraph_compile_and_autocast(device: str) -> None:
    module = DispersionLoss(impl="fused")
    z = randn(2, 20, 12).to(device, torch.float32)
    mask = torch.ones(2, 20, dtype=torch.bool, device=device)
    mask[1, 9:] = False

    def step(x: Tensor) -> Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            return module(torch.tanh(x), mask)

    eager, compiled = z.clone().requires_grad_(), z.clone().requires_grad_()
    expected = step(eager)
    # the interpreter cannot be compiled around; the graph, its shapes and its derivative can
    backend = "aot_eager" if device == "cpu" else "inductor"
    actual = torch.compile(step, fullgraph=True, backend=backend)(compiled)
    expected.backward()
    actual.backward()
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(compiled.grad, eager.grad)


@on_device
def test_the_operator_is_registered_as_torch_wants_it(device: str) -> None:
    z = randn(2, 12, 8).to(device, torch.float32).requires_grad_()
    arguments = (z, None, None, "angular", [1.0, 1e-3], None, "fused", True)
    torch.library.opcheck(_pair_sums, arguments, test_utils=("test_schema", "test_faketensor"))


@on_device
def test_lock_step_training(device: str) -> None:
    """50 steps of descent under every implementation: the same losses, no drift."""
    losses = {}
    for impl in ("reference", "chunked", "fused"):
        z = (randn(2, 12, 8) + 1.0).to(device, torch.float32).requires_grad_()
        optimizer = torch.optim.SGD([z], lr=2.0)
        losses[impl] = []
        for _ in range(50 if device == "cuda" else 25):
            optimizer.zero_grad()
            loss = dispersion_loss(z, impl=impl, tau=0.3)
            loss.backward()
            optimizer.step()
            losses[impl].append(loss.item())
    for impl in ("chunked", "fused"):
        difference = torch.tensor(losses[impl]) - torch.tensor(losses["reference"])
        assert difference.abs().max().item() < 1e-5
        assert difference.mean().abs().item() < 3e-6


@on_device
def test_arccos_polynomial(device: str) -> None:
    x = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    fit = sum(c * x**k for k, c in enumerate(fused._ARCCOS)) * (1 - x).sqrt()
    assert (fit - x.arccos()).abs().max().item() < 4e-9


@on_device
def test_auto_chooses(device: str) -> None:
    z = torch.zeros(1, 2, 2, device=device)
    assert engine.choose(LossConfig(), z) == ("fused" if device == "cuda" else "chunked")
    assert engine.choose(LossConfig(), z.double()) == "chunked"
    assert engine.choose(LossConfig(form="koleo"), z) == "chunked"


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4, 256, 768), (2, 1024, 1024), (1, 4096, 4096), (1, 2049, 777)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", ["chunked", "fused"])
def test_full_size_on_a_gpu(shape: tuple[int, int, int], dtype: torch.dtype, impl: str) -> None:
    z = (torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(0)) + 1.0).to(dtype)
    exact = value_and_gradient(z.double(), "reference")
    ours = value_and_gradient(z, impl)
    assert (ours[0] - exact[0]).abs().item() < (1e-5 if dtype == torch.float32 else 1e-3)
    assert ((ours[1] - exact[1]).norm() / exact[1].norm()).item() < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("pairs", ["all", "subset", "grouped"])
def test_no_wait_for_the_device(pairs: str) -> None:
    z = torch.randn(2, 300, 64, device="cuda", requires_grad=True)
    mask = torch.ones(2, 300, dtype=torch.bool, device="cuda")
    losses = [DispersionLoss(impl=impl, pairs=pairs) for impl in ("chunked", "fused")]
    for loss in losses:
        loss(z, mask).backward()
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for loss in losses:
            loss(z, mask).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_states_on_another_than_the_current_device() -> None:
    z = (torch.randn(2, 40, 24, generator=torch.Generator().manual_seed(0)) + 0.4).to("cuda:1")
    with torch.cuda.device(0):
        value, gradient = errors(z)
    assert (value, gradient) < (1e-6, TOLERANCE[torch.float32])


@on_device
@pytest.mark.parametrize("form", ["angular", "hinge", "uniformity"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero)")  # numpy's, of the interpreter
def test_a_state_that_is_lost_is_not_hidden(device: str, form: str, dtype: torch.dtype, bad: float) -> None:
    """One bad value or token makes loss and gradient NaN, as the tiled engine's; a masked one does not."""
    for place in ((0, 3, 1), (0, 3)):
        z = randn(2, 37, 20) + 0.4
        z[place] = bad
        z = z.to(device, dtype)
        value, gradient = value_and_gradient(z, "fused", form=form)
        assert value.isnan()
        assert gradient[0].isnan().any()
        mask = torch.ones(2, 37, dtype=torch.bool, device=device)
        mask[0, 3] = False
        value, gradient = value_and_gradient(z, "fused", form=form, mask_BT=mask)
        assert value.isfinite()
        assert gradient.isfinite().all()


@triton.jit
def _narrowed(bits_p, bf16_p, tf32_p, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(bits_p + at).to(tl.float32, bitcast=True)
    tl.store(bf16_p + at, fused._narrow(x, tl.bfloat16, False).to(tl.float32))
    tl.store(tf32_p + at, fused._narrow(x, tl.float32, True))


@on_device
def test_rounding_keeps_every_nan(device: str) -> None:
    """NVIDIA's arithmetic gives 0x7FFFFFFF, a CPU's 0x7FC00000; 0x7F800000 is infinity, 0x7F7FFFFF rounds to it."""
    bits = [0x7FFFFFFF, 0x7FC00000, 0x7F800001, -1, 0x7F800000, 0x7F7FFFFF, 0x3F800000, 0]
    source = torch.tensor(bits, dtype=torch.int32, device=device)
    narrow, tf32 = torch.empty(2, 8, device=device)
    _narrowed[(1,)](source, narrow, tf32, N=8)
    for found in (narrow.tolist(), tf32.tolist()):
        assert all(math.isnan(value) for value in found[:4])
        assert found[4:] == [math.inf, math.inf, 1.0, 0.0]


@on_device
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_auto_tries_the_kernels_before_it_trusts_them(device: str, dtype: torch.dtype, monkeypatch) -> None:
    engine._kernels_agree_once.cache_clear()
    state = torch.get_rng_state()
    assert engine.kernels_agree(device, dtype)
    assert torch.equal(state, torch.get_rng_state())

    sweep = fused.sweep

    def wrong(*arguments: object) -> object:
        sums, gradient, factor = sweep(*arguments)
        return sums * 1.01, gradient, factor

    def broken(*arguments: object) -> object:
        raise RuntimeError("no such instruction\nand more")

    for kernel, reason in ((wrong, "do not agree"), (broken, "RuntimeError: no such instruction")):
        engine._kernels_agree_once.cache_clear()
        monkeypatch.setattr(fused, "sweep", kernel)
        with pytest.warns(RuntimeWarning, match=reason):
            assert not engine.kernels_agree(device, dtype)
    engine._kernels_agree_once.cache_clear()


@on_device
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad, "autocast"])
def test_the_first_call_may_come_in_any_mode(device: str, mode: object) -> None:
    engine._kernels_agree_once.cache_clear()
    with torch.autocast(device, dtype=torch.bfloat16) if mode == "autocast" else mode():
        assert engine.kernels_agree(device, torch.float32)


@on_device
def test_the_trial_is_a_constant_to_the_compiler(device: str) -> None:
    def step(x: Tensor) -> Tensor:
        return x * 2 if engine.kernels_agree(str(x.device), x.dtype) else x

    engine._kernels_agree_once.cache_clear()
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(3, device=device)), torch.full((3,), 2.0, device=device))


@on_device
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_check_of_the_device_sees_errors(device: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_check, "ALLOWED", {dtype: device_check.ALLOWED[dtype]})
    sweep = fused.sweep

    def wrong(*arguments: object) -> object:
        sums, gradient, factor = sweep(*arguments)
        return sums, gradient, None if factor is None else 1.02 * factor

    if dtype == "bfloat16":
        monkeypatch.setattr(fused, "sweep", wrong)
    found = device_check.check_device(device, (1, 9, 8), (1, 9, 8), 1)
    assert set(found.errors) == set(found.auto) == {dtype}
    assert found.right == (dtype == "float32")
    assert ("WRONG" if dtype == "bfloat16" else "are correct") in device_check.sentences(found)[1]
    if dtype == "bfloat16":
        assert found.errors[dtype] == pytest.approx(0.02, rel=0.3)


def test_a_check_where_the_kernels_cannot_run() -> None:
    found = device_check.check_device("meta", (1, 8, 4), (1, 8, 4), 1)
    assert not found.right
    assert device_check.sentences(found)[0].startswith("The fused kernels do not run on meta: ")
