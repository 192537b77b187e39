"""Figures of a paired study: loss over training, mean cosine by layer, paired differences, cost."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from decondense.compare import SIZE_QUANTITIES, VALIDATION, Cell, Comparison, Difference, Key, Measure, Study
from decondense.figures.condensation import COSINE_RANGE, count_label, density, family_figure, heatmap, spread_ticks
from decondense.figures.style import COLUMN, INK, PAGE, Looks, figure_style, grid, new_figure
from decondense.records import Row

Array = npt.NDArray[np.float64]
Panel = Literal["training", "validation", "difference"]
MOST_BANDS = 6
"""With more arms than that, bands and single seeds would hide each other, and only means are drawn."""
MOST_MAPS = 6
"""Rows of heat maps that fit a page."""


def looks_of(study: Study) -> Looks:
    """Colours and labels of a study's arms."""
    return Looks(study.arms, study.baseline, study.labels)


def _width(panels: int) -> float:
    return COLUMN if panels == 1 else PAGE


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend above all panels, where it hides no data, in as many rows as it needs."""
    found: dict[str, Any] = {}
    for place in axes:
        for handle, label in zip(*place.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if not found:
        return
    room = 16 * figure.get_figwidth()  # characters that fit a row
    columns = len(found)
    while columns > 1 and sum(sorted(len(label) + 7 for label in found)[-columns:]) > room:
        columns -= 1
    rows = math.ceil(len(found) / columns)
    if rows > 2:  # a high legend must not eat the panels
        figure.set_figheight(figure.get_figheight() + 0.17 * (rows - 2))
    figure.legend(found.values(), found.keys(), loc="outside upper left", ncols=columns, columnspacing=1.4)


def _token_axis(axes: Axes, most: float) -> None:
    units = ((1e9, "training tokens (billion)"), (1e6, "training tokens (million)"), (1.0, "training tokens"))
    scale, label = next((unit for unit in units if most >= 0.1 * unit[0]), units[-1])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / scale:g}"))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel(label)
    axes.set_xlim(left=0, right=most * 1.02 if most else 1)


def _stack(curves: Sequence[tuple[Array, Array]]) -> tuple[Array, Array] | None:
    """(x, values [runs, points]) over the points that all curves share."""
    curves = [curve for curve in curves if len(curve[0])]
    if not curves:
        return None
    shared = sorted(set.intersection(*(set(x.tolist()) for x, _ in curves)))
    if not shared:
        return None
    rows = [[dict(zip(x.tolist(), y.tolist(), strict=True))[at] for at in shared] for x, y in curves]
    return np.array(shared), np.array(rows)


# --------------------------------------------------------------------------------------------------------------------
# Loss over training
# --------------------------------------------------------------------------------------------------------------------


def _arm_curves(study: Study, arm: str, panel: Panel, key: Key) -> list[tuple[Array, Array]]:
    # what was not trained has no curve
    cells = [cell for cell in study.of_arm(arm) if not cell.untrained]
    if panel == "training":
        return [cell.training_curve() for cell in cells]
    if panel == "validation":
        return [cell.curve(key) for cell in cells]
    found = []
    for cell in cells:
        assert study.baseline is not None
        rival = study.cells.get((study.baseline, cell.seed))
        if rival is None or rival.status != "finished" or rival.untrained:
            continue
        both = _stack([cell.curve(key), rival.curve(key)])
        if both is not None:
            found.append((both[0], both[1][0] - both[1][1]))
    return found


def loss_curves(
    study: Study, panels: Sequence[Panel] = ("training", "validation", "difference"), *, key: Key = VALIDATION
) -> Figure:
    """Loss against training tokens: mean over seeds, band from the least to the greatest seed.

    ``"training"`` is the logged cross-entropy, ``"validation"`` the held-out loss at the evaluated checkpoints,
    ``"difference"`` the paired difference of the held-out loss, one thin line a seed. The vertical axis starts after
    the first tenth of training, so that the end can be read.
    """
    looks = looks_of(study)
    with figure_style():
        figure, axes = new_figure(_width(len(panels)), 2.55, len(panels))
        for place, panel in zip(axes, panels, strict=True):
            _loss_panel(place, study, panel, looks, key)
        _legend(figure, axes)
    return figure


def _loss_panel(axes: Axes, study: Study, panel: Panel, looks: Looks, key: Key) -> None:
    arms = [arm for arm in study.arms if panel != "difference" or arm != study.baseline]
    many = len(study.arms) > MOST_BANDS
    seen: list[tuple[Array, Array]] = []
    for arm in arms:
        stacked = _stack(_arm_curves(study, arm, panel, key)) if panel != "difference" or study.baseline else None
        if stacked is None:
            continue
        x, values = stacked
        colour = looks.colour(arm)
        marker = looks.marker(arm) if panel != "training" else ""
        if many:
            pass
        elif panel == "difference":
            for row in values:
                axes.plot(x, row, color=colour, linewidth=0.7, alpha=0.55)
        elif len(values) > 1:
            axes.fill_between(x, values.min(0), values.max(0), color=colour, alpha=0.22, linewidth=0)
        axes.plot(
            x, values.mean(0), color=colour, linestyle=looks.dash(arm), marker=marker, label=looks.label(arm), zorder=3
        )
        seen.append((x, values))
    grid(axes)
    name = "validation loss" if key == VALIDATION else f"{key[0]} {key[1]}"
    unit = " (nats/token)" if key[1] == "loss" else ""
    labels = {"training": "training loss (nats/token)", "validation": f"{name}{unit}", "difference": f"Δ {name}{unit}"}
    axes.set_ylabel(labels[panel])
    if not seen:
        axes.text(0.5, 0.5, "no rows", ha="center", va="center", transform=axes.transAxes, color=INK)
        return
    most = max(float(x[-1]) for x, _ in seen)
    _token_axis(axes, most)
    if panel == "difference":
        axes.axhline(0, color=INK, linewidth=0.8)
        low = min(float(values.min()) for _, values in seen)
        high = max(float(values.max()) for _, values in seen)
        low, high = min(low, 0.0), max(high, 0.0)
        pad = 0.08 * (high - low or 1)
        axes.set_ylim(low - pad, high + pad)
    else:
        late = [values[:, x >= 0.08 * most] for x, values in seen]
        if min(values.shape[1] for values in late) >= 3:
            low = min(float(values.min()) for values in late)
            high = max(float(values.max()) for values in late)
            pad = 0.06 * (high - low or 1)
            axes.set_ylim(low - pad, high + pad)


# --------------------------------------------------------------------------------------------------------------------
# Mean cosine by layer
# --------------------------------------------------------------------------------------------------------------------


def times(study: Study, count: int = 3) -> list[int]:
    """The steps at which profiles are shown: the start, then up to ``count - 2`` early ones, and the end."""
    cells = [cell for cell in study.cells.values() if cell.status == "finished" and cell.profiles]
    # what was not trained is the same at all times
    shared = [set(cell.profiles) for cell in [cell for cell in cells if not cell.untrained] or cells]
    steps = sorted(set.intersection(*shared)) if shared else []
    if len(steps) <= count:
        return steps
    return [steps[0], *steps[1 : count - 1], steps[-1]]


def when(study: Study, step: int) -> str:
    """``start``, ``end`` or the step with its share of training."""
    last = max((cell.final_step or 0 for cell in study.cells.values()), default=0)
    if last == 0:
        return "as it is"
    if step == 0:
        return "start"
    if step >= last:
        return f"end (step {step})"
    return f"step {step} ({step / last:.0%})"


def _profile_at(cell: Cell, step: int) -> Row | None:
    """The profile at a step; of what was not trained, its only one."""
    return cell.profiles.get(0 if cell.untrained else step)


def profiles(study: Study, steps: Sequence[int] | None = None) -> Figure:
    """Mean cosine of every layer, one panel a time: mean over seeds, band from the least to the greatest seed."""
    steps = times(study) if steps is None else list(steps)
    looks = looks_of(study)
    with figure_style():
        panels = max(1, len(steps))
        figure, axes = new_figure(_width(panels), 2.55, panels, sharey=True)
        # all times share one axis, in one figure or in several
        rows = [profile for cell in study.cells.values() for profile in cell.profiles.values()]
        lowest = min((min(p["mean_cosine"]) for p in rows), default=0.0)
        for number, (place, step) in enumerate(zip(axes, steps, strict=False)):
            _profile_panel(place, study, step, looks)
            place.set_ylim(min(-0.03, math.floor(lowest * 10) / 10), 1.02)
            if number == 0:
                place.set_ylabel("mean cosine similarity")
        _legend(figure, axes)
    return figure


def _profile_panel(axes: Axes, study: Study, step: int, looks: Looks) -> None:
    grid(axes)
    every = {
        arm: [profile for cell in study.of_arm(arm) if (profile := _profile_at(cell, step)) is not None]
        for arm in study.arms
    }
    # models of several depths share an axis only as fractions of their depth
    fractions = len({len(profile["mean_cosine"]) for found in every.values() for profile in found}) > 1
    for arm, found in every.items():
        if not found:
            continue
        depth = min(len(profile["mean_cosine"]) for profile in found)
        values = np.array([profile["mean_cosine"][:depth] for profile in found])
        x = np.linspace(0, 1, depth) if fractions else np.arange(depth)
        if len(values) > 1 and len(every) <= MOST_BANDS:
            axes.fill_between(x, values.min(0), values.max(0), color=looks.colour(arm), alpha=0.22, linewidth=0)
        axes.plot(
            x,
            values.mean(0),
            color=looks.colour(arm),
            linestyle=looks.dash(arm),
            marker=looks.marker(arm),
            label=looks.label(arm),
            zorder=3,
            clip_on=False,
        )
    if fractions:
        axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        axes.set_xlabel("layer fraction (0 = embedding)")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.set_xlabel("layer (0 = embedding)")
    axes.set_title(when(study, step))


def overview(study: Study) -> Figure:
    """The study at a glance: mean cosine by layer early and at the end, and the held-out loss over training."""
    looks = looks_of(study)
    steps = times(study)[-2:]
    with figure_style():
        figure, axes = new_figure(PAGE, 2.55, len(steps) + 1)
        for place, step in zip(axes, steps, strict=False):
            _profile_panel(place, study, step, looks)
            place.set_ylim(-0.03, 1.02)
        axes[0].set_ylabel("mean cosine similarity")
        _loss_panel(axes[-1], study, "validation", looks, VALIDATION)
        _legend(figure, axes)
    return figure


# --------------------------------------------------------------------------------------------------------------------
# Differences
# --------------------------------------------------------------------------------------------------------------------


def forest(
    measures: Sequence[Measure], comparison: Comparison, *, xlabel: str, names: Sequence[str] | None = None
) -> Figure:
    """Paired differences with their 95 % intervals: small dots are seeds, the large marker is their mean.

    All measures share one axis, so they must share a unit. ``names`` are their labels, default the measures' own.
    Several measures of more than three arms get a panel each. An arm whose difference would squeeze all others
    together lies at the edge, with its value beside it.
    """
    looks = Looks(comparison.arms, comparison.baseline, comparison.labels)
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
            _legend(figure, [axes])
    return figure


_MOST_GROUPED = 3


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
    looks = Looks(comparison.arms, comparison.baseline, comparison.labels)
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
                color=looks.colour(arm),
                linestyle=looks.dash(arm),
                marker=looks.marker(arm),
                elinewidth=1.1,
                linewidth=0.9,
                label=looks.label(arm),
            )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.set_xlabel("layer (0 = embedding)")
        axes.set_ylabel("Δ mean cosine, end of training")
        _legend(figure, [axes])
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


# --------------------------------------------------------------------------------------------------------------------
# Model size, learning rates
# --------------------------------------------------------------------------------------------------------------------


def size_trend(comparison: Comparison) -> Figure:
    """Condensation against the number of parameters, a panel a measure and a line a family (after figure 2)."""
    assert comparison.size is not None
    entries = {entry.arm: entry for entry in comparison.condensation_by_arm}
    families = comparison.size.families
    looks = Looks(families, None)
    spread = {"spearman": lambda e: e.spearman, "kendall": lambda e: e.kendall, "last_layer": lambda e: e.last.get("1")}
    with figure_style():
        figure, panels = new_figure(PAGE, 2.55, len(SIZE_QUANTITIES))
        sizes = sorted({float(point.parameters) for point in comparison.size.points})
        for axes, quantity in zip(panels, SIZE_QUANTITIES, strict=True):
            grid(axes)
            for family in families:
                points = sorted(
                    (p for p in comparison.size.points if p.family == family and p.value(quantity) is not None),
                    key=lambda p: p.parameters,
                )
                if not points:
                    continue
                values = [spread[quantity](entries[p.arm]) for p in points]
                axes.errorbar(
                    [p.parameters for p in points],
                    [value.mean for value in values],
                    yerr=[value.sd or 0.0 for value in values],
                    color=looks.colour(family),
                    linestyle=looks.dash(family),
                    marker=looks.marker(family),
                    elinewidth=0.9,
                    linewidth=1.2,
                    label=looks.label(family),
                )
            axes.set_xscale("log")
            axes.set_xlim(sizes[0] / (sizes[-1] / sizes[0]) ** 0.08, sizes[-1] * (sizes[-1] / sizes[0]) ** 0.08)
            ticks = spread_ticks(sizes)
            axes.set_xticks(ticks, [count_label(size) for size in ticks])
            axes.minorticks_off()
            axes.set_xlabel("parameters")
            axes.set_ylabel(SIZE_QUANTITIES[quantity].replace(" of mean cosine with depth", " with depth"))
        _legend(figure, panels)
    return figure


def family(study: Study, comparison: Comparison, name: str) -> Figure | None:
    """The heat maps of a family from the smallest to the largest model; None without histograms or with one model."""
    assert comparison.size is not None
    found = []
    for point in comparison.size.points:
        if point.family != name:
            continue
        maps = histograms(study, point.arm)
        if not maps:
            return None
        found.append(
            {
                **maps[max(maps)],
                "label": textwrap.fill(study.labels[point.arm], 14, max_lines=2, placeholder="…"),
                "parameters": point.parameters,
                "spearman": point.spearman,
                "kendall": point.kendall,
            }
        )
    return family_figure(found, family=name, kind="pooled") if len(found) > 1 else None


def trials(comparison: Comparison) -> Figure:
    """Loss of each trial against its learning rate, a line an arm; the chosen rates are filled, failures crossed."""
    looks = Looks(comparison.arms, comparison.baseline, comparison.labels)
    with figure_style():
        figure, (axes,) = new_figure(COLUMN, 2.4)
        grid(axes)
        rates = sorted({trial.learning_rate for sweep in comparison.trials for trial in sweep.trials})
        for sweep in comparison.trials:
            colour = looks.colour(sweep.arm)
            finished = [trial for trial in sweep.trials if trial.value is not None]
            axes.plot(
                [trial.learning_rate for trial in finished],
                [trial.value or 0.0 for trial in finished],
                color=colour,
                linestyle=looks.dash(sweep.arm),
                marker=looks.marker(sweep.arm),
                markerfacecolor="white",
                linewidth=1.2,
                label=looks.label(sweep.arm),
            )
            chosen = sweep.chosen
            if chosen is not None and chosen.value is not None:
                axes.plot(
                    [chosen.learning_rate],
                    [chosen.value],
                    looks.marker(sweep.arm),
                    color=colour,
                    markersize=6,
                    zorder=4,
                )
            failed = [trial.learning_rate for trial in sweep.trials if trial.value is None]
            # a failed trial has no loss: its cross stands at the top
            axes.plot(failed, [0.97] * len(failed), "x", color=colour, transform=axes.get_xaxis_transform())
        axes.set_xscale("log")
        span = (rates[-1] / rates[0]) ** 0.08 if rates[-1] > rates[0] else 1.5
        axes.set_xlim(rates[0] / span, rates[-1] * span)
        ticks = spread_ticks(rates)
        axes.set_xticks(ticks, [f"{rate:g}" for rate in ticks])
        axes.minorticks_off()
        axes.margins(y=0.12)
        axes.set_xlabel("learning rate")
        axes.set_ylabel("loss, documents set aside")
        _legend(figure, [axes])
    return figure


# --------------------------------------------------------------------------------------------------------------------
# Cost
# --------------------------------------------------------------------------------------------------------------------


def cost(comparison: Comparison) -> Figure:
    """Median time of an optimizer step: one dot a run, a bar at the median over seeds, the paired ratio beside it."""
    looks = Looks(comparison.arms, comparison.baseline, comparison.labels)
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


# --------------------------------------------------------------------------------------------------------------------
# Heat maps over training
# --------------------------------------------------------------------------------------------------------------------


def histograms(study: Study, arm: str) -> dict[int, dict[str, Any]]:
    """Step -> the arm's pooled histogram summed over its finished seeds, as ``figures.condensation`` takes it.

    Steps at which a seed has no histogram are left out, so that every map of an arm is of the same runs.
    """
    cells = [cell for cell in study.of_arm(arm) if cell.profiles]
    found: dict[int, dict[str, Any]] = {}
    for step in sorted(set.intersection(*(set(cell.profiles) for cell in cells)) if cells else ()):
        rows = [cell.profiles[step] for cell in cells]
        counts = [np.asarray(row["histogram"], float) for row in rows if row.get("histogram")]
        if (
            len(counts) < len(rows)
            or len({count.shape for count in counts}) > 1
            or not np.sum(counts, axis=(0, 2)).all()
        ):
            continue
        found[step] = {
            "label": looks_of(study).label(arm),
            "histogram": np.sum(counts, axis=0),
            "mean_cosine": np.mean([row["mean_cosine"] for row in rows], axis=0),
        }
    return found


def map_times(study: Study, arms: Sequence[str], count: int = 5) -> list[int]:
    """The steps at which every one of the arms has a histogram, at most ``count``, first and last among them."""
    sets = [set(histograms(study, arm)) for arm in arms]
    steps = sorted(set.intersection(*sets)) if sets else []
    chosen = sorted({round(place) for place in np.linspace(0, len(steps) - 1, min(count, len(steps)))}) if steps else []
    return [steps[place] for place in chosen]


def _share_below(counts: Array, cosine: float) -> Array:
    """Share of each layer's pairs whose cosine lies below ``cosine``."""
    edges = np.linspace(-1, 1, counts.shape[1] + 1)[:-1]
    return np.asarray(counts[:, edges < cosine].sum(axis=1) / counts.sum(axis=1))


def heat_maps(
    study: Study,
    arms: Sequence[str],
    *,
    count: int = 5,
    width: float | None = None,
    among: Sequence[str] | None = None,
) -> Figure:
    """Cosines of all pairs over layer fraction, a row an arm and a column a time (after figure 7 of the paper).

    Pooled over the passages and the seeds; the dashed line is the mean cosine. ``among`` are the arms of all figures
    that belong together, default ``arms``: they share times and scales.

    Raises:
        ValueError: there is no time at which every arm has a histogram.
    """
    together = list(among or arms)
    steps = map_times(study, together, count)
    if not steps:
        raise ValueError(f"no evaluated step has histograms for all of {', '.join(arms)}.")
    looks = looks_of(study)
    with figure_style():
        figure = Figure(
            figsize=(width or min(PAGE, 0.9 + 1.25 * len(steps)), 0.5 + 1.35 * len(arms)), layout="constrained"
        )
        by_arm = {arm: histograms(study, arm) for arm in together}
        every = [by_arm[arm] for arm in arms]
        table = figure.subplots(len(arms), len(steps), sharex=True, sharey=True, squeeze=False)
        # pooled densities span a wide range over training: a square-root scale shows both ends
        top = max(
            float(np.quantile(density(maps[step], "pooled"), 0.995)) for maps in by_arm.values() for step in steps
        )
        norm = PowerNorm(0.5, 0.0, next((limit for limit in (1.0, 2.0, 5.0) if top <= limit), 10.0))
        below = max(
            float(_share_below(maps[step]["histogram"], COSINE_RANGE[0]).max())
            for maps in by_arm.values()
            for step in steps
        )
        mesh = None
        for line, (row, arm) in enumerate(zip(table, arms, strict=True)):
            for number, (axes, step) in enumerate(zip(row, steps, strict=True)):
                mesh = heatmap(axes, every[line][step], kind="pooled")
                mesh.set_norm(norm)
                if below > 0.02:  # the published range would cut these off
                    axes.set_ylim(-1, 1)
                    axes.set_yticks([-1, -0.5, 0, 0.5, 1], ["−1", "−0.5", "0", "0.5", "1"])
                if line == 0:
                    axes.set_title(when(study, step).replace(" (", "\n("), fontsize=8)
                if line == len(arms) - 1:
                    axes.set_xlabel("layer fraction")
                if number == 0:
                    axes.set_ylabel(f"{looks.tick(arm)}\ncosine" if len(arms) > 1 else "cosine")
        assert mesh is not None
        ticks = [0.0, norm.vmax / 4, norm.vmax] if norm.vmax else []
        bar = figure.colorbar(mesh, ax=table, extend="max", ticks=ticks, fraction=0.03, pad=0.015, aspect=25)
        bar.ax.set_yticklabels([f"{tick:g}" for tick in ticks])
        bar.set_label("density")
        bar.outline.set_linewidth(0.5)
    return figure
