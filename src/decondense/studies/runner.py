"""The runner: a study directory in, rows out; stop it anywhere and the same command goes on.

    OUT/study.yaml       the study, every default spelled out; its fingerprint says whose directory this is
    OUT/corpus.json      which text it is trained on
    OUT/cells/ARM/SEED/  one folder a cell, owned by whichever worker holds its lock
    OUT/rows.jsonl       the rows of all cells in a fixed order, rewritten whenever a cell ends
    OUT/logs/            what the workers printed

Workers are processes of their own; each takes the next cell that is neither done nor held. The lock is the operating
system's, so a killed worker's cell is free again, and two runners on one directory share the work instead of
spoiling it. This module needs no torch: only the workers do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from decondense.config import ConfigError, StudyConfig
from decondense.corpora.packed import PackedCorpus, load, prepare
from decondense.evaluate import check_benchmarks
from decondense.records import RecordError, Row, atomic_write, read_rows, write_rows

_POLL_SECONDS = 0.5


class StudyFailed(RuntimeError):
    """A worker stopped before its cells were done; what it had written is kept and the study can go on."""


@dataclass(frozen=True)
class CellState:
    """Progress of one cell, as far as its rows tell."""

    arm: str
    seed: int
    step: int
    steps: int
    loss: float | None
    status: str
    """``waiting``, ``running``, ``finished`` or ``failed``."""


class Watcher(Protocol):
    """Whoever shows the progress."""

    def corpus(self, what: str, done: int, total: int) -> None:
        """The text is being prepared."""

    def cells(self, states: list[CellState]) -> None:
        """The cells have moved on."""


class _Silent:
    def corpus(self, what: str, done: int, total: int) -> None:
        pass

    def cells(self, states: list[CellState]) -> None:
        pass


def cell_folder(out: Path, arm: str, seed: int) -> Path:
    """Folder of a cell. Only the runner uses the name; who a row belongs to is written in the row."""
    return out / "cells" / arm / f"seed-{seed}"


def plan(study: StudyConfig) -> list[tuple[str, int]]:
    """The cells (arm, seed) in the order in which they are taken: pair by pair, so that pairs are complete early."""
    return [(arm.name, seed) for seed in study.seeds for arm in study.arms]


def open_directory(study: StudyConfig, out: Path, *, resume: bool = False) -> StudyConfig:
    """Make ``out`` this study's directory, or check that it is, and return the study that lies there.

    Raises:
        ConfigError: the directory holds another study (unless ``resume`` asks to go on with that one), or other files.
    """
    path = out / "study.yaml"
    if path.exists():
        there = StudyConfig.from_yaml(path)
        if resume or there.fingerprint() == study.fingerprint():
            return there
        raise ConfigError(
            f"{out} holds another study ({there.name}, scale {there.scale}, seeds {list(there.seeds)}, fingerprint "
            f"{there.fingerprint()}; asked for: {study.name}, scale {study.scale}, seeds {list(study.seeds)}, "
            f"fingerprint {study.fingerprint()}). Choose another directory with --out, or go on with the one that "
            "lies there with --resume."
        )
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; --out names a directory.")
    if out.exists() and any(not item.name.startswith(".") for item in out.iterdir()):
        raise ConfigError(f"{out} is not empty and holds no study; choose a new or empty directory with --out.")
    if resume:
        raise ConfigError(f"{out} holds no study to resume; leave --resume away to start one.")
    atomic_write(path, study.to_yaml())
    return study


def study_corpus(study: StudyConfig, out: Path, watcher: Watcher | None = None) -> PackedCorpus:
    """The study's prepared text; the first call of a study fixes which text that is.

    Raises:
        ConfigError: the text differs from the one the study was begun with.
    """
    corpus = prepare(study.corpus, progress=None if watcher is None else watcher.corpus)
    path = out / "corpus.json"
    if path.exists():
        expected = json.loads(path.read_text())["content_hash"]
        if expected != corpus.content_hash:
            raise ConfigError(
                f"{out} was begun on the text {expected}, but {study.corpus.source!r} is now {corpus.content_hash} "
                "(a changed file, or other installed versions). Start again in another directory."
            )
    else:
        atomic_write(path, json.dumps({**corpus.manifest, "path": str(corpus.path)}, indent=1))
    return corpus


def opened_corpus(out: Path) -> PackedCorpus:
    """The text that :func:`study_corpus` fixed, for a worker."""
    manifest = json.loads((out / "corpus.json").read_text())
    corpus = load(Path(manifest["path"]))
    if corpus is None or corpus.content_hash != manifest["content_hash"]:
        raise ConfigError(f"the prepared text in {manifest['path']} is gone or damaged; run the study again.")
    return corpus


def collect(study: StudyConfig, out: Path) -> list[Row]:
    """The rows of all cells in the order of the plan; cells without rows contribute none."""
    rows: list[Row] = []
    for arm, seed in plan(study):
        path = cell_folder(out, arm, seed) / "rows.jsonl"
        if path.exists():
            rows += read_rows(path, check=False)
    return rows


def states(study: StudyConfig, out: Path) -> list[CellState]:
    """Where every cell is, read from its rows."""
    found = []
    for arm, seed in plan(study):
        path = cell_folder(out, arm, seed) / "rows.jsonl"
        try:
            rows = read_rows(path, check=False) if path.exists() else []
        except RecordError:  # replaced while being read
            rows = []
        status, step, loss = "waiting", 0, None
        for row in rows:
            if row["kind"] == "run":
                status = row["status"] if row["status"] in ("finished", "failed") else "running"
            elif row["kind"] == "step":
                step, loss = row["step"], row["loss"]
        found.append(CellState(arm, seed, step, study.train.steps, loss, status))
    return found


def default_workers(study: StudyConfig) -> int:
    """As many CPU runs side by side as there are cores for their threads; one on a machine with a GPU."""
    if _has_gpu():
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores // (study.train.threads or cores), len(plan(study))))


def _has_gpu() -> bool:
    # asked of the driver's own files: importing torch for it would cost this process seconds
    return any(Path("/dev").glob("nvidia[0-9]*"))


def run_study(
    study: StudyConfig,
    out: str | Path,
    *,
    workers: int | None = None,
    resume: bool = False,
    retry_failed: bool = False,
    watcher: Watcher | None = None,
) -> list[Row]:
    """Run a study to its end and return all its rows; they also stand in ``out/rows.jsonl``.

    Done cells are skipped. After an interruption, a kill or a power cut, call it again with the same arguments: every
    cell goes on from its newest checkpoint and the rows come out as if nothing had happened.

    Args:
        study: what to run.
        out: the study's directory.
        workers: processes side by side; None: :func:`default_workers`; 0: in this process.
        resume: go on with the study that lies in ``out``, whatever ``study`` says.
        retry_failed: start failed cells again.
        watcher: shows the progress.

    Raises:
        ConfigError: the directory holds another study, or the configuration cannot be run.
        StudyFailed: a worker stopped early; its log is named.
    """
    out = Path(out)
    watcher = watcher or _Silent()
    check_benchmarks(study.evaluate)
    study = open_directory(study, out, resume=resume)
    if workers == 0:
        from decondense.studies.worker import work

        study_corpus(study, out, watcher)
        work(out, retry_failed=retry_failed)
    else:
        # the workers load torch while the text is being prepared
        wanted = default_workers(study) if workers is None else workers
        pending = [state for state in states(study, out) if state.status != "finished"]
        processes = [_start(out, index, retry_failed) for index in range(min(wanted, len(pending)))]
        try:
            study_corpus(study, out, watcher)
            _watch(study, out, processes, watcher)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.terminate()
            for process in processes:
                process.wait()
    rows = collect(study, out)
    write_rows(out / "rows.jsonl", rows)
    watcher.cells(states(study, out))
    _check_complete(study, out)
    return rows


def _start(out: Path, index: int, retry_failed: bool) -> subprocess.Popen[bytes]:
    log = out / "logs" / f"worker-{index}.log"
    log.parent.mkdir(exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "decondense.studies.worker",
        str(out),
        *(["--retry-failed"] if retry_failed else []),
    ]
    # glibc returns every large block to the kernel and faults it in again at the next step; keeping them saves a
    # small model on a CPU about a seventh of its time
    keep = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
    with log.open("ab") as handle:
        return subprocess.Popen(
            command, stdout=handle, stderr=handle, stdin=subprocess.DEVNULL, env={**keep, **os.environ}
        )


def _watch(study: StudyConfig, out: Path, processes: Iterable[subprocess.Popen[bytes]], watcher: Watcher) -> None:
    ended = -1
    alive = list(processes)
    while alive:
        alive = [process for process in alive if process.poll() is None]
        now = states(study, out)
        watcher.cells(now)
        finished = sum(state.status in ("finished", "failed") for state in now)
        if finished != ended:
            ended = finished
            write_rows(out / "rows.jsonl", collect(study, out))
        if alive:
            time.sleep(_POLL_SECONDS)


def _check_complete(study: StudyConfig, out: Path) -> None:
    left = [state for state in states(study, out) if state.status not in ("finished", "failed")]
    if not left:
        return
    names = ", ".join(f"{state.arm} seed {state.seed}" for state in left)
    tails = []
    for log in sorted((out / "logs").glob("worker-*.log")) if (out / "logs").is_dir() else []:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        if lines:
            tails.append(f"{log}: {lines[-1]}")
    said = (" The workers' last words:\n" + "\n".join(tails)) if tails else ""
    raise StudyFailed(
        f"not finished: {names}. Nothing is lost: the same command goes on from the last checkpoints.{said}"
    )
