"""The contrasts of the studies beyond the paper are arms of the shipped files, and are corrected together."""

from __future__ import annotations

import gzip
import json
import re
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from decondense.compare import VALIDATION
from decondense.studies import load_study

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import beyond  # noqa: E402
import front  # noqa: E402
import sections  # noqa: E402
import study_rows  # noqa: E402
from beyond import QUESTIONS, Question, contrasts  # noqa: E402


@pytest.mark.parametrize("name", sorted(QUESTIONS))
def test_each_contrast_is_named_by_the_head_of_its_study(name: str) -> None:
    arms = {arm.name for arm in load_study(name).arms}
    text = resources.files("decondense.studies").joinpath("shipped", f"{name}.yaml").read_text(encoding="utf-8")
    head = " ".join(re.findall(r"^# ?(.*)$", text, re.MULTILINE)).replace("longer warm-up", "warm-up")
    second = head.split("Second", 1)[1]
    for question in QUESTIONS[name]:
        for pair in question.contrasts:
            assert set(pair) <= arms
            for arm in pair:
                assert re.search(rf"(?<![\w-]){re.escape(arm)}(?![\w-])", second), arm


@pytest.mark.parametrize("name", sorted(QUESTIONS))
def test_each_outcome_has_an_answer(name: str) -> None:
    for question in QUESTIONS[name]:
        assert set(question.answers) == {"better", "worse", "equivalent", "undecided"}


def test_contrasts_are_paired_and_corrected_over_all_of_them() -> None:
    f = study_rows.committed("table3")
    assert f is not None
    pairs = (("deep", "all"), ("deep", "shallow"), ("last", "deep"))
    found = contrasts(f, [Question("a", pairs[:2], {}), Question("b", pairs[2:], {})])
    assert list(found) == list(pairs)

    def losses(arm: str) -> np.ndarray:
        return np.array([cell.final_score(VALIDATION) for cell in sorted(f.cells(arm), key=lambda cell: cell.seed)])

    for pair, d in found.items():
        assert d.mean == pytest.approx((losses(pair[0]) - losses(pair[1])).mean())
        bounds = stats.ttest_rel(losses(pair[0]), losses(pair[1])).confidence_interval(0.95)
        assert d.interval_over_seeds == pytest.approx((bounds.low, bounds.high))
    # Holm: the k-th smallest of m times m - k + 1, never below the one before
    p, before = sorted((d.p, d.p_holm) for d in found.values() if d.p is not None), 0.0
    for rank, (plain, corrected) in enumerate(p):
        before = max(before, min(1.0, plain * (len(p) - rank)))
        assert corrected == pytest.approx(before)


def test_a_study_that_was_not_run_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def committed(name: str, scale: str = "tiny") -> study_rows.Committed | None:
        return None if name in QUESTIONS else study_rows.committed(name, scale)

    for module in (beyond, sections, front):
        monkeypatch.setattr(module, "committed", committed)
    tables = {name: made for name, made in beyond.TABLES.items() if made is not beyond.held}
    assert len(tables) == 7
    for name, made in tables.items():
        assert made().startswith("Not run yet: `decondense study "), name
    assert not any(question.asked in front.default() for questions in QUESTIONS.values() for question in questions)


def test_the_controller_table_is_that_of_the_logged_steps() -> None:
    folder = ROOT / "benchmarks" / "results" / "controls"
    for line, name in zip(beyond.held().split("\n")[2:4], ("1", "10"), strict=True):
        text = gzip.decompress((folder / f"target-smollm2-{name}.jsonl.gz").read_bytes()).decode()
        rows = [json.loads(row) for row in text.splitlines() if '"kind":"step"' in row]
        late = [sum(row["dispersion_cosines"].values()) / 15 for row in rows if row["step"] > 160]
        assert len(late) == 8
        cells = [cell.strip() for cell in line.split("|")]
        assert cells[1] == name
        assert cells[4].startswith(f"{sum(late) / 8:.3f} ")
