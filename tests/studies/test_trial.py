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
