"""The trial of kills, damaged files and hostile folders (`make trial`), small."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from decondense.records import read_rows

TRIAL = Path(__file__).resolve().parents[2] / "benchmarks" / "trial.py"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_small_trial_finds_nothing(tmp_path: Path) -> None:
    counts = ["--kills", "2", "--files", "20", "--folders", "4", "--seed", "1"]
    done = subprocess.run(
        [sys.executable, str(TRIAL), *counts, "--out", str(tmp_path / "trial.jsonl")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    rows = {row["variant"]: row["metrics"] for row in read_rows(tmp_path / "trial.jsonl")}
    assert [rows[part]["tried"] for part in ("kills", "files", "folders")] == [2, 20, 4]
    assert rows["files"]["refused"] > 0, "damage that nothing notices tries nothing"


@pytest.fixture
def trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TRIAL.parent))


@pytest.mark.parametrize(
    ("status", "text", "certain", "counted"),
    [
        (0, "", False, "survived"),
        (0, "", True, "silent"),  # damage that cannot be overlooked
        (0, "warning: a.npz is cut", True, "survived"),
        (2, "error: a.npz: damaged", False, "survived"),
        (2, "error: a.n\npz: damaged", False, "survived"),  # a terminal breaks lines
        (2, "error: damaged", False, "silent"),
        (2, "", False, "silent"),
        ("Traceback ...", "", False, "tracebacks"),
        (1, "Traceback (most recent call last)", False, "tracebacks"),
        ("stuck", "", False, "left_running"),
    ],
)
def test_each_end_of_a_command_is_counted_once(trial, status, text: str, certain: bool, counted: str) -> None:
    from trial_inputs import Done, Tally

    tally = Tally()
    tally.add("case", Done(status, text), Path("a.npz"), certain=certain)
    names = ("survived", "silent", "tracebacks", "left_running", "code_run")
    assert {name: getattr(tally, name) for name in names} == {name: int(name == counted) for name in names}


def test_kills_of_a_study_that_cannot_start_end_with_its_error(trial, tmp_path: Path, monkeypatch) -> None:
    import trial_kills

    monkeypatch.setitem(trial_kills.STUDY, "baseline", "nobody")
    with pytest.raises(RuntimeError, match="nobody"):
        trial_kills.run(1, 0, tmp_path, say=lambda text: None)
