"""The settings that were tried (learning rate, warm-up, clipping), and the learning rates of the runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from decondense.compare.context import Context
from decondense.compare.results import Sweep, Trial


def sweeps(context: Context) -> list[Sweep]:
    """The trials of each arm, ascending by learning rate, warm-up and clipping."""
    found = []
    for arm in context.arms:
        # a trial that was repeated after a failure counts as it ended last
        rows: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
        for row in context.study.trials:
            if row["arm"] == arm:
                setting = (float(row["learning_rate"]), row.get("warmup"), row.get("max_grad_norm"))
                rows.setdefault(setting, {})[int(row["seed"])] = row
        if rows:
            ordered = sorted(rows.items(), key=lambda entry: [value or 0.0 for value in entry[0]])
            found.append(Sweep(arm, tuple(_trial(setting, list(by_seed.values())) for setting, by_seed in ordered)))
    return found


def _trial(setting: tuple[Any, ...], rows: Sequence[dict[str, Any]]) -> Trial:
    """One setting over its trial seeds: its loss is their mean, and it failed when one of them did."""
    failed = next((row for row in rows if row["status"] == "failed"), None)
    values = [row["value"] for row in rows]
    whole = failed is None and None not in values
    return Trial(
        learning_rate=setting[0],
        warmup=setting[1],
        max_grad_norm=setting[2],
        steps=int(rows[0]["steps"]),
        seeds=tuple(int(row["seed"]) for row in rows),
        value=float(sum(values) / len(values)) if whole else None,
        chosen=any(row["chosen"] for row in rows),
        error=None if failed is None else failed["error"] or "no reason recorded",
    )


def learning_rates(context: Context) -> dict[str, tuple[float, ...]]:
    """The peak learning rates of each trained arm's runs."""
    swept = {sweep.arm for sweep in sweeps(context)}
    config = context.study.config
    found: dict[str, tuple[float, ...]] = {}
    for arm in context.arms:
        rates: dict[float, None] = {}
        for seed in context.seeds:
            cell = context.cells.get((arm, seed))
            if cell is None or cell.untrained:
                continue
            rate = cell.recorded("learning_rate")
            if rate is None and arm not in swept and config is not None:
                # the committed rows of the demo leave it to the configuration
                entry = context.study.arm_config(arm)
                rate = (entry.learning_rate if entry else None) or config.train.learning_rate
            if rate is not None:
                rates[float(rate)] = None
        if rates:
            found[arm] = tuple(rates)
    return found
