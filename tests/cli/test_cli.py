from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import decondense
from decondense.cli import main

ANSI = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture(scope="module")
def quick_demo(tmp_path_factory, python_docs_cache) -> Path:
    """`decondense demo --quick` as a user runs it, of two seeds, in a directory of its own."""
    folder = tmp_path_factory.mktemp("demo")
    python_docs_cache(folder / "cache")
    done = subprocess.run(
        [sys.executable, "-m", "decondense", "demo", "--quick", "--seeds", "2", "--workers", "1"],
        cwd=folder,
        env={**os.environ, "DECONDENSE_CACHE": str(folder / "cache"), "COLUMNS": "120"},
        capture_output=True,
        text=True,
    )
    (folder / "stdout.txt").write_text(ANSI.sub("", done.stdout))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, ANSI.sub("", captured.out), ANSI.sub("", captured.err)


def test_the_demo_leaves_everything_it_promises(quick_demo: Path) -> None:
    out = quick_demo / "decondense-demo-quick"
    html = (out / "report.html").read_text()
    assert html.startswith("<!doctype html>") or html.lower().startswith("<!doctype html>")
    assert not re.search(r"""(src|href)=["']https?://""", html), "the report must not load anything"
    assert list((out / "figures").glob("*.png"))
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    finished = [row for row in rows if row["kind"] == "run" and row["status"] == "finished"]
    assert sorted((row["arm"], row["seed"]) for row in finished) == sorted(
        (arm, seed) for arm in ("cross-entropy", "dispersion") for seed in (0, 1)
    )
    for seed in (0, 1):
        pair = [row for row in finished if row["seed"] == seed]
        assert len({(row["init_hash"], row["order_hash"], row["corpus_hash"]) for row in pair}) == 1
    assert len({row["init_hash"] for row in finished}) == 2
    said = (quick_demo / "stdout.txt").read_text()
    assert "95 %" in said
    assert "report.html" in said


def test_dispersion_loss_disperses(quick_demo: Path) -> None:
    rows = [json.loads(line) for line in (quick_demo / "decondense-demo-quick" / "rows.jsonl").read_text().splitlines()]
    last = {
        (row["arm"], row["seed"]): row["mean_cosine"][1:]
        for row in rows
        if row["kind"] == "profile" and row["step"] > 0
    }
    for seed in (0, 1):
        assert sum(last["dispersion", seed]) < sum(last["cross-entropy", seed])


def test_compare_from_the_rows_alone(quick_demo: Path, capsys) -> None:
    out = quick_demo / "decondense-demo-quick"
    status, said, _ = run(capsys, "compare", out)
    assert status == 0
    assert "95 %" in said
    status, said, _ = run(capsys, "compare", out / "rows.jsonl", "--json")
    assert status == 0
    assert json.loads(said)


def test_measure_the_trained_model(quick_demo: Path, tmp_path: Path, capsys) -> None:
    model = quick_demo / "decondense-demo-quick" / "cells" / "dispersion" / "seed-0" / "final"
    status, _, err = run(
        capsys, "measure", model, "--out", tmp_path / "m", "--passages", 4, "--tokens", 64, "--words", 200, 300
    )
    assert status == 0, err
    assert (tmp_path / "m" / "heatmap.png").exists()
    profile = json.loads((tmp_path / "m" / "profile.json").read_text())
    assert len(profile["summary"]["mean_cosine"]) == 5


def test_the_demo_directory_cannot_be_taken_by_another_study(quick_demo: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(quick_demo)
    status, _, err = run(capsys, "demo", "--out", "decondense-demo-quick")
    assert status == 2
    assert "holds another study" in err
    assert "--resume" in err


def test_train_runs_one_cell_of_the_same_study(quick_demo: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("DECONDENSE_CACHE", str(quick_demo / "cache"))
    status, _, err = run(
        capsys,
        "train",
        "demo",
        "--scale",
        "quick",
        "--arm",
        "dispersion",
        "--seed",
        1,
        "--seeds",
        2,
        "--out",
        tmp_path / "study",
    )
    assert status == 0, err
    mine = [json.loads(line) for line in (tmp_path / "study" / "rows.jsonl").read_text().splitlines()]
    demo = [json.loads(line) for line in (quick_demo / "decondense-demo-quick" / "rows.jsonl").read_text().splitlines()]
    # a row of the study itself stands before those of its runs
    theirs = [row for row in demo if "arm" not in row or (row["arm"] == "dispersion" and row["seed"] == 1)]
    for row in (*mine, *theirs):
        row.pop("timing", None), row.pop("provenance", None)
    assert mine == theirs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["study", "dmeo"], "Did you mean 'demo'"),
        (["study", "demo", "--scale", "hgue"], "unknown scale 'hgue'"),
        (["train", "demo", "--arm", "disperson"], "Did you mean 'dispersion'"),
        (["train", "demo", "--arm", "dispersion", "--seed", "7"], "seed 7 is not one of the study's seeds [0, 1, 2]"),
        (["compare", "nowhere"], "there is no rows.jsonl"),
        (["report", "nowhere"], "there is no rows.jsonl"),
        (["study", "missing/file.yaml"], "no such study file"),
        (["measure", "no-such-model-directory"], "no-such-model-directory"),
    ],
)
def test_mistakes_are_explained_without_a_traceback(arguments, message, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir()), "a refused command must leave nothing behind"


def test_usage_errors_and_unknown_verbs(capsys) -> None:
    status, _, err = run(capsys, "demmo")
    assert status == 2
    assert "demo" in err
    status, _, err = run(capsys, "demo", "--seeds", "zero")
    assert status == 2


def test_rows_with_a_torn_end_are_still_compared(quick_demo: Path, tmp_path: Path, capsys) -> None:
    data = (quick_demo / "decondense-demo-quick" / "rows.jsonl").read_bytes()
    (tmp_path / "rows.jsonl").write_bytes(data + b'{"kind": "st')
    status, _, _ = run(capsys, "compare", tmp_path)
    assert status == 0
    (tmp_path / "rows.jsonl").write_bytes(data[:4000] + b"\n" + data[4000:])
    status, _, err = run(capsys, "compare", tmp_path)
    assert status == 2
    assert "line" in err


def test_a_directory_without_write_permission(capsys, tmp_path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    status, _, err = run(capsys, "study", "demo", "--scale", "quick", "--out", blocked / "below")
    assert status == 2
    assert str(blocked) in " ".join(err.split())


def test_env_and_version(capsys) -> None:
    status, said, _ = run(capsys, "env")
    assert status == 0
    found = json.loads(said)
    assert found["versions"]["torch"]
    assert found["devices"]
    status, said, _ = run(capsys, "--version")
    assert said.strip() == f"decondense {decondense.__version__}"


def test_a_check_of_the_gpu_needs_one(capsys, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    status, said, err = run(capsys, "env", "--gpu")
    assert (status, said) == (2, "")
    assert "--gpu needs a GPU that torch can use" in " ".join(err.split())


def test_a_dry_run_shows_the_plan_and_runs_nothing(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    status, said, _ = run(capsys, "study", "demo", "--dry-run", "--seeds", 2)
    assert status == 0
    assert "4 runs; " in said
    assert "decondense study demo --scale tiny" not in said
    assert "decondense study demo --seeds 2 --out decondense-demo-tiny" in said
    assert not list(tmp_path.iterdir())


def test_the_comparison_fits_a_terminal_and_keeps_n(quick_demo: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    _, said, _ = run(capsys, "compare", quick_demo / "decondense-demo-quick")
    table = said.split("Held-out")[0].splitlines()
    assert all(len(line.rstrip()) <= 80 for line in table)
    (loss,) = [line for line in table if line.strip().startswith("validation loss")]
    assert loss.rstrip().endswith(" 2")
    assert "[" in loss
    assert "]" in loss
