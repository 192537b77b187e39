"""A reader of the output that leaves (``decondense ... | head``) ends no command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "demo.jsonl"


def without_reader(*words: object) -> subprocess.CompletedProcess[str]:
    """The command, writing to a pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    try:
        command = [sys.executable, "-m", "decondense", *map(str, words)]
        return subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(write)


@pytest.mark.parametrize("words", [["compare"], ["compare", "--json"]])
def test_what_only_prints_ends_without_a_complaint(words: list[str]) -> None:
    done = without_reader(words[0], DEMO, *words[1:])
    assert (done.returncode, done.stderr) == (0, "")


def test_files_are_written_all_the_same(tmp_path: Path) -> None:
    done = without_reader("report", DEMO, "--out", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "report.html").stat().st_size > 10_000


@pytest.mark.slow
def test_a_study_trains_to_its_end(tmp_path: Path) -> None:
    done = without_reader("demo", "--quick", "--out", tmp_path / "demo")
    assert done.returncode == 0
    assert (tmp_path / "demo" / "report.html").is_file()
