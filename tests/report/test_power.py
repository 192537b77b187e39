"""The power of a plan from a pilot's rows, and trials that kept the warm-up as a share."""

from __future__ import annotations

import dataclasses
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy import optimize, stats
from synthetic import study, trial

from decondense.cli.run import _show_power
from decondense.compare import Comparison, compare, paired_difference
from decondense.compare.statistics import detectable
from decondense.config import ConfigError, StudyConfig
from decondense.records import write_rows
from decondense.report.power import power_table
from decondense.studies import load_study
from decondense.studies.catalogue import committed_rows
from decondense.studies.cost import Line, Plan, Size, totals

DEMO = load_study("demo")


@pytest.fixture(scope="module")
def pilot() -> Comparison:
    # without items the spread over seeds alone decides
    return compare([row for row in study(seeds=(0, 1, 2)) if row["kind"] != "eval_item"])


def detected(n: int, effect: float) -> float:
    """Power of a two-sided paired t test at 5 %, from the noncentral t."""
    critical, shift = stats.t.ppf(0.975, n - 1), effect * math.sqrt(n)
    return float(stats.nct.sf(critical, n - 1, shift) + stats.nct.cdf(-critical, n - 1, shift))


@pytest.mark.parametrize("n", [3, 6, 20])
def test_the_table_is_that_of_the_noncentral_t(pilot: Comparison, n: int) -> None:
    planned = StudyConfig.parse({**DEMO.model_dump(), "seeds": list(range(n)), "margin": 0.05}, where="test")
    table = power_table(pilot, planned)
    assert table is not None
    ((arm, (_, mean), (_, sd), (_, smallest), (text, needed)),) = table.rows
    assert pilot.validation is not None
    (d,) = pilot.validation.differences
    assert (arm, mean, sd) == ("dispersion", d.mean, d.sd)
    assert smallest == pytest.approx(
        sd * optimize.brentq(lambda e: detected(n, e) - 0.8, 0.1, 8 / math.sqrt(n)), rel=1e-3
    )
    assert detected(needed, 0.05 / sd) >= 0.8 > detected(needed - 1, 0.05 / sd)
    upper = sd * math.sqrt(2 / stats.chi2.ppf(0.2, 2))  # 2.12 SD of three seeds
    unlucky = int(text.split("(")[1].rstrip(")"))
    assert detected(unlucky, 0.05 / upper) >= 0.8 > detected(unlucky - 1, 0.05 / upper)


def test_too_few_documents_have_no_number_of_seeds(pilot: Comparison) -> None:
    held_out = pilot.validation
    assert held_out is not None
    (d,) = held_out.differences
    assert d.item_variance == 0
    assert d.sd is not None
    doubtful = dataclasses.replace(held_out, differences=(dataclasses.replace(d, item_variance=0.01),))
    table = power_table(dataclasses.replace(pilot, tasks=(doubtful,)), DEMO)
    assert table is not None
    assert table.rows[0][4] == "none: too few documents"
    assert table.rows[0][3][1] == pytest.approx(math.hypot(detectable(d.sd, 3), 0.1 * detectable(math.sqrt(3), 3)))


def test_a_pilot_of_one_seed_has_no_power() -> None:
    assert power_table(compare(study(seeds=(0,))), DEMO) is None


def test_where_the_rows_come_from(tmp_path: Path) -> None:
    rows, empty = tmp_path / "pilot.jsonl", tmp_path / "none"
    write_rows(rows, study())
    (tmp_path / "out").mkdir()
    write_rows(tmp_path / "out" / "rows.jsonl", study())

    def said(chosen: StudyConfig, folder: Path, given: Path | None = None) -> str:
        console = Console(file=io.StringIO(), width=100)
        _show_power(chosen, folder, given, console)
        return console.file.getvalue()  # type: ignore[attr-defined]

    own = DEMO.model_copy(update={"name": "mine"})
    assert "--pilot ROWS" in said(own, empty)
    assert f"From the rows of\n    {rows}\n" in said(own, empty, rows)
    assert ["seeds", "until", "decided"][0] in said(own.model_copy(update={"until": "decided"}), empty, rows)
    assert f"From the rows of\n    {tmp_path / 'out' / 'rows.jsonl'}\n" in said(own, tmp_path / "out")
    committed = committed_rows(DEMO)
    assert committed is None or "demo.jsonl" in said(DEMO, empty)
    with pytest.raises(ConfigError, match=r"no rows\.jsonl"):
        said(own, empty, tmp_path / "missing")


def test_the_cost_of_a_study_until_decided_is_a_range() -> None:
    planned = DEMO.model_copy(update={"until": "decided", "seeds": (0, 1), "most_seeds": 10})
    lines = [Line("cell", arm, "", 2, 100, Size(10, 10, 10, 2, 8, 8), 2e6, 1e12, 60.0) for arm in ("a", "b")]
    plan = Plan(planned, [], lines, 2, 0.0, 0.0, "timed")
    assert plan.with_seeds(10).tokens == 5 * plan.tokens
    assert plan.with_seeds(10).seconds == 5 * plan.seconds
    text = next(line for line in totals(plan) if line.startswith("Until decided"))
    assert "3 to 10 seeds, that is 6 to 20 runs, 6M to 20M tokens and 2 min to 5 min" in text


@pytest.mark.parametrize(
    ("sweep", "expected"),
    [
        ({}, {"trial": 3, "run": 30}),  # rows of earlier releases say nothing of a unit
        ({"warmup_unit": "fraction"}, {"trial": 3, "run": 30}),
        ({"warmup_unit": "steps", "steps": 60}, None),
        ({"steps": None}, None),  # as long as the runs
    ],
)
def test_trials_that_kept_the_warm_up_as_a_share(sweep: dict[str, Any], expected: dict[str, int] | None) -> None:
    whole = {"learning_rates": [1e-3, 3e-3], "seed": 1000, "steps": 30, **sweep}
    rows = [
        {**row, "config": {**row["config"], "sweep": whole, "train": {"steps": 300, "warmup": 0.1}}}
        if row["kind"] == "run"
        else row
        for row in study(seeds=(0, 1))
    ]
    for arm in ("cross-entropy", "dispersion"):
        rows += trial(arm, {1e-3: 5.0, 3e-3: 5.1})
    notes = {note.kind: note.facts for note in compare(rows).notes}
    assert notes.get("scaled-down trials") == expected


def test_counts_of_signs_by_bits_are_those_of_every_pattern() -> None:
    values = np.array([0.3, -0.1, 0.2, 0.4])
    assert paired_difference(np.zeros(4), values).p_sign_flip == pytest.approx(4 / 16)
