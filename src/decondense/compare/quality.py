"""Scores: single tasks, their means and ranks, and what choosing the best checkpoint would have shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from decondense.compare.context import Context
from decondense.compare.gold import decision_accuracy
from decondense.compare.quantity import METRIC_TITLES, Quantity, task_id, task_quantity
from decondense.compare.results import Measure, Selection, TaskMean, TaskMeasure
from decondense.compare.statistics import Items, average_ranks
from decondense.compare.study import VALIDATION, Cell, Key

_NO_ITEMS = "without the same per-item scores in every run it holds for these items only"


def task_measures(context: Context, keys: Sequence[Key]) -> tuple[TaskMeasure, ...]:
    """Every task's final scores, corrected over arms, those of benchmarks over arms x the tasks of a metric."""
    families: dict[str, list[TaskMeasure]] = {}
    for key in keys:
        families.setdefault("" if key == VALIDATION else key[1], []).append(task(context, key))
    done: dict[Key, TaskMeasure] = {}
    for group in families.values():
        corrected = iter(context.over_arms([d for entry in group for d in entry.differences], len(group)))
        for entry in group:
            own = tuple(next(corrected) for _ in entry.differences)
            done[entry.task, entry.metric] = dataclasses.replace(entry, differences=own)
    return tuple(done[key] for key in keys)


def task(context: Context, key: Key) -> TaskMeasure:
    """One task's final scores, paired by seed and by item; not corrected."""

    def items(arm: str, seeds: Sequence[int]) -> tuple[list[Items] | None, str]:
        found = context.per_item(key, arm, seeds)
        return (None, _NO_ITEMS) if found is None else ([found], "")

    quantity = task_quantity(key, higher_is_better=context.direction(key))
    measure = context.measure(quantity, items, corrected=False)
    fields = {f.name: getattr(measure, f.name) for f in dataclasses.fields(Measure)}
    rows = [cell.scores.get(key, {}).get(-1 if cell.final_step is None else cell.final_step)
            for cell in context.cells.values()]  # fmt: skip
    scored = sorted({int(row["items"]) for row in rows if row})
    official = {int(row["official_items"]) for row in rows if row and row["official_items"] is not None}
    return TaskMeasure(
        **fields,
        task=key[0],
        metric=key[1],
        scored=tuple(scored),
        official=max(official) if official else None,
        decision_accuracy=decision_accuracy(*key, (cell.recorded("parameters") for cell in context.cells.values())),
    )


def task_means(context: Context, keys: Sequence[Key]) -> tuple[TaskMean, ...]:
    """Means over the tasks that share a metric."""
    groups: dict[tuple[str, bool], list[Key]] = {}
    for key in keys:
        if key != VALIDATION:
            groups.setdefault((key[1], context.direction(key)), []).append(key)
    return tuple(task_mean(context, metric, group, up) for (metric, up), group in groups.items() if len(group) > 1)


def task_mean(context: Context, metric: str, keys: list[Key], higher_is_better: bool) -> TaskMean:
    """The mean over some tasks, and the mean rank among the arms."""

    def of(cell: Cell) -> float | None:
        scores = [cell.final_score(key) for key in keys]
        return None if None in scores else float(np.mean([score for score in scores if score is not None]))

    def items(arm: str, seeds: Sequence[int]) -> tuple[list[Items] | None, str]:
        found = [context.per_item(key, arm, seeds) for key in keys]
        whole = [entry for entry in found if entry is not None]
        return (whole, "") if len(whole) == len(found) else (None, _NO_ITEMS)

    mean = Quantity(
        id=f"mean.{metric}",
        title=f"mean {METRIC_TITLES.get(metric, metric)} of {len(keys)} tasks",
        of=of,
        higher_is_better=higher_is_better,
    )
    measure = context.measure(mean, items)
    ranks: dict[str, list[float]] = {arm: [] for arm in context.arms}
    for seed in context.seeds:
        for key in keys:
            scores = {a: context.cells[a, seed].final_score(key) for a in context.arms if (a, seed) in context.cells}
            if len(scores) < len(context.arms) or None in scores.values():
                continue  # a rank among fewer arms is another rank
            numbers = np.array([score for score in scores.values() if score is not None])
            for arm, rank in zip(scores, average_ranks(-numbers if higher_is_better else numbers), strict=True):
                ranks[arm].append(float(rank))
    mean_rank = {arm: float(np.mean(entries)) for arm, entries in ranks.items() if entries}
    return TaskMean(metric, tuple(task for task, _ in keys), measure, mean_rank)


def selections(context: Context, keys: Sequence[Key]) -> tuple[Selection, ...]:
    """What choosing the best checkpoint would have shown, by task and arm."""
    found = []
    for key in keys:
        up = context.direction(key)
        best: dict[str, dict[int, float]] = {}
        final: dict[str, dict[int, float]] = {}
        count = 0
        for (arm, seed), cell in context.cells.items():
            score = cell.final_score(key)
            values = cell.curve(key)[1]
            if score is None or len(values) < 2:
                continue
            count = max(count, len(values))
            best.setdefault(arm, {})[seed] = float(values.max() if up else values.min())
            final.setdefault(arm, {})[seed] = score
        for arm in context.arms:
            if arm not in best:
                continue
            shared = [seed for seed in context.pairs[arm] if seed in best[arm] and seed in best.get(context.base, {})]
            treated = arm != context.base and bool(shared)
            mean_final = float(np.mean(list(final[arm].values())))
            mean_best = float(np.mean(list(best[arm].values())))
            found.append(
                Selection(
                    arm=arm,
                    quantity=task_id(key),
                    checkpoints=count,
                    final=mean_final,
                    best=mean_best,
                    gain=mean_best - mean_final,
                    difference_final=float(np.mean([final[arm][s] - final[context.base][s] for s in shared]))
                    if treated
                    else None,
                    difference_best=float(np.mean([best[arm][s] - best[context.base][s] for s in shared]))
                    if treated
                    else None,
                )
            )
    return tuple(found)
