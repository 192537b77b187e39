"""Paired differences with their intervals, and what an arm costs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from decondense.compare import Comparison, Difference, Measure
from decondense.figures.style import COLUMN, INK, PAGE, Looks, figure_style, grid, legend_above, new_figure

_MOST_GROUPED = 3


def forest(
    measures: Sequence[Measure], comparison: Comparison, *, xlabel: str, names: Sequence[str] | None = None
) -> Figure:
    """Paired differences with their 95 % intervals: small dots are seeds, the large marker is their mean.

    All measures share one axis, so they must share a unit. ``names`` are their labels, default the measures' own.
    Several measures of more than three arms get a panel each. An arm whose difference would squeeze all others
    together lies at the edge, with its value beside it.
    """
    looks = Looks(comparison.arms, comparison.baseline, comparison.labels, comparison.dispersed)
    names = list(names or [measure.name for measure in measures])
    grouped = len(measures) > 1
    if grouped and len(comparison.treated) > _MOST_GROUPED:
        return _forest_panels(measures, looks, xlabel, names)
    ticks: list[tuple[float, str]] = []
    lines: list[tuple[float, Difference]] = []
    place = 0.0
    for name, measure in zip(names, measures, strict=True):
        first = place
        for d in measure.differences:
            lines.append((place, d))
            if not grouped:
                ticks.append((place, looks.tick(d.arm)))
            place += 1.0
        if grouped:
            ticks.append(((first + place - 1) / 2, name))
            place += 0.5
    with figure_style():
        legend = grouped and len(comparison.treated) > 1
        figure, (axes,) = new_figure(COLUMN, 0.7 + 0.3 * legend + 0.22 * max(1.0, place))
        _forest_rows(axes, lines, looks)
        axes.set_yticks([at for at, _ in ticks], [name for _, name in ticks])
        axes.set_ylim(max([at for at, _ in lines], default=0) + 0.6, -0.6)
        axes.set_xlabel(xlabel)
        if legend:
            legend_above(figure, [axes])
    return figure


def _forest_panels(measures: Sequence[Measure], looks: Looks, xlabel: str, names: Sequence[str]) -> Figure:
    arms = list(dict.fromkeys(d.arm for measure in measures for d in measure.differences))
    columns = min(4, len(measures))
    rows = math.ceil(len(measures) / columns)
    with figure_style():
        figure = Figure(figsize=(PAGE, rows * (0.55 + 0.17 * len(arms)) + 0.2), layout="constrained")
        table = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        every = [d for measure in measures for d in measure.differences]
        limits = _common_limits(every)
        for number, axes in enumerate(table.ravel()):
            if number >= len(measures):
                axes.set_visible(False)
                continue
            lines = [(float(arms.index(d.arm)), d) for d in measures[number].differences]
            _forest_rows(axes, lines, looks, limits)
            axes.set_title(names[number], fontsize=8)
            axes.set_yticks(range(len(arms)), [looks.tick(arm).replace("\n", " ") for arm in arms], fontsize=7)
            axes.tick_params(labelleft=number % columns == 0, labelbottom=number + columns >= len(measures))
            if number + columns >= len(measures):
                axes.set_xlabel(xlabel)
        table[0, 0].set_ylim(len(arms) - 0.4, -0.6)
    return figure


def _common_limits(differences: Sequence[Difference]) -> tuple[float, float] | None:
    """Limits that most arms fit, where a few lie more than four times as far out as all others; else None."""
    reach: dict[str, float] = {}
    for d in differences:
        bounds = [*d.differences, *(d.interval or ())]
        reach[d.arm] = max(reach.get(d.arm, 0.0), max(abs(value) for value in bounds))
    ordered = sorted(reach.values())
    for place in range(len(ordered) - 1, max(0, (len(ordered) - 1) // 2), -1):
        near = ordered[place - 1]
        if near > 0 and ordered[place] > 4 * near:
            inside = [v for d in differences if reach[d.arm] <= near for v in (*d.differences, *(d.interval or ()))]
            low, high = min(0.0, *inside), max(0.0, *inside)
            pad = 0.12 * (high - low)
            return low - pad, high + pad
    return None


def _forest_rows(
    axes: Axes,
    lines: Sequence[tuple[float, Difference]],
    looks: Looks,
    limits: tuple[float, float] | None = None,
) -> None:
    axes.axvline(0, color=INK, linewidth=0.8, zorder=1)
    limits = limits or _common_limits([d for _, d in lines])
    named: set[str] = set()
    for row, d in lines:
        colour = looks.colour(d.arm)
        if limits and not limits[0] <= d.mean <= limits[1]:
            right = d.mean > limits[1]
            words = f"{d.mean:+.2f}".replace("-", "−")
            axes.annotate(
                f"{words} →" if right else f"← {words}",
                (1.0 if right else 0.0, row),
                xycoords=("axes fraction", "data"),
                ha="right" if right else "left",
                va="center",
                fontsize=7,
                color=colour,
            )
            continue
        axes.plot(d.differences, [row + 0.24] * d.n, "o", color=colour, markersize=2.6, alpha=0.6, markeredgewidth=0)
        if d.interval:
            axes.plot(d.interval, [row, row], color=colour, linewidth=1.6, solid_capstyle="butt")
        axes.plot(
            [d.mean],
            [row],
            looks.marker(d.arm),
            color=colour,
            markerfacecolor=colour if d.detected else "white",
            markersize=5,
            zorder=4,
        )
        if d.arm not in named:  # the legend tells arms apart, not what was detected
            axes.plot([], [], looks.marker(d.arm), color=colour, label=looks.label(d.arm))
        named.add(d.arm)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(4, min_n_ticks=3))
    axes.margins(x=0.06)
    if limits:
        axes.set_xlim(limits)
    grid(axes, "x")


def layer_differences(comparison: Comparison) -> Figure:
    """Difference of every layer's mean cosine, arm - baseline, with pointwise 95 % intervals over seeds."""
    looks = Looks(comparison.arms, comparison.baseline, comparison.labels, comparison.dispersed)
    assert comparison.layers is not None
    arms = [arm for arm in comparison.treated if arm in comparison.layers.differences]
    if len(arms) > _MOST_GROUPED:
        return _layer_panels(comparison, arms, looks)
    with figure_style():
        figure, (axes,) = new_figure(COLUMN, 2.55)
        grid(axes)
        axes.axhline(0, color=INK, linewidth=0.8)
        for number, arm in enumerate(arms):
            entries = comparison.layers.differences[arm]
            shift = 0.16 * (number - (len(arms) - 1) / 2)
            x = np.arange(len(entries)) + shift
            y = np.array([d.mean for d in entries])
            bounds = [d.interval or (d.mean, d.mean) for d in entries]
            error = np.array([[d.mean - b[0], b[1] - d.mean] for d, b in zip(entries, bounds, strict=True)]).T
            axes.errorbar(
                x,
                y,
                np.maximum(error, 0),
                elinewidth=1.1,
                linewidth=0.9,
                **looks.line(arm),
            )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.set_xlabel("layer (0 = embedding)")
        axes.set_ylabel("Δ mean cosine, end of training")
        legend_above(figure, [axes])
    return figure


def _layer_panels(comparison: Comparison, arms: Sequence[str], looks: Looks) -> Figure:
    """A panel an arm: the error bars of many arms in one panel would hide each other."""
    assert comparison.layers is not None
    columns = min(4, len(arms))
    rows = math.ceil(len(arms) / columns)
    with figure_style():
        figure = Figure(figsize=(PAGE, 1.45 * rows + 0.3), layout="constrained")
        table = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for number, axes in enumerate(table.ravel()):
            if number >= len(arms):
                axes.set_visible(False)
                continue
            entries = comparison.layers.differences[arms[number]]
            x = np.arange(len(entries))
            bounds = np.array([d.interval or (d.mean, d.mean) for d in entries])
            colour = looks.colour(arms[number])
            grid(axes)
            axes.axhline(0, color=INK, linewidth=0.8)
            axes.fill_between(x, bounds[:, 0], bounds[:, 1], color=colour, alpha=0.25, linewidth=0)
            axes.plot(x, [d.mean for d in entries], color=colour, marker=looks.marker(arms[number]), markersize=3)
            axes.set_title(looks.tick(arms[number]), fontsize=8)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
            axes.tick_params(labelbottom=number + columns >= len(arms))
            if number + columns >= len(arms):
                axes.set_xlabel("layer")
            if number % columns == 0:
                axes.set_ylabel("Δ mean cosine")
    return figure


def cost(comparison: Comparison) -> Figure:
    """Median time of an optimizer step: one dot a run, a bar at the median over seeds, the paired ratio beside it."""
    looks = Looks(comparison.arms, comparison.baseline, comparison.labels, comparison.dispersed)
    entries = [c for c in comparison.cost if any(c.step_wall_ms)]
    with figure_style():
        figure, (axes,) = new_figure(COLUMN, 0.75 + 0.3 * max(1, len(entries)))
        for row, entry in enumerate(entries):
            values = [value for value in entry.step_wall_ms if value]
            colour = looks.colour(entry.arm)
            axes.barh(row, float(np.median(values)), color=colour, alpha=0.25, height=0.5)
            axes.plot(values, [row] * len(values), "o", color=colour, markersize=3)
            if entry.wall_ratio:
                axes.annotate(
                    f"× {entry.wall_ratio[0]:.3f}",
                    (max(values), row),
                    xytext=(6, 0),
                    textcoords="offset points",
                    va="center",
                )
        axes.set_yticks(range(len(entries)), [looks.tick(entry.arm) for entry in entries])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(entries) - 0.5, -0.5)
        axes.set_xlabel("optimizer step (ms, median of a run)")
        axes.margins(x=0.2)
        axes.set_xlim(left=0)
    return figure
