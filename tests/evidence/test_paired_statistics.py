"""The statistics against scipy, closed forms, hand-computed values and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from decondense.compare import (
    Items,
    holm,
    paired_difference,
    sign_flip_p,
    smallest_sign_flip_p,
    tokens_to_reach,
    two_level_bootstrap,
)


def test_interval_and_p_are_the_paired_t_test() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=7), rng.normal(0.3, size=7)
    d = paired_difference(a, b)
    oracle = stats.ttest_rel(b, a)
    assert d.mean == pytest.approx(np.mean(b - a))
    assert d.p == pytest.approx(oracle.pvalue)
    assert d.interval == pytest.approx(tuple(oracle.confidence_interval(0.95)))
    assert d.interval_kind == "over seeds"


def test_effect_size_by_hand() -> None:
    d = paired_difference([0.0, 0.0, 0.0], [1.0, 2.0, 3.0])
    # mean 2, sd 1, Hedges' factor 1 - 3 / (4 * 2 - 1)
    assert d.effect_size == pytest.approx(2 * (1 - 3 / 7))
    assert d.relative is None  # over a baseline of zero
    assert paired_difference([0.0, 0.0], [1.0, 2.0]).effect_size is None  # the factor would be zero


def test_one_pair_has_neither_interval_nor_test() -> None:
    d = paired_difference([5.0], [4.0], higher_is_better=False)
    assert (d.mean, d.n) == (-1.0, 1)
    assert d.interval is None
    assert d.p is None
    assert d.p_sign_flip is None
    assert d.sd is None
    assert not d.detected
    assert "one seed" in d.verdict
    assert "one seed" in d.interval_reason


def test_no_difference_at_all_is_not_detected() -> None:
    d = paired_difference([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert d.interval == (0.0, 0.0)
    assert d.p == 1.0
    assert d.verdict == "no detectable difference"


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_sign_flip_enumerates_every_pattern(n: int) -> None:
    values = np.random.default_rng(n).normal(0.5, 1, n)
    patterns = list(itertools.product((1, -1), repeat=n))
    by_hand = sum(abs(np.dot(p, values)) >= abs(values.sum()) - 1e-12 for p in patterns) / len(patterns)
    assert sign_flip_p(values) == pytest.approx(by_hand)


def test_sign_flip_agrees_with_scipy() -> None:
    values = np.random.default_rng(3).normal(0.4, 1, 9)
    oracle = stats.permutation_test(
        (values,), np.mean, permutation_type="samples", alternative="two-sided", n_resamples=np.inf
    )
    assert sign_flip_p(values) == pytest.approx(oracle.pvalue)


def test_sign_flip_with_many_pairs_is_drawn_and_close_to_the_t_test() -> None:
    values = np.random.default_rng(4).normal(0.3, 1, 60)
    assert sign_flip_p(values) == pytest.approx(stats.ttest_1samp(values, 0).pvalue, abs=0.01)


@pytest.mark.parametrize(("n", "floor"), [(1, 1.0), (2, 0.5), (3, 0.25), (5, 0.0625), (6, 0.03125)])
def test_smallest_p_is_what_equal_signs_give(n: int, floor: float) -> None:
    assert smallest_sign_flip_p(n) == floor
    assert sign_flip_p(np.arange(1.0, n + 1)) == floor


def test_holm_by_hand() -> None:
    # sorted .01 .02 .03 .04 -> 4 x .01, 3 x .02, max(.06, 2 x .03), max(.06, .04)
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


# ---- the two-level bootstrap -------------------------------------------------------------------------------------


def _simulate(
    rng: np.random.Generator, seeds: int, items: int, seed_sd: float, item_sd: float, residual_sd: float
) -> np.ndarray:
    return (
        rng.normal(0, seed_sd, (seeds, 1))
        + rng.normal(0, item_sd, (1, items))
        + rng.normal(0, residual_sd, (seeds, items))
    )


def test_bootstrap_variance_of_pure_seed_effects_is_unbiased() -> None:
    effects = np.array([0.3, -0.1, 0.4, 0.0])
    difference_SI = np.repeat(effects[:, None], 30, axis=1)
    replicates = two_level_bootstrap([Items(difference_SI, np.ones(30))], resamples=40_000)
    # stretched by sqrt(S / (S - 1)), the variance of a resampled mean is sd^2 / S
    assert replicates.var() == pytest.approx(effects.var(ddof=1) / 4, rel=0.03)
    assert replicates.mean() == pytest.approx(effects.mean(), abs=0.005)


def test_bootstrap_variance_of_pure_item_effects() -> None:
    effects = np.random.default_rng(0).normal(0, 1, 50)
    replicates = two_level_bootstrap([Items(np.tile(effects, (3, 1)), np.ones(50))], resamples=40_000)
    assert replicates.var() == pytest.approx(effects.var() / 50, rel=0.03)


def test_bootstrap_weighs_items() -> None:
    effects = np.array([1.0, 0.0, 0.0])
    weights = np.array([1.0, 1.0, 998.0])
    replicates = two_level_bootstrap([Items(np.tile(effects, (2, 1)), weights)], resamples=4_000)
    # a document of 998 tokens is in most resamples, and then hardly anything is left of the first one
    assert np.median(replicates) == pytest.approx(0.0, abs=0.01)


def test_equal_differences_stay_equal_whatever_the_weights() -> None:
    weights = np.random.default_rng(9).integers(1, 1000, 30).astype(float)
    replicates = two_level_bootstrap([Items(np.full((3, 30), 0.25), weights)], resamples=500)
    # a weighted mean over the resampled items, so their weights divide too
    np.testing.assert_allclose(replicates, 0.25)


def test_percentiles_of_pure_item_effects_are_those_of_the_normal_law() -> None:
    effects = np.random.default_rng(10).normal(0.2, 1, 400)
    task = Items(np.tile(effects, (4, 1)), np.ones(400))
    d = paired_difference(np.zeros(4), np.full(4, effects.mean()), items=[task], resamples=20_000)
    half = stats.norm.ppf(0.975) * effects.std() / 20
    assert d.bootstrap_percentiles == pytest.approx((effects.mean() - half, effects.mean() + half), abs=0.01)


def test_mean_over_tasks_divides_by_the_tasks() -> None:
    rng = np.random.default_rng(5)
    tasks = [Items(rng.normal(mean, 1, (4, 40)), np.ones(40)) for mean in (1.0, 3.0)]
    replicates = two_level_bootstrap(tasks, resamples=4_000)
    expected = np.mean([task.difference_SI.mean() for task in tasks])
    assert replicates.mean() == pytest.approx(expected, abs=0.02)


def test_bootstrap_is_reproducible() -> None:
    task = Items(np.random.default_rng(6).normal(size=(3, 20)), np.ones(20))
    assert np.array_equal(two_level_bootstrap([task]), two_level_bootstrap([task]))


def test_the_wider_interval_is_shown_and_named() -> None:
    rng = np.random.default_rng(2)
    by_items = _simulate(rng, 3, 80, 0.0, 1.0, 0.05)
    d = paired_difference(np.zeros(3), by_items.mean(1), items=[Items(by_items, np.ones(80))])
    assert d.interval_kind == "over seeds and items"
    assert d.interval == d.interval_over_seeds_and_items
    assert d.interval_over_seeds is not None
    assert d.interval_over_seeds_and_items is not None
    assert np.ptp(d.interval_over_seeds_and_items) > np.ptp(d.interval_over_seeds)

    by_seeds = _simulate(rng, 3, 80, 1.0, 0.05, 0.05)
    d = paired_difference(np.zeros(3), by_seeds.mean(1), items=[Items(by_seeds, np.ones(80))])
    assert d.interval_kind == "over seeds"
    assert d.items == 80


# ---- operating characteristics -----------------------------------------------------------------------------------

STUDIES = 1500


def _rejections(
    seeds: int, items: int, spread: tuple[float, float, float], *, effect: float = 0.0
) -> tuple[float, float]:
    """Shares of simulated studies in which a difference is detected: as shown, and over seeds alone."""
    rng = np.random.default_rng([seeds, items, *(int(100 * sd) for sd in spread)])
    shown = alone = 0
    for _ in range(STUDIES):
        difference_SI = effect + _simulate(rng, seeds, items, *spread)
        means = difference_SI.mean(1)
        d = paired_difference(np.zeros(seeds), means, items=[Items(difference_SI, np.ones(items))], resamples=200)
        shown += d.detected
        assert d.interval_over_seeds is not None
        alone += not d.interval_over_seeds[0] <= 0 <= d.interval_over_seeds[1]
    return shown / STUDIES, alone / STUDIES


def _binomial_bound(p: float) -> float:
    """Above this a share of that many studies has a chance of 1 in 10 000 when the true rate is ``p``."""
    return float(stats.binom.ppf(1 - 1e-4, STUDIES, p)) / STUDIES


@pytest.mark.parametrize(
    ("seeds", "items", "spread"),
    [(3, 60, (1.0, 0.0, 1.0)), (3, 60, (0.1, 1.0, 1.0)), (3, 60, (1.0, 1.0, 1.0)), (8, 60, (0.3, 1.0, 1.0))],
)
def test_false_positives_stay_at_five_per_cent(seeds: int, items: int, spread: tuple[float, float, float]) -> None:
    shown, _ = _rejections(seeds, items, spread)
    assert shown <= _binomial_bound(0.05)


def test_the_interval_over_seeds_alone_is_exact_when_only_seeds_differ() -> None:
    _, alone = _rejections(3, 20, (1.0, 0.0, 0.0))
    error = 4 * math.sqrt(0.05 * 0.95 / STUDIES)
    assert alone == pytest.approx(0.05, abs=error)


def test_an_interval_over_seeds_alone_would_be_too_narrow_when_items_differ() -> None:
    """The reason why the wider of two intervals is shown."""
    shown, alone = _rejections(3, 60, (0.1, 1.0, 1.0))
    assert alone > 0.09
    assert shown < 0.05


def test_sign_flip_keeps_its_level_and_reaches_it() -> None:
    rng = np.random.default_rng(8)
    rejected = np.mean([sign_flip_p(rng.standard_t(3, size=8)) <= 0.05 for _ in range(STUDIES)])
    # 12 of the 256 patterns are the most that fit into 5 %
    assert rejected == pytest.approx(12 / 256, abs=4 * math.sqrt(0.05 * 0.95 / STUDIES))


@pytest.mark.parametrize(("seeds", "effect"), [(3, 2.0), (5, 1.2), (10, 1.0)])
def test_power_is_that_of_the_noncentral_t(seeds: int, effect: float) -> None:
    rng = np.random.default_rng(seeds)
    detected = np.mean(
        [paired_difference(np.zeros(seeds), rng.normal(effect, 1, seeds)).detected for _ in range(STUDIES)]
    )
    critical = stats.t.ppf(0.975, seeds - 1)
    shift = effect * math.sqrt(seeds)
    power = stats.nct.sf(critical, seeds - 1, shift) + stats.nct.cdf(-critical, seeds - 1, shift)
    assert detected == pytest.approx(power, abs=4 * math.sqrt(power * (1 - power) / STUDIES))


# ---- tokens to reach a loss ---------------------------------------------------------------------------------------


def test_tokens_to_reach_by_hand() -> None:
    tokens, loss = [0, 100, 200, 400], [8.0, 6.0, 5.0, 4.0]
    assert tokens_to_reach(tokens, loss, 5.5) == (150.0, (100.0, 200.0))
    assert tokens_to_reach(tokens, loss, 4.0) == (400.0, (200.0, 400.0))
    assert tokens_to_reach(tokens, loss, 3.9) == (None, None)
    assert tokens_to_reach(tokens, loss, 9.0) == (0.0, (0.0, 0.0))


def test_unequal_lengths_do_not_pair() -> None:
    with pytest.raises(ValueError, match="do not pair"):
        paired_difference([1.0], [1.0, 2.0])


# ---- several arms, several tasks ----------------------------------------------------------------------------------

FAMILIES = 250
ARMS = 12


def _bound(p: float, studies: int) -> float:
    """Above this a share of ``studies`` has a chance of 1 in 10 000 when the true rate is ``p``."""
    return float(stats.binom.ppf(1 - 1e-4, studies, p)) / studies


def test_holm_over_twelve_arms_keeps_the_family_wise_error() -> None:
    """No arm differs; all share the baseline's runs and the items, as in a study.

    The chance that any of the 12 is called different stays at 5 % (250 studies: sampling error 1.4 % at that rate);
    without the correction it would be a multiple of it.
    """
    rng = np.random.default_rng(12)
    seeds, items = 3, 40
    families = raw = 0
    for _ in range(FAMILIES):
        base_SI = _simulate(rng, seeds, items, 0.3, 1.0, 1.0)
        p = []
        for _ in range(ARMS):
            difference_SI = _simulate(rng, seeds, items, 0.3, 1.0, 1.0) - base_SI
            task = [Items(difference_SI, np.ones(items))]
            d = paired_difference(np.zeros(seeds), difference_SI.mean(1), items=task, resamples=100)
            assert d.p is not None
            p.append(d.p)
        families += min(holm(p)) <= 0.05
        raw += min(p) <= 0.05
    assert families / FAMILIES <= _bound(0.05, FAMILIES)
    assert raw / FAMILIES > families / FAMILIES


def test_holm_keeps_the_family_wise_error_of_independent_exact_tests() -> None:
    """Where each p is exact and uniform the rate is known: 1 - (1 - 0.05 / 12)^12 = 0.0489, to 4 standard errors."""
    p_FA = np.random.default_rng(5).random((4000, ARMS))
    rate = np.mean([min(holm(p.tolist())) <= 0.05 for p in p_FA])
    expected = 1 - (1 - 0.05 / ARMS) ** ARMS
    assert rate == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 4000))


@pytest.mark.parametrize(("effect", "least", "most"), [(0.0, 0.0, None), (0.9, 0.9, 1.0)])
def test_the_mean_over_tasks_keeps_its_level_and_finds_what_is_there(
    effect: float, least: float, most: float | None
) -> None:
    """Ten tasks of 20 to 110 items, five seeds whose effects the tasks share: 400 studies, sampling error at most 1.1 %
    at the nominal 5 %. A task counts as one, whatever its items."""
    rng = np.random.default_rng(10)
    studies, seeds = 400, 5
    detected = 0
    for _ in range(studies):
        shared_S = rng.normal(0, 0.2, (seeds, 1))
        tables = [effect + shared_S + _simulate(rng, seeds, 20 + 10 * k, 0.1, 1.0, 1.0) for k in range(10)]
        means = np.mean([table.mean(1) for table in tables], axis=0)
        tasks = [Items(table, np.ones(table.shape[1])) for table in tables]
        detected += paired_difference(np.zeros(seeds), means, items=tasks, resamples=100).detected
    share = detected / studies
    assert least <= share <= (_bound(0.05, studies) if most is None else most)


def test_a_task_counts_as_one_whatever_its_items() -> None:
    tasks = [Items(np.full((3, 10), 1.0), np.ones(10)), Items(np.full((3, 1000), 0.0), np.ones(1000))]
    np.testing.assert_allclose(two_level_bootstrap(tasks, resamples=50), 0.5)
