"""What ``compat=`` computes, against formulas written out here in float64 from the description of the research code."""

from __future__ import annotations

import math

import pytest
import torch
from loss_inputs import condensed, randn
from torch import Tensor

from decondense.losses import COMPAT, dispersion_loss

EPSILON = 1e-2


class ClampKeepingSlope(torch.autograd.Function):
    """Value of the clamped number, gradient as if it had not been clamped."""

    @staticmethod
    def forward(ctx: object, c: Tensor, t: float) -> Tensor:
        return c.clamp(-1 + t, 1 - t)

    @staticmethod
    def backward(ctx: object, g: Tensor) -> tuple[Tensor, None]:
        return g, None


def off_diagonal(n: int) -> Tensor:
    return ~torch.eye(n, dtype=torch.bool)


def distances(z_TD: Tensor, t: float) -> Tensor:
    u = z_TD / (z_TD.norm(dim=-1, keepdim=True) + EPSILON)
    return torch.arccos(ClampKeepingSlope.apply(u @ u.T, t)) / math.pi


def golden(form: str, z_TD: Tensor, t: float, tau: float) -> Tensor:
    n = len(z_TD)
    pairs = off_diagonal(n)
    if form == "angular":
        return torch.logsumexp(-distances(z_TD, t)[pairs] / tau + EPSILON, 0) - math.log(n * (n - 1))
    if form == "orthogonalization":
        return torch.relu(0.5 - distances(z_TD, t)[pairs]).square().mean()
    if form == "l2_repel":
        d = (z_TD.unsqueeze(0) - z_TD.unsqueeze(1)).square().sum(-1)
        return torch.logsumexp((-d / tau + EPSILON).flatten(), 0) - math.log(n * n) + 0.1 * z_TD.square().mean()
    assert form == "decorrelation"
    x = (z_TD - z_TD.mean(-1, keepdim=True)) / z_TD.std(-1, keepdim=True)
    r = x @ x.T / (z_TD.shape[1] - 1)
    return r[pairs].square().mean()


CASES = {"random": randn(2, 20, 16), "condensed": condensed(2, 20, 16, 0.93), "short": 0.05 * randn(2, 20, 16)}


@pytest.mark.parametrize("name", COMPAT)
@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("form", ["angular", "orthogonalization", "l2_repel", "decorrelation"])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case: str, form: str, impl: str, name: str) -> None:
    z = CASES[case].clone().requires_grad_()
    expected = torch.stack([golden(form, z_TD, COMPAT[name], 0.9) for z_TD in z]).mean()
    (gradient,) = torch.autograd.grad(expected, z)
    actual = dispersion_loss(z, form=form, tau=0.9, compat=name, impl=impl)
    (actual_gradient,) = torch.autograd.grad(actual, z)
    assert actual.item() == pytest.approx(expected.item(), abs=1e-6)
    torch.testing.assert_close(actual_gradient, gradient, rtol=1e-6, atol=1e-6 * gradient.abs().max().item())


@pytest.mark.parametrize(("name", "value"), [("lm-dispersion:t=0.25", -0.2201), ("lm-dispersion:t=0.1", -0.1336)])
def test_the_clamped_value_is_blind_to_condensation(name: str, value: float) -> None:
    # every cosine beyond the clamp: the same number at .99 and .999, where the exact loss has -.045 and -.014
    for cosine, exact in ((0.99, -0.0450), (0.999, -0.0142)):
        z = condensed(1, 64, 512, cosine)
        assert dispersion_loss(z, compat=name).item() == pytest.approx(value, abs=2e-4)
        assert dispersion_loss(z).item() == pytest.approx(exact, abs=1e-3)


def test_the_frozen_slope_damps_the_gradient() -> None:
    z = condensed(1, 64, 512, 0.999)
    norms = {}
    for name in (None, "lm-dispersion:t=0.25", "lm-dispersion:t=0.1"):
        x = z.clone().requires_grad_()
        dispersion_loss(x, compat=name).backward()
        norms[name] = x.grad.norm()
    # sin of the clamped angle in place of sin of the angle
    assert norms["lm-dispersion:t=0.25"] / norms[None] == pytest.approx(0.067, abs=0.004)
    assert norms["lm-dispersion:t=0.1"] / norms[None] == pytest.approx(0.10, abs=0.006)


def test_the_diagonal_hides_the_distances() -> None:
    # at the length of real hidden states only i = j is left in the sum: -log n + epsilon, and no repulsion
    z = (28 * torch.nn.functional.normalize(randn(1, 128, 768), dim=-1)).requires_grad_()
    value = dispersion_loss(z, form="l2_repel", compat="lm-dispersion:t=0.25", norm_weight=0.0)
    value.backward()
    assert value.item() == pytest.approx(-math.log(128) + 0.01, abs=1e-6)
    assert z.grad.abs().max() == 0
    x = z.detach().clone().requires_grad_()
    dispersion_loss(x, form="l2_repel", norm_weight=0.0).backward()
    assert x.grad.norm() > 10


def test_what_compat_does_not_cover() -> None:
    z = randn(1, 4, 4)
    with pytest.raises(ValueError, match=r"unknown compat 'lm-dispersion:t=\.1'\. Did you mean 'lm-dispersion:t=0\.1'"):
        dispersion_loss(z, compat="lm-dispersion:t=.1")
    with pytest.raises(ValueError, match="does not cover form 'uniformity'"):
        dispersion_loss(z, form="uniformity", compat="lm-dispersion:t=0.1")
