"""The learning rates that were tried, and those of the runs."""

from __future__ import annotations

from decondense.compare.context import Context
from decondense.compare.results import Sweep, Trial


def sweeps(context: Context) -> list[Sweep]:
    """The trials of each arm, ascending."""
    found = []
    for arm in context.arms:
        # a trial that was repeated after a failure counts as it ended last
        rows = {float(row["learning_rate"]): row for row in context.study.trials if row["arm"] == arm}
        if rows:
            trials = tuple(
                Trial(
                    learning_rate=rate,
                    steps=int(row["steps"]),
                    seed=int(row["seed"]),
                    value=None if row["value"] is None or row["status"] == "failed" else float(row["value"]),
                    chosen=bool(row["chosen"]),
                    error=(row["error"] or "no reason recorded") if row["status"] == "failed" else None,
                )
                for rate, row in sorted(rows.items())
            )
            found.append(Sweep(arm, trials))
    return found


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
