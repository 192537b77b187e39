"""``until: decided``: which seeds are added, what stays the same study, and the error of the rule under looking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from decondense.cli import main
from decondense.cli.run import StudyOptions
from decondense.compare import compare, paired_difference
from decondense.compare.sequential import anytime, confidence_sequence, open_arms, seeds_to_decide
from decondense.config import ConfigError, StudyConfig
from decondense.records import Row, make_row, read_rows
from decondense.report import notes_in_words
from decondense.studies import run_study
from decondense.studies.deciding import add_seeds, next_seeds
from decondense.studies.directory import open_directory
from decondense.studies.plan import plan
from studies.conftest import small_study

ARMS = ("cross-entropy", "a", "b")


def planned(**changes: Any) -> StudyConfig:
    return StudyConfig.parse(
        {
            "name": "until",
            "title": "Until",
            "question": "?",
            "baseline": "cross-entropy",
            "arms": [{"name": arm} for arm in ARMS],
            "until": "decided",
            "margin": 0.02,
            **changes,
        },
        where="test",
    )


def rows_of(study: StudyConfig, effects: Mapping[str, Sequence[float]], *, failed: Sequence[str] = ()) -> list[Row]:
    """Ended runs with a held-out loss of 5 plus the arm's effect in that seed; the first seed of ``failed`` fails."""
    rows = []
    config = study.model_dump(mode="json")
    for number, seed in enumerate(study.every_seed):
        for arm in ARMS:
            who = {"study": study.name, "study_fingerprint": study.fingerprint(), "arm": arm, "seed": seed}
            bad = arm in failed and number == 0
            loss = 5 + 0.1 * seed + effects.get(arm, [0.0] * 99)[number]
            if not bad:
                score = {"task": "validation", "metric": "loss", "value": loss, "higher_is_better": False, "items": 9}
                rows.append(make_row("eval", **who, step=8, tokens=8, **score))
            end = {"init_hash": f"i{seed}", "order_hash": f"o{seed}", "corpus_hash": "c", "steps": 8, "config": config}
            rows.append(
                make_row("run", **who, status="failed" if bad else "finished", error="NaN" if bad else None, **end)
            )
    return rows


NOISE = np.array([0.004, -0.003, 0.001, -0.002, 0.003, 0.0, -0.001, 0.002])
CLEAR, SAME, VAGUE = (-1 + NOISE).tolist(), NOISE.tolist(), (0.05 + 20 * NOISE).tolist()


@pytest.mark.parametrize(
    ("effects", "changes", "at_once", "expected"),
    [
        ({"a": CLEAR, "b": CLEAR}, {"seeds": range(4)}, 1, ()),  # both differ
        ({"a": CLEAR, "b": SAME}, {"seeds": range(6), "margin": 0.05}, 1, ()),  # one differs, one is equivalent
        ({"a": CLEAR, "b": VAGUE}, {"seeds": range(4)}, 1, (4,)),
        ({"a": CLEAR, "b": VAGUE}, {"seeds": range(4)}, 3, (4, 5, 6)),
        ({"a": CLEAR, "b": VAGUE}, {"seeds": range(4), "most_seeds": 5}, 3, (4,)),
        ({"a": CLEAR, "b": VAGUE}, {"seeds": range(4), "most_seeds": 4}, 3, ()),  # not decided, and at its end
        ({"a": CLEAR, "b": VAGUE}, {"seeds": range(4), "until": None}, 1, ()),
        ({"a": CLEAR, "b": CLEAR}, {"seeds": [7]}, 1, (8, 9)),  # nothing is decided below three seeds
        ({"a": CLEAR, "b": VAGUE}, {"seeds": [0, 1], "added_seeds": [2, 5]}, 1, (6,)),
        ({"a": CLEAR, "b": [0.0] * 8}, {"seeds": range(4)}, 1, ()),  # equal in every seed: more say nothing
        (
            {"a": CLEAR, "b": VAGUE},
            {"seeds": range(4), "sweep": {"learning_rates": [1e-3, 2e-3], "seed": 4}},
            1,
            (5,),  # a trial's seed is none of the study's
        ),
    ],
)
def test_seeds_to_add(effects: Any, changes: Any, at_once: int, expected: tuple[int, ...]) -> None:
    study = planned(**{name: list(v) if isinstance(v, range) else v for name, v in changes.items()})
    assert next_seeds(study, rows_of(study, effects), at_once=at_once) == expected


@pytest.mark.parametrize(
    ("failed", "expected"), [(["a"], (5,)), (["b"], ()), (["cross-entropy"], ()), (["a", "b"], ())]
)
def test_arms_with_failed_runs_are_not_waited_for(failed: list[str], expected: tuple[int, ...]) -> None:
    study = planned(seeds=list(range(5)))
    assert next_seeds(study, rows_of(study, {"a": CLEAR, "b": VAGUE}, failed=failed)) == expected


def test_seeds_that_are_added_leave_the_study_what_it_is() -> None:
    plain = planned(until=None)
    for changes in ({"until": "decided"}, {"added_seeds": [3]}, {"most_seeds": 9}, {"margin": 0.5}):
        assert planned(**changes).fingerprint() == plain.fingerprint()
    assert planned(seeds=[0, 1, 2, 3]).fingerprint() != plain.fingerprint()
    assert plan(planned(seeds=[0], added_seeds=[4]))[-1] == ("b", 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"most_seeds": 3, "seeds": [0, 1, 2, 3]}, "most_seeds 3 is below the 4 seeds"),
        ({"launch": "torchtitan"}, "run by torchtitan"),
        ({"arms": [{"name": "cross-entropy"}]}, "needs an arm besides the baseline"),
        ({"added_seeds": [2]}, "different non-negative"),
        ({"sweep": {"learning_rates": [1e-3, 2e-3], "seed": 8}, "added_seeds": [8]}, "sweep.seed 8"),
    ],
)
def test_what_cannot_be_decided_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        planned(**changes)


def test_the_command_line_says_the_rule(capsys) -> None:
    asked = StudyOptions("demo", seeds=2, until="decided", margin=0.1, most_seeds=7)
    study = asked.study()
    assert (study.seeds, study.until, study.margin, study.most_seeds) == ((0, 1), "decided", 0.1, 7)
    assert asked.words() == ["demo", "--seeds", "2", "--until", "decided", "--margin", "0.1", "--most-seeds", "7"]
    for words in (["--most-seeds", "5", "--dry-run"], ["--pilot", "rows.jsonl"], ["--until", "tired", "--dry-run"]):
        assert main(["study", "demo", *words]) == 2
        assert words[0] in capsys.readouterr().err


def test_the_comparison_shows_the_sequence_and_says_so() -> None:
    study = planned(seeds=[0, 1, 2], added_seeds=[3, 4])
    rows = rows_of(study, {"a": CLEAR, "b": VAGUE})
    comparison = compare(rows)
    assert comparison.validation is not None
    a, b = comparison.validation.differences
    # two contrasts share alpha
    assert a.interval == pytest.approx(confidence_sequence(a.differences, confidence=0.975))
    assert (a.outcome, b.outcome) == ("better", "undecided")
    assert a.interval_kind == "over seeds, at every look"
    assert (a.p_sign_flip, a.detectable, a.seeds_needed) == (None, None, None)
    notes = {note.kind: note for note in comparison.notes}
    assert notes["seeds added"].facts["seeds"] == 5
    assert notes["not decided"].arms == ("b",)
    assert any("5 seeds, of which 2 were added" in text for text in notes_in_words(comparison))
    # rows that were begun with fixed seeds count as extended once one of them says so
    first = {"config": {**study.model_dump(mode="json"), "until": None}}
    fixed = [row | first if row["seed"] == 0 and row["kind"] == "run" else row for row in rows]
    assert compare(fixed).validation == comparison.validation


def test_outcome_and_interval_agree() -> None:
    """Detected, by the p times the number of arms, where the interval shown excludes 0."""
    rng = np.random.default_rng(0)
    seen = set()
    for n in (2, 3, 4, 7):
        for shift in (0.0, 1.0, 3.0, 8.0):
            d = anytime(paired_difference(np.zeros(n), rng.normal(shift, 1, n), margin=0.02), 3)
            excludes = d.interval is not None and not d.interval[0] <= 0 <= d.interval[1]
            assert d.detected == excludes
            seen.add((d.interval is None, d.detected))
    assert seen == {(True, False), (False, False), (False, True)}


def test_seeds_until_decided_if_nothing_changes() -> None:
    assert seeds_to_decide(-1.0, 0.001, margin=0.02) == 3
    n = seeds_to_decide(0.0, 0.02, margin=0.02)
    assert n is not None
    values = np.resize([-1.0, 1.0], n - 1)
    values = 0.02 * (values - values.mean()) / values.std(ddof=1)
    assert confidence_sequence(values)[1] > 0.02  # one seed fewer does not do
    # between 0 and the margin it takes longest, and a correction for arms takes longer
    between = seeds_to_decide(0.01, 0.02, margin=0.02)
    assert between is not None
    assert between > n
    assert seeds_to_decide(0.01, 0.02, margin=0.02, most=n) is None
    assert (seeds_to_decide(0.0, 0.02, margin=0.02, arms=4) or 0) > n


def test_a_study_is_extended_and_resumed(tmp_path: Path) -> None:
    """Three real runs in all: one planned, two added, with an end between the decision to add and the first of them."""
    out = tmp_path / "study"
    first = run_study(small_study(), out, workers=0)
    until = small_study(until="decided", margin=5.0, most_seeds=4)
    there = open_directory(until, out)
    assert (there.until, there.seeds, there.added_seeds) == ("decided", (0,), ())
    assert add_seeds(there, out, (1, 2)).added_seeds == (1, 2)
    assert add_seeds(there, out, (1,)).added_seeds == (1, 2)  # another runner that looked earlier takes these
    with pytest.raises(ConfigError, match="holds another study"):
        run_study(small_study(until="decided", seeds=[0, 1]), out, workers=0)
    rows = run_study(until, out, workers=0)
    assert {row["seed"] for row in rows} == {0, 1, 2}
    assert [row for row in rows if row["seed"] == 0 and row["kind"] != "run"] == [
        row for row in first if row["kind"] != "run"
    ]
    ends = [row for row in rows if row["kind"] == "run"]
    assert {tuple(row["config"]["added_seeds"]) for row in ends} == {(1, 2)}
    assert {row["study_fingerprint"] for row in ends} == {small_study().fingerprint()}
    comparison = compare(rows)
    assert comparison.validation is not None
    assert open_arms(comparison.validation.differences, 1) == ()
    # a plain command keeps the rule, and there is nothing left to do
    assert run_study(small_study(margin=5.0), out, workers=0) == rows == read_rows(out / "rows.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize(("at_once", "law"), [(1, "normal"), (4, "normal"), (1, "heavy")])
def test_the_rule_errs_in_five_per_cent_at_most(at_once: int, law: str) -> None:
    """400 studies of three arms and one baseline without any difference, looked at until decided or 16 seeds."""
    rng = np.random.default_rng([at_once, len(law)])
    wrong = equivalent = 0
    for _ in range(400):
        loss_AN = rng.normal(size=(4, 16)) if law == "normal" else rng.standard_t(3, size=(4, 16))
        n = 3
        while True:
            ds = [
                paired_difference(loss_AN[0, :n], own[:n], arm=str(k), margin=2.0) for k, own in enumerate(loss_AN[1:])
            ]
            if not open_arms(ds, 3) or n >= 16:
                break
            n = min(16, n + at_once)
        shown = [anytime(d, 3) for d in ds]
        wrong += any(d.detected for d in shown)
        equivalent += all(d.outcome == "equivalent" for d in shown)
    assert wrong / 400 <= 0.05
    assert equivalent > 0
