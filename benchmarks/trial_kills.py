"""Kills at random moments of a tiny study that sweeps, trains a start first and resumes; part of ``trial.py``.

A moment is a number of rows that have been written, or what a young start has made so far: how fast the machine is
changes nothing but the duration. Only :data:`ENDS_WITHIN` is a time that is promised.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from decondense.records import RecordError, Row, read_rows, stable

ENDS_WITHIN = 5.0
"""Seconds that workers have after the end of their runner."""
STUCK_AFTER = 1800.0
KILLS_EACH = 5
"""Kills of one study directory, before it is left to end."""
ROWS = 70
"""About as many rows as the tasks of the study write."""
YOUNG = ("nothing", "study.yaml", "a worker", "corpus.json")
"""What a start has made when it is killed while it is young."""
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
    "model": {"pretrained": "prepared:base"},
    "prepared": {"base": {"model": {"architecture": "gpt2", "overrides": SIZE}, "train": {"steps": 20}}},
    "sweep": {"learning_rates": [0.001, 0.003]},
    "train": {"steps": 40, "batch_size": 4, "max_seq_length": 32, "log_every": 5, "checkpoint_every": 10},
    "evaluate": {"points": [0, 1], "validation_tokens": 512, "passages": 2, "passage_tokens": 16},
}


def write_study(folder: Path, **changes: Any) -> Path:
    """The study's file and its text."""
    words = random.Random(0)
    names = ["".join(words.choices("abcdefghij", k=words.randint(2, 7))) for _ in range(300)]
    lines = [json.dumps({"text": " ".join(words.choices(names, k=120))}) for _ in range(200)]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    corpus = {"source": str(folder / "text.jsonl"), "vocab_size": 300, "held_out": 0.3}
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


class Series:
    """One study directory: the same command is started and killed until the study is whole."""

    def __init__(self, study: Path, folder: Path) -> None:
        self.study, self.folder = study, folder
        self.out, self.cache = folder / "out", folder / "cache"
        folder.mkdir()
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
            )
        _SESSIONS.append(process.pid)
        return process

    def rows(self) -> int:
        """Lines of rows so far."""
        count = 0
        for path in self.files():
            with contextlib.suppress(FileNotFoundError):  # a study at work replaces files
                count += path.read_bytes().count(b"\n")
        return count

    def files(self) -> list[Path]:
        """The files of rows of all tasks; without a look into checkpoints, which come and go."""
        return [
            path for name in ("prepared/*", "sweep/*/*", "cells/*/*") for path in self.out.glob(f"{name}/rows.jsonl")
        ]

    def has(self, what: str, session: int) -> bool:
        """Whether a start got so far; see :data:`YOUNG`."""
        if what == "a worker":
            return bool(workers(session))
        return what == "nothing" or (self.out / what).exists()

    def valid(self) -> bool:
        """Whether every row that was written can be read."""
        try:
            for path in self.files():
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


def resumed(series: Series) -> int:
    """Runs of a finished study that resumed from a checkpoint."""
    rows = [row for path in series.files() for row in read_rows(path)]
    return sum(bool(row.get("timing", {}).get("resumed_from_steps")) for row in rows if row.get("status") == "finished")


def told(series: Series, status: int, number: int) -> bool:
    """Whether a signalled runner ended with 128 + signal and a sentence, or had not begun: it prints its plan first."""
    text = series.printed.read_text(errors="replace")
    if status == -number:
        return not text.strip()
    return status == 128 + number and ("goes on" in text or "resume" in text)


COUNTS = ("tried", "survived", "tracebacks", "silent", "left_running", "resumed")


def run(count: int, seed: int, folder: Path, jobs: int = 2, say: Any = print) -> dict[str, Any]:
    """``count`` kills; the counts of the table, and what went wrong in words.

    Raises:
        RuntimeError: the study cannot be run at all.
    """
    study = write_study(folder)
    began = time.monotonic()
    shares = [min(KILLS_EACH, count - first) for first in range(0, count, KILLS_EACH)]
    with ThreadPoolExecutor(max(1, jobs)) as pool:
        whole = pool.submit(_undisturbed, study, folder / "whole", say)
        parts = [pool.submit(_Part(study, folder, seed, n, whole, say).run, share) for n, share in enumerate(shares)]
        found = [part.result() for part in parts]
        whole.result()
    sums = {name: sum(part.found[name] for part in found) for name in COUNTS}
    problems = [problem for part in found for problem in part.problems]
    return {**sums, "problems": problems, "seconds": round(time.monotonic() - began, 1)}


def _undisturbed(study: Path, folder: Path, say: Any) -> list[Row]:
    series = Series(study, folder)
    status = series.start().wait()
    if status != 0:
        raise RuntimeError(f"the undisturbed study ended with status {status}: {series.text()[-2000:]}")
    say(f"undisturbed: {series.rows()} rows of tasks")
    return series.result()


class _Part:
    """Some of the kills, in directories of their own."""

    def __init__(self, study: Path, folder: Path, seed: int, number: int, whole: Future[list[Row]], say: Any) -> None:
        self.study, self.folder, self.number, self.whole, self.say = study, folder, number, whole, say
        self.chance = random.Random(f"{seed}-{number}")
        self.order = random.Random(seed).sample(MOMENTS, len(MOMENTS))
        self.found = dict.fromkeys(COUNTS, 0)
        self.problems: list[str] = []

    def run(self, count: int) -> _Part:
        """``count`` kills."""
        series, starts = None, 0
        while self.found["tried"] < count:
            if (starts := starts + 1) > 4 * count + 4:
                raise RuntimeError(f"{starts} starts for {self.found['tried']} kills: {'; '.join(self.problems)}")
            series = series or Series(self.study, self.folder / f"series-{self.number}-{starts}")
            tried = self.found["tried"]
            target, name = self.order[(self.number * KILLS_EACH + tried) % len(self.order)]
            young = tried % 3 == 0
            what = self.chance.choice(YOUNG) if young else self.chance.randint(min(series.rows(), ROWS), ROWS)
            if young and name == "SIGINT":  # Python answers with a traceback of its own until a program has begun
                what = "a worker"
            pause = self.chance.uniform(0, 2)
            killed = _killed(series, target, name, (what, pause), self.found, self.problems)
            if killed:
                self.found["tried"] += 1
                series.kills += 1
                there = f"{what} of {ROWS} rows" if isinstance(what, int) else what
                self.say(f"series {self.number}: {name} to the {target}, {pause:.1f} s behind {there}")
            if not killed or self.found["tried"] == count:
                _finish(series, self.whole.result(), self.found, self.problems)
                self.say(f"series {self.number}: whole after {series.kills} kills; {self.found['survived']} survived")
                series = None
        return self


def _killed(
    series: Series,
    target: str,
    name: str,
    moment: tuple[int | str, float],
    found: dict[str, Any],
    problems: list[str],
) -> bool:
    """Start, wait for what the moment names and then so long, kill; False when the command ended before."""
    number = getattr(signal, name)
    process = series.start()
    what, pause = moment

    def early() -> bool:
        nonlocal pause
        there = series.rows() >= what if isinstance(what, int) else series.has(what, process.pid)
        if not there or (target == "worker" and not workers(process.pid)):
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
        with contextlib.suppress(ProcessLookupError):
            os.kill(there[0], number)
    case = f"{name} to the {target} at {moment}"
    try:
        status = process.wait(STUCK_AFTER)
    except subprocess.TimeoutExpired:
        problems.append(f"{case}: the runner did not end")
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
            problems.append(f"{case}: {word}: {series.text()[-400:]!r}")
    for log in series.out.glob("logs/*.log"):
        log.write_bytes(b"")
    if not series.valid():
        problems.append(f"{case}: rows that cannot be read")
    return True


def _finish(series: Series, expected: list[Row], found: dict[str, Any], problems: list[str]) -> None:
    """Let the study end, and compare: its kills are survived when the rows are those of the undisturbed study."""
    process = series.start()
    status = process.wait(2 * STUCK_AFTER)
    found["left_running"] += left_running(process.pid)
    found["tracebacks"] += "Traceback (most recent call last)" in series.text()
    found["resumed"] += resumed(series)
    if status == 0 and series.result() == expected:
        found["survived"] += series.kills
        return
    found["silent"] += status == 0
    problems.append(f"after {series.kills} kills: status {status}, rows not equal: {series.text()[-400:]!r}")
