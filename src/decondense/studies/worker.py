"""A worker process: takes the tasks of a study directory one after the other until none is left to take."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from decondense.config import StudyConfig
from decondense.records import Row, make_row, write_rows
from decondense.studies.runner import Task, opened_corpus, prepared_models, resolved_arm, task_end, tasks

if TYPE_CHECKING:
    from decondense.corpora.packed import PackedCorpus


def run_task(
    study: StudyConfig,
    task: Task,
    corpus: PackedCorpus | None,
    out: Path,
    *,
    retry_failed: bool = False,
    watch: Callable[[], None] | None = None,
) -> Row:
    """Train one task of a study, from where it was left, and return its terminal row.

    Raises:
        CellBusy: another process holds it.
        ConfigError: it cannot be run here.
    """
    from decondense.studies.measuring import measure_cell
    from decondense.training.hf import run_cell

    if study.measure is not None:
        arm, watched = study.arm(task.arm), watch or (lambda: None)
        return measure_cell(study, arm, task.seed, task.folder, watched, retry_failed=retry_failed)
    assert corpus is not None
    for name, path in prepared_models(study, out).items():
        ended = task_end(path.parent) if path.parent in task.needs else None
        if ended is not None and ended["status"] == "failed":
            return _cannot_start(task, f"it needs the prepared model {name!r}, whose training failed: {ended['error']}")
    arm = resolved_arm(study, task.arm, out) if task.kind == "cell" else task.study.arm(task.arm)
    return run_cell(
        task.study,
        arm,
        task.seed,
        corpus,
        task.folder,
        retry_failed=retry_failed,
        watch=watch,
        prepared=prepared_models(study, out),
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
    """
    from decondense.training.hf import CellBusy, world_size

    everything = tasks(study, out)
    (cell,) = [task for task in everything if (task.kind, task.arm, task.seed) == ("cell", arm, seed)]
    trials = [task for task in everything if task.folder in cell.needs]
    wanted = {folder for task in [cell, *trials] for folder in task.needs}
    corpus = None if study.measure is not None else opened_corpus(out)
    row: Row = {}
    for task in [task for task in everything if task.folder in wanted] + [cell]:

        def tell(task: Task = task) -> None:
            if watch is not None:
                watch(task)

        while True:
            try:
                row = run_task(study, task, corpus, out, retry_failed=retry_failed and task is cell, watch=tell)
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
    write_rows(task.folder / "rows.jsonl", [row])
    return row


def work(out: Path, *, retry_failed: bool = False, parent: int | None = None) -> None:
    """Run every task of the study in ``out`` that nobody else runs, and return when all of them are done.

    Args:
        out: directory with ``study.yaml`` and ``corpus.json``.
        retry_failed: start failed tasks again.
        parent: process that must be alive for the work to go on; None: nobody.
    """
    from decondense.training.hf import CellBusy

    def watch() -> None:
        if parent is not None and os.getppid() != parent:
            raise SystemExit("the process that started this worker is gone; stopping where the run can be resumed.")

    study = StudyConfig.from_yaml(out / "study.yaml")
    while study.measure is None and not (out / "corpus.json").exists():  # the parent is still preparing the text
        watch()
        time.sleep(0.1)
    corpus = None if study.measure is not None else opened_corpus(out)
    left = tasks(study, out)
    ended: set[Path] = set()
    while left:
        waiting = []
        for task in left:
            ended |= {folder for folder in task.needs if folder not in ended and task_end(folder) is not None}
            if not ended.issuperset(task.needs):
                waiting.append(task)
                continue
            try:
                run_task(study, task, corpus, out, retry_failed=retry_failed, watch=watch)
                ended.add(task.folder)
            except CellBusy:
                waiting.append(task)
        # a task that another process holds ends there, or is left behind by it when it dies: look again later
        if len(waiting) == len(left):
            watch()
            time.sleep(0.5)
        left = waiting


def main() -> int:
    """Entry point of ``python -m decondense.studies.worker OUT``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--retry-failed", action="store_true")
    arguments = parser.parse_args()
    try:
        work(arguments.out, retry_failed=arguments.retry_failed, parent=os.getppid())
    except (ValueError, OSError, RuntimeError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
