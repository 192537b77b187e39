"""``until: decided``: which seeds a study adds, given its rows so far."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path

from decondense.compare import CompareError, compare
from decondense.compare.sequential import FEWEST_SEEDS, open_arms
from decondense.config import StudyConfig
from decondense.records import Row
from decondense.studies.directory import change_study


def next_seeds(study: StudyConfig, rows: Iterable[Row], *, at_once: int = 1) -> tuple[int, ...]:
    """The seeds to add once all runs of the study have ended; empty: the study is complete.

    It is complete when every contrast is decided, when it has ``most_seeds`` seeds, or when every undecided arm has a
    failed run: a mean over the runs that did not fail is another quantity, whatever the number of seeds.

    Args:
        study: the study with the seeds added so far.
        rows: the rows of all of its runs.
        at_once: seeds to add together, for when more runs fit in parallel than a seed has arms. Testing after several
            seeds is as valid as testing after each.
    """
    have = study.every_seed
    room = study.most_seeds - len(have)
    if study.until is None or room <= 0:
        return ()
    try:
        comparison = compare(rows, study.baseline, incomplete="omit", margin=study.margin)
    except CompareError:
        return ()
    faulty = {fault.cell.arm for fault in comparison.omitted}
    held_out = comparison.validation
    if held_out is None or study.baseline in faulty:
        return ()
    if not faulty.issuperset(open_arms(held_out.differences, len(study.arms) - 1)):
        count = min(room, max(at_once, FEWEST_SEEDS - len(have)))
        taken = {*have, *(study.sweep.trial_seeds if study.sweep is not None else ())}
        fresh = (seed for seed in itertools.count(max(have) + 1) if seed not in taken)
        return tuple(itertools.islice(fresh, count))
    return ()


def add_seeds(study: StudyConfig, out: Path, seeds: Iterable[int]) -> StudyConfig:
    """Add seeds to the study in ``out`` and return it.

    If another runner of the directory has added seeds since ``study`` was read, its seeds are used instead.
    """

    def added(there: StudyConfig) -> StudyConfig:
        if there.added_seeds != study.added_seeds:
            return there
        return there.model_copy(update={"added_seeds": (*there.added_seeds, *seeds)})

    return change_study(out, added)
