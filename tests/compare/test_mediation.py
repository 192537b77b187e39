"""The share of a gain that goes with the cosine: known shares, coverage, and when there is none."""

from __future__ import annotations

import numpy as np
import pytest
from synthetic import config

from decondense.compare import compare, share_explained
from decondense.compare.sequential import confidence_sequence, multiplier
from decondense.records import Row, make_row
from decondense.report.condensation_tables import mediation_table


def shares(n: int, slope: float, rest: float, noise: float, *, studies: int = 400, **known: int) -> list:
    """Studies whose treatment moves the cosine by -0.3 and the loss by slope x cosine + rest."""
    draws = np.random.default_rng(n)
    found = []
    for _ in range(studies):
        x = draws.normal(-0.3, 0.05, n)
        found.append(share_explained(x, rest + slope * x + draws.normal(0, noise, n), **known))
    return found


@pytest.mark.parametrize("n", [5, 12])
@pytest.mark.parametrize(("slope", "rest"), [(0.4, -0.04), (0.0, -0.15), (0.5, 0.0), (-0.2, -0.25)])
def test_the_interval_covers_a_known_share(n: int, slope: float, rest: float) -> None:
    true = slope * -0.3 / (slope * -0.3 + rest)
    found = shares(n, slope, rest, 0.02)
    defined = [m for m in found if m.undefined is None]
    assert len(defined) > 360
    covered = np.mean([m.interval[0] <= true <= m.interval[1] for m in defined])
    assert 0.92 <= covered <= 0.985
    assert np.median([m.share for m in defined]) == pytest.approx(true, abs=0.05)
    assert all(m.interval[0] <= m.share <= m.interval[1] for m in defined)


def test_no_gain_has_no_share() -> None:
    found = shares(8, 0.0, 0.0, 0.02)
    assert np.mean([m.undefined == "no gain" for m in found]) > 0.92
    assert all((m.share is None) == (m.interval is None) == (m.undefined is not None) for m in found)


def test_where_seeds_were_added_the_interval_is_wider() -> None:
    x = [-0.3, -0.35, -0.28, -0.31, -0.4, -0.33]
    y = [-0.1, -0.13, -0.09, -0.12, -0.15, -0.1]
    fixed, added, many = share_explained(x, y), share_explained(x, y, arms=1), share_explained(x, y, arms=8)
    assert fixed.share == added.share == many.share
    widths = [m.interval[1] - m.interval[0] for m in (fixed, added, many)]
    assert widths == sorted(widths)
    assert widths[1] > 1.2 * widths[0]
    low, high = confidence_sequence(y)
    assert (high - low) / 2 == pytest.approx(multiplier(6) * np.std(y, ddof=1) / 6**0.5)


@pytest.mark.parametrize(
    ("x", "y", "why"),
    [
        ([-0.3, -0.2, -0.3, -0.1], [-0.1, -0.2, -0.1, -0.3], "few seeds"),
        ([-0.3] * 6, [-0.1, -0.2, -0.1, -0.3, -0.2, -0.1], "equal cosines"),
        ([-0.1, -0.2, -0.3, -0.4, -0.5], [-0.2, -0.4, -0.6, -0.8, -1.0], "on a line"),
    ],
)
def test_why_there_is_no_share(x: list[float], y: list[float], why: str) -> None:
    found = share_explained(x, y)
    assert (found.undefined, found.share, found.interval) == (why, None, None)
    assert found.gain == pytest.approx(np.mean(y))


def test_pairs_only() -> None:
    with pytest.raises(ValueError, match="2 cosines and 3 losses do not pair"):
        share_explained([1.0, 2.0], [1.0, 2.0, 3.0])


def rows(seeds: int, slope: float) -> list[Row]:
    """Two arms: at half of training the cosine explains the loss by ``slope``; at the end it says nothing."""
    draws = np.random.default_rng(5)
    made: list[Row] = []
    for seed in range(seeds):
        base = draws.normal(4, 0.2)
        moved = draws.normal(-0.3, 0.08)
        for arm, cosine, loss in (("cross-entropy", 0.8, base), ("dispersion", 0.8 + moved, base + slope * moved)):
            loss += draws.normal(0, 0.005)
            common = {"study": "synthetic", "study_fingerprint": "f" * 16, "arm": arm, "seed": seed}
            hashes = {"init_hash": f"i{seed}", "order_hash": f"o{seed}", "corpus_hash": "c"}
            for step, value in ((0, 0.5), (25, 0.7), (75, cosine * 2 - 0.7), (100, draws.normal(0.3, 0.05))):
                made.append(
                    make_row(
                        "profile",
                        **common,
                        step=step,
                        tokens=step * 10,
                        layers=["embedding", "block 1", "block 2"],
                        mean_cosine=[0.1, value - 0.05, value + 0.05],
                        spearman=None,
                        kendall=None,
                        passages=4,
                        passage_tokens=8,
                    )
                )
            score = {"task": "validation", "metric": "loss", "higher_is_better": False, "items": 1}
            made.append(make_row("eval", **common, step=100, tokens=1000, value=loss, **score))
            study = config(["cross-entropy", "dispersion"], range(seeds), steps=100)
            made.append(make_row("run", **common, status="finished", config=study, steps=100, tokens=1000, **hashes))
    return made


def test_of_a_study_by_point_of_training() -> None:
    comparison = compare(rows(8, 0.5))
    by_point = {m.at: m for m in comparison.mediation}
    assert list(by_point) == [0.1, 0.5, 1.0]
    # at 10 % the cosine is interpolated between two checkpoints at which the arms agree
    assert by_point[0.1].undefined == "equal cosines"
    middle = by_point[0.5]
    assert middle.cosine == pytest.approx(-0.3, abs=0.1)
    assert middle.share == pytest.approx(1, abs=0.15)
    assert middle.interval[0] > 0.5
    end = by_point[1.0]
    assert end.interval is None or end.interval[0] < 0.5
    assert comparison.to_dict()["mediation"][1]["share"] == middle.share
    table = mediation_table(comparison)
    assert [row[1] for row in table.rows] == [("10 %", 0.1), ("50 %", 0.5), ("100 %", 1.0)]
    assert "every seed" in table.rows[0][-1]


def test_with_few_seeds_there_is_no_table() -> None:
    comparison = compare(rows(4, 0.5))
    assert comparison.mediation == ()
    assert mediation_table(comparison) is None
