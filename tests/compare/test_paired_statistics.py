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
    seeds_needed,
    sign_flip_p,
    smallest_sign_flip_p,
    tokens_to_reach,
)
from decondense.compare.statistics import Spread, spread_over_items


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
    assert d.outcome == "not tested"
    assert "one seed" in d.interval_reason


@pytest.mark.parametrize(
    ("base", "arm"),
    [
        ([1.0, 1.0], [0.8, 0.8]),  # equal differences of equal values
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]),  # no difference at all
        ([1.0, 1.1, 0.7], [0.9, 1.0, 0.6]),  # -0.1 in every seed, but for rounding
        ([5.0] * 8, [4.0] * 8),  # as many seeds as one likes
    ],
)
def test_differences_that_do_not_vary_are_not_tested(base: list[float], arm: list[float]) -> None:
    d = paired_difference(base, arm, higher_is_better=False, margin=0.5)
    assert (d.interval, d.p, d.p_holm, d.p_sign_flip, d.detectable, d.seeds_needed) == (None,) * 6
    assert d.outcome == "not tested"
    assert not d.detected
    assert not d.within_margin
    # items cannot stand in for the seeds
    spread = Items(np.outer(np.ones(len(base)), np.arange(4.0)), np.ones(4))
    assert paired_difference(base, arm, items=[spread]).outcome == "not tested"


@pytest.mark.parametrize(
    ("shift", "direction", "outcome"),
    [
        (-0.10, False, "better"),
        (-0.10, True, "worse"),
        (-0.10, None, "lower"),
        (0.10, None, "higher"),
        (0.0, False, "equivalent"),
        (0.0, None, "equivalent"),
        (-0.004, False, "better"),  # detected, however small
    ],
)
def test_outcomes(shift: float, direction: bool | None, outcome: str) -> None:
    noise = np.array([-0.001, 0.0, 0.001])
    d = paired_difference(np.zeros(3), shift + noise, higher_is_better=direction, margin=0.02)
    assert d.outcome == outcome
    assert d.within_margin == (abs(shift) < 0.017)
    wide = paired_difference(np.zeros(3), 100 * noise, higher_is_better=direction, margin=0.02)
    assert wide.outcome == "undecided"


def test_without_a_margin_nothing_is_equivalent() -> None:
    assert paired_difference(np.zeros(3), [-0.001, 0.0, 0.001]).outcome == "undecided"


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


# ---- the interval over seeds and items ------------------------------------------------------------------------------


def _simulate(
    rng: np.random.Generator, seeds: int, items: int, seed_sd: float, item_sd: float, residual_sd: float
) -> np.ndarray:
    return (
        rng.normal(0, seed_sd, (seeds, 1))
        + rng.normal(0, item_sd, (1, items))
        + rng.normal(0, residual_sd, (seeds, items))
    )


def _variance(tasks: list[Items]) -> float:
    """The variance over seeds and items of the mean over tasks."""
    means = np.mean([task.difference_SI @ task.share_I for task in tasks], axis=0)
    spread = spread_over_items(Spread(float(means.var(ddof=1)) / len(means), len(means) - 1), tasks)
    assert spread is not None
    return spread.variance


def test_items_of_equal_weight_add_the_variance_of_their_mean() -> None:
    rng = np.random.default_rng(3)
    effects = rng.normal(0.5, 1, 30)
    seeds = rng.normal(0, 0.3, 4)
    task = Items(seeds[:, None] + effects, np.ones(30))  # no residual
    expected = seeds.var(ddof=1) / 4 + effects.var(ddof=1) / 30
    assert _variance([task]) == pytest.approx(expected)


def test_weights_of_items_leave_their_variance_unbiased() -> None:
    """Items of variance 1, one with half of the weight: the mean of the estimates is sum p^2."""
    rng = np.random.default_rng(4)
    weight = np.r_[20.0, rng.uniform(0.2, 1.8, 20)]
    share = weight / weight.sum()
    found = []
    for _ in range(1500):
        table = 0.01 * rng.normal(size=(3, 1)) + np.tile(rng.normal(size=21), (3, 1))
        # seeds alone have a variance of about nothing here
        found.append(_variance([Items(table, weight)]))
    assert np.mean(found) == pytest.approx(np.sum(share**2), rel=0.1)
    assert Items(table, weight).effective == pytest.approx(1 / np.sum(share**2))


def test_a_residual_alone_counts_once() -> None:
    """Seeds and items that do not interact add nothing: the interval is about Student's, not three times as careful.

    With a residual of variance 1 alone, v_seeds, v_items and v_residual estimate the same 1 / (S I), with about 7, 39
    and 273 degrees of freedom. What items add, max(0, v_items - v_residual), has a mean of sqrt(2 / 39 + 2 / 273) /
    sqrt(2 pi) = 0.10 of that, over v_seeds 0.10 x 7 / 5 = 0.14; the wider of the two intervals is shown, and its
    Student quantile is never the larger one. So by Jensen's inequality the mean ratio is at most sqrt(1.14) = 1.066; a
    residual counted three times would give 1.7. The mean of 300 ratios has a standard error of 0.006.
    """
    rng = np.random.default_rng(5)
    ratio = []
    for _ in range(300):
        table = _simulate(rng, 8, 40, 0.0, 0.0, 1.0)
        d = paired_difference(np.zeros(8), table.mean(1), items=[Items(table, np.ones(40))])
        assert d.interval is not None
        assert d.interval_over_seeds is not None
        ratio.append(np.ptp(d.interval) / np.ptp(d.interval_over_seeds))
    assert 1 <= np.mean(ratio) <= 1.066 + 4 * 0.006


def test_the_wider_interval_is_shown_and_named() -> None:
    rng = np.random.default_rng(2)
    by_items = _simulate(rng, 3, 80, 0.0, 1.0, 0.05)
    d = paired_difference(np.zeros(3), by_items.mean(1), items=[Items(by_items, np.ones(80))])
    assert d.interval_kind == "over seeds and items"
    assert d.interval == d.interval_over_seeds_and_items
    by_seeds = _simulate(rng, 3, 80, 1.0, 0.05, 0.05)
    d = paired_difference(np.zeros(3), by_seeds.mean(1), items=[Items(by_seeds, np.ones(80))])
    assert d.interval_kind == "over seeds"
    assert d.items == 80


def test_one_item_with_all_of_the_weight_gives_students_interval() -> None:
    table = np.random.default_rng(6).normal(size=(4, 3))
    d = paired_difference(np.zeros(4), table[:, 0], items=[Items(table, np.array([1.0, 0.0, 0.0]))])
    assert d.interval == d.interval_over_seeds
    assert d.interval_kind == "over seeds"


def test_a_mean_over_tasks_has_the_mean_of_their_variances() -> None:
    rng = np.random.default_rng(7)
    effects = [rng.normal(1, 1, 20), rng.normal(1, 1, 300)]
    seeds = rng.normal(0, 0.2, (5, 1))
    tasks = [Items(seeds + values, np.ones(len(values))) for values in effects]
    expected = seeds.var(ddof=1) / 5 + sum(values.var(ddof=1) / len(values) for values in effects) / 4
    assert _variance(tasks) == pytest.approx(expected)


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
        d = paired_difference(np.zeros(seeds), means, items=[Items(difference_SI, np.ones(items))])
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
    """The reason why items are part of the interval."""
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
            d = paired_difference(np.zeros(seeds), difference_SI.mean(1), items=task)
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
        detected += paired_difference(np.zeros(seeds), means, items=tasks).detected
    share = detected / studies
    assert least <= share <= (_bound(0.05, studies) if most is None else most)


# ---- power ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("effect", "seeds"), [(0.5, 34), (1.0, 10), (2.0, 5), (4.0, 3)])
def test_seeds_needed_are_those_of_the_paired_t_test(effect: float, seeds: int) -> None:
    # Cohen's tables for 80 %, effect in standard deviations
    assert seeds_needed(1.0, effect) == seeds


def test_more_seeds_do_not_help_against_too_few_items() -> None:
    assert seeds_needed(0.01, 0.02, fixed=0.01**2) is None
    assert seeds_needed(0.01, 0.02, fixed=0.001**2) is not None
    d = paired_difference(np.zeros(3), [-0.01, 0.0, 0.01], margin=0.02)
    assert d.seeds_needed == seeds_needed(0.01, 0.02) == 5


def test_the_detectable_difference_is_detected_in_four_of_five_studies() -> None:
    rng = np.random.default_rng(11)
    d = paired_difference(np.zeros(4), stats.norm.ppf([0.2, 0.4, 0.6, 0.8]))
    assert d.detectable is not None
    assert d.sd is not None
    values = rng.normal(d.detectable, d.sd, (20_000, 4))
    power = np.mean(stats.ttest_1samp(values, 0, axis=1).pvalue <= 0.05)
    assert power == pytest.approx(0.8, abs=0.012)


# ---- the audit's conditions ------------------------------------------------------------------------------------------

DOCUMENTS = np.array([160, 320, 511, 640, 900, 1350, 2100, 4639.0])  # effective number 4.6, like the shipped studies'
HALF = np.r_[20.0, np.ones(20)]
EQUAL = np.ones(40)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5, 8, 12])
@pytest.mark.parametrize(
    ("weight", "spread", "law"),
    [
        (EQUAL, (1.0, 0.0, 0.0), "normal"),
        (EQUAL, (1.0, 6.0, 0.0), "normal"),  # items weigh as much as seeds
        (EQUAL, (0.1, 0.5, 1.0), "normal"),
        (EQUAL, (0.0, 0.0, 1.0), "normal"),  # nothing but the interaction
        (DOCUMENTS, (0.05, 1.0, 0.1), "normal"),
        (DOCUMENTS, (0.3, 1.0, 0.3), "normal"),
        (DOCUMENTS, (0.05, 1.0, 0.1), "heavy"),
        (DOCUMENTS, (0.0, 0.0, 1.0), "normal"),
        (HALF, (0.05, 1.0, 0.1), "normal"),
        (HALF, (0.5, 1.0, 0.5), "heavy"),
    ],
)
def test_coverage_in_the_conditions_of_the_audit(
    seeds: int, weight: np.ndarray, spread: tuple[float, float, float], law: str
) -> None:
    """Coverage of at least 93.5 %, and errors of at most 6 % with it, up to the error of the simulation."""
    studies = 1200
    rng = np.random.default_rng([seeds, len(weight), int(100 * sum(spread))])
    share = weight / weight.sum()
    rejected = 0
    for _ in range(studies):
        items = rng.standard_t(2.5, (1, len(weight))) if law == "heavy" else rng.normal(size=(1, len(weight)))
        table = (
            spread[0] * rng.normal(size=(seeds, 1))
            + spread[1] * items
            + spread[2] * rng.normal(size=(seeds, len(weight)))
        )
        d = paired_difference(np.zeros(seeds), table @ share, items=[Items(table, weight)])
        rejected += d.detected
    assert rejected <= stats.binom.ppf(0.999, studies, 0.06)
