"""Links inside a directory of results lead nothing outside it; the directory itself may be one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from model_folders import save_model, write_text
from synthetic import study

from decondense.cli import main
from decondense.outputs import OutputError, check_output
from decondense.records import write_rows

SIZES = ["--passages", "2", "--words", "10", "20", "--tokens", "8"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """What must stay as it is."""
    (tmp_path / "outside" / "checkpoint-2").mkdir(parents=True)
    for name in ("rows.jsonl", "worker-0.log", "checkpoint-2/COMPLETE"):
        (tmp_path / "outside" / name).write_text("precious\n")
    return tmp_path / "outside"


def a_study(folder: Path) -> list[object]:
    text = write_text(folder / "text.jsonl", words=3000)
    (folder / "study.yaml").write_text(
        json.dumps(
            {
                **{"name": "s", "title": "s", "question": "q?", "baseline": "a", "seeds": [0], "arms": [{"name": "a"}]},
                "corpus": {"source": str(text), "vocab_size": 300},
                "model": {"architecture": "gpt2", "overrides": {"n_layer": 1, "n_embd": 8, "n_head": 1}},
                "train": {"steps": 1},
            }
        )
    )
    return ["study", folder / "study.yaml", "--workers", 0]


def a_report(folder: Path) -> list[object]:
    write_rows(folder / "study.jsonl", study({"cross-entropy": 0.0, "dispersion": -0.1}, documents=2))
    return ["report", folder / "study.jsonl"]


def a_measurement(folder: Path) -> list[object]:
    for name in ("m", "n"):
        save_model(folder / name)
    return ["measure", folder / "m", folder / "n", "--text", write_text(folder / "text.jsonl", words=300), *SIZES]


def an_evaluation(folder: Path) -> list[object]:
    save_model(folder / "m")
    (folder / "data" / "piqa").mkdir(parents=True)
    row = {"goal": "w1", "sol1": "w2", "sol2": "w3", "label": 0}
    (folder / "data" / "piqa" / "validation.jsonl").write_text(json.dumps(row) + "\n")
    return ["evaluate", folder / "m", "--tasks", "piqa", "--data-dir", folder / "data"]


LINKS = {
    a_study: ["cells", "cells/a", "cells/a/seed-0/rows.jsonl", "cells/a/seed-0/checkpoint-2", "cells/a/seed-0/lock",
              "sweep", "prepared/base", "logs", "logs/worker-0.log", ".study.lock", "figures", "tables"],
    a_report: ["figures", "tables", "tables/validation.csv"],
    a_measurement: ["m", "n"],
    an_evaluation: ["tasks", "evaluate.log", ".lock", ".events.jsonl"],
}  # fmt: skip


@pytest.mark.parametrize("command", LINKS, ids=lambda command: command.__name__)
def test_nothing_is_written_or_removed_through_a_link(command, tmp_path: Path, outside: Path, capsys) -> None:
    words = [str(word) for word in command(tmp_path)]
    before = contents(outside)
    for number, place in enumerate(LINKS[command]):
        out = tmp_path / f"out-{number}"
        (out / place).parent.mkdir(parents=True)
        # into a directory, to a file, and to a file that does not exist
        target = outside / ("" if "." not in place and "lock" not in place else "rows.jsonl")
        (out / place).symlink_to(outside / "new" if place.startswith(".") else target)
        assert main([*words, "--out", str(out)]) == 2, place
        said = " ".join(capsys.readouterr().err.split())
        assert f"{place} is a symbolic link to {outside}" in said.replace("\\", "")
        assert contents(outside) == before, place


def test_a_link_in_the_place_of_a_file_that_is_replaced_is_replaced(tmp_path: Path, outside: Path) -> None:
    _, rows = a_report(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "headline.csv").symlink_to(outside / "rows.jsonl")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    before = contents(outside)
    assert main(["compare", str(rows), "--tables", str(tmp_path / "link")]) == 0, "the directory may be a link itself"
    assert contents(outside) == before
    assert "dispersion" in (tmp_path / "out" / "headline.csv").read_text()
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("name", [b"o\xff", b"\x80/below", "ü/ü".encode("latin-1")])
def test_models_are_not_saved_below_a_name_that_is_not_utf_8(name: bytes, tmp_path: Path, capsys) -> None:
    words = [str(word) for word in a_study(tmp_path)]
    out = os.fsdecode(os.path.join(os.fsencode(tmp_path), name))
    before = os.listdir(tmp_path)
    assert main([*words, "--out", out]) == 2
    assert "not UTF-8" in capsys.readouterr().err
    assert os.listdir(tmp_path) == before
    check_output(out)
    check_output(tmp_path / "ü", models=True)
    with pytest.raises(OutputError, match="not UTF-8"):
        check_output(out, models=True)


@pytest.mark.parametrize("locale", ["C", "en_US.ISO-8859-1"])
def test_models_are_not_saved_where_the_locale_writes_the_name_otherwise(locale: str, tmp_path: Path) -> None:
    """Libraries take paths as UTF-8: under another locale they would write elsewhere, or fail in a worker."""
    (tmp_path / "ü").mkdir()
    code = "import sys; from decondense.outputs import check_output; check_output(sys.argv[1], models=True)"
    for utf8, where, folder in [("1", "ü", "ü"), ("0", "ü", str(tmp_path)), ("0", ".", "ü"), ("0", "ü", "out")]:
        environment = {"PATH": os.environ["PATH"], "LC_ALL": locale, "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": utf8}
        command = [sys.executable, "-c", code, folder]
        done = subprocess.run(command, env=environment, cwd=tmp_path / where, capture_output=True, text=True)
        if utf8 == "1" or folder == str(tmp_path):
            assert done.returncode == 0, done.stderr
        else:
            assert "PYTHONUTF8=1" in done.stderr
