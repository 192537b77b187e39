"""Likelihoods of right answers beside the accuracy, the family of arms x tasks, and tasks that decide nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from scipy import stats
from synthetic import study

from decondense.compare import Comparison, compare, holm
from decondense.compare.gold import DECISION_ACCURACY
from decondense.records import Row
from decondense.report import notes_in_words, terminal_table
from decondense.report.score_tables import task_table

TASKS = {"piqa": 0.6, "winogrande": 0.5, "lambada_openai": 0.3}


def with_gold(row: Row) -> Row:
    """Bits per byte that depend on seed, arm and item; a margin but for LAMBADA."""
    if row["kind"] == "eval_item" and row["task"] in TASKS:
        item = int(row["item"], 16) % 997 / 997
        bits = 1 + item + 0.01 * row["seed"] - (0.2 + 0.01 * row["seed"] ** 2) * (row["arm"] == "dispersion")
        margin = None if row["task"] == "lambada_openai" else 3 * item - 1 - 0.02 * row["seed"]
        return {**row, "bits_per_byte": bits, "margin_bits": margin}
    return row


def rows_of(change: Any = with_gold, **keywords: Any) -> list[Row]:
    arms = ("cross-entropy", "dispersion")
    return study(tasks=dict.fromkeys(arms, TASKS), task_items=40, change=change, **keywords)


def without(task: str, arm: str, *, item: str | None = None) -> Any:
    def change(row: Row) -> Row:
        whole = with_gold(row)
        named = row["kind"] == "eval_item" and (row["task"], row["arm"]) == (task, arm)
        return row if named and item in (None, row["item"]) else whole

    return change


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return compare(rows_of())


def test_the_likelihoods_are_scores_of_the_task(comparison: Comparison) -> None:
    rows = [row for row in rows_of() if row["kind"] == "eval_item" and row["task"] == "piqa"]
    measure = comparison.measure("piqa.bits_per_byte")
    assert measure is not None
    assert (measure.unit, measure.higher_is_better, measure.items) == ("bits/byte", False, 40)
    (d,) = measure.differences
    for seed, base, arm in zip(d.seeds, d.baseline_values, d.arm_values, strict=True):
        for name, value in (("cross-entropy", base), ("dispersion", arm)):
            own = [row["bits_per_byte"] for row in rows if (row["arm"], row["seed"]) == (name, seed)]
            assert value == pytest.approx(np.mean(own))
    assert d.outcome == "better"
    assert comparison.measure("piqa.margin_bits") is not None
    assert comparison.measure("lambada_openai.margin_bits") is None  # there is no wrong answer
    assert [task.metric for task in comparison.tasks if task.task == "piqa"] == ["acc", "bits_per_byte", "margin_bits"]
    assert {mean.metric: len(mean.tasks) for mean in comparison.means} == {
        "acc": 3,
        "bits_per_byte": 3,
        "margin_bits": 2,
    }


def test_an_item_without_a_likelihood_in_one_run_is_left_out_of_all() -> None:
    item = next(row["item"] for row in rows_of() if row["kind"] == "eval_item" and row["task"] == "piqa")
    found = compare(rows_of(without("piqa", "dispersion", item=item)))
    measure, acc = found.measure("piqa.bits_per_byte"), found.measure("piqa.acc")
    assert measure is not None
    assert acc is not None
    assert (measure.items, acc.items) == (39, 40)


def test_runs_without_any_likelihoods_leave_the_task_as_it_was() -> None:
    found = compare(rows_of(without("piqa", "dispersion")))
    assert found.measure("piqa.bits_per_byte") is None
    assert found.measure("winogrande.bits_per_byte") is not None
    assert [task.metric for task in compare(rows_of(None)).tasks[1:]] == ["acc"] * 3


def test_the_family_of_a_metric_is_arms_times_tasks() -> None:
    effects = {"cross-entropy": 0.0, "dispersion": -0.1, "other-dispersion": -0.2}
    found = compare(study(effects, tasks=dict.fromkeys(effects, TASKS), task_items=40, change=with_gold))
    for metric, count in (("acc", 6), ("bits_per_byte", 6), ("margin_bits", 4)):
        family = [d for task in found.tasks if task.metric == metric for d in task.differences]
        tested = [d for d in family if d.p is not None]
        assert len(family) == count
        assert [d.p_holm for d in tested] == pytest.approx(holm([d.p for d in tested if d.p is not None]))
    # the held-out loss and the mean over tasks are families of their own, over arms
    for measure in (found.validation, found.means[0].measure):
        assert measure is not None
        ps = [d.p for d in measure.differences if d.p is not None]
        assert [d.p_holm for d in measure.differences] == pytest.approx(holm(ps))


@pytest.mark.slow
def test_ten_tasks_of_one_arm_keep_the_family_wise_error() -> None:
    """Without the correction a difference in any of ten tasks is called in about 40 % of studies."""
    rng = np.random.default_rng(3)
    wrong = raw = 0
    for _ in range(1000):
        p = stats.ttest_1samp(rng.normal(size=(10, 5)), 0, axis=1).pvalue
        wrong += min(holm(p.tolist())) <= 0.05
        raw += p.min() <= 0.05
    assert wrong <= stats.binom.ppf(0.999, 1000, 0.05)
    assert raw > 300


@pytest.mark.parametrize(("parameters", "flagged"), [(1_738_752, {"winogrande"}), (350_000_000, set())])
def test_accuracies_that_decide_nothing_at_this_size_are_flagged(parameters: int, flagged: set[str]) -> None:
    def sized(row: Row) -> Row:
        return {**with_gold(row), "parameters": parameters} if row["kind"] == "run" else with_gold(row)

    found = compare(rows_of(sized))
    assert {task.task for task in found.tasks if task.hardly_decides} == flagged
    known: Mapping[tuple[str, str], float | None] = {(t.task, t.metric): t.decision_accuracy for t in found.tasks}
    assert known["piqa", "acc"] == (DECISION_ACCURACY["piqa"] if flagged else None)
    assert known["winogrande", "bits_per_byte"] is None
    table = task_table(found)
    assert table is not None
    assert ("winogrande (acc †)" in [row[0] for row in table.rows]) == bool(flagged)
    assert bool(table.notes) == bool(flagged)
    assert any("accuracy of winogrande 0.5" in text for text in notes_in_words(found)) == bool(flagged)


def test_tables_show_both(comparison: Comparison) -> None:
    table = task_table(comparison)
    assert table is not None
    names = [row[0] for row in table.rows]
    assert names[:3] == ["piqa (acc)", "piqa (bits per byte)", "piqa (margin in bits)"]
    shown = [" ".join(row[0].split()) for row in terminal_table(comparison).text()]
    assert "piqa bits per byte" in shown
    assert "piqa margin in bits" not in shown
