"""Values that can be worked out by hand, for every form and both implementations."""

from __future__ import annotations

import math

import pytest
import torch
from loss_inputs import antipodal, exact_angular, orthonormal, randn, simplex

from decondense import geometry
from decondense.losses import FORMS, dispersion_loss

N, D = 6, 8
TAU, MARGIN = 0.7, 0.5
KAPPA = geometry.shrink(1e-3)


def angle(c: float) -> float:
    return math.acos(KAPPA * c) / math.pi


def log_mean_exp(c: float, tau: float = TAU) -> float:
    return -angle(c) / tau


def infonce(*cosines_and_counts: tuple[float, int]) -> float:
    total = sum(k for _, k in cosines_and_counts)
    return math.log(sum(k * math.exp(c / TAU) for c, k in cosines_and_counts) / total)


def uniform(c: float) -> float:
    return -4 * (1 - c) / TAU


S = -1 / (N - 1)  # the cosine of a regular simplex

# form: (orthonormal, simplex, all equal); the antipodal set has its own test
CLOSED = {
    "angular": (log_mean_exp(0), log_mean_exp(S), log_mean_exp(1)),
    "orthogonalization": (0.0, 0.0, (0.5 - angle(1)) ** 2),
    "l2_repel": (-2 / TAU + 0.1 / D, -2 * N / (N - 1) / TAU + 0.1 / D, 0.1 / D),
    "perplexity_entropy": (-math.log(N - 1),) * 3,
    "cosine_infonce": (infonce((1, N), (0, N * N - N)), infonce((1, N), (S, N * N - N)), 1 / TAU),
    "l2_infonce": (
        math.log((1 + (N - 1) * math.exp(-2 / TAU)) / N),
        math.log((1 + (N - 1) * math.exp(-2 * N / (N - 1) / TAU)) / N),
        0.0,
    ),
    "hinge": (
        ((1 + MARGIN) ** 2 + (N - 1) * MARGIN**2) / N,
        ((1 + MARGIN) ** 2 + (N - 1) * (MARGIN + S) ** 2) / N,
        (1 + MARGIN) ** 2,
    ),
    "mean_cosine": (0.0, S, 1.0),
    "profile": (0.0, S**2, 1.0),
    "uniformity": (uniform(0), uniform(S), 0.0),
    "koleo": (
        -0.5 * math.log(2),
        -0.5 * math.log(2 - 2 * KAPPA * S),
        -0.5 * math.log(2 - 2 * KAPPA),
    ),
    "decorrelation": (None, None, 0.0),
    "barlow": (None, None, 0.0),
    "covariance": (None, None, 0.0),
    "vicreg": (None, None, 25 * (1 - 0.01)),
}


def evaluate(z: torch.Tensor, form: str, impl: str, **keywords: object) -> float:
    impl = impl if impl in FORMS[form].implementations else "auto"
    return dispersion_loss(z.unsqueeze(0), form=form, impl=impl, tau=TAU, margin=MARGIN, **keywords).item()


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("form", CLOSED)
def test_orthonormal_simplex_and_equal_tokens(form: str, impl: str) -> None:
    sets = (orthonormal(N, D), simplex(N, D), orthonormal(1, D).expand(N, D))
    for z, expected in zip(sets, CLOSED[form], strict=True):
        if expected is not None:
            assert evaluate(z, form, impl) == pytest.approx(expected, abs=1e-8)


def test_every_form_is_in_the_tables() -> None:
    # the others have files of their own, or are random
    assert set(CLOSED) | {"sigreg", "gram", "visreg", "centring", "straightness"} == set(FORMS)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_antipodal_tokens(impl: str) -> None:
    # 3 x (+e), 3 x (-e): 12 ordered pairs at cosine 1, 18 at -1
    z = antipodal(N, D)
    expected = math.log((12 * math.exp(-angle(1) / TAU) + 18 * math.exp(-angle(-1) / TAU)) / 30)
    assert evaluate(z, "angular", impl) == pytest.approx(expected, abs=1e-12)
    assert evaluate(z, "mean_cosine", impl) == pytest.approx(-6 / 30, abs=1e-12)
    assert evaluate(z, "hinge", impl) == pytest.approx(18 * 1.5**2 / 36, abs=1e-12)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_correlation_forms_of_four_tokens_in_two_features(impl: str) -> None:
    # features (1, -1, 1, -1) and (1, -1, -1, 1) are uncorrelated; (1, -1, 1, -1) twice are perfectly correlated
    uncorrelated = torch.tensor([[1, 1], [-1, -1], [1, -1], [-1, 1]], dtype=torch.float64)
    for form in ("decorrelation", "barlow", "covariance"):
        assert evaluate(uncorrelated, form, impl) == pytest.approx(0.0, abs=1e-12)
    same = torch.tensor([[1, 1], [-1, -1], [1, 1], [-1, -1]], dtype=torch.float64)
    assert evaluate(same, "decorrelation", impl) == pytest.approx(1.0)
    assert evaluate(same, "barlow", impl) == pytest.approx(1.0)
    # unit vectors times sqrt(2) are +-(1, 1); the sum of squares 4 over n - 1 = 3; twice its square over D = 2
    assert evaluate(same, "covariance", impl) == pytest.approx((4 / 3) ** 2)
    # variance 4/3 > 1: no variance term; covariance 4/3
    assert evaluate(same, "vicreg", impl) == pytest.approx((4 / 3) ** 2)
    assert evaluate(same / 4, "vicreg", impl) == pytest.approx(25 * (1 - math.sqrt(1 / 12 + 1e-4)) + (1 / 12) ** 2)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_sigreg_tells_a_normal_cloud_from_others(impl: str) -> None:
    def value(z: torch.Tensor) -> float:
        draws = torch.Generator().manual_seed(0)
        return dispersion_loss(z.unsqueeze(0), form="sigreg", impl=impl, generator=draws).item()

    normal, collapsed, wide = value(randn(400, 5)), value(randn(1, 5).expand(400, 5)), value(5 * randn(400, 5))
    assert normal < 1.0
    assert collapsed > 100 * normal
    assert wide > 50 * normal


def test_sigreg_of_one_point_by_hand() -> None:
    # all tokens 0: the characteristic function is 1, so n * integral of (1 - e^{-t^2/2})^2 e^{-t^2/2} over [-3, 3]
    t = torch.linspace(0, 3, 17, dtype=torch.float64)
    g = torch.exp(-(t**2) / 2)
    expected = 10 * 2 * torch.trapezoid((1 - g) ** 2 * g, t)
    z = torch.zeros(1, 10, 4, dtype=torch.float64)
    value = dispersion_loss(z, form="sigreg", generator=torch.Generator().manual_seed(1))
    assert value.item() == pytest.approx(expected.item())


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("tau", [1.0, 0.1, 0.005])
def test_angular_against_the_half_angle_oracle(impl: str, tau: float) -> None:
    z = randn(40, 7)
    z[3] = z[11]
    expected = exact_angular(z, tau, delta=1e-3)
    assert dispersion_loss(z.unsqueeze(0), tau=tau, impl=impl).item() == pytest.approx(expected.item(), abs=1e-9)


def test_the_smoothing_error_of_the_value_is_bounded() -> None:
    z = randn(40, 7)
    z[3] = z[11]
    for tau in (1.0, 0.1):
        error = abs(dispersion_loss(z.unsqueeze(0), tau=tau).item() - exact_angular(z, tau).item())
        assert error <= 1e-3 / (math.pi * tau)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_unit_vectors_and_inverse_norms_agree_for_any_length(dtype: torch.dtype) -> None:
    z = randn(3, 9, 4).to(dtype)
    largest = 38 if dtype == torch.float32 else 300
    z[0] *= (10.0 ** torch.linspace(-29, largest - 1, 9, dtype=torch.float64)).to(dtype)[:, None]  # all beyond the rule
    z[1, 2], z[1, 3] = 0, 1e-31
    for wait in (None, True, False):
        for rows in (z, z[2:]):  # with and without lengths whose squares leave the range
            inverse, norm = geometry.inverse_norm(rows, wait=wait)
            torch.testing.assert_close(rows * inverse.unsqueeze(-1), geometry.unit(rows))
            exact = torch.tensor([[math.hypot(*x) for x in row] for row in rows.tolist()], dtype=torch.float64)
            exact[exact < 1e-30] = 0
            torch.testing.assert_close(norm.double(), exact, rtol=1e-6 if dtype == torch.float32 else 1e-12, atol=0)
    assert (geometry.unit(z)[1, 2:4] == 0).all()
    assert (geometry.inverse_norm(z)[0][1, 2:4] == 0).all()


def test_a_state_that_is_no_number_is_not_a_zero_vector() -> None:
    z = randn(1, 5, 4)
    z[0, 2, 1] = math.nan
    assert geometry.unit(z)[0, 2].isnan().all()
    for wait in (True, False):
        assert geometry.inverse_norm(z, wait=wait)[0][0, 2].isnan()
    for impl in ("reference", "chunked"):
        assert dispersion_loss(z, impl=impl).isnan()
