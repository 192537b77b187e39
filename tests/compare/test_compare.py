"""What is compared, what is refused, and what comes out, on rows whose answer is known."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from scipy import stats
from synthetic import LAYERS, config, study

from decondense.compare import CompareError, Study, compare
from decondense.config import ConfigError, StudyConfig
from decondense.records import Row, check_row


def _is(row: Row, kind: str, arm: str | None = None, seed: int | None = None, **fields: Any) -> bool:
    return (
        row["kind"] == kind
        and (arm is None or row["arm"] == arm)
        and (seed is None or row["seed"] == seed)
        and all(row.get(name) == value for name, value in fields.items())
    )


def test_synthetic_rows_obey_the_schema() -> None:
    for row in study(tasks={"dispersion": {"arc_easy": 0.4}}, documents=3):
        assert check_row(row) == row


# ---- results ------------------------------------------------------------------------------------------------------


def test_validation_difference_is_that_of_the_final_rows_by_seed() -> None:
    rows = study()
    final = {
        (row["arm"], row["seed"]): row["value"] for row in rows if _is(row, "eval", step=300) and row["kind"] == "eval"
    }
    found = compare(rows)
    assert found.baseline == "cross-entropy"
    assert found.validation is not None
    (d,) = found.validation.differences
    assert d.seeds == (0, 1, 2)
    assert d.n == 3
    gaps = [final["dispersion", seed] - final["cross-entropy", seed] for seed in (0, 1, 2)]
    assert d.differences == pytest.approx(gaps)
    assert d.interval_over_seeds == pytest.approx(tuple(stats.ttest_1samp(gaps, 0).confidence_interval(0.95)))
    assert d.items == 60
    assert d.outcome == "better"
    assert d.p_sign_flip_smallest == 0.25


def test_a_better_checkpoint_on_the_way_changes_nothing_but_the_selection_table() -> None:
    def lucky(row: Row) -> Row:
        if _is(row, "eval", arm="cross-entropy", step=150):
            row["value"] = 1.0
        return row

    plain, changed = compare(study()), compare(study(change=lucky))
    assert plain.validation == changed.validation
    entry = next(s for s in changed.selection if s.arm == "cross-entropy")
    assert entry.best == 1.0
    assert entry.gain == pytest.approx(1.0 - entry.final)
    arm = next(s for s in changed.selection if s.arm == "dispersion")
    assert arm.difference_final is not None
    assert arm.difference_final < 0
    assert arm.difference_best is not None
    assert arm.difference_best > 0


def test_nothing_there_is_said_in_words() -> None:
    found = compare(study({"cross-entropy": 0.0, "other": 0.0}, seeds=range(5), seed_sd=0.05))
    assert found.validation is not None
    assert found.validation.differences[0].outcome == "undecided"


def test_a_harmful_arm_is_called_worse() -> None:
    found = compare(study({"cross-entropy": 0.0, "dispersion": 0.3}))
    assert found.validation is not None
    assert found.validation.differences[0].outcome == "worse"
    assert found.speed[0].reached == 0
    assert found.speed[0].share_of_tokens is not None
    assert found.speed[0].share_of_tokens > 1


def test_one_seed_is_compared_without_interval() -> None:
    found = compare(study(seeds=(4,)))
    assert found.validation is not None
    (d,) = found.validation.differences
    assert d.n == 1
    assert d.interval is None
    assert d.p is None


def test_one_arm_has_nothing_to_be_compared_with() -> None:
    found = compare(study({"cross-entropy": 0.0}))
    assert found.treated == ()
    assert found.validation is not None
    assert found.validation.differences == ()


def test_holm_runs_over_the_arms() -> None:
    found = compare(study({"cross-entropy": 0.0, "dispersion": -0.2, "noisy": 0.0}))
    assert found.validation is not None
    raw = {d.arm: d.p for d in found.validation.differences}
    corrected = {d.arm: d.p_holm for d in found.validation.differences}
    assert raw["dispersion"] is not None
    assert raw["noisy"] is not None
    assert raw["dispersion"] < raw["noisy"]
    assert corrected["dispersion"] == pytest.approx(2 * raw["dispersion"])
    assert corrected["noisy"] == pytest.approx(max(raw["noisy"], 2 * raw["dispersion"]))


def test_another_baseline_turns_the_sign() -> None:
    rows = study()
    forward, backward = compare(rows), compare(rows, "dispersion")
    assert forward.validation is not None
    assert backward.validation is not None
    assert backward.validation.differences[0].mean == pytest.approx(-forward.validation.differences[0].mean)


def test_condensation_of_blocks_layers_and_trend() -> None:
    rows = study()
    final = {(row["arm"], row["seed"]): row for row in rows if _is(row, "profile", step=300)}
    found = compare(rows)
    blocks, last, trend, order = found.condensation
    expected = [
        np.mean(final["dispersion", s]["mean_cosine"][1:]) - np.mean(final["cross-entropy", s]["mean_cosine"][1:])
        for s in (0, 1, 2)
    ]
    assert blocks.differences[0].differences == pytest.approx(expected)
    assert last.differences[0].arm_values[1] == final["dispersion", 1]["mean_cosine"][-1]
    assert trend.differences[0].mean == 0
    assert order.name == "Kendall of mean cosine with depth"
    assert order.differences[0].arm_values == (0.8, 0.8, 0.8)
    assert found.layers is not None
    assert found.layers.labels == tuple(LAYERS)
    for place, d in enumerate(found.layers.differences["dispersion"]):
        assert d.baseline_values[2] == final["cross-entropy", 2]["mean_cosine"][place]
    # less condensation is no good in itself
    assert blocks.differences[0].outcome == "lower"


def test_cost_is_paired_by_seed() -> None:
    def slow(row: Row) -> Row:
        if _is(row, "run", status="finished"):
            row["timing"]["step_wall_ms"] = {"cross-entropy": 100.0, "dispersion": 110.0}[row["arm"]] * (
                1 + row["seed"]
            )
        return row

    cost = {entry.arm: entry for entry in compare(study(change=slow)).cost}
    assert cost["dispersion"].wall_ratio == pytest.approx((1.1, 1.1, 1.1))
    assert cost["cross-entropy"].wall_ratio is None
    assert cost["dispersion"].step_wall_ms == pytest.approx((110.0, 220.0, 330.0))


def test_faults_name_their_cell_and_kind() -> None:
    def broken(row: Row) -> Row | None:
        if row["kind"] == "run" and row["arm"] == "dispersion" and row["seed"] == 1:
            row["order_hash"] = "0" * 16
        # a name that begins like another's must not take the blame for it
        return None if row["arm"] == "dispersion (seed 1)" and row["seed"] == 2 else row

    with pytest.raises(CompareError) as caught:
        compare(study(change=broken))
    (fault,) = caught.value.faults
    assert (fault.cell, fault.kind) == (("dispersion", 1), "other hash")
    assert compare(study(change=broken), incomplete="omit").omitted == (fault,)


def test_a_configuration_that_is_not_valid_is_named() -> None:
    rows = study()
    for row in rows:
        if row["kind"] == "run":
            row["config"] = {**row["config"], "seeds": [-1]}
    with pytest.raises(CompareError, match="configuration in the rows is not valid"):
        Study.from_rows(rows)


def test_the_margin_is_the_studys_unless_given() -> None:
    rows = study()
    for row in rows:
        if row["kind"] == "run":
            row["config"] = {**row["config"], "margin": 0.5}
    assert compare(study()).margin == 0.02
    found = compare(rows)
    assert found.margin == 0.5
    assert found.validation is not None
    assert found.validation.differences[0].margin == 0.5
    # a cosine has no margin in nats
    assert {d.margin for m in found.condensation for d in m.differences} == {None}
    assert compare(rows, margin=0.1).margin == 0.1


def test_the_margin_belongs_to_the_analysis_and_not_to_the_runs() -> None:
    whole = StudyConfig.parse(config(["cross-entropy"], [0]), where="test")
    other = whole.model_copy(update={"margin": 0.5})
    assert other.fingerprint() == whole.fingerprint()
    assert "margin" in other.to_yaml()
    assert whole.model_copy(update={"seeds": (1,)}).fingerprint() != whole.fingerprint()


def test_every_quantity_has_an_id_and_is_found_by_it() -> None:
    found = compare(study(tasks={arm: {"a": 0.4, "b": 0.5} for arm in ("cross-entropy", "dispersion")}))
    ids = [measure.quantity for measure in found.measures()]
    assert ids == ["validation.loss", "a.acc", "b.acc", "mean.acc", "mean_cosine.blocks", "mean_cosine.last",
                   "spearman.depth", "kendall.depth"]  # fmt: skip
    for name in ids:
        measure = found.measure(name)
        assert measure is not None
        assert {d.quantity for d in measure.differences} == {name}
    assert found.layers is not None
    assert [d.quantity for d in found.layers.differences["dispersion"]] == [
        f"mean_cosine.state.{place}" for place in range(len(LAYERS))
    ]


def test_tasks_means_and_ranks() -> None:
    tasks = {
        "cross-entropy": {"arc_easy": 0.40, "piqa": 0.60},
        "dispersion": {"arc_easy": 0.60, "piqa": 0.80},
        "noisy": {"arc_easy": 0.20, "piqa": 0.40},
    }
    rows = study(dict.fromkeys(tasks, 0.0), tasks=tasks)
    found = compare(rows)
    (mean,) = found.means
    assert mean.tasks == ("arc_easy", "piqa")
    assert mean.mean_rank == {"cross-entropy": 2.0, "dispersion": 1.0, "noisy": 3.0}
    scores = {
        (r["arm"], r["seed"], r["task"]): r["value"] for r in rows if r["kind"] == "eval" and r["metric"] == "acc"
    }
    gaps = [
        np.mean([scores["dispersion", s, t] - scores["cross-entropy", s, t] for t in mean.tasks]) for s in (0, 1, 2)
    ]
    d = mean.measure.difference("dispersion")
    assert d is not None
    assert d.differences == pytest.approx(gaps)
    assert d.items == 400
    assert d.outcome == "better"
    assert {(t.task, t.items) for t in found.tasks} == {("validation", 60), ("arc_easy", 200), ("piqa", 200)}


def test_missing_item_rows_leave_the_interval_over_seeds() -> None:
    found = compare([row for row in study() if row["kind"] != "eval_item"])
    assert found.validation is not None
    (d,) = found.validation.differences
    assert d.interval_kind == "over seeds"
    assert d.interval_over_seeds_and_items is None
    assert "per-item" in d.interval_reason


def test_missing_profiles_and_timings_are_left_out() -> None:
    def bare(row: Row) -> Row | None:
        if row["kind"] in ("profile", "step"):
            return None
        return {**row, "timing": {}} if "timing" in row else row

    found = compare(study(change=bare))
    assert found.condensation == ()
    assert found.layers is None
    assert found.cost[1].wall_ratio is None
    assert found.speed[0].share_of_time is None
    assert found.speed[0].share_of_tokens is not None


def test_a_score_that_is_not_the_mean_of_its_items_is_noted() -> None:
    def odd(row: Row) -> Row:
        if _is(row, "eval", arm="dispersion", seed=0, step=300):
            row["value"] += 0.5
        return row

    assert not any(note.kind == "not the mean of items" for note in compare(study()).notes)
    assert any(note.kind == "not the mean of items" for note in compare(study(change=odd)).notes)


def test_the_order_of_rows_does_not_matter() -> None:
    rows = study()
    mixed = list(rows)
    np.random.default_rng(0).shuffle(mixed)  # type: ignore[arg-type]
    # a kill may reorder cells, never a cell's own first row
    mixed.sort(key=lambda row: row["kind"] != "run" or row["status"] != "started")
    assert compare(mixed).to_dict() == compare(rows).to_dict()


def test_to_dict_is_json() -> None:
    text = json.dumps(compare(study()).to_dict(), allow_nan=False)
    assert json.loads(text)["baseline"] == "cross-entropy"


def test_pairing_proof_names_the_hashes() -> None:
    found = compare(study())
    assert [entry.seed for entry in found.pairing] == [0, 1, 2]
    assert len({entry.init_hash for entry in found.pairing}) == 3
    assert len({entry.corpus_hash for entry in found.pairing}) == 1
    assert found.pairing[0].arms == ("cross-entropy", "dispersion")


# ---- refusals -----------------------------------------------------------------------------------------------------


def _without_end(row: Row) -> Row | None:
    return None if _is(row, "run", arm="dispersion", seed=1, status="finished") else row


def _failed(row: Row) -> Row:
    if _is(row, "run", arm="dispersion", seed=1, status="finished"):
        row.update(status="failed", error="out of memory")
    return row


def _missing(row: Row) -> Row | None:
    return None if row["arm"] == "dispersion" and row["seed"] == 1 else row


def _hash(name: str) -> Any:
    def change(row: Row) -> Row:
        if _is(row, "run", arm="dispersion", seed=1):
            row[name] = "0123456789abcdef"
        return row

    return change


def _no_hash(row: Row) -> Row:
    if _is(row, "run", arm="dispersion", seed=1):
        row["order_hash"] = None
    return row


def _other_items(row: Row) -> Row:
    if _is(row, "eval_item", arm="dispersion", seed=1):
        row["item"] = row["item"][::-1]
    return row


def _other_weights(row: Row) -> Row:
    if _is(row, "eval_item", arm="dispersion", seed=1):
        row["weight"] += 1
    return row


def _no_final_score(row: Row) -> Row | None:
    return None if _is(row, "eval", arm="dispersion", seed=1, step=300) else row


def _stopped_being_measured(row: Row) -> Row | None:
    late = row["kind"] in ("eval", "eval_item", "profile") and row["step"] == 300
    return None if late and row["arm"] == "dispersion" and row["seed"] == 1 else row


REFUSED = {
    "unfinished": (_without_end, "dispersion (seed 1) is unfinished (last row at step 300)"),
    "failed": (_failed, "dispersion (seed 1) failed: out of memory"),
    "missing": (_missing, "dispersion (seed 1) has no rows"),
    "other start": (_hash("init_hash"), "not paired with cross-entropy (seed 1): different initial weights"),
    "other order": (_hash("order_hash"), "not paired with cross-entropy (seed 1): different data order"),
    "other corpus": (_hash("corpus_hash"), "not paired with cross-entropy (seed 1): different corpus"),
    "no proof": (_no_hash, "dispersion (seed 1) has no order_hash"),
    "other items": (_other_items, "dispersion (seed 1) was scored on other items of validation"),
    "other weights": (_other_weights, "the same items have different weights"),
    "last score is not the final one": (
        _stopped_being_measured,
        "dispersion (seed 1) has no score of its final checkpoint (step 300)",
    ),
    "no final score": (_no_final_score, "dispersion (seed 1) has no score of its final checkpoint (step 300)"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_is_no_pair_is_refused_by_name_and_can_be_left_out(fault: str) -> None:
    change, message = REFUSED[fault]
    rows = study(change=change)
    with pytest.raises(CompareError) as caught:
        compare(rows)
    assert message in str(caught.value)
    assert "cross-entropy (seed 0)" not in str(caught.value)
    found = compare(rows, incomplete="omit")
    assert any(message in str(fault) for fault in found.omitted)
    assert found.validation is not None
    assert found.validation.differences[0].seeds == (0, 2)
    # what is left is what a study of the other seeds gives
    whole = compare([row for row in study() if row["seed"] != 1], incomplete="omit")
    assert whole.validation is not None
    assert found.validation.differences[0].mean == whole.validation.differences[0].mean


def test_a_cell_that_finished_twice_is_refused() -> None:
    rows = study()
    again = next(row for row in rows if _is(row, "run", arm="dispersion", seed=1, status="finished"))
    with pytest.raises(CompareError, match=r"dispersion \(seed 1\) finished 2 times"):
        compare([*rows, again])


def test_two_values_for_one_thing_are_refused() -> None:
    rows = study()
    double = dict(next(row for row in rows if _is(row, "eval", arm="dispersion", seed=1, step=300)))
    assert compare([*rows, double]).validation is not None  # the same row twice, after a resume, is no contradiction
    with pytest.raises(CompareError, match="two different validation loss values at step 300"):
        compare([*rows, {**double, "value": 1.0}])


def test_a_failed_attempt_that_was_repeated_counts_as_finished() -> None:
    rows = study()
    start = dict(next(row for row in rows if _is(row, "run", arm="dispersion", seed=1, status="started")))
    failure = {**start, "status": "failed", "error": "killed"}
    assert compare([failure, *rows]).omitted == ()
    assert Study.from_rows([start, failure]).cells["dispersion", 1].status == "failed"


def test_two_studies_are_refused() -> None:
    with pytest.raises(CompareError, match="2 different studies"):
        compare(study() + study(fingerprint="e" * 16))


def test_no_rows_and_no_finished_run() -> None:
    with pytest.raises(CompareError, match=r"rows\.jsonl"):
        compare([])
    with pytest.raises(CompareError, match="no finished run"):
        compare([row for row in study() if row.get("status") != "finished"], incomplete="omit")


def test_unknown_baseline_is_suggested() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'cross-entropy'"):
        compare(study(), "cross_entropy")


def test_an_arm_that_is_not_trained_needs_no_data_order() -> None:
    def untouched(row: Row) -> Row | None:
        if row["arm"] != "none":
            return row
        if row["kind"] == "run":
            row.update(order_hash=None, steps=0 if row["status"] == "finished" else None, tokens=0)
        elif row.get("step", 0) and row["kind"] != "eval_item":
            return None
        elif row["kind"] == "eval_item":
            row["step"] = 0
        return row

    found = compare(study({"cross-entropy": 0.0, "none": 0.0}, change=untouched))
    assert found.validation is not None
    assert found.validation.differences[0].outcome == "worse"


@pytest.mark.slow
def test_simulated_null_studies_from_rows_to_verdict() -> None:
    """The whole path, 400 studies in which the arms do not differ."""
    detected = 0
    for number in range(400):

        def null(row: Row, number: int = number) -> Row | None:
            if row["kind"] in ("profile", "step") or (row["kind"] in ("eval", "eval_item") and row["step"] < 300):
                return None
            if row["kind"] in ("eval", "eval_item"):
                key = [number, row["seed"], int(row["arm"] == "dispersion")]
                row["value"] = 5.0 + float(np.random.default_rng(key).normal(0, 0.05))
            return row

        found = compare(study({"cross-entropy": 0.0, "dispersion": 0.0}, change=null, documents=2))
        assert found.validation is not None
        detected += found.validation.differences[0].detected
    assert detected <= stats.binom.ppf(1 - 1e-4, 400, 0.05)


def test_task_means_and_ranks_weigh_a_cut_task_and_mmlu_like_any_other() -> None:
    """MMLU is one row, however many subjects and items it has; a task with a limit has fewer. Each counts once."""
    scores = {  # task -> arm -> score in every seed
        "mmlu": {"cross-entropy": 0.30, "dispersion": 0.28, "noisy": 0.26},
        "arc_easy": {"cross-entropy": 0.40, "dispersion": 0.46, "noisy": 0.46},
        "piqa": {"cross-entropy": 0.60, "dispersion": 0.62, "noisy": 0.66},
    }
    items = {"mmlu": 14_042, "arc_easy": 200, "piqa": 1838}
    official = {"mmlu": 14_042, "arc_easy": 2376, "piqa": 1838}
    tasks = {arm: dict.fromkeys(scores, 0.5) for arm in ("cross-entropy", "dispersion", "noisy")}

    def told(row: Row) -> Row | None:
        task = row.get("task")
        if task not in scores:
            return row
        if row["kind"] == "eval_item":
            return None
        return {**row, "value": scores[task][row["arm"]], "items": items[task], "official_items": official[task],
                "limit": 200 if task == "arc_easy" else None}  # fmt: skip

    found = compare(study(dict.fromkeys(tasks, 0.0), tasks=tasks, change=told, task_items=3, documents=3))
    (mean,) = found.means
    for arm in tasks:
        values = mean.measure.of(arm)
        assert values is not None
        assert values.mean == pytest.approx(np.mean([scores[task][arm] for task in scores]))
        # ties share the mean of their ranks
        ranks = [stats.rankdata([-by_arm[a] for a in tasks])[list(tasks).index(arm)] for by_arm in scores.values()]
        assert mean.mean_rank[arm] == pytest.approx(np.mean(ranks))
    assert {task.task: task.deviation for task in found.tasks} == {
        "validation": "", "mmlu": "", "piqa": "", "arc_easy": "200 of 2,376 items",
    }  # fmt: skip
    assert found.task_notes == ("not scored on the official number of items: arc_easy 200 of 2,376 items",)
