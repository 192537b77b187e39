"""A worker process: takes the tasks of a study directory one after the other until none is left to take."""

from __future__ import annotations

import argparse
import errno
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from decondense.config import StudyConfig
from decondense.lifeline import HeldFolder, end_without
from decondense.records import Row, make_row, write_rows
from decondense.stopping import Stopped, stop_if_requested, stop_on_signals
from decondense.studies.directory import (
    CORPUS,
    Progress,
    StudyFailed,
    make_below,
    opened_corpus,
    resolved_arm,
    study_corpus,
    study_of,
    task_end,
)
from decondense.studies.plan import Task, prepared_models, tasks

if TYPE_CHECKING:
    from decondense.corpora.packed import PackedCorpus

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.ENOLCK)
"""Refusals that meet every task alike; after any other error the next task is taken."""


def run_task(
    study: StudyConfig,
    task: Task,
    listed: Sequence[Task],
    corpus: PackedCorpus | None,
    out: Path,
    *,
    retry_failed: bool = False,
    watch: Callable[[], None] | None = None,
) -> Row:
    """Train one task of a study, resuming it if it was started, and return its terminal row.

    Raises:
        CellBusy: another process holds it.
        ConfigError: it cannot be run on this machine.
    """
    from decondense.studies.measuring import measure_cell
    from decondense.training.hf import run_cell

    make_below(out, task.folder)
    if study.measure is not None:
        arm, watched = study.arm(task.arm), watch or (lambda: None)
        return measure_cell(study, arm, task.seed, task.folder, watched, retry_failed=retry_failed)
    assert corpus is not None
    for name, path in prepared_models(study, out).items():
        ended = task_end(path.parent) if path.parent in task.needs else None
        if ended is not None and ended["status"] == "failed":
            return _cannot_start(task, f"it needs the prepared model {name!r}, whose training failed: {ended['error']}")
    arm = resolved_arm(study, task.arm, listed) if task.kind == "cell" else task.study.arm(task.arm)
    return run_cell(
        task.study,
        arm,
        task.seed,
        corpus,
        task.folder,
        retry_failed=retry_failed,
        watch=watch,
        prepared=prepared_models(study, out),
        with_profile=task.kind == "prepared",
    )


def run_one(
    study: StudyConfig,
    arm: str,
    seed: int,
    out: Path,
    *,
    retry_failed: bool = False,
    watch: Callable[[Task], None] | None = None,
) -> Row:
    """Train one cell of a study, and before it the models and trials that it needs; also on several ranks.

    Args:
        study: the study in ``out``.
        arm: one of its arms.
        seed: one of its seeds.
        out: its directory.
        retry_failed: start a failed cell again.
        watch: called with the task at hand whenever rows are written.

    Returns:
        The cell's terminal row.

    Raises:
        CellBusy: another process holds the cell, or, on several ranks, something that it needs.
        Stopped: a signal asked the process to stop; the rows and checkpoints written so far are complete.
    """
    from decondense.training.hf import CellBusy, world_size

    listed = tasks(study, out)
    (cell,) = [task for task in listed if (task.kind, task.arm, task.seed) == ("cell", arm, seed)]
    trials = [task for task in listed if task.folder in cell.needs]
    needed = {folder for task in [cell, *trials] for folder in task.needs}
    corpus = None if study.measure is not None else opened_corpus(out)
    row: Row = {}
    with stop_on_signals():
        for task in [task for task in listed if task.folder in needed] + [cell]:

            def tell(task: Task = task) -> None:
                if watch is not None:
                    watch(task)

            while True:
                stop_if_requested()
                try:
                    retry = retry_failed and task is cell
                    row = run_task(study, task, listed, corpus, out, retry_failed=retry, watch=tell)
                    break
                except CellBusy:
                    if task is cell or world_size() > 1:
                        raise
                    time.sleep(1.0)  # another cell of the study is having the same thing done
    return row


def _cannot_start(task: Task, reason: str) -> Row:
    """A failure is a row: the other arms go on."""
    row = make_row(
        "run",
        study=task.study.name,
        study_fingerprint=task.study.fingerprint(),
        arm=task.arm,
        seed=task.seed,
        status="failed",
        config=task.study.model_dump(mode="json"),
        steps=task.steps,
        error=reason,
    )
    write_rows(task.rows, [row])
    return row


def work(out: Path, told: Callable[[], None] | None = None, *, only: str | None = None) -> None:
    """Run every task of the study in ``out`` that no other process runs, and return when all of them are done.

    A task that cannot be run does not keep the others from being run; the first such error is raised at the end.

    Args:
        out: directory with ``study.yaml`` and ``corpus.json``.
        told: called before each task and whenever rows are written.
        only: the folder below ``out`` of the one task to run; its text is prepared where this machine lacks it.

    Raises:
        StudyFailed: ``out`` was removed while its study ran, or a task ended with an error that nobody expected, whose
            traceback is printed.
        Stopped: SIGUSR1 asked for the end, and a checkpoint was saved.
        ConfigError: a task cannot be run on this machine.
        OSError: rows or checkpoints cannot be written.
    """
    from decondense.training.hf import CellBusy

    held = HeldFolder(out)
    of_told: list[Exception] = []

    def watch() -> None:
        if not held.is_there():
            raise StudyFailed(f"{out} was removed while its study was running; nothing more is written there.")
        if told is not None:
            try:
                told()
            except Exception as error:
                of_told.append(error)
                raise

    while not (out / CORPUS).exists() and study_of(out).measure is None:  # the runner is still preparing the text
        watch()
        stop_if_requested()
        time.sleep(0.1)
    study = study_of(out)
    opened = opened_corpus if only is None else partial(study_corpus, study)
    corpus = None if study.measure is not None else opened(out)
    listed = tasks(study, out)
    left = [task for task in listed if only is None or task.folder == out / only]
    progress = Progress(listed)
    ended: set[Path] = set()
    stuck: set[Path] = set()
    errors: list[Exception] = []
    while left:
        waiting = []
        for task in left:
            stop_if_requested()
            watch()
            if stuck.intersection(task.needs):
                stuck.add(task.folder)
                continue
            ended |= {folder for folder in task.needs if folder not in ended and progress.state(folder).ended}
            if not ended.issuperset(task.needs):
                waiting.append(task)
                continue
            try:
                run_task(study, task, listed, corpus, out, watch=watch)
                ended.add(task.folder)
            except CellBusy:
                waiting.append(task)
            except StudyFailed:
                raise
            except Exception as error:
                if error in of_told or (isinstance(error, OSError) and error.errno in _NO_ROOM):
                    raise
                if isinstance(error, (ValueError, OSError, RuntimeError)):
                    errors.append(error)
                else:
                    traceback.print_exc()
                    reason = f"{task.name} seed {task.seed}: unexpected {type(error).__name__}: {error}"
                    errors.append(StudyFailed(f"{reason}. The lines above say where; the other tasks were run."))
                stuck.add(task.folder)
        # a task that another process holds ends there, or is left behind by it when it dies: look again later
        if len(waiting) == len(left):
            time.sleep(0.5)
        left = waiting
    if errors:
        raise errors[0]


def main() -> int:
    """Entry point of ``python -m decondense.lifeline DESCRIPTOR decondense.studies.worker OUT [--task FOLDER]``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--task")
    arguments = parser.parse_args()
    try:
        end_without(arguments.out)
        with stop_on_signals(at_once=False):  # SIGTERM ends a worker where it stands: that is safe at every moment
            work(arguments.out, only=arguments.task)
    except Stopped as stopped:
        print(f"{stopped.signal.name}: stopped; the run can be resumed.", file=sys.stderr)
        return int(stopped.code or 0)
    except Exception as error:
        if not isinstance(error, (ValueError, OSError, RuntimeError)):
            traceback.print_exc()
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
