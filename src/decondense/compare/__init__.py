"""Paired comparison of the arms of a study, computed from its rows alone (numpy and scipy, no torch).

What is compared is fixed before anything is looked at: the *final* checkpoint of every run. Within a seed all arms
start from the same weights and read the same sequences in the same order, which the recorded hashes prove. The unit of
evidence is therefore the difference d_s = arm - baseline of seed s; no other assumption about the runs is needed.
An arm with a model of its own starts from other weights by design: it is paired by the order of the data alone, and a
note says so. A study that only measures starts trains nothing; there, a seed is one choice of passages.

Interval, tests, power and outcomes: :mod:`decondense.compare.statistics`. An interval for seeds that are added until a
study is decided: :mod:`decondense.compare.sequential`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from decondense.compare.condensation import by_arm, family_of, layers, measures, size_trend
from decondense.compare.context import Context, common
from decondense.compare.cost import costs, equal_time, speeds, tokens_to_reach
from decondense.compare.mediation import mediations, share_explained
from decondense.compare.notes import evidence_notes, item_notes, task_notes
from decondense.compare.notes import notes as all_notes
from decondense.compare.pairing import faults_of, pairings, unpaired
from decondense.compare.plateaus import plateaus
from decondense.compare.quality import selections, task_means, task_measures
from decondense.compare.quantities import QUANTITIES
from decondense.compare.quantity import Quantity
from decondense.compare.rates import learning_rates, sweeps
from decondense.compare.results import (
    FEWEST_MODELS,
    SIZE_QUANTITIES,
    ArmCondensation,
    Clock,
    Comparison,
    Cost,
    EqualTime,
    Layers,
    Measure,
    Mediation,
    Note,
    NoteKind,
    Pairing,
    Plateau,
    Selection,
    SizeCorrelation,
    SizePoint,
    SizeTrend,
    Speed,
    Sweep,
    TaskMean,
    TaskMeasure,
    Trial,
    Values,
)
from decondense.compare.statistics import (
    CONFIDENCE,
    MARGIN,
    Difference,
    Interval,
    Items,
    Outcome,
    holm,
    paired_difference,
    seeds_needed,
    sign_flip_p,
    smallest_sign_flip_p,
)
from decondense.compare.study import VALIDATION, Cell, CellId, CompareError, Fault, Key, Study
from decondense.config import one_of
from decondense.records import ItemRows, Row

__all__ = [
    "CONFIDENCE",
    "FEWEST_MODELS",
    "MARGIN",
    "QUANTITIES",
    "SIZE_QUANTITIES",
    "VALIDATION",
    "ArmCondensation",
    "Cell",
    "CellId",
    "Clock",
    "CompareError",
    "Comparison",
    "Cost",
    "Difference",
    "EqualTime",
    "Fault",
    "Interval",
    "Items",
    "Key",
    "Layers",
    "Measure",
    "Mediation",
    "Note",
    "NoteKind",
    "Outcome",
    "Pairing",
    "Plateau",
    "Quantity",
    "Selection",
    "SizeCorrelation",
    "SizePoint",
    "SizeTrend",
    "Speed",
    "Study",
    "Sweep",
    "TaskMean",
    "TaskMeasure",
    "Trial",
    "Values",
    "compare",
    "family_of",
    "holm",
    "paired_difference",
    "seeds_needed",
    "share_explained",
    "sign_flip_p",
    "smallest_sign_flip_p",
    "tokens_to_reach",
]  # fmt: skip


def compare(
    rows: Iterable[Row | ItemRows] | Study,
    baseline: str | None = None,
    *,
    incomplete: Literal["refuse", "omit"] = "refuse",
    margin: float | None = None,
) -> Comparison:
    """Compare the arms of one study with its baseline, at the final checkpoints, paired by seed and by item.

    Args:
        rows: the rows of one study (``records.read_rows``), or a :class:`Study`.
        baseline: the arm that the others are compared with; default: what the study names.
        incomplete: ``"refuse"`` (default) raises when any run is missing, failed, unfinished, duplicated or not paired;
            ``"omit"`` leaves those runs out, and names them in ``Comparison.omitted``.
        margin: differences of a loss up to this, in nats per token, count as equal in practice; default:
            the study's, or 0.02.

    Raises:
        CompareError: runs that cannot be compared, named one by one.
        ConfigError: an unknown baseline.
    """
    study = rows if isinstance(rows, Study) else Study.from_rows(rows)
    if baseline is None and study.baseline is None:
        raise CompareError(f"the rows name no baseline; choose one of the arms: {', '.join(study.arms)}.")
    base = one_of("baseline arm", str(baseline or study.baseline), study.arms)

    faults: list[Fault] = []
    good: dict[tuple[str, int], Cell] = {}
    for place, cell in study.cells.items():
        found = faults_of(cell, measured=study.measured)
        faults += found
        if not found:
            good[place] = cell
    for seed in study.seeds:
        cells = [good[arm, seed] for arm in study.arms if (arm, seed) in good]
        found = unpaired(cells, base, study)
        faults += found
        for cell in cells:
            if any(fault.cell == cell.id for fault in found):
                del good[cell.arm, seed]
    if faults and incomplete == "refuse":
        raise CompareError(
            f"study {study.name} cannot be compared",
            faults,
            "Finish or repeat these runs, or compare what is left: with compare(..., incomplete='omit'), "
            "`decondense compare --omit`, or in the report.",
        )
    if not good:
        raise CompareError(f"study {study.name} has no finished run to compare", faults)
    if margin is None:
        margin = study.config.margin if study.config else MARGIN
    # an arm is compared over the seeds that it shares with the baseline
    pairs = {arm: [seed for seed in study.seeds if (arm, seed) in good and (base, seed) in good] for arm in study.arms}
    arms = [base, *(arm for arm in study.arms if arm != base and any((arm, seed) in good for seed in study.seeds))]
    seeds = [seed for seed in study.seeds if any((arm, seed) in good for arm in arms)]
    context = Context(study, base, arms, seeds, good, pairs, margin)

    keys = [key for key in study.task_keys() if any(key in cell.scores for cell in good.values())]
    tasks = task_measures(context, keys)
    final = [cell.run for cell in good.values()]
    stuck = plateaus(context)
    notes = [*all_notes(context), *evidence_notes(context, tasks, stuck)]
    return Comparison(
        study=study.name,
        fingerprint=study.fingerprint,
        title=study.title,
        question=study.question,
        baseline=base,
        arms=tuple(arms),
        labels={arm: study.labels[arm] for arm in arms},
        seeds=tuple(seeds),
        steps=common(row.get("steps") for row in final),
        tokens=common(row.get("tokens") for row in final),
        parameters=common(cell.recorded("parameters") for cell in good.values()),
        tasks=tasks,
        condensation=measures(context),
        layers=layers(context),
        means=task_means(context, keys),
        equal_time=equal_time(context),
        speed=speeds(context),
        cost=costs(context),
        selection=selections(context, keys),
        pairing=pairings(context),
        omitted=tuple(faults),
        margin=margin,
        notes=tuple(notes),
        task_notes=(*item_notes(tasks), *task_notes(context)),
        measured=study.measured,
        untrained=tuple(arm for arm in arms if context.untrained(arm)),
        dispersed=tuple(arm for arm in study.dispersed if arm in arms),
        other_starts=tuple(context.other_starts()),
        condensation_by_arm=by_arm(context),
        size=size_trend(context),
        trials=tuple(sweeps(context)),
        plateaus=stuck,
        mediation=mediations(context),
        learning_rates=learning_rates(context),
    )
