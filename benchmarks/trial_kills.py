"""Kills at random moments of a tiny study that sweeps, trains a start first and resumes; part of ``trial.py``.

A moment is a share of the time that a start takes, or a number of rows that have been written: how fast the machine is
changes nothing but the duration. Only :data:`ENDS_WITHIN` is a time that is promised.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from decondense.records import RecordError, Row, read_rows, stable

ENDS_WITHIN = 5.0
"""Seconds that workers have after the end of their runner."""
STUCK_AFTER = 600.0
MOMENTS = (
    *((("runner", name)) for name in ("SIGKILL", "SIGTERM", "SIGHUP", "SIGINT", "SIGUSR1")),
    *((("worker", name)) for name in ("SIGKILL", "SIGTERM", "SIGUSR1")),
    *((("group", name)) for name in ("SIGKILL", "SIGTERM", "SIGHUP", "SIGINT")),
)
SIZE = {"n_layer": 2, "n_embd": 16, "n_head": 2}
STUDY: dict[str, Any] = {
    **{"name": "trial", "title": "Trial", "question": "Are the rows equal?", "baseline": "cross-entropy"},
    "arms": [{"name": "cross-entropy", "learning_rate": 0.001}, {"name": "dispersion", "dispersion": {"weight": 1.0}}],
    "seeds": [0],
    "model": {"start": "prepared:base"},
    "prepared": {"base": {"model": {"architecture": "gpt2", "overrides": SIZE}, "train": {"steps": 20}}},
    "sweep": {"learning_rates": [0.001, 0.003]},
    "train": {"steps": 40, "batch_sequences": 4, "sequence_tokens": 32, "log_every": 5, "checkpoint_every": 10},
    "evaluate": {"points": [0, 1], "validation_tokens": 512, "passages": 2, "passage_tokens": 16},
}


def write_study(folder: Path, **changes: Any) -> Path:
    """The study's file and its text."""
    words = random.Random(0)
    names = ["".join(words.choices("abcdefghij", k=words.randint(2, 7))) for _ in range(300)]
    lines = [json.dumps({"text": " ".join(words.choices(names, k=120))}) for _ in range(200)]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    corpus = {"source": str(folder / "text.jsonl"), "vocabulary": 300, "held_out": 0.3}
    path = folder / "study.yaml"
    path.write_text(json.dumps({**STUDY, "corpus": corpus, **changes}))  # JSON is YAML
    return path


def living(session: int) -> list[int]:
    """The processes of a session that have not ended."""
    found = []
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = place.read_text().rsplit(")", 1)[1].split()
        except (OSError, IndexError):
            continue
        if int(fields[3]) == session and fields[0] not in "ZX":
            found.append(int(place.parent.name))
    return found


def workers(session: int) -> list[int]:
    """Those of them that are workers."""
    found = []
    for pid in living(session):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"decondense.studies.worker" in words:
            found.append(pid)
    return found


def left_running(session: int) -> int:
    """Processes of a session that are there :data:`ENDS_WITHIN` seconds from now; they are ended then."""
    limit = time.monotonic() + ENDS_WITHIN
    while living(session) and time.monotonic() < limit:
        time.sleep(0.05)
    left = living(session)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return len(left)


_SESSIONS: list[int] = []


def end_all() -> None:
    """End every process that was started here."""
    for session in _SESSIONS:
        for pid in living(session):
            os.kill(pid, signal.SIGKILL)


def _receptive() -> None:
    """Whoever started the trial in the background may ignore signals, and that would be inherited."""
    for name in ("SIGINT", "SIGHUP", "SIGTERM", "SIGUSR1"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)


class Series:
    """One study directory: the same command is started and killed until the study is whole."""

    def __init__(self, study: Path, folder: Path) -> None:
        self.study, self.folder = study, folder
        self.out, self.cache = folder / "out", folder / "cache"
        self.kills = 0
        self.starts = 0

    def start(self) -> subprocess.Popen[bytes]:
        """The study in a session of its own, so that its group can be signalled and its processes counted."""
        self.starts += 1
        command = [sys.executable, "-m", "decondense", "study", str(self.study), "--out", str(self.out)]
        self.printed = self.folder / f"start-{self.starts}.txt"
        with self.printed.open("wb") as printed:
            process = subprocess.Popen(
                [*command, "--workers", "2"],
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=printed,
                env={**os.environ, "DECONDENSE_CACHE": str(self.cache)},
                start_new_session=True,
                preexec_fn=_receptive,
            )
        _SESSIONS.append(process.pid)
        return process

    def rows(self) -> int:
        """Lines of rows so far."""
        return sum(path.read_bytes().count(b"\n") for path in self.out.glob("*/**/rows.jsonl"))

    def valid(self) -> bool:
        """Whether every row that was written can be read."""
        try:
            for path in self.out.glob("*/**/rows.jsonl"):
                read_rows(path)
        except RecordError:
            return False
        return True

    def text(self) -> str:
        """What was printed, by the runner since its last start and by all workers."""
        logs = [self.printed, *self.out.glob("logs/*.log")]
        return "\n".join(path.read_text(errors="replace") for path in logs if path.exists())

    def result(self) -> list[Row]:
        return [stable(row) for row in read_rows(self.out / "rows.jsonl")]


def resumed(out: Path) -> int:
    """Runs of a finished study that went on from a checkpoint."""
    rows = [row for path in out.glob("*/**/rows.jsonl") for row in read_rows(path)]
    return sum(bool(row.get("timing", {}).get("resumed_from_steps")) for row in rows if row.get("status") == "finished")


def told(series: Series, status: int, number: int) -> bool:
    """Whether a signalled runner ended with 128 + signal and a sentence, or had not begun: it prints its plan first."""
    text = series.printed.read_text(errors="replace")
    if status == -number:
        return not text.strip()
    return status == 128 + number and ("goes on" in text or "resume" in text)


def run(count: int, seed: int, folder: Path, say: Any = print) -> dict[str, Any]:
    """``count`` kills; the counts of the table, and what went wrong in words."""
    chance = random.Random(seed)
    study = write_study(folder)
    whole = Series(study, folder / "whole")
    whole.folder.mkdir()
    began = time.monotonic()
    process = whole.start()
    first = 0.0
    while process.poll() is None:
        if not first and whole.rows():
            first = time.monotonic() - began
        time.sleep(0.05)
    if process.returncode != 0:
        raise RuntimeError(f"the undisturbed study ended with status {process.returncode}: {whole.text()[-2000:]}")
    lasted, expected, lines = time.monotonic() - began, whole.result(), whole.rows()
    say(f"undisturbed: {lasted:.0f} s, {len(expected)} rows")
    found: dict[str, Any] = dict.fromkeys(("tried", "survived", "tracebacks", "silent", "left_running", "resumed"), 0)
    problems: list[str] = []
    order = list(MOMENTS)
    chance.shuffle(order)
    series, starts = None, 0
    while found["tried"] < count:
        if (starts := starts + 1) > 4 * count + 8:
            raise RuntimeError(f"{starts} starts for {found['tried']} kills: {'; '.join(problems)}")
        if series is None:
            series = Series(study, folder / f"series-{starts}")
            series.folder.mkdir()
        target, name = order[found["tried"] % len(order)]
        there = series.rows()
        # every third kill while the start is young, where there are no new rows yet
        moment = (
            (0, chance.uniform(0, first))
            if found["tried"] % 3 == 0
            else (chance.randint(there, max(there, lines - 1)), chance.uniform(0, 1))
        )
        killed = _killed(series, target, name, moment, found, problems)
        if killed:
            found["tried"] += 1
            series.kills += 1
            say(f"{found['tried']:3d} {name} to the {target} at {moment[0]} of {lines} rows and {moment[1]:.1f} s")
        if not killed or series.kills >= 5 or found["tried"] == count:
            _finish(series, expected, found, problems)
            say(f"    whole after {series.kills} kills; {found['survived']} survived")
            series = None
    return {**found, "problems": problems, "seconds": round(time.monotonic() - began, 1)}


def _killed(
    series: Series,
    target: str,
    name: str,
    moment: tuple[int, float],
    found: dict[str, Any],
    problems: list[str],
) -> bool:
    """Start, wait for so many rows and then so long, kill; False when the command ended before."""
    number = getattr(signal, name)
    process = series.start()
    count, pause = moment

    def early() -> bool:
        nonlocal pause
        if series.rows() < count or (target == "worker" and not workers(process.pid)):
            return True
        pause -= 0.05
        return pause > 0

    while process.poll() is None and early():
        time.sleep(0.05)
    if process.poll() is not None:
        if process.returncode != 0:
            problems.append(f"a start after {series.kills} kills ended with status {process.returncode}")
            found["silent"] += not series.printed.read_text(errors="replace").strip()
        return False
    if target == "group":
        os.killpg(process.pid, number)
    else:
        there = workers(process.pid) if target == "worker" else [process.pid]
        if not there:
            process.wait(STUCK_AFTER)
            return False
        os.kill(there[0], number)
    what = f"{name} to the {target} at {moment}"
    try:
        status = process.wait(STUCK_AFTER)
    except subprocess.TimeoutExpired:
        problems.append(f"{what}: the runner did not end")
        process.kill()
        status = process.wait()
    left = left_running(process.pid)
    traceback = "Traceback (most recent call last)" in series.text()
    silent = False
    if target != "worker" and name != "SIGKILL":
        silent = status != 0 and not told(series, status, number)  # 0: the study was whole at that moment
    elif target == "worker":
        silent = status != 0 and not series.printed.read_text(errors="replace").strip()
    found["left_running"] += left
    found["tracebacks"] += traceback
    found["silent"] += silent
    for wrong, word in ((left, f"{left} left running"), (traceback, "a traceback"), (silent, f"silent, {status}")):
        if wrong:
            problems.append(f"{what}: {word}: {series.text()[-400:]!r}")
    for log in series.out.glob("logs/*.log"):
        log.write_bytes(b"")
    if not series.valid():
        problems.append(f"{what}: rows that cannot be read")
    return True


def _finish(series: Series, expected: list[Row], found: dict[str, Any], problems: list[str]) -> None:
    """Let the study end, and compare: its kills are survived when the rows are those of the undisturbed study."""
    process = series.start()
    status = process.wait(2 * STUCK_AFTER)
    found["left_running"] += left_running(process.pid)
    found["tracebacks"] += "Traceback (most recent call last)" in series.text()
    found["resumed"] += resumed(series.out)
    if status == 0 and series.result() == expected:
        found["survived"] += series.kills
        return
    found["silent"] += status == 0
    problems.append(f"after {series.kills} kills: status {status}, rows not equal: {series.text()[-400:]!r}")
