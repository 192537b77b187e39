"""The verdicts of docs/results.md follow their rules, and the committed rows are those of the shipped studies."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from decondense.compare import paired_difference
from decondense.config import StudyConfig
from decondense.records import read_rows, terminal_row
from decondense.studies import load_study

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import beyond  # noqa: E402
import claims  # noqa: E402
import front  # noqa: E402
import horizon  # noqa: E402
import mid_training  # noqa: E402
import sections  # noqa: E402
import study_rows  # noqa: E402
from claims import CLAIMS, Claim, Contrast, by_size, joint, judge, verdicts  # noqa: E402
from study_rows import estimate  # noqa: E402

COMMITTED = sorted((ROOT / "benchmarks" / "results" / "studies").glob("*.jsonl.gz"))


def test_a_verdict_needs_a_detected_difference() -> None:
    below = estimate([-1.0, -1.1, -0.9])
    assert judge(below, "below") == "agrees"
    assert judge(below, "above") == "disagrees"
    assert judge(below, "below", p=0.06) == "undecided", "what is lost to the correction decides nothing"
    assert judge(estimate([-1.0, 1.0, -0.9]), "below") == "undecided"
    assert judge(estimate([-1.0]), "below") == "not tested", "one seed is no evidence"
    assert judge(estimate([-1.0, -1.0, -1.0]), "below") == "not tested", "nothing says how much a seed differs"


def test_a_difference_within_the_margin_is_equivalence_only_where_there_is_a_margin() -> None:
    close = paired_difference([0.0, 0.0, 0.0], [-0.001, 0.0, 0.001], margin=0.02)
    assert judge(close, "below") == "equivalent"
    assert judge(estimate([-0.001, 0.0, 0.001]), "below") == "undecided"


def test_parts_make_one_verdict() -> None:
    assert joint(["agrees", "agrees"]) == "agrees"
    assert joint(["agrees", "undecided"]) == "undecided"
    assert joint(["agrees", "equivalent"]) == "equivalent", "better than some only"
    assert joint(["agrees", "equivalent", "undecided"]) == "undecided"
    assert joint(["not testable", "agrees"]) == "undecided"
    assert joint(["equivalent", "equivalent"]) == "equivalent"
    assert joint(["agrees", "disagrees", "undecided"]) == "disagrees"
    assert joint(["agrees", "agrees", "undecided"], majority=True) == "agrees"
    assert joint(["agrees", "undecided", "undecided"], majority=True) == "undecided"
    assert joint([]) == "not run"


def test_claims_of_one_study_are_corrected_together() -> None:
    f = study_rows.committed("fig4")
    if f is None:
        pytest.skip("no rows of fig4")
    # p = .04 alone: agrees; beside a second contrast of the study: 2 x .04 decides nothing
    t = stats.t.isf(0.02, 2)
    values = -t / 3**0.5 + np.array([-1.0, 0.0, 1.0])
    near = Claim("fig4", "near", "below", lambda f: [Contrast("a", estimate(values))])
    far = Claim("fig4", "far", "below", lambda f: [Contrast("b", estimate([-1.0, 1.0, 0.0]))])
    clear = Claim("fig4", "clear", "below", lambda f: [Contrast("c", estimate([-9.0, -9.1, -9.05]))])
    assert {name: verdict for name, (_, verdict) in verdicts(f, [near]).items()} == {"near": "agrees"}
    together = {name: verdict for name, (_, verdict) in verdicts(f, [near, far, clear]).items()}
    assert together == {"near": "undecided", "far": "undecided", "clear": "agrees"}


def test_a_slope_is_per_doubling_of_the_parameters() -> None:
    f = study_rows.committed("fig3")
    if f is None:
        pytest.skip("no rows of fig3")
    d = study_rows.slope(f, f.study.arms, lambda cell: 3 + 0.5 * math.log2(cell.run["parameters"]) + cell.seed)
    assert d is not None
    assert d.mean == pytest.approx(0.5)


def test_a_statistic_at_its_bound_shows_no_trend() -> None:
    f = study_rows.committed("fig3")
    if f is None:
        pytest.skip("no rows of fig3")
    value = {arm: number for number, arm in enumerate(f.study.arms)}
    for bound, expected in ((0.5, True), (2.5, False), (9.0, False)):  # of 4 arms 3, 1 and 0 are at the bound
        (contrast,) = by_size("x", lambda cell, b=bound: min(b, float(value[cell.arm])), largest=bound)(f)
        assert contrast.saturated == expected
        claim = Claim("fig3", "c", "above", lambda f, c=contrast: [c])
        assert (verdicts(f, [claim])["c"][1] == "not testable") == expected


def test_settings_are_read_from_the_configuration_and_not_from_names() -> None:
    f = study_rows.committed("table4")
    if f is None:
        pytest.skip("no rows of table4")
    renamed = dataclasses.replace(f.study, arms=f.study.arms[::-1], labels=dict.fromkeys(f.study.arms, "?"))
    again = dataclasses.replace(f, study=renamed)
    assert (again.weights(), again.taus()) == ([0.1, 0.3, 1.0, 3.0], [0.1, 0.3, 1.0])
    arm = again.with_setting(0.3, 0.1)
    assert arm is not None
    entry = f.study.arm_config(arm)
    assert entry is not None
    assert entry.dispersion is not None
    assert (entry.dispersion.weight, entry.dispersion.loss.tau) == (0.3, 0.1)
    assert f.with_setting(0.5, 1.0) is None


def test_every_claim_names_a_shipped_study() -> None:
    for claim in CLAIMS:
        load_study(claim.study, "tiny")
    assert len({(claim.study, claim.published) for claim in CLAIMS}) == len(CLAIMS)


def test_the_two_horizon_studies_differ_in_their_text_alone() -> None:
    first = load_study("horizon", "tiny")
    second = load_study(ROOT / "benchmarks" / "studies" / "horizon-english.yaml")
    other = {
        "name": second.name,
        "title": second.title,
        "corpus": first.corpus.model_copy(update={"source": "english.jsonl"}),
    }
    assert first.model_copy(update=other) == second


def test_the_tables_of_the_page_are_those_of_the_committed_rows() -> None:
    """Each section that the page shows is made by a table of that name, and by no other."""
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    made = {*sections.TABLES, *front.TABLES, *beyond.TABLES, *horizon.TABLES, *mid_training.TABLES}
    assert set(re.findall(r"<!-- rows:([\w-]+) -->", page)) == {name for name in made if name.startswith("results-")}
    verdict = {key: verdict for key, (_, verdict) in claims.judged("tiny").items()}
    for claim in CLAIMS:
        (line,) = [line for line in page.splitlines() if line.startswith(f"| `{claim.study}` | {claim.published} |")]
        assert line.endswith(f"| **{verdict[claim.study, claim.published]}** |")


def test_real_models_stand_beside_the_22_published_ones() -> None:
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    made = sections.TABLES["results-real"]()
    assert made in page
    published = [line.split("|")[1].strip() for line in made.splitlines() if line.startswith("|")][2:]
    assert len([name for name in published if "passages" not in name]) == 22
    assert len([name for name in published if "passages" in name]) >= 2


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.name)
def test_committed_rows_are_whole_and_of_the_shipped_study(path: Path) -> None:
    name, scale = path.name.removesuffix(".jsonl.gz").rsplit("-", 1)
    file = ROOT / "benchmarks" / "studies" / f"{name}.yaml"
    study = load_study(file if file.exists() else name, None if file.exists() else scale)
    rows = read_rows(path)
    assert len({row["study_fingerprint"] for row in rows}) == 1
    # the fingerprint of the rows is a hash over the keys of their release: the configurations must be equal, but for
    # the margin and the seeds that were added until the study was decided
    for config in {id(row["config"]): row["config"] for row in rows if row["kind"] == "run"}.values():
        ran = StudyConfig.parse(config, where=path.name)
        assert ran.fingerprint() == study.fingerprint()
    for arm in study.arms:
        for seed in ran.every_seed:
            mine = [row for row in rows if row["arm"] == arm.name and row["seed"] == seed]
            assert terminal_row(mine) is not None, f"{arm.name} seed {seed} has not ended"
    for row in rows:
        assert "/" not in str(row.get("provenance", {}).get("command") or ""), "folders of a machine"
