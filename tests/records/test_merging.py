"""Rows of one run from two places: equal ends become one, different ends are refused by name."""

from __future__ import annotations

import itertools

import pytest

from decondense.records import RecordError, merged


def run(arm: str, loss: float = 1.0, *, seed: int = 0, machine: str = "a", ends: bool = True) -> list[dict]:
    cell = {"study": "s", "study_fingerprint": "f", "arm": arm, "seed": seed}
    rows = [
        {"kind": "run", **cell, "status": "started", "config": {"margin": machine}, "timing": {"at": machine}},
        {"kind": "step", **cell, "step": 1, "loss": loss},
        {"kind": "run", **cell, "status": "resumed", "config": {}} if machine == "b" else None,
        {"kind": "run", **cell, "status": "finished", "config": {}, "provenance": {"machine": machine}},
    ]
    return [row for row in rows[: None if ends else 2] if row is not None]


def test_equal_ends_are_one_whatever_differs_beside_the_content() -> None:
    first, again, other = run("x"), run("x", machine="b"), run("y", machine="b")
    assert merged({"one": first, "two": [*again, *other]}) == [*first, *other]
    assert merged({"two": [*other, *again], "one": first}) == [*other, *again]


def test_an_end_wins_over_none_and_more_rows_over_fewer() -> None:
    short, whole = run("x", 2.0, ends=False), run("x")
    for names in itertools.permutations(["short", "whole"]):
        places = {"short": short, "whole": whole}
        assert merged({name: places[name] for name in names}) == whole
    assert merged({"one": short[:1], "two": short}) == short


@pytest.mark.parametrize("change", [{"loss": 1.5}, {"status": "failed"}, {"step": 2}])
def test_different_ends_are_refused_by_name(change: dict) -> None:
    other = [{**row, **{key: value for key, value in change.items() if key in row}} for row in run("x", seed=3)]
    with pytest.raises(RecordError, match=r"x seed 3 .*: one and two"):
        merged({"one": [*run("y"), *run("x", seed=3)], "two": other})
    assert len(merged({"one": run("x"), "two": run("x", 1.5, seed=1)})) == 6
