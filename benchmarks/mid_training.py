"""Tables of the studies that go on from a pretrained model; collected by tables.py."""

from __future__ import annotations

import math
from pipes import pipe_table

from decondense.compare import Cell, Difference
from decondense.report import interval, number, words
from sections import base, losses, noted, sweep_table
from study_rows import FOLDER, committed, deep_half, mean, paired, shown

CONTROLS = FOLDER.parent / "controls"


def condensed_start() -> str:
    """Figure 7 from SmolLM2: losses, and the geometry over training."""
    f = committed("fig7-smollm2")
    if f is None:
        return "Not run yet: `decondense study benchmarks/studies/fig7-smollm2.yaml`."
    steps = sorted(f.cells(f.comparison.baseline)[0].profiles)
    lines = []
    for arm in f.comparison.arms:
        cells = f.cells(arm)
        over = [number(mean([deep_half(cell, step) for cell in cells])) for step in steps]
        less = "" if arm == f.comparison.baseline else shown(paired(f, arm, f.comparison.baseline, deep_half))
        ends = [number(mean([_last_at(cell, step) for cell in cells])) for step in (steps[0], steps[-1])]
        lines.append([f.label(arm), *over, less, " to ".join(ends)])
    header = ("arm", *(f"step {step}" for step in steps), "less the baseline's, at the end", "last layer")
    geometry = pipe_table(header, lines, right=range(1, len(header)))
    return "\n\n".join(
        [
            losses(f),
            geometry,
            f"Below, the mean cosine of the last L/2 layers over training, and of the last layer after the final norm "
            f"from the start to the end. Final checkpoints: {base(f)}.",
        ]
    )


def _last_at(cell: Cell, step: int) -> float:
    return float(cell.profiles[step]["mean_cosine"][-1])


def settings() -> str:
    """The settings of the baseline, and what the lower precision of the study does."""
    if not (CONTROLS / "smollm2-settings.jsonl.gz").exists():
        return "Not run yet: `decondense study benchmarks/studies/smollm2-settings.yaml`."
    return sweep_table("smollm2-settings") + (
        "\n\nLoss on the tuning documents after 60 steps, one seed; the least is bold. Rows: "
        "`benchmarks/results/controls/smollm2-settings.jsonl.gz`, `decondense study "
        "benchmarks/studies/smollm2-settings.yaml`."
    )


def pretrained() -> str:
    f = committed("mid-training-260k")
    if f is None:
        return "Not run yet."
    parts = [losses(f)]
    lines = []
    for task_mean in f.comparison.means:
        for arm in f.comparison.arms:
            values, d = task_mean.measure.of(arm), task_mean.measure.difference(arm)
            if values is None:
                continue
            rank = task_mean.mean_rank.get(arm)
            lines.append(
                [
                    f"{task_mean.metric}, {len(task_mean.tasks)} tasks",
                    f.label(arm),
                    f"{number(100 * values.mean, 2)}" if task_mean.metric.startswith("acc") else number(values.mean),
                    "" if d is None else f"{number(100 * d.mean, 2, sign=True)} {_percent(d)}",
                    "" if d is None else words.outcome(d),
                    number(rank, 2),
                ]
            )
    parts.append(
        pipe_table(
            ("mean over benchmarks", "arm", "score", "difference, 95 % interval", "in words", "mean rank"), lines
        )
    )
    parts.append("\n".join(f"- {note}." for note in f.comparison.task_notes))
    parts.append(noted(f, "hardly decides").strip())
    limit = f.config.evaluate.limit
    assert limit is not None
    parts.append(
        f"At most {limit} items a task: a task's own standard error is about "
        f"{100 * math.sqrt(0.25 / limit):.0f} points. {base(f)}."
    )
    return "\n\n".join(parts)


def _percent(d: Difference) -> str:
    return interval(None if d.interval is None else (100 * d.interval[0], 100 * d.interval[1]), 2)


TABLES = {
    "results-pretrained": pretrained,
    "results-fig7-smollm2": condensed_start,
    "results-fig7-settings": settings,
}
