"""The progress display where there is no terminal, and the verbs that use it."""

from __future__ import annotations

import io
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from decondense.cli import display, main
from decondense.cli.display import Display, EvaluationDisplay, StudyDisplay
from decondense.studies import CellState


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def log() -> Console:
    """As a log file is: no terminal, no width."""
    return Console(file=io.StringIO(), force_terminal=False, width=80)


def lines(console: Console) -> list[str]:
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def wait_for(condition, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "no line came"
        time.sleep(0.005)


def test_lines_come_while_nothing_moves() -> None:
    """One long step (a download, a slow batch) is not silent: the lines come with the clock, not with the work."""
    console = log()
    with Display(console, every=0.01) as shown:
        shown.update("load", "loading x")
        wait_for(lambda: len(lines(console)) >= 3)
    assert all(line.startswith("loading x: ") for line in lines(console))
    count = len(lines(console))
    time.sleep(0.03)
    assert len(lines(console)) == count  # nothing after the end


def test_quick_work_prints_nothing_but_its_ends() -> None:
    console = log()
    with Display(console) as shown:
        for done in range(100):
            shown.update("a", "measuring a", done, 100)
        shown.finish("a", "measuring a", "100 passages")
        shown.finish("a", "measuring a", "again")
    assert lines(console) == ["measuring a: 100 passages"]


@pytest.mark.parametrize(
    ("first", "seconds", "done", "expected"),
    [
        (0, 40, 10, "x: 10/50, half, 40 s, about 3 min left"),  # 4 s each, 40 left
        (20, 60, 30, "x: 30/50, half, 60 s, about 2 min left"),  # resumed at 20: 6 s each, 20 left
        (20, 60, 20, "x: 20/50, half, 60 s"),  # no pace yet
    ],
)
def test_what_is_left_follows_from_the_pace_of_this_run(first, seconds, done, expected) -> None:
    clock, console = Clock(), log()
    shown = Display(console, clock=clock)
    shown.update("x", "x", first, 50)
    clock.now += seconds
    shown.update("x", "x", done, 50, "half")
    assert shown._lines() == [expected]


def test_long_names_stay_on_one_line_and_are_no_markup() -> None:
    console = log()
    with Display(console, every=0.01) as shown:
        shown.update("x", "[bold]" + "long/" * 40, 1, 2)
        wait_for(lambda: lines(console))
    assert lines(console)[0].startswith("[bold]long/")
    assert lines(console)[0].count("long/") == 40


def test_a_reader_that_is_gone_does_not_stop_the_work() -> None:
    console = log()
    with Display(console, every=0.01) as shown:
        shown.update("x", "x", 1, 2)
        console.file.close()  # type: ignore[attr-defined]
        wait_for(lambda: not shown._thread.is_alive())
        shown.update("x", "x", 2, 2)


def test_a_terminal_gets_bars_and_no_lines() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80)
    with Display(console, every=0.0) as shown:
        shown.update("x", "measuring", 1, 2)
        assert shown._thread is None
    assert "about" not in out.getvalue()


def cell(arm: str, status: str, step: int = 0, steps: int = 50, loss: float | None = None) -> CellState:
    return CellState(arm, 0, step, steps, loss, status)


def test_a_study_shows_what_runs_and_says_what_ended() -> None:
    clock, console = Clock(), log()
    shown = Display(console, clock=clock)
    study = StudyDisplay(shown)
    study.corpus("tokenising", 1, 4)
    study.corpus("tokenising", 4, 4)
    study.cells([cell("a", "running", 1, loss=4.0), cell("b", "waiting"), cell("c", "waiting", steps=0)])
    clock.now += 10
    study.cells([cell("a", "running", 11, loss=3.0), cell("b", "waiting"), cell("c", "waiting", steps=0)])
    assert shown._lines() == ["a, seed 0: 11/50, loss 3.000, 10 s, about 39 s left", "runs: 0/3, 10 s"]
    study.cells([cell("a", "finished", 50, loss=2.5), cell("b", "failed"), cell("c", "running", steps=0)])
    assert shown._lines() == ["runs: 2/3, 10 s, about 5 s left", "c, seed 0: 1 s"]
    for _ in range(2):
        study.cells([cell("a", "finished", 50, loss=2.5), cell("b", "failed"), cell("c", "finished", steps=0)])
    assert shown._lines() == []
    assert lines(console) == [
        "tokenising: 4/4",
        "a, seed 0: step 50/50, loss 2.500",
        "b, seed 0: failed",
        "c, seed 0: finished",
    ]


def test_a_damaged_file_of_results_is_said_before_its_task_is_scored_again() -> None:
    console = log()
    tell = EvaluationDisplay(Display(console))
    for what in ("damaged", "running", "done"):
        tell("piqa", what, 7, 7)
    assert lines(console) == ["piqa: its file of results is damaged or unreadable: scored again", "piqa: 7 items"]


def test_an_evaluation_shows_one_task_at_a_time() -> None:
    console = log()
    shown = Display(console)
    tell = EvaluationDisplay(shown)
    tell("", "loading", 0, None)
    tell("piqa", "scoring", 3, 9)
    assert shown.active() == ["piqa"]
    tell("piqa", "done", 9, 9)
    tell("mmlu", "kept", 1, 1)
    tell("lambada", "failed", 0, None)
    assert lines(console) == ["piqa: 9 items", "mmlu: kept from before", "lambada: failed"]


def test_measure_into_a_log_is_not_silent(tmp_path: Path, capsys, monkeypatch) -> None:
    from tiny_models import TEXT, save

    monkeypatch.setattr(display, "EVERY", 0.0)
    (tmp_path / "text.txt").write_text(TEXT)
    save(tmp_path / "model", 16)
    source = ["--text", str(tmp_path / "text.txt"), "--passages", "6", "--words", "60", "80", "--tokens", "32"]
    assert main(["measure", str(tmp_path / "model"), *source, "--batch-size", "1", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^loading .*/model: \d+ s$", shown, re.MULTILINE)
    assert re.search(r"^measuring model: \d/6, \d+ s(, about \d+ s left)?$", shown, re.MULTILINE)


ROWS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "demo.jsonl"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("words", [["compare", str(ROWS)], ["compare", "no\udcff−日.jsonl"]], ids=["rows", "a name"])
def test_every_encoding_takes_what_is_printed(encoding: str, words: list[str], monkeypatch: Any) -> None:
    """A narrow encoding gets the same numbers, with their signs; what has no plain form gets its code."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    status = main(words)
    text = "".join((stream.flush(), stream.buffer.getvalue().decode(encoding))[1] for stream in (out, err))
    if words[1] == str(ROWS):
        assert status == 0
        assert "validation" in text
        assert ("−" in text) == (encoding == "utf-8")
        assert re.search(r"[-−]0\.\d", text)
        assert "\\u" not in text
    else:
        assert status == 2
        assert "\\udcff" in text


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_the_c_locales_streams_take_signs_and_names_of_files(encoding: str, monkeypatch: Any) -> None:
    """Python opens standard output with ``surrogateescape`` there, which alone takes no minus sign."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="surrogateescape") for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert main(["compare", str(ROWS)]) == 0
    out.flush()
    text = out.buffer.getvalue().decode(encoding)
    assert re.search(r"[-−]0\.\d", text)
    assert ("−" in text) == (encoding == "utf-8")
    assert main(["compare", "no\udcfe\udcff−.jsonl"]) == 2
    err.flush()
    assert b"no\xfe\xff" in err.buffer.getvalue(), "the bytes of the name"
