"""Error budgets, and what must hold for any input (property-based)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_inputs import ALONE, INPUTS, condensed, exact_angular, randn, with_duplicates
from torch import Tensor

from decondense.losses import FORMS, dispersion_loss, vectors

SHAPE = (2, 65, 24)
SCALE_FREE = [name for name in ALONE if not FORMS[name].euclidean]
# these see the lengths of the tokens, though not a common factor
LENGTHS = ("decorrelation", "barlow", "centring", "straightness")
DIRECTIONS = [name for name in SCALE_FREE if name not in LENGTHS]


def gradient(z: Tensor, **keywords: object) -> Tensor:
    z = z.clone().requires_grad_()
    dispersion_loss(z, generator=torch.Generator().manual_seed(0), **keywords).backward()
    assert z.grad is not None
    return z.grad


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("tau", [1.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_worse_than_dense_autograd_of_the_same_precision(name: str, tau: float, dtype: torch.dtype) -> None:
    """Error of each element <= the dense float32 implementation's worst on the same input, times 1.5."""
    z = INPUTS[name](*SHAPE).to(dtype)
    exact = gradient(z.double(), tau=tau, impl="reference")
    dense = gradient(z.float(), tau=tau, impl="reference").double()
    ours = gradient(z, tau=tau, impl="chunked")
    assert ours.dtype == dtype
    # a typical element, for inputs whose true gradient is zero
    scale = gradient(randn(*SHAPE), tau=tau, impl="reference").abs().mean()
    allowed = 1.5 * (dense - exact).abs().max() + 1e-5 * scale
    if dtype == torch.bfloat16:
        # kept in bfloat16 until backward multiplies it: two roundings of 2^-8
        allowed = allowed + 2.02 * 2**-8 * exact.abs()
    assert ((ours.double() - exact).abs() <= allowed).all()
    value = dispersion_loss(z, tau=tau).item()
    assert value == pytest.approx(dispersion_loss(z.double(), tau=tau, impl="reference").item(), abs=3e-5 / tau)


@pytest.mark.parametrize("name", INPUTS)
def test_tf32_operands(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Operands rounded beforehand to what a TF32 product takes of them: repeated tokens still cancel."""
    monkeypatch.setattr(vectors, "rounds_products", lambda x: True)
    z = INPUTS[name](*SHAPE).float()
    exact = gradient(z.double(), impl="reference")
    scale = torch.maximum(exact.norm(), 1e-3 * gradient(randn(*SHAPE), impl="reference").norm())
    assert ((gradient(z, impl="chunked") - exact).norm() / scale).item() < 1e-3


@pytest.mark.parametrize(("cosine", "bias"), [(0.9, 1e-5), (0.99, 1e-4), (0.9999, 5e-3)])
def test_the_smoothing_bias_of_the_gradient(cosine: float, bias: float) -> None:
    """float64, smoothed against the exact gradient from explicit differences."""
    z = condensed(1, 48, 256, cosine)
    x = z.clone().requires_grad_()
    exact_angular(x[0], 1.0).backward()
    smoothed = gradient(z, tau=1.0)
    assert ((smoothed - x.grad).norm() / x.grad.norm()).item() < bias


def test_duplicates_feel_no_force_from_each_other() -> None:
    z = randn(1, 2, 16).float()
    z[:, 1] = z[:, 0]
    for impl in ("reference", "chunked"):
        assert gradient(z, impl=impl).norm() < 1e-2 * gradient(randn(1, 2, 16).float(), impl=impl).norm()


@pytest.mark.parametrize("form", ALONE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_gradient_dtype_and_finiteness_on_planted_structure(form: str, dtype: torch.dtype) -> None:
    z = with_duplicates(condensed(2, 21, 10, 0.9)).to(dtype)
    z[0, 4] = 0
    z[1] = z[1, :1]
    made = gradient(z, form=form)
    assert made.dtype == dtype
    assert made.isfinite().all()


@pytest.mark.parametrize("exponent", [-44, -38, -20, 0, 18, 38])
@pytest.mark.parametrize("form", [*DIRECTIONS, "centring", "straightness"])
def test_any_length_is_finite(form: str, exponent: int) -> None:
    z = (randn(1, 9, 5) * 10.0**exponent).clamp(-3.4e38, 3.4e38).float()
    assert math.isfinite(dispersion_loss(z, form=form).item())
    assert not gradient(z, form=form).isnan().any()


def test_zero_vectors_are_orthogonal_to_everything_and_feel_nothing() -> None:
    z = randn(1, 6, 8)
    z[0, 2] = 0
    e = torch.zeros(1, 6, 14, dtype=z.dtype)
    e[..., :8] = z
    e[0, 2, 8] = 1.0  # a direction of its own instead
    for impl in ("reference", "chunked"):
        torch.testing.assert_close(dispersion_loss(z, impl=impl), dispersion_loss(e, impl=impl))
        made = gradient(z, impl=impl)
        assert (made[0, 2] == 0).all()


matrices = st.tuples(
    st.integers(2, 12), st.integers(2, 6), st.integers(0, 2**31), st.sampled_from([1.0, 0.3, 0.05]), st.floats(-4, 4)
)


@settings(max_examples=40, deadline=None)
@given(matrices, st.sampled_from(DIRECTIONS))
def test_scale_invariance_and_tangency(case: tuple[int, int, int, float, float], form: str) -> None:
    t, d, seed, tau, log_scale = case
    z = randn(1, t, d, seed=seed)
    lengths = (randn(1, t, 1, seed=seed + 1) + log_scale).exp()
    torch.testing.assert_close(
        dispersion_loss(z * lengths, form=form, tau=tau), dispersion_loss(z, form=form, tau=tau), rtol=1e-7, atol=1e-9
    )
    made = gradient(z, form=form, tau=tau)
    radial = (made * z).sum(dim=-1).abs()
    assert (radial <= 1e-9 * (1 + made.norm(dim=-1) * z.norm(dim=-1))).all()


@settings(max_examples=40, deadline=None)
@given(matrices, st.sampled_from(sorted(name for name in ALONE if not FORMS[name].ordered)))
def test_permutation_equivariance(case: tuple[int, int, int, float, float], form: str) -> None:
    t, d, seed, tau, _ = case
    z = randn(2, t, d, seed=seed)
    order = torch.randperm(t, generator=torch.Generator().manual_seed(seed))
    made = gradient(z, form=form, tau=tau)
    permuted = gradient(z[:, order], form=form, tau=tau)
    torch.testing.assert_close(permuted, made[:, order], rtol=1e-6, atol=1e-9 * (1 + made.abs().max().item()))


@settings(max_examples=40, deadline=None)
@given(matrices)
def test_the_angular_gradient_is_bounded(case: tuple[int, int, int, float, float]) -> None:
    """|dL/dz_i| <= 2/(pi tau |z_i|) sum_j p_ij, and the p of a sequence sum to 1."""
    t, d, seed, tau, log_scale = case
    z = with_duplicates(randn(1, max(t, 3), d, seed=seed), 0.5) * math.exp(log_scale)
    force = gradient(z.float(), tau=tau).norm(dim=-1) * z.norm(dim=-1)
    assert force.sum().item() <= 2 / (math.pi * tau) * (1 + 1e-3)


@settings(max_examples=30, deadline=None)
@given(matrices, st.sampled_from(["angular", "mean_cosine", "uniformity", "hinge", "koleo"]))
def test_the_value_lies_between_its_extremes(case: tuple[int, int, int, float, float], form: str) -> None:
    t, d, seed, tau, _ = case
    value = dispersion_loss(randn(1, t, d, seed=seed), form=form, tau=tau).item()
    low, high = {
        "angular": (-1 / tau, 0.0),
        "mean_cosine": (-1 / (t - 1), 1.0),
        "uniformity": (-8 / tau, 0.0),
        "hinge": (1.5**2 / t, 1.5**2),
        "koleo": (-math.log(2), -math.log(1e-3) + 1e-6),
    }[form]
    assert low - 1e-9 <= value <= high + 1e-9


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=3, max_size=3), min_size=2)
)
def test_no_nan_for_any_finite_input(rows: list[list[float]]) -> None:
    z = torch.tensor([rows], dtype=torch.float32)
    for impl in ("reference", "chunked"):
        assert math.isfinite(dispersion_loss(z, impl=impl).item())
        assert gradient(z, impl=impl).isfinite().all()
