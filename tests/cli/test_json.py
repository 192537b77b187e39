"""``--json``: one object on standard output and nothing else; its keys are those of the documentation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from synthetic import study

from decondense.cli import main
from decondense.cli.printed import KEYS, SCHEMA_VERSION, emit, page
from decondense.records import write_rows

ROOT = Path(__file__).resolve().parents[2]


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """The object that a command prints; its keys are the documented ones, in one version."""
    words = [str(argument) for argument in arguments]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (found["schema_version"], found["command"]) == (SCHEMA_VERSION, words[0])
    keys = KEYS["study --dry-run" if "--dry-run" in words else words[0]]
    if "..." not in keys:
        assert set(found) - {"schema_version", "command"} == {key for key in keys if "[" not in key}
    for key in (key for key in keys if "[]." in key):
        owner, name = key.split("[].")
        assert all(name in entry for entry in found[owner])
    return found


def test_the_page_is_made_from_the_code() -> None:
    assert (ROOT / "docs" / "json.md").read_text() == page()


def test_compare_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row for row in study() if row["kind"] != "step" and row.get("step", 300) == 300]  # of few figures
    write_rows(tmp_path / "rows.jsonl", rows)
    compared = printed(capsys, "compare", tmp_path)
    assert compared["baseline"] == "cross-entropy"
    reported = printed(capsys, "report", tmp_path)
    assert Path(reported["report"]).is_file()
    assert {key: value for key, value in compared.items() if key not in ("schema_version", "command")} == reported[
        "comparison"
    ]
    assert reported["failed"] == []


def test_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    plan = printed(capsys, "study", "fig2", "--scale", "paper", "--dry-run")
    assert (plan["study"], plan["scale"]) == ("fig2", "paper")
    assert plan["runs"] >= 22
    assert plan["lines"]
    assert plan["commands"]
    assert main(["study", "fig2", "--dry-run", "--yaml", "--json"]) == 2


def test_measure_of_a_gguf_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf")
    from gguf_file import TEXT, write_pair

    file, _ = write_pair(tmp_path)
    (tmp_path / "text.txt").write_text("\n\n".join([TEXT] * 4))
    source = ["--text", tmp_path / "text.txt", "--passages", 3, "--words", 30, 40, "--skip-tokens", 1, "--tokens", 30]
    found = printed(capsys, "measure", file, *source, "--out", tmp_path / "out")
    (model,) = found["models"]
    assert model["label"] == "tiny.gguf"
    assert (model["info"]["skip_tokens"], model["passage_tokens"]) == (1, 29)
    assert (tmp_path / "out" / "profile.json").is_file()


def test_what_is_not_finite_is_null(capsys: pytest.CaptureFixture[str]) -> None:
    emit("compare", value=float("nan"), inside=[{"x": float("inf")}, (1, 2)])
    found = json.loads(capsys.readouterr().out)
    assert (found["value"], found["inside"]) == (None, [{"x": None}, [1, 2]])


def test_no_control_character_reaches_the_terminal_and_all_come_back(capsys: pytest.CaptureFixture[str]) -> None:
    name = "".join(map(chr, range(0xA1)))
    emit("evaluate", model=name, results="out", scores=[], notes=[])
    printed = capsys.readouterr().out
    assert not [mark for mark in printed if mark != "\n" and (mark < " " or "\x7f" <= mark <= "\x9f")]
    assert json.loads(printed)["model"] == name
