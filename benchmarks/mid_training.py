"""Tables of the studies that go on from a pretrained model; collected by tables.py."""

from __future__ import annotations

import math
from pipes import pipe_table

import numpy as np

from decondense.compare import Difference, Study
from decondense.records import read_rows
from decondense.report import interval, number, words
from sections import base, losses, noted, sweep_table
from study_rows import CONTROLS, committed, deep_half, last, mean, paired, shown


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
        ends = [number(mean([last(cell, step) for cell in cells])) for step in (steps[0], steps[-1])]
        lines.append([f.label(arm), *over, less, " to ".join(ends)])
    header = ("arm", *(f"step {step}" for step in steps), "less the baseline's, at the end", "last layer")
    geometry = pipe_table(header, lines, right=range(1, len(header)))
    return "\n\n".join(
        [
            losses(f),
            geometry,
            "The second table has the mean cosine of the last L/2 layers over training, and of the last layer, after "
            f"the final norm, from the start to the end. Final checkpoints: {base(f)}.",
        ]
    )


def settings() -> str:
    """The learning rate and the warm-up of the baseline."""
    path = CONTROLS / "smollm2-settings.jsonl.gz"
    if not path.exists():
        return "Not run yet: `decondense study benchmarks/studies/smollm2-settings.yaml`."
    config = Study.from_rows(read_rows(path)).config
    assert config is not None
    assert config.sweep is not None
    return sweep_table("smollm2-settings") + (
        f"\n\nLoss on the tuning documents after {config.sweep.steps} steps, one seed; the least is bold. Rows: "
        "`benchmarks/results/controls/smollm2-settings.jsonl.gz`, `decondense study "
        "benchmarks/studies/smollm2-settings.yaml`."
    )


Items = dict[str, dict[str, tuple[float, float]]]
"""Task -> item -> score and weight."""


def task_mean(one: Items, other: Items | None = None) -> tuple[float, float]:
    """Mean over tasks of the mean over items, of one model or of one less another; its standard error over items."""
    means, variances = [], []
    for task, items in one.items():
        names = sorted(items if other is None else items.keys() & other[task].keys())
        value = np.array([items[name][0] - (0.0 if other is None else other[task][name][0]) for name in names])
        weight = np.array([items[name][1] for name in names])
        share = weight / weight.sum()
        mean_of_task = float(share @ value)
        means.append(mean_of_task)
        variances.append(len(names) / (len(names) - 1) * float(share**2 @ (value - mean_of_task) ** 2))
    return float(np.mean(means)), math.sqrt(sum(variances)) / len(means)


def benchmarks() -> str:
    """The ten benchmarks at the start and at the end of one seed: accuracy, and bits per byte of the right answers."""
    path = CONTROLS / "smollm2-tasks.jsonl.gz"
    if not path.exists():
        return "Not run yet: `decondense evaluate` on the final checkpoints of one seed."
    scores: dict[str, dict[str, Items]] = {"acc": {}, "bits": {}}
    limits = set()
    for row in read_rows(path):
        arm = "the start" if row["study"] == "evaluate" else row["arm"]
        if row["kind"] == "eval_item" and row["metric"] == "acc":
            scores["acc"].setdefault(arm, {}).setdefault(row["task"], {})[row["item"]] = (row["value"], row["weight"])
            if row["bits_per_byte"] is not None:
                bits = (row["bits_per_byte"], row["weight"])
                scores["bits"].setdefault(arm, {}).setdefault(row["task"], {})[row["item"]] = bits
        elif row["kind"] == "eval" and row["metric"] == "acc":
            limits.add(row["limit"])
    f = committed("fig7-smollm2")
    assert f is not None
    lines = []
    for arm in ("the start", *f.comparison.arms):
        line = [arm if arm == "the start" else f.label(arm)]
        for metric, scale, digits in (("acc", 100, 1), ("bits", 1, 3)):
            by_arm = scores[metric]
            line.append(number(scale * task_mean(by_arm[arm])[0], digits))
            for other in ("the start", f.comparison.baseline):
                if arm in ("the start", other):
                    line.append("")
                    continue
                mean_of, error = task_mean(by_arm[arm], by_arm[other])
                bounds = (scale * (mean_of - 1.96 * error), scale * (mean_of + 1.96 * error))
                line.append(f"{number(scale * mean_of, digits, sign=True)} {interval(bounds, digits)}")
        lines.append(line)
    header = ("model", "mean acc, %", "less the start's", "less cross-entropy's",
              "bits per byte of the right answers", "less the start's", "less cross-entropy's")  # fmt: skip
    tasks = {metric: len(by_arm["the start"]) for metric, by_arm in scores.items()}
    (limit,) = limits
    return pipe_table(header, lines, right=range(1, len(header))) + (
        f"\n\nMean over the ten benchmarks ({tasks['bits']} of them have bits per byte: lower is better) of the "
        f"start and of the final checkpoints of one seed, at most {limit} items of a task. The 95 % intervals are over "
        "the items that two models share; how much another seed would differ is not in them. Rows: "
        "`benchmarks/results/controls/smollm2-tasks.jsonl.gz`."
    )


def pretrained() -> str:
    f = committed("mid-training-260k")
    if f is None:
        return "Not run yet."
    parts = [losses(f)]
    lines = []
    for entry in f.comparison.means:
        for arm in f.comparison.arms:
            values, d = entry.measure.of(arm), entry.measure.difference(arm)
            if values is None:
                continue
            rank = entry.mean_rank.get(arm)
            lines.append(
                [
                    f"{entry.metric}, {len(entry.tasks)} tasks",
                    f.label(arm),
                    f"{number(100 * values.mean, 2)}" if entry.metric.startswith("acc") else number(values.mean),
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
    "results-fig7-benchmarks": benchmarks,
}
