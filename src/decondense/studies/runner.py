"""The runner: a study directory in, rows out; stop it anywhere and the same command goes on.

    OUT/study.yaml           the study, every default spelled out; its fingerprint says whose directory this is
    OUT/corpus.json          which text it is trained on
    OUT/prepared/NAME/       a model that the study trains first
    OUT/sweep/ARM/RATE/      an arm tried at a learning rate
    OUT/cells/ARM/seed-SEED/ one folder a cell, owned by whichever worker holds its lock
    OUT/rows.jsonl           the rows of all trials and cells in a fixed order, rewritten whenever one of them ends
    OUT/logs/                what the workers printed

A study is a list of tasks: prepared models, then trials, then cells; a task waits for those that it needs. Workers are
processes of their own; each takes the next task that is ready and neither done nor held. The lock is the operating
system's, so a killed worker's task is free again, and two runners on one directory share the work instead of
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
from typing import Literal, Protocol

from decondense.config import ArmConfig, ConfigError, StudyConfig
from decondense.corpora.packed import PackedCorpus, load, prepare
from decondense.evaluate import check_benchmarks
from decondense.records import (
    COMMAND,
    RecordError,
    Row,
    atomic_write,
    command_line,
    make_row,
    read_rows,
    terminal_row,
    write_rows,
)

_POLL_SECONDS = 0.5


class StudyFailed(RuntimeError):
    """A worker stopped before its cells were done; what it had written is kept and the study can go on."""


@dataclass(frozen=True)
class CellState:
    """Progress of one task, as far as its rows tell."""

    arm: str
    """The arm; for a model that is trained first ``prepared NAME``, for a trial the arm and its rate."""
    seed: int
    step: int
    steps: int
    loss: float | None
    status: str
    """``waiting``, ``running``, ``finished`` or ``failed``."""
    kind: Literal["prepared", "trial", "cell"] = "cell"


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


@dataclass(frozen=True)
class Task:
    """One training run of a study's directory, and what must be done before it."""

    kind: Literal["prepared", "trial", "cell"]
    name: str
    """How progress and messages call it."""
    study: StudyConfig
    """Whose run it is: the study itself, or for a prepared model or a trial the small study made for it."""
    arm: str
    seed: int
    folder: Path
    needs: tuple[Path, ...] = ()
    """Folders of the tasks that must have ended."""

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return 0 if self.study.arm(self.arm).untrained else self.study.train.steps


def prepared_folder(out: Path, name: str) -> Path:
    """Folder of a prepared model's run; the model itself lies in ``final`` below it."""
    return out / "prepared" / name


def trial_folder(out: Path, arm: str, rate: float) -> Path:
    """Folder of a trial."""
    return out / "sweep" / arm / f"{rate:g}"


def _prepared_study(study: StudyConfig, name: str) -> StudyConfig:
    entry = study.prepared[name]
    return StudyConfig.parse(
        {
            "name": f"{study.name}.prepared.{name}",
            "title": f"{name}, trained first for {study.title}",
            "question": study.question,
            "scale": study.scale,
            "baseline": "cross-entropy",
            "arms": [{"name": "cross-entropy"}],
            "seeds": [entry.seed],
            "model": entry.model.model_dump(),
            "corpus": study.corpus.model_dump(),
            "train": entry.train.model_dump(),
            "evaluate": {**study.evaluate.model_dump(), "tasks": ()},
        },
        where=f"prepared.{name}",
    )


def _trial_study(study: StudyConfig, arm: ArmConfig, rate: float) -> StudyConfig:
    assert study.sweep is not None
    train = study.train.model_copy(update={"steps": study.sweep.steps or study.train.steps, "learning_rate": rate})
    # only the end is looked at, on documents that the comparison does not score
    evaluate = study.evaluate.model_copy(update={"points": (1.0,), "held_out_part": "tuning", "tasks": ()})
    return study.model_copy(
        update={
            "name": f"{study.name}.sweep.{arm.name}",
            "baseline": arm.name,
            "arms": (arm.model_copy(update={"learning_rate": rate}),),
            "seeds": (study.sweep.seed,),
            "train": train,
            "evaluate": evaluate,
            "sweep": None,
        }
    )


def tasks(study: StudyConfig, out: Path) -> list[Task]:
    """Everything a study trains, in the order in which it is taken."""
    found = []
    for name in study.prepared:
        own = _prepared_study(study, name)
        found.append(
            Task("prepared", f"prepared {name}", own, "cross-entropy", own.seeds[0], prepared_folder(out, name))
        )
    needs = {arm.name: [prepared_folder(out, name) for name in study.prepared_of(arm)] for arm in study.arms}
    for arm in study.arms:
        if study.sweep is not None and study.swept(arm):
            for rate in study.sweep.learning_rates:
                folder = trial_folder(out, arm.name, rate)
                own = _trial_study(study, arm, rate)
                name = f"{arm.name} at rate {rate:g}"
                found.append(Task("trial", name, own, arm.name, own.seeds[0], folder, tuple(needs[arm.name])))
    for arm in study.arms:
        if study.sweep is not None and study.swept(arm):
            needs[arm.name] += [trial_folder(out, arm.name, rate) for rate in study.sweep.learning_rates]
    for name, seed in plan(study):
        found.append(Task("cell", name, study, name, seed, cell_folder(out, name, seed), tuple(needs[name])))
    return found


def prepared_models(study: StudyConfig, out: Path) -> dict[str, Path]:
    """Directories of the prepared models, by name."""
    return {name: prepared_folder(out, name) / "final" for name in study.prepared}


def task_end(folder: Path) -> Row | None:
    """The terminal row of a task, or None while there is work left."""
    path = folder / "rows.jsonl"
    return terminal_row(read_rows(path, check=False)) if path.exists() else None


def trial_rows(study: StudyConfig, out: Path) -> list[Row]:
    """One row for each trial that has ended; the arm's best is marked once all of them have."""
    found = []
    for arm in study.arms:
        if study.sweep is None or not study.swept(arm):
            continue
        ends = {rate: task_end(trial_folder(out, arm.name, rate)) for rate in study.sweep.learning_rates}
        values = {rate: _tuning_loss(trial_folder(out, arm.name, rate)) for rate, end in ends.items() if end}
        chosen = _best(values) if len(values) == len(ends) else None
        for rate, end in ends.items():
            if end is not None:
                found.append(
                    make_row(
                        "trial",
                        study=study.name,
                        study_fingerprint=study.fingerprint(),
                        arm=arm.name,
                        seed=study.sweep.seed,
                        status=end["status"],
                        learning_rate=rate,
                        steps=end["steps"],
                        value=values[rate],
                        chosen=rate == chosen,
                        error=end["error"],
                        timing=end["timing"],
                        provenance=end["provenance"],
                    )
                )
    return found


def _tuning_loss(folder: Path) -> float | None:
    rows = read_rows(folder / "rows.jsonl", check=False)
    end = terminal_row(rows)
    if end is None or end["status"] == "failed":
        return None
    scores = [row for row in rows if row["kind"] == "eval" and row["step"] == end["steps"]]
    return float(scores[-1]["value"])


def _best(values: dict[float, float | None]) -> float:
    losses = {rate: value for rate, value in values.items() if value is not None}
    # where every rate failed, the least one is left to say so in the comparison
    return min(losses, key=losses.__getitem__) if losses else min(values)


def resolved_arm(study: StudyConfig, arm: str, out: Path) -> ArmConfig:
    """The arm with the learning rate that its trials chose; they must have ended."""
    found = study.arm(arm)
    if study.sweep is None or not study.swept(found):
        return found
    values = {rate: _tuning_loss(trial_folder(out, arm, rate)) for rate in study.sweep.learning_rates}
    return found.model_copy(update={"learning_rate": _best(values)})


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
    """The rows of all trials and cells in the order of the plan; what has none contributes none."""
    rows = trial_rows(study, out)
    for arm, seed in plan(study):
        path = cell_folder(out, arm, seed) / "rows.jsonl"
        if path.exists():
            rows += read_rows(path, check=False)
    return rows


def states(study: StudyConfig, out: Path) -> list[CellState]:
    """Where every task is, read from its rows."""
    return _states(tasks(study, out), {})


def _states(listed: Iterable[Task], seen: dict[Path, tuple[tuple[int, int], CellState]]) -> list[CellState]:
    """The same for a list of tasks; a file that has not changed since it was ``seen`` is not read again."""
    found = []
    for task in listed:
        path = task.folder / "rows.jsonl"
        try:
            status = path.stat()
            mark = (status.st_mtime_ns, status.st_size)
        except OSError:
            mark = (0, 0)
        if path not in seen or seen[path][0] != mark:
            seen[path] = (mark, _state(task, path))
        found.append(seen[path][1])
    return found


def _state(task: Task, path: Path) -> CellState:
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
    return CellState(task.name, task.seed, step, task.steps, loss, status, task.kind)


def default_workers(study: StudyConfig) -> int:
    """One run a GPU; without any, as many side by side as there are cores for their threads."""
    if gpus := visible_gpus():
        return len(gpus)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores // (study.train.threads or cores), len(plan(study))))


def visible_gpus() -> list[str]:
    """Names of the GPUs that CUDA_VISIBLE_DEVICES leaves to this process."""
    # asked of the driver's own files: importing torch for it would cost this process seconds
    there = sorted(Path("/dev").glob("nvidia[0-9]*"))
    if not there:
        return []
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return [str(number) for number in range(len(there))]
    return [name.strip() for name in chosen.split(",") if name.strip() and name.strip() != "-1"]


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
    if study.launch != "study":
        raise ConfigError(
            f"{study.name} at scale {study.scale} is too large for this runner: --dry-run prints the commands that run "
            f"it with {study.launch}."
        )
    check_benchmarks(study.evaluate)
    study = open_directory(study, out, resume=resume)
    if workers == 0:
        from decondense.studies.worker import work

        if study.measure is None:
            study_corpus(study, out, watcher)
        work(out, retry_failed=retry_failed)
    else:
        # the workers load torch while the text is being prepared
        wanted = default_workers(study) if workers is None else workers
        pending = [state for state in states(study, out) if state.status != "finished"]
        processes = [_start(out, index, retry_failed) for index in range(min(wanted, len(pending)))]
        try:
            if study.measure is None:
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
    gpus = visible_gpus()
    own = {"CUDA_VISIBLE_DEVICES": gpus[index % len(gpus)]} if gpus else {}
    asked = {COMMAND: os.environ.get(COMMAND) or command_line() or ""}
    with log.open("ab") as handle:
        return subprocess.Popen(
            command, stdout=handle, stderr=handle, stdin=subprocess.DEVNULL, env={**keep, **os.environ, **own, **asked}
        )


def _watch(study: StudyConfig, out: Path, processes: Iterable[subprocess.Popen[bytes]], watcher: Watcher) -> None:
    ended = -1
    alive = list(processes)
    listed = tasks(study, out)
    seen: dict[Path, tuple[tuple[int, int], CellState]] = {}
    while alive:
        alive = [process for process in alive if process.poll() is None]
        now = _states(listed, seen)
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
