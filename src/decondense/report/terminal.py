"""The comparison in 80 columns."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from typing import Any

from decondense.compare import QUANTITIES, Comparison, Cost, Difference, TaskMeasure
from decondense.formatting import NONE, count, fitting, fitting_interval, number
from decondense.report.cells import median_of
from decondense.report.selection import MANY, main_measures, measures, only, shown_arms, shown_in_words
from decondense.report.words import CLOCKS, shares
from decondense.table import Table


def terminal_table(comparison: Comparison) -> Table:
    """A table that fits 80 characters: measures, cosine by layer, step time, tokens to equal loss.

    With several arms each measure begins with a row of the baseline; with many the layers and, where they have a mean,
    the single benchmarks are left to the report. Of more than 13 arms it shows the extremes, and a note says so.
    """
    few = shown_in_words(comparison)
    comparison = only(comparison, shown_arms(comparison)) if few else comparison
    several = len(comparison.treated) > 1
    many = len(comparison.treated) > MANY
    width = 13 if not several else 16
    # of a hub id the model's own name is enough, where that tells all arms apart
    names = {arm: comparison.labels[arm].rstrip("/").rsplit("/", 1)[-1] for arm in comparison.arms}
    if len(set(names.values())) < len(names):
        names = comparison.labels
    short = {arm: textwrap.fill(names[arm], width, max_lines=2, placeholder="…") for arm in comparison.arms}
    lines: list[list[str]] = []
    if not comparison.treated:
        for measure in measures(comparison):
            values = measure.of(comparison.baseline)
            lines.append([textwrap.fill(measure.title, 40), fitting(values.mean) if values else NONE])
        return _table(comparison, ["", short[comparison.baseline]], lines, few)
    columns = (
        ["", "arm", "value", "difference", "95 % interval", "n"]
        if several
        else ["", short[comparison.baseline], short[comparison.treated[0]], "difference", "95 % interval", "n"]
    )
    begun: set[str] = set()

    def add(name: str, arm: str, base: str, own: str, *cells: str) -> None:
        shown = textwrap.fill(name, 18)
        if not several:
            lines.append([shown, base, own, *cells])
            return
        if name not in begun:
            lines.append([shown, short[comparison.baseline], base, "", "", ""])
            begun.add(name)
        lines.append(["", short[arm], own, *cells])

    def add_difference(name: str, d: Difference, *, outcome: bool = False) -> None:
        base, own = (fitting(sum(values) / d.n) for values in (d.baseline_values, d.arm_values))
        difference = fitting(d.mean, sign=True) + (f"\n{d.outcome}" if outcome else "")
        add(name, d.arm, base, own, difference, fitting_interval(d.interval), str(d.n))

    layered = comparison.layers is not None and not many
    # the mean over benchmarks speaks for them where every one would have a row for each of many arms
    for measure in main_measures(comparison) if many and comparison.means else measures(comparison):
        if layered and measure.quantity == "mean_cosine.last":
            continue  # the last of the layers below
        if isinstance(measure, TaskMeasure) and measure.metric == "margin_bits":
            continue  # beside accuracy and bits per byte, for which there is room
        name = QUANTITIES[measure.quantity].short_title if measure.quantity in QUANTITIES else measure.title
        for d in measure.differences:
            add_difference(name, d, outcome=True)
    if comparison.layers is not None and layered:
        labels = comparison.layers.labels
        stride = math.ceil(len(labels) / 16)
        for place, label in enumerate(labels):
            if place % stride and place != len(labels) - 1:
                continue
            for arm in comparison.treated:
                if arm in comparison.layers.differences:
                    add_difference(f"cosine, {label}", comparison.layers.differences[arm][place])
    base_cost = next((c for c in comparison.cost if c.arm == comparison.baseline), None)
    costs: list[tuple[str, Callable[[Cost], Any], Callable[[Cost], Any], float]] = [
        ("step time (ms)", lambda c: c.wall_ratio, lambda c: c.step_wall_ms, 1.0),
        ("step, CPU (ms)", lambda c: c.cpu_ratio, lambda c: c.step_cpu_ms, 1.0),
        ("GPU memory (MiB)", lambda c: c.cuda_ratio, lambda c: c.peak_cuda_bytes, 2.0**20),
    ]
    for name, ratio_of, values_of, scale in costs:
        for c in comparison.cost:
            ratio = ratio_of(c)
            if ratio and base_cost is not None:
                base, own = (
                    NONE if (value := median_of(values_of(entry))) is None else number(value / scale, 1)
                    for entry in (base_cost, c)
                )
                add(name, c.arm, base, own, f"× {ratio[0]:.3f}", f"{ratio[1]:.3f} to {ratio[2]:.3f}", str(c.n))
    if comparison.equal_time is not None:
        name = f"loss, equal {CLOCKS[comparison.equal_time.clock]}"
        for d in comparison.equal_time.differences:
            add_difference(name, d, outcome=True)
    for s in comparison.speed:
        base, own = (count(median_of(values)) for values in (s.baseline_tokens, s.tokens))
        if s.in_tokens is None:
            add("same-loss tokens", s.arm, base, own, NONE if s.resolved else "unsure", NONE, str(s.n))
            continue
        share, bounds = shares(s.in_tokens)
        span = NONE if bounds is None else f"{bounds[0]:.2f} to {bounds[1]:.2f}"
        add("same-loss tokens", s.arm, base, own, f"× {share:.2f}\n{s.in_tokens.outcome}", span, str(s.n))
    return _table(comparison, columns, lines, few)


def _table(comparison: Comparison, columns: list[str], lines: list[list[str]], few: str) -> Table:
    words = 2 if "arm" in columns else 1
    return Table("comparison", comparison.title, tuple(columns), tuple(map(tuple, lines)), words, (few,) if few else ())
