"""The confidence sequence: Bayes factor by integration, interval by inversion, error under constant looking."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import integrate, stats

from decondense.compare.sequential import confidence_sequence, decided, log_bayes_factor


@pytest.mark.parametrize(("n", "shift", "g"), [(3, 0.4, 16.0), (6, -1.2, 16.0), (12, 0.1, 1.0)])
def test_the_bayes_factor_is_the_integral_over_the_prior(n: int, shift: float, g: float) -> None:
    d = np.random.default_rng(n).normal(shift, 1.3, n)
    t, nu = float(stats.ttest_1samp(d, 0).statistic), n - 1
    # the density of t under an effect, averaged over the normal prior, against that under none
    mixed, _ = integrate.quad(
        lambda effect: stats.nct.pdf(t, nu, effect * math.sqrt(n)) * stats.norm.pdf(effect, 0, math.sqrt(g)),
        -8 * math.sqrt(g),
        8 * math.sqrt(g),
        limit=400,
        points=[0.0, t / math.sqrt(n)],
    )
    assert log_bayes_factor(d, g=g) == pytest.approx(math.log(mixed / stats.t.pdf(t, nu)), abs=1e-5)


@pytest.mark.parametrize("n", [3, 4, 9, 40])
def test_the_bounds_are_the_means_at_which_the_bayes_factor_is_twenty(n: int) -> None:
    d = np.random.default_rng(n).normal(0.2, 2.0, n)
    for bound in confidence_sequence(d):
        assert log_bayes_factor(d, null=bound) == pytest.approx(math.log(20))


def test_few_seeds_or_a_small_prior_reject_nothing() -> None:
    assert confidence_sequence([1.0, 2.0]) == (-math.inf, math.inf)
    assert confidence_sequence([1.0, 2.0, 1.5], g=6.0) == (-math.inf, math.inf)
    assert all(map(math.isfinite, confidence_sequence([1.0, 2.0, 1.5])))
    assert decided([1.0, 2.0], margin=10.0) is None
    with pytest.raises(ValueError, match="do not vary"):
        confidence_sequence([1.0, 1.0, 1.0])
    assert decided([1.0, 1.0, 1.0], margin=10.0) is None


def test_decisions() -> None:
    noise = np.array([-0.01, 0.0, 0.01, 0.005, -0.005])
    assert decided(-1 + noise, margin=0.02) == "lower"
    assert decided(1 + noise, margin=0.02) == "higher"
    assert decided(noise, margin=0.1) == "equivalent"
    assert decided(noise, margin=0.005) is None


def test_constant_looking_keeps_the_error() -> None:
    """3000 null studies, a look after every seed from 3 to 25; a fixed t test would err in about a quarter of them."""
    d_RN = np.random.default_rng(1).normal(size=(3000, 25))
    wrong = naive = 0
    for d in d_RN:
        looks = [log_bayes_factor(d[:n]) > math.log(20) for n in range(3, 26)]
        wrong += any(looks)
        n = np.arange(3, 26)
        mean = np.cumsum(d)[2:] / n
        sd = np.sqrt((np.cumsum(d**2)[2:] - n * mean**2) / (n - 1))
        naive += bool(np.any(np.abs(mean) * np.sqrt(n) / sd > stats.t.ppf(0.975, n - 1)))
    assert wrong / 3000 <= 0.05
    assert naive / 3000 > 0.15


def test_a_difference_at_the_margin_is_rarely_called_equivalent() -> None:
    rng = np.random.default_rng(2)
    wrong = 0
    for _ in range(400):
        d = rng.normal(1.0, 0.5, 12)
        wrong += any(decided(d[:n], margin=1.0) == "equivalent" for n in range(3, 13))
    assert wrong / 400 <= 0.05
