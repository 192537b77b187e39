"""Paired differences with their intervals, and the cost of an arm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from decondense.compare import Comparison, Difference, Measure
from decondense.figures.curves import style_of
from decondense.figures.style import (
    COLUMN,
    INK,
    ArmStyle,
    figure_style,
    grid,
    legend_above,
    new_figure,
    panel_grid,
    same_limits,
)

_MOST_GROUPED = 3


def forest(
    measures: Sequence[Measure], comparison: Comparison, *, xlabel: str, names: Sequence[str] | None = None
) -> Figure:
    """Paired differences with their 95 % intervals: small dots are seeds, the large marker is their mean.

    All measures share one axis, so they must have the same unit. ``names`` are their labels, default the measures' own.
    Several measures of more than three arms get one panel each. An outlying difference, which would compress the axis
    for all others, is drawn as a number at the edge.
    """
    style = style_of(comparison)
    names = list(names or [measure.name for measure in measures])
    grouped = len(measures) > 1
    if grouped and len(comparison.treated) > _MOST_GROUPED:
        return _forest_panels(measures, style, xlabel, names)
    ticks: list[tuple[float, str]] = []
    lines: list[tuple[float, Difference]] = []
    place = 0.0
    for name, measure in zip(names, measures, strict=True):
        first = place
        for d in measure.differences:
            lines.append((place, d))
            if not grouped:
                ticks.append((place, style.tick(d.arm)))
            place += 1.0
        if grouped:
            ticks.append(((first + place - 1) / 2, name))
            place += 0.5
    with figure_style():
        legend = grouped and len(comparison.treated) > 1
        figure, (axes,) = new_figure(COLUMN, 0.7 + 0.3 * legend + 0.22 * max(1.0, place))
        _forest_rows(axes, lines, style)
        axes.set_yticks([at for at, _ in ticks], [name for _, name in ticks])
        axes.set_ylim(max([at for at, _ in lines], default=0) + 0.6, -0.6)
        axes.set_xlabel(xlabel)
        if legend:
            legend_above(figure, [axes])
    return figure


def _forest_panels(measures: Sequence[Measure], style: ArmStyle, xlabel: str, names: Sequence[str]) -> Figure:
    differences = [d for measure in measures for d in measure.differences]
    arms = list(dict.fromkeys(d.arm for d in differences))
    limits = _common_limits(differences)
    with figure_style():
        figure, panels = panel_grid(len(measures), 0.55 + 0.17 * len(arms), 0.2)
        for measure, name, (axes, is_first, is_last) in zip(measures, names, panels, strict=True):
            _forest_rows(axes, [(float(arms.index(d.arm)), d) for d in measure.differences], style, limits)
            axes.set_title(name, fontsize=8)
            axes.set_yticks(range(len(arms)), [style.tick(arm).replace("\n", " ") for arm in arms], fontsize=7)
            axes.tick_params(labelleft=is_first, labelbottom=is_last)
            axes.set_ylim(len(arms) - 0.4, -0.6)
            if is_last:
                axes.set_xlabel(xlabel)
        same_limits(figure)
    return figure


def _common_limits(differences: Sequence[Difference]) -> tuple[float, float] | None:
    """Limits without the outliers, if a minority of the arms lies more than four times as far out as all others."""
    values: dict[str, list[float]] = {}
    for d in differences:
        values.setdefault(d.arm, []).extend([*d.differences, *(d.interval or ())])
    extent = {arm: max(map(abs, own)) for arm, own in values.items()}
    ordered = sorted(extent.values())
    for place in range(len(ordered) - 1, max(0, (len(ordered) - 1) // 2), -1):
        near = ordered[place - 1]
        if near > 0 and ordered[place] > 4 * near:
            inside = [value for arm, own in values.items() if extent[arm] <= near for value in own]
            low, high = min(0.0, *inside), max(0.0, *inside)
            pad = 0.12 * (high - low)
            return low - pad, high + pad
    return None


def _forest_rows(
    axes: Axes, lines: Sequence[tuple[float, Difference]], style: ArmStyle, limits: tuple[float, float] | None = None
) -> None:
    axes.axvline(0, color=INK, linewidth=0.8, zorder=1)
    limits = limits or _common_limits([d for _, d in lines])
    named: set[str] = set()
    for row, d in lines:
        colour = style.colour(d.arm)
        if limits and not limits[0] <= d.mean <= limits[1]:
            value = f"{d.mean:+.2f}".replace("-", "−")
            text, x, side = (f"{value} →", 1.0, "right") if d.mean > limits[1] else (f"← {value}", 0.0, "left")
            at = axes.get_yaxis_transform()
            axes.text(x, row, text, transform=at, ha=side, va="center", fontsize=7, color=colour)
            continue
        axes.plot(d.differences, [row + 0.24] * d.n, "o", color=colour, markersize=2.6, alpha=0.6, markeredgewidth=0)
        if d.interval:
            axes.plot(d.interval, [row, row], color=colour, linewidth=1.6, solid_capstyle="butt")
        marker, face = style.marker(d.arm), colour if d.detected else "white"
        axes.plot([d.mean], [row], marker, color=colour, markerfacecolor=face, markersize=5, zorder=4)
        if d.arm not in named:  # filled in the legend, detected or not
            axes.plot([], [], marker, color=colour, label=style.label(d.arm))
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
    style = style_of(comparison)
    assert comparison.layers is not None
    by_arm = {a: comparison.layers.differences[a] for a in comparison.treated if a in comparison.layers.differences}
    if len(by_arm) > _MOST_GROUPED:
        return _layer_panels(by_arm, style)
    with figure_style():
        figure, (axes,) = new_figure(COLUMN, 2.55)
        grid(axes)
        axes.axhline(0, color=INK, linewidth=0.8)
        for number, (arm, layers) in enumerate(by_arm.items()):
            x = np.arange(len(layers)) + 0.16 * (number - (len(by_arm) - 1) / 2)
            y = np.array([d.mean for d in layers])
            low, high = np.array([d.interval or (d.mean, d.mean) for d in layers]).T
            error = np.maximum([y - low, high - y], 0)
            axes.errorbar(x, y, error, elinewidth=1.1, linewidth=0.9, **style.line(arm))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.set_xlabel("layer (0 = embedding)")
        axes.set_ylabel("Δ mean cosine, end of training")
        legend_above(figure, [axes])
    return figure


def _layer_panels(by_arm: Mapping[str, Sequence[Difference]], style: ArmStyle) -> Figure:
    """One panel per arm: the error bars of many arms in one panel would hide each other."""
    with figure_style():
        figure, panels = panel_grid(len(by_arm), 1.45, 0.3)
        for (arm, layers), (axes, is_first, is_last) in zip(by_arm.items(), panels, strict=True):
            x, colour = np.arange(len(layers)), style.colour(arm)
            bounds = np.array([d.interval or (d.mean, d.mean) for d in layers])
            grid(axes)
            axes.axhline(0, color=INK, linewidth=0.8)
            axes.fill_between(x, bounds[:, 0], bounds[:, 1], color=colour, alpha=0.25, linewidth=0)
            axes.plot(x, [d.mean for d in layers], color=colour, marker=style.marker(arm), markersize=3)
            axes.set_title(style.tick(arm), fontsize=8)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
            axes.tick_params(labelleft=is_first, labelbottom=is_last)
            if is_last:
                axes.set_xlabel("layer")
            if is_first:
                axes.set_ylabel("Δ mean cosine")
        same_limits(figure)
    return figure


def cost(comparison: Comparison) -> Figure:
    """Median time of an optimizer step: one dot per run, a bar at the median over seeds, and the paired ratio."""
    style = style_of(comparison)
    entries = [c for c in comparison.cost if any(c.step_wall_ms)]
    with figure_style():
        figure, (axes,) = new_figure(COLUMN, 0.75 + 0.3 * max(1, len(entries)))
        for row, entry in enumerate(entries):
            values = [value for value in entry.step_wall_ms if value]
            colour = style.colour(entry.arm)
            axes.barh(row, float(np.median(values)), color=colour, alpha=0.25, height=0.5)
            axes.plot(values, [row] * len(values), "o", color=colour, markersize=3)
            if entry.wall_ratio:
                ratio = f"× {entry.wall_ratio[0]:.3f}"
                at = (max(values), row)
                axes.annotate(ratio, at, xytext=(6, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(entries)), [style.tick(entry.arm) for entry in entries])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(entries) - 0.5, -0.5)
        axes.set_xlabel("optimizer step (ms, median of a run)")
        axes.margins(x=0.2)
        axes.set_xlim(left=0)
    return figure
