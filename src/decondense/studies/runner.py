"""The runner: a study directory in, rows out; stop it anywhere and the same command resumes.

Workers are processes of their own; each takes the next task that is ready and neither done nor held. The lock is the
operating system's, so a killed worker's task is free again, and two runners on one directory share the work. A worker
ends within seconds of its runner, whatever ends that (:mod:`decondense.lifeline`). What lies in the directory:
:mod:`decondense.studies.directory`; what is to be done: :mod:`decondense.studies.plan`. This module needs no torch:
only the workers do.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from decondense.config import ConfigError, StudyConfig
from decondense.evaluate import check_benchmarks
from decondense.lifeline import HeldFolder, Lifeline
from decondense.records import Row, write_rows
from decondense.stopping import SAVE_FIRST, Stopped, save_requested, stop_on_signals
from decondense.studies import devices
from decondense.studies.cluster import Cluster
from decondense.studies.deciding import add_seeds, next_seeds
from decondense.studies.directory import (
    CellState,
    Progress,
    StudyFailed,
    Watcher,
    collect,
    open_directory,
    opened_corpus,
    reset_failed,
    resolved_arm,
    states,
    study_corpus,
    task_end,
    trial_rows,
)
from decondense.studies.plan import (
    Task,
    cell_folder,
    plan,
    prepared_folder,
    prepared_models,
    tasks,
    trial_folder,
)
from decondense.studies.process import WorkerProcess, start_worker

__all__ = [
    "CellState",
    "StudyFailed",
    "Task",
    "Watcher",
    "cell_folder",
    "collect",
    "default_workers",
    "open_directory",
    "opened_corpus",
    "plan",
    "prepared_folder",
    "prepared_models",
    "resolved_arm",
    "run_study",
    "states",
    "study_corpus",
    "task_end",
    "tasks",
    "trial_folder",
    "trial_rows",
    "visible_gpus",
]

_POLL_SECONDS = 0.5
_END_SECONDS = 5.0
"""Seconds that a worker has to stop after SIGTERM before it is killed."""
_WRITING_SHARE = 0.05
"""Share of the runner's time that rewriting the rows of a running study may take."""


class _Silent:
    def corpus(self, what: str, done: int, total: int) -> None:
        pass

    def cells(self, states: list[CellState]) -> None:
        pass


def default_workers(study: StudyConfig) -> int:
    """One run per GPU; without a GPU, as many runs in parallel as the cores allow for their threads."""
    if gpus := visible_gpus():
        return len(gpus)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores // (study.train.threads or cores), len(plan(study))))


def visible_gpus() -> list[str]:
    """Names of the NVIDIA or AMD GPUs that the environment variables leave visible to this process."""
    return devices.gpus()[1]


def run_study(
    study: StudyConfig,
    out: str | Path,
    *,
    workers: int | None = None,
    resume: bool = False,
    retry_failed: bool = False,
    watcher: Watcher | None = None,
    ray: str | None = None,
) -> list[Row]:
    """Run a study to its end and return all its rows, which are also written to ``out/rows.jsonl``.

    Done cells are skipped. After an interruption, a kill or a power cut, call it again with the same arguments: every
    cell resumes from its newest complete checkpoint and the rows come out as if nothing had happened. SIGTERM and
    SIGHUP stop it at once, like Ctrl-C; SIGUSR1 lets every run save a checkpoint first. A study with ``until: decided``
    adds seeds (:mod:`decondense.studies.deciding`) until its contrasts are decided.

    Args:
        study: the study to run.
        out: the study's directory.
        workers: number of worker processes; None: :func:`default_workers`; 0: run in this process.
        resume: resume the study in ``out``, even if ``study`` is another one.
        retry_failed: start failed trials, models and cells again.
        watcher: receives the progress.
        ray: address of a Ray cluster that runs the tasks (:mod:`decondense.studies.cluster`); ``workers`` is then
            the maximum number of tasks in parallel, and SIGUSR1 stops the study like SIGTERM.

    Raises:
        ConfigError: the directory holds another study, or the configuration cannot be run.
        StudyFailed: a worker stopped early (the message names its log), or the directory was removed.
        Stopped: a signal asked the study to stop; a SystemExit with status 128 + signal.
    """
    out = Path(out)
    watcher = watcher or _Silent()
    if study.launch != "study":
        raise ConfigError(
            f"{study.name} at scale {study.scale} is too large for this runner; --dry-run prints the commands that run "
            f"it with {study.launch}."
        )
    check_benchmarks(study.evaluate)
    study = open_directory(study, out, resume=resume)
    with contextlib.nullcontext() if ray is None else Cluster(ray) as cluster:
        slots = default_workers if cluster is None else cluster.slots
        wanted = slots(study) if workers is None else workers
        while True:
            run = _Run(study, out, tasks(study, out), watcher)
            if retry_failed:
                reset_failed(run.tasks)
            if cluster is not None:
                stopping = run.on_cluster(cluster, wanted)
            else:
                stopping = run.in_this_process() if wanted == 0 else run.with_workers(wanted)
            rows = run.result()
            more = next_seeds(study, rows, at_once=max(1, wanted // len(study.arms)))
            if not more:
                return rows
            if stopping:
                assert SAVE_FIRST is not None
                raise Stopped(SAVE_FIRST)
            study, retry_failed = add_seeds(study, out, more), False


class _Run:
    """One call of :func:`run_study`: its tasks, listed once, and its workers."""

    def __init__(self, study: StudyConfig, out: Path, listed: Sequence[Task], watcher: Watcher) -> None:
        self.study, self.out, self.tasks, self.watcher = study, out, listed, watcher
        self.progress = Progress(listed)
        self.workers: list[WorkerProcess] = []
        self.words: dict[str, str] = {}
        """Error messages of tasks on a cluster, by task."""
        self._held = HeldFolder(out)
        self._wrote = (0.0, 0.0)  # when, and how long it took
        self._ended = -1
        self._shown = 0.0
        self._before = {state_key(state) for state in self.progress.states() if state.status == "finished"}

    def in_this_process(self) -> bool:
        """Run the tasks in this process, and return whether SIGUSR1 asked to stop."""
        from decondense.studies.worker import work

        with stop_on_signals():
            if self.study.measure is None:
                study_corpus(self.study, self.out, self.watcher)
            work(self.out, self.show)
            return save_requested()

    def with_workers(self, wanted: int) -> bool:
        """Run the tasks in worker processes, and return whether SIGUSR1 asked to stop."""
        pending = len(self.tasks) - len(self._before)
        with Lifeline() as lifeline, stop_on_signals(forward=self._pass_on):
            try:
                # the workers load torch while the text is being prepared
                for index in range(min(wanted, pending)):
                    if not save_requested():
                        self.workers.append(self._start(index, lifeline))
                if self.study.measure is None:
                    study_corpus(self.study, self.out, self.watcher)
                self._watch()
            except BaseException:
                self._end()
                with contextlib.suppress(OSError, ValueError, StudyFailed):  # what ended the run is what is to be said
                    self._write()
                raise
            finally:
                self._end()
            if save_requested() and not all(state.ended for state in self.progress.states()):
                assert SAVE_FIRST is not None
                raise Stopped(SAVE_FIRST)
            return save_requested()

    def on_cluster(self, cluster: Cluster, most: int) -> bool:
        """Run the tasks on a Ray cluster, as :meth:`with_workers`. SIGUSR1 stops it at once, without checkpoints."""
        with stop_on_signals(save_first=False):
            try:
                if self.study.measure is None:
                    study_corpus(self.study, self.out, self.watcher)
                self.words = cluster.run(self.study, self.out, self.tasks, most, self._look)
            except BaseException:
                with contextlib.suppress(OSError, ValueError, StudyFailed):  # what ended the run is what is to be said
                    self._write()
                raise
        return False

    def show(self) -> None:
        """Report the progress of the cells, unless that was done just now."""
        if time.monotonic() - self._shown >= _POLL_SECONDS:
            self.watcher.cells(self.progress.states())
            self._shown = time.monotonic()

    def _check_there(self) -> None:
        if not self._held.is_there():
            raise StudyFailed(f"{self.out} was removed while its study was running; nothing more is written there.")

    def _pass_on(self, number: int) -> None:
        for worker in self.workers:
            with contextlib.suppress(OSError):
                worker.process.send_signal(number)

    def _start(self, index: int, lifeline: Lifeline) -> WorkerProcess:
        variable, names = devices.gpus()
        own = {variable: names[index % len(names)]} if names else {}
        return start_worker(self.out, f"worker-{index}.log", lifeline, environment=own)

    def _watch(self) -> None:
        alive = True
        while alive:
            alive = any(worker.process.poll() is None for worker in self.workers)
            if save_requested() and SAVE_FIRST is not None:
                self._pass_on(SAVE_FIRST)  # again: a worker may have been started while the signal came
            self._look()
            if alive:
                time.sleep(_POLL_SECONDS)

    def _look(self) -> None:
        """Report the progress of the tasks, and write the rows of ended tasks unless that was done just now."""
        self._check_there()
        now = self.progress.states()
        self.watcher.cells(now)
        count = sum(state.ended for state in now)
        when, took = self._wrote
        if count != self._ended and time.monotonic() - when >= took / _WRITING_SHARE:
            self._ended = count
            self._write()

    def _write(self) -> list[Row]:
        self._check_there()
        began = time.monotonic()
        rows = collect(self.study, self.out, self.tasks)
        write_rows(self.out / "rows.jsonl", rows)
        self._wrote = (time.monotonic(), time.monotonic() - began)
        return rows

    def _end(self) -> None:
        for worker in self.workers:
            if worker.process.poll() is None:
                worker.process.terminate()
        limit = time.monotonic() + _END_SECONDS
        for worker in self.workers:
            try:
                worker.process.wait(max(0.0, limit - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()

    def result(self) -> list[Row]:
        """All rows, once every task has ended.

        Raises:
            StudyFailed: some have not.
        """
        rows = self._write()
        now = self.progress.states()
        self.watcher.cells(now)
        left = [state for state in now if not state.ended]
        if left:
            words = self.words | {str(worker.log): worker.last_words() for worker in self.workers}
            raise StudyFailed(_unfinished(left, words))
        self._tell_ignored(now)
        return rows

    def _tell_ignored(self, now: Iterable[CellState]) -> None:
        """Warn about unusable checkpoints: the runs are complete, but a disk that damages files should be known."""
        for task, state in zip(self.tasks, now, strict=True):
            if state_key(state) in self._before:
                continue
            end = task_end(task.folder)
            for reason in (end or {}).get("timing", {}).get("ignored_checkpoints", ()):
                warnings.warn(f"{task.name} seed {task.seed}: {reason}", stacklevel=3)


def state_key(state: CellState) -> tuple[str, str, int]:
    """The key of a task within its study."""
    return (state.kind, state.arm, state.seed)


def _unfinished(left: Iterable[CellState], words: Mapping[str, str]) -> str:
    names = ", ".join(f"{state.arm} seed {state.seed}" for state in left)
    lines = [f"{who}: {text}" for who, text in words.items() if text]
    reasons = (" Last messages of the workers:\n" + "\n".join(lines)) if lines else ""
    return (
        f"not finished: {names}. Rows written so far are valid. Fix the cause, then run the same command again: it "
        f"resumes from the last complete checkpoints.{reasons}"
    )
