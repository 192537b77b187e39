"""Rank correlations against scipy, and intervals against their meaning."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau, spearmanr

from decondense.measuring import depth


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(-5, 5), min_size=2, max_size=15))
def test_scipy(values: list[int]) -> None:
    index = range(len(values))
    rho, tau = float(depth.spearman(values)), float(depth.kendall(values))
    if len(set(values)) == 1:
        assert math.isnan(rho)
        assert math.isnan(tau)
        return
    assert rho == pytest.approx(spearmanr(values, index).statistic, abs=1e-12)
    assert tau == pytest.approx(kendalltau(values, index).statistic, abs=1e-12)


def test_many_at_once() -> None:
    table = np.random.default_rng(0).normal(size=(6, 9))
    np.testing.assert_allclose(depth.spearman(table), [depth.spearman(row) for row in table])
    np.testing.assert_allclose(depth.kendall(table), [depth.kendall(row) for row in table])


def test_resampling_is_its_own_and_repeats() -> None:
    before = np.random.get_state()[1].copy()
    one, two = depth.resample_weights(7, 100, 3), depth.resample_weights(7, 100, 3)
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, depth.resample_weights(7, 100, 4))
    np.testing.assert_allclose(one.sum(axis=1), 1)
    np.testing.assert_array_equal(before, np.random.get_state()[1])


def test_interval_covers_at_its_rate() -> None:
    """Of 300 samples of 40 normal values, about 95 % of the bootstrap intervals hold the true mean."""
    rng = np.random.default_rng(5)
    covered = 0
    for trial in range(300):
        sample = rng.normal(size=40)
        low, high = depth.percentile_interval(depth.resample_weights(40, 500, trial) @ sample, 0.95)
        covered += low <= 0 <= high
    assert 0.90 <= covered / 300 <= 0.98
