"""The verdicts of docs/results.md follow their rules, and the committed rows are those of the shipped studies."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from scipy import stats

from decondense.config import StudyConfig
from decondense.records import read_rows, terminal_row
from decondense.studies import load_study

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import result_tables as tables  # noqa: E402

COMMITTED = sorted((ROOT / "benchmarks" / "results" / "studies").glob("*.jsonl.gz"))


def test_a_verdict_needs_an_interval_that_excludes_zero() -> None:
    below = tables.estimate([-1.0, -1.1, -0.9])
    assert below.interval is not None
    half = stats.t.ppf(0.975, 2) * 0.1 / 3**0.5
    assert below.interval == pytest.approx((-1 - half, -1 + half))
    assert tables.judge(below, "below") == "agrees"
    assert tables.judge(below, "above") == "disagrees"
    assert tables.judge(tables.estimate([-1.0, 1.0, -0.9]), "below") == "inconclusive"
    assert tables.judge(tables.estimate([-1.0]), "below") == "inconclusive", "one seed is no evidence"


def test_parts_make_one_verdict() -> None:
    assert tables.joint(["agrees", "agrees"]) == "agrees"
    assert tables.joint(["agrees", "inconclusive"]) == "inconclusive"
    assert tables.joint(["agrees", "disagrees", "inconclusive"]) == "disagrees"
    assert tables.joint([]) == "not run"


def test_a_measure_that_does_not_vary_with_size_decides_nothing() -> None:
    f = tables.found("fig3")
    if f is None:
        pytest.skip("no rows of fig3")
    assert tables.size_correlation(f, f.study.arms, lambda cell: 1.0) == (None, len(f.study.seeds))
    d, flat = tables.size_correlation(f, f.study.arms, lambda cell: -cell.run["parameters"])
    assert d is not None
    assert (d.mean, flat) == (-1.0, 0)


def test_numbers_are_shown_with_interval_and_n() -> None:
    assert tables.shown(tables.estimate([-0.5, -0.5])) == "−0.500 [−0.500, −0.500], n = 2"


def test_every_claim_names_a_shipped_study() -> None:
    for claim in tables.CLAIMS:
        load_study(claim.study, "tiny")


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.name)
def test_committed_rows_are_whole_and_of_the_shipped_study(path: Path) -> None:
    name, scale = path.name.removesuffix(".jsonl.gz").rsplit("-", 1)
    file = ROOT / "benchmarks" / "studies" / f"{name}.yaml"
    study = load_study(file if file.exists() else name, None if file.exists() else scale)
    rows = read_rows(path)
    assert len({row["study_fingerprint"] for row in rows}) == 1
    # the fingerprint is a hash over every key, those of later releases too: the configurations themselves must be equal
    for config in {id(row["config"]): row["config"] for row in rows if row["kind"] == "run"}.values():
        assert StudyConfig.parse(config, where=path.name) == study
    for arm in study.arms:
        for seed in study.seeds:
            mine = [row for row in rows if row["arm"] == arm.name and row["seed"] == seed]
            assert terminal_row(mine) is not None, f"{arm.name} seed {seed} has not ended"
    for row in rows:
        assert "/" not in str(row.get("provenance", {}).get("command") or ""), "folders of a machine"
