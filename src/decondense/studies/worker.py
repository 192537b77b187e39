"""A worker process: takes the cells of a study directory one after the other until none is left to take."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from decondense.config import StudyConfig
from decondense.studies.runner import cell_folder, opened_corpus, plan


def work(out: Path, *, retry_failed: bool = False, parent: int | None = None) -> None:
    """Train every cell of the study in ``out`` that nobody else trains, and return when all of them are done.

    Args:
        out: directory with ``study.yaml`` and ``corpus.json``.
        retry_failed: start failed cells again.
        parent: process that must be alive for the work to go on; None: nobody.
    """
    from decondense.training.hf import CellBusy, run_cell

    def watch() -> None:
        if parent is not None and os.getppid() != parent:
            raise SystemExit("the process that started this worker is gone; stopping where the run can be resumed.")

    while not (out / "corpus.json").exists():  # the parent is still preparing the text
        watch()
        time.sleep(0.1)
    study = StudyConfig.from_yaml(out / "study.yaml")
    corpus = opened_corpus(out)
    left = plan(study)
    while left:
        busy = []
        for arm, seed in left:
            folder = cell_folder(out, arm, seed)
            try:
                run_cell(study, study.arm(arm), seed, corpus, folder, retry_failed=retry_failed, watch=watch)
            except CellBusy:
                busy.append((arm, seed))
        # a cell that another process holds ends there, or is left behind by it when it dies: look again later
        if len(busy) == len(left):
            watch()
            time.sleep(0.5)
        left = busy


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
