"""The rows that a run ended with are known by their hash."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from decondense.records import (
    RecordError,
    Row,
    append_rows,
    is_whole,
    make_row,
    merged,
    read_rows,
    read_run,
    rows_hash,
    write_rows,
)

CELL = {"study": "s", "study_fingerprint": "f", "arm": "a", "seed": 0}
SCORE = {"step": 4, "task": "validation", "metric": "loss"}
SHAPE = {"spearman": None, "kendall": 0.5, "passages": 1, "passage_tokens": 4}


def measured(*, wall: float = 1.0) -> list[Row]:
    layers = {"layers": ["embedding", "block 1"], "mean_cosine": [0.1, 1 / 3]}
    steps = [
        make_row("step", **CELL, step=n, tokens=n, loss=1 / n, learning_rate=0.1, timing={"step_wall_ms": wall})
        for n in (2, 4)
    ]
    score = make_row("eval", **CELL, **SCORE, tokens=4, value=1 / 7, higher_is_better=False, items=2, notes=["\udcff"])
    items = [make_row("eval_item", **CELL, **SCORE, item=f"{n:016x}", value=n / 7) for n in range(20)]
    return [*steps, make_row("profile", **CELL, step=4, tokens=4, **layers, **SHAPE), score, *items]


def run(status: str, **more: object) -> Row:
    return make_row("run", **CELL, status=status, config={"title": "t"}, **more)


def end(path: Path, rows: list[Row]) -> Path:
    append_rows(path, [run("started"), *rows, run("finished", rows_hash=rows_hash(rows))])
    return path


def without(kind: str) -> Callable[[list[Row]], list[Row]]:
    return lambda rows: [row for row in rows if row["kind"] != kind]


def with_value(kind: str, field: str, value: object) -> Callable[[list[Row]], list[Row]]:
    return lambda rows: [{**row, field: value} if row["kind"] == kind else row for row in rows]


CHANGES: dict[str, Callable[[list[Row]], list[Row]]] = {
    **{f"no {kind}": without(kind) for kind in ("step", "profile", "eval", "eval_item")},
    "another loss": with_value("step", "loss", 1.0),
    "the last digit of a score": with_value("eval", "value", 1 / 7 + 3e-17),
    "another item": with_value("eval_item", "value", 0.0),
    "an item less": lambda rows: [*rows[:-3], *rows[-2:]],
    "an item twice": lambda rows: [*rows[:-2], rows[-2], *rows[-2:]],
    "another order": lambda rows: [rows[0], *rows[1:3][::-1], *rows[3:]],
    "a value lost": with_value("profile", "kendall", None),
}


@pytest.mark.parametrize("what", CHANGES)
def test_rows_that_changed_after_the_end_are_refused(what: str, tmp_path: Path) -> None:
    path = end(tmp_path / "rows.jsonl", measured())
    assert is_whole(path)
    rows = read_rows(path)
    write_rows(path, CHANGES[what](rows))
    assert read_rows(path) != rows
    for _ in range(2):
        assert not is_whole(path)
        with pytest.raises(RecordError, match=r"rows\.jsonl: its rows have changed since the run ended"):
            read_run(path)
    write_rows(path, rows)
    assert is_whole(path)
    assert read_run(path) == rows


def test_clocks_interruptions_and_where_the_rows_lie_do_not_matter(tmp_path: Path) -> None:
    rows = measured()
    assert rows_hash(measured(wall=9.0)) == rows_hash(rows) == rows_hash([run("started"), *rows, run("resumed")])
    for name in ("rows.jsonl", "rows.jsonl.gz"):
        write_rows(tmp_path / name, rows)
        assert rows_hash(read_rows(tmp_path / name)) == rows_hash(rows)


def test_a_field_that_a_later_release_adds_does_not_matter() -> None:
    rows = measured()
    assert rows_hash([{**row, "new": None, "newer": [], "newest": {}} for row in rows]) == rows_hash(rows)
    assert rows_hash([{**row, "new": 0.0} for row in rows]) != rows_hash(rows)


def test_rows_without_a_hash_and_runs_that_go_on_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_rows(path, [run("started"), *measured()])
    assert len(read_run(path)) == 25
    append_rows(path, [run("finished")])
    write_rows(path, read_rows(path)[3:])
    assert is_whole(path)
    assert not is_whole(tmp_path / "missing.jsonl")


def test_a_file_is_checked_once_for_each_of_its_states(tmp_path: Path) -> None:
    path = end(tmp_path / "rows.jsonl", measured())
    assert is_whole(path)
    before = path.stat()
    path.write_bytes(path.read_bytes().replace(b'"loss":0.5', b'"loss":0.6'))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert is_whole(path), "it looks as it did, so it was not read again"
    os.utime(path)
    assert not is_whole(path)


def test_the_hash_is_no_difference_between_two_results_of_one_run() -> None:
    rows = measured()
    early, late = [*rows, run("finished")], [*rows, run("finished", rows_hash=rows_hash(rows))]
    assert merged({"here": early, "there": late}) == early
