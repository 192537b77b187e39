"""The statistics of docs/geometry.md against closed forms, and on rows whose answer is known."""

from __future__ import annotations

import itertools
import re
import sys
from functools import cache
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from scipy import stats
from synthetic import study as synthetic_rows

from decondense.compare import Comparison, Study, compare, paired_difference
from decondense.records import Row

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import geometry  # noqa: E402
import geometry_field  # noqa: E402
from geometry import Doses, doses_of, share_of, simultaneous  # noqa: E402
from geometry_figure import _LINE, _spread  # noqa: E402
from study_rows import Committed, deep_half  # noqa: E402
from within_seed import mediation, partial_correlation, permutation_p, rank_correlations  # noqa: E402

COSINE = {"cross-entropy": 0.6, "a": 0.5, "b": 0.35, "c": 0.3, "d": 0.1}
"""Mean cosine of the last half at the end of the invented runs, by arm."""


@cache
def base_rows() -> list[Row]:
    return synthetic_rows(dict.fromkeys(COSINE, 0.0), documents=1, log_every=300)


def invented(loss: dict[tuple[str, int], float], *, untrained: str = "", compared: bool = False) -> Doses | None:
    """A study whose final checkpoints have these cosines and losses, through the rows."""
    rows = []
    for row in map(dict, base_rows()):
        if row["kind"] == "profile" and row["step"] == 300:
            row["mean_cosine"] = [0.0] + [COSINE[row["arm"]] + 0.01 * row["seed"]] * (len(row["mean_cosine"]) - 1)
        if row["kind"] == "eval" and row["step"] == 300:
            row["value"] = loss[row["arm"], row["seed"]]
        if row["kind"] == "run" and row["arm"] == untrained and row["status"] == "finished":
            row["steps"] = 0
        if row["kind"] not in ("eval_item", "step"):
            rows.append(row)
    study = Study.from_rows(rows)
    comparison = compare(study) if compared else cast(Comparison, None)
    return doses_of(Committed("invented", "tiny", study, comparison))


def losses(through: float, direct: float, seeds: tuple[int, ...] = (0, 1, 2)) -> dict[tuple[str, int], float]:
    """5 + through * cosine, and ``direct`` for every arm but the baseline; seeds differ."""
    return {
        (arm, seed): 5 + 0.2 * seed + through * cosine + direct * (arm != "cross-entropy")
        for arm, cosine in COSINE.items()
        for seed in seeds
    }


def test_a_partial_correlation_is_the_closed_form() -> None:
    rng = np.random.default_rng(0)
    x, y, z, w = rng.normal(size=(4, 9)) + rng.normal(size=9)
    r = np.corrcoef([x, y, z])
    expected = (r[0, 1] - r[0, 2] * r[1, 2]) / np.sqrt((1 - r[0, 2] ** 2) * (1 - r[1, 2] ** 2))
    assert partial_correlation(x, y, [z]) == pytest.approx(expected, abs=1e-12)
    precision = np.linalg.inv(np.corrcoef([x, y, z, w]))
    expected = -precision[0, 1] / np.sqrt(precision[0, 0] * precision[1, 1])
    assert partial_correlation(x, y, [z, w]) == pytest.approx(expected, abs=1e-12)
    assert partial_correlation(x, y, [z, w, 2 * z - w]) == pytest.approx(expected, abs=1e-9), "told twice"
    assert partial_correlation(x, y) == pytest.approx(r[0, 1], abs=1e-12)


def test_there_is_no_correlation_where_nothing_is_left() -> None:
    x, z = np.array([1.0, 2.0, 4.0, 3.0]), np.array([0.0, 1.0, 0.0, 0.0])
    assert partial_correlation(x[:3], x[:3] ** 2, [z[:3]]) is None, "one dimension is left"
    assert partial_correlation(x, np.full(4, 7.0)) is None
    assert partial_correlation(x, 3 * z + 1, [z]) is None


def test_a_correlation_of_zero_has_no_sign() -> None:
    """Its rounding error differs between processors, and the page counts signs."""
    line = np.arange(-3.0, 4)
    orders = [np.array(order) for order in itertools.permutations(line)]
    zero = [order for order in orders if line @ order == 0]
    assert len(zero) > 100
    assert rank_correlations(np.tile(line, (len(zero), 1)), np.array(zero)) == [0] * len(zero)


def test_the_correlation_within_a_seed_is_spearmans_and_blind_to_the_seed() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 3, 8))
    expected = [stats.spearmanr(x[s], y[s]).statistic for s in range(3)]
    assert rank_correlations(x, y) == pytest.approx(expected)
    offset = np.array([[0.0], [50.0], [-9.0]])
    assert rank_correlations(x + offset, y - offset) == pytest.approx(expected)


def test_the_p_over_arms_counts_orders_of_arms() -> None:
    line = np.arange(5.0)
    x, y = np.tile(line, (3, 1)), np.tile(line, (3, 1)) + np.array([[0.0], [4.0], [8.0]])
    assert permutation_p(x, y) == pytest.approx(2 / 120)
    assert permutation_p(x[:1], y[:1]) == pytest.approx(2 / 120), "more seeds of the same arms add no arms"
    assert permutation_p(x, np.ones_like(x)) is None
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(2, 2, 5))
    means = [
        abs(np.mean([stats.spearmanr(a[s], b[s, list(order)]).statistic for s in range(2)]))
        for order in itertools.permutations(range(5))
    ]
    assert permutation_p(a, b) == pytest.approx(np.mean(np.array(means) >= means[0] - 1e-9))


def test_arms_without_a_relation_are_detected_at_the_nominal_rate() -> None:
    rng = np.random.default_rng(3)
    found = [permutation_p(*rng.normal(size=(2, 3, 5))) for _ in range(200)]
    assert np.mean([p is not None and p <= 0.05 for p in found]) <= 0.1
    drawn = [permutation_p(*rng.normal(size=(2, 3, 9)), draws=200) for _ in range(100)]
    assert np.mean([p is not None and p <= 0.05 for p in drawn]) <= 0.12


@pytest.mark.parametrize(("through", "direct", "share"), [(1.0, 0.0, 1.0), (0.0, -0.3, 0.0), (0.5, -0.14375, 0.5)])
def test_the_share_of_rows_with_a_known_share(through: float, direct: float, share: float) -> None:
    """Pure mediation, none, half: the mean cosine of the arms is 0.2875 below the baseline's."""
    f = invented(losses(through, direct))
    assert f is not None
    found = share_of(f)
    assert found is not None
    assert len(found.seeds) == 3
    for each in found.seeds:
        assert each.total == pytest.approx(-0.2875 * through + direct, abs=1e-12)
        assert each.slope == pytest.approx(through, abs=1e-12)
        assert each.through / each.total == pytest.approx(share, abs=1e-12)
        assert each.direct == pytest.approx(direct, abs=1e-12)


def test_a_mediation_is_the_least_squares_fit() -> None:
    rng = np.random.default_rng(4)
    m, y = rng.normal(size=(2, 7))
    treated = np.arange(7) != 2
    (_, c, b), *_ = np.linalg.lstsq(np.column_stack([np.ones(7), treated, m]), y, rcond=None)
    found = mediation(m, y, 2)
    assert found is not None
    assert (found.slope, found.direct) == pytest.approx((b, c))
    assert mediation(np.where(treated, 0.5, 0.9), y, 2) is None, "the arms do not differ in the mediator"


def test_noise_leaves_the_share_unbiased() -> None:
    """Half of the effect goes with the cosine; 2000 seeds of noise average out."""
    rng = np.random.default_rng(5)
    m = np.array([0.6, 0.5, 0.35, 0.3, 0.1])
    y = 0.5 * m + np.array([0, -0.14375, -0.14375, -0.14375, -0.14375])
    found = [mediation(m, y + rng.normal(0, 0.05, 5), 0) for _ in range(2000)]
    whole = [each for each in found if each is not None]
    total, through = (float(np.mean([getattr(each, name) for each in whole])) for name in ("total", "through"))
    assert through / total == pytest.approx(0.5, abs=0.03)


def test_a_study_takes_part_with_four_trained_arms_of_one_model() -> None:
    f = invented(losses(1.0, 0.0))
    assert f is not None
    assert (len(f.arms), f.seeds, f.baseline) == (5, (0, 1, 2), "cross-entropy")
    assert f.cosine[2] == pytest.approx([value + 0.02 for value in COSINE.values()])
    assert f.whole(deep_half) == pytest.approx(f.cosine)
    assert rank_correlations(f.cosine, f.loss) == pytest.approx([1, 1, 1])
    without = invented(losses(1.0, 0.0), untrained="a")
    assert without is not None
    assert without.arms == ("cross-entropy", "b", "c", "d")


def test_what_is_given_is_one_value_a_run_and_left_out_where_it_does_not_vary() -> None:
    f = invented(losses(1.0, 0.0), compared=True)
    assert f is not None
    given = geometry.covariates(f)
    early = given["early loss"]
    assert given["learning rate"] is None
    assert early is not None
    expected = [
        [f.rows.study.cells[arm, seed].scores["validation", "loss"][75]["value"] for arm in f.arms] for seed in f.seeds
    ]
    assert early == pytest.approx(np.array(expected)), "the checkpoint at a quarter of 300 steps"
    at_tenth = f.values(geometry.cosine_at(0.1))
    assert at_tenth is not None
    assert at_tenth[0, 0] == pytest.approx(
        np.mean(f.rows.study.cells["cross-entropy", 0].profiles[30]["mean_cosine"][1:])
    )
    assert f.values(geometry.cosine_at(0.15)) is None, "no checkpoint lies there"


def test_at_an_equal_cosine_a_loss_on_the_line_does_not_differ() -> None:
    on_line = losses(1.0, 0.0)
    off = {key: value + (0.2 + 0.01 * key[1]) * (key[0] == "b") for key, value in on_line.items()}
    f, g = invented(on_line, compared=True), invented(off, compared=True)
    assert f is not None
    assert g is not None
    assert geometry.at_equal_cosine(f, "c", 0.01) is None, "no arm lies there"
    line, apart = geometry.at_equal_cosine(f, "c", 0.3), geometry.at_equal_cosine(g, "c", 0.051)
    assert line is not None
    assert apart is not None
    assert (line.n, line.mean) == (3, pytest.approx(0, abs=1e-12))
    assert (apart.arm, apart.n, apart.mean, apart.differs) == ("b", 1, pytest.approx(0.21), True)


@pytest.mark.parametrize("n", [1, 8])
def test_an_interval_that_was_picked_out_of_n_is_bonferronis(n: int) -> None:
    values = np.array([-0.2, 0.1, 0.3, 0.15])
    d = paired_difference([0.0] * 4, values.tolist())
    half = stats.t.isf(0.025 / n, 3) * values.std(ddof=1) / 2
    assert simultaneous(d, n) == pytest.approx((values.mean() - half, values.mean() + half))
    assert simultaneous(paired_difference([0.0], [1.0]), n) is None


def test_detected_corrects_over_those_that_were_tested() -> None:
    assert geometry.detected([0.02, None, 0.03]) == [True, False, True]
    assert geometry.detected([0.03, 0.03]) == [False, False]


def test_names_beside_a_panel_keep_apart_and_in_order() -> None:
    wanted = [0.5, 0.5, 0.51, 0.02, 0.0, 1.0]
    heights = _spread(wanted)
    assert [heights[i] for i in np.argsort(wanted, kind="stable")] == sorted(heights)
    assert np.all(np.diff(sorted(heights)) >= _LINE - 1e-12)
    assert min(heights) >= 0
    assert max(heights) <= 1
    assert _spread([0.1, 0.9]) == pytest.approx([0.1, 0.9]), "those with room stay where they are"


def test_every_table_is_on_its_page_and_ends_in_what_the_rows_show() -> None:
    page, questions = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("geometry.md", "faq.md"))
    shown = re.findall(r"<!-- rows:([\w-]+) -->\n(.*?)<!-- /rows -->", page, re.DOTALL)
    tables = {*geometry.TABLES, *geometry_field.TABLES}
    assert {name for name, _ in shown} == tables - {"geometry-answer"}
    assert "<!-- rows:geometry-answer -->" in questions
    for name, text in shown:
        last = text.strip().splitlines()[-1]
        assert name == "geometry-field" or last.startswith(geometry.SHOWS)
    for work in geometry_field.WORKS:
        assert work.link in page
        assert work.read
