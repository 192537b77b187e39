"""Rows that were changed by hand or by another version: the file and the line, and no traceback."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from decondense.cli import _say, main
from decondense.records.writing import configuration_hash

DEMO = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "demo.jsonl"
Row = dict[str, Any]


def changed(folder: Path, change: Callable[[Row], Row]) -> Path:
    rows = [change(json.loads(line)) for line in DEMO.read_text(encoding="utf-8").splitlines()]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def complaint(capsys: pytest.CaptureFixture[str], status: int, *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == status
    return "".join(capsys.readouterr().err.split())


def test_reasons_and_titles_with_brackets_are_shown_as_they_are(tmp_path: Path, capsys) -> None:
    names: dict[str, str] = {}

    def fail(row: Row) -> Row:
        if row["kind"] == "configuration":
            row["config"]["title"] = "A [/red] title"
            names[row["hash"]] = configuration_hash(row["config"])
            row["hash"] = names[row["hash"]]
        if row["kind"] == "run":
            row["config"] = names[row["config"]]
        if row["kind"] == "run" and row["status"] == "finished":
            row |= {"status": "failed", "error": "out of [memory] [/foo]" if row["seed"] else None}
        return row

    said = complaint(capsys, 1, "report", changed(tmp_path, fail), "--out", tmp_path / "report")
    assert "outof[memory][/foo]" in said
    assert "noreasonrecorded" in said


def test_values_that_are_no_numbers_are_named_with_their_line(tmp_path: Path, capsys) -> None:
    path = changed(tmp_path, lambda row: {**row, "value": float("nan")} if row["kind"] == "eval" else row)
    assert f"{path},line" in complaint(capsys, 2, "compare", path)


ODD: dict[str, Callable[[Row], Row]] = {
    "another schema": lambda row: {**row, "schema_version": row["schema_version"] + 1},
    "layers without values": lambda row: {**row, "mean_cosine": row["mean_cosine"][:2]} if "layers" in row else row,
    "no layers": lambda row: {**row, "layers": [], "mean_cosine": []} if "layers" in row else row,
    "bins cut off": lambda row: (
        {**row, "histogram": [row["histogram"][0][:9], *row["histogram"][1:]]} if row.get("histogram") else row
    ),
    "no bins": lambda row: {**row, "histogram": [[] for _ in row["histogram"]]} if row.get("histogram") else row,
    "counts below 0": lambda row: (
        {**row, "histogram": [[-1, *counts[1:]] for counts in row["histogram"]]} if row.get("histogram") else row
    ),
    "no cosine": lambda row: {**row, "mean_cosine": [5.3, *row["mean_cosine"][1:]]} if "layers" in row else row,
}


@pytest.mark.parametrize("what", ODD)
def test_rows_that_do_not_fit_together_are_named(what: str, tmp_path: Path, capsys) -> None:
    path = changed(tmp_path, ODD[what])
    assert f"{path},line" in complaint(capsys, 2, "compare", path)


def test_a_directory_in_the_place_of_an_output_is_named_with_the_remedy(tmp_path: Path, capsys) -> None:
    (tmp_path / "report.html").mkdir()
    said = complaint(capsys, 2, "report", DEMO, "--out", tmp_path)
    assert f"{tmp_path / 'report.html'}:Isadirectory." in said
    assert "removeit,orchooseanotheronewith--out" in said


@pytest.mark.parametrize(
    "number",
    [errno.EISDIR, errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EEXIST, errno.EACCES, errno.ENOSPC],
)
def test_every_refusal_of_the_system_has_a_remedy(number: int) -> None:
    said = _say(OSError(number, os.strerror(number), "some/place"))
    assert said.startswith(f"some/place: {os.strerror(number)}. ")
    assert said.endswith(".")


def test_a_line_nested_too_deep_is_named(tmp_path: Path, capsys) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("[" * 100_000 + "\n\n")
    assert f"{path},line1" in complaint(capsys, 2, "compare", path)
