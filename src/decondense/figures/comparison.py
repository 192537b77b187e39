"""Figures of a paired study: loss over training, mean cosine by layer, paired differences, cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from decondense.compare import VALIDATION, Comparison, Difference, Key, Measure, Study
from decondense.figures.condensation import COSINE_RANGE, density, heatmap
from decondense.figures.style import COLUMN, INK, PAGE, Looks, figure_style, grid, new_figure

Array = npt.NDArray[np.float64]
Panel = Literal["training", "validation", "difference"]


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
    cells = study.of_arm(arm)
    if panel == "training":
        return [cell.training_curve() for cell in cells]
    if panel == "validation":
        return [cell.curve(key) for cell in cells]
    found = []
    for cell in cells:
        assert study.baseline is not None
        rival = study.cells.get((study.baseline, cell.seed))
        if rival is None or rival.status != "finished":
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
    seen: list[tuple[Array, Array]] = []
    for arm in arms:
        stacked = _stack(_arm_curves(study, arm, panel, key)) if panel != "difference" or study.baseline else None
        if stacked is None:
            continue
        x, values = stacked
        colour = looks.colour(arm)
        marker = looks.marker(arm) if panel != "training" else ""
        if panel == "difference":
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
    shared = [set(cell.profiles) for cell in study.cells.values() if cell.status == "finished" and cell.profiles]
    steps = sorted(set.intersection(*shared)) if shared else []
    if len(steps) <= count:
        return steps
    return [steps[0], *steps[1 : count - 1], steps[-1]]


def when(study: Study, step: int) -> str:
    """``start``, ``end`` or the step with its share of training."""
    last = max((cell.final_step or 0 for cell in study.cells.values()), default=0)
    if step == 0:
        return "start"
    if step >= last:
        return f"end (step {step})"
    return f"step {step} ({step / last:.0%})"


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
    for arm in study.arms:
        found = [cell.profiles[step] for cell in study.of_arm(arm) if step in cell.profiles]
        if not found:
            continue
        depth = min(len(profile["mean_cosine"]) for profile in found)
        values = np.array([profile["mean_cosine"][:depth] for profile in found])
        x = np.arange(depth)
        if len(values) > 1:
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
    """
    looks = Looks(comparison.arms, comparison.baseline, comparison.labels)
    names = list(names or [measure.name for measure in measures])
    grouped = len(measures) > 1
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


def _forest_rows(axes: Axes, lines: Sequence[tuple[float, Difference]], looks: Looks) -> None:
    axes.axvline(0, color=INK, linewidth=0.8, zorder=1)
    named: set[str] = set()
    for row, d in lines:
        colour = looks.colour(d.arm)
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
    grid(axes, "x")


def layer_differences(comparison: Comparison) -> Figure:
    """Difference of every layer's mean cosine, arm - baseline, with pointwise 95 % intervals over seeds."""
    looks = Looks(comparison.arms, comparison.baseline, comparison.labels)
    assert comparison.layers is not None
    with figure_style():
        figure, (axes,) = new_figure(COLUMN, 2.55)
        grid(axes)
        axes.axhline(0, color=INK, linewidth=0.8)
        arms = [arm for arm in comparison.treated if arm in comparison.layers.differences]
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


def heat_maps(study: Study, arms: Sequence[str], *, count: int = 5, width: float | None = None) -> Figure:
    """Cosines of all pairs over layer fraction, a row an arm and a column a time (after figure 7 of the paper).

    Pooled over the passages and the seeds; the dashed line is the mean cosine.

    Raises:
        ValueError: there is no time at which every arm has a histogram.
    """
    steps = map_times(study, arms, count)
    if not steps:
        raise ValueError(f"no evaluated step has histograms for all of {', '.join(arms)}.")
    looks = looks_of(study)
    with figure_style():
        figure = Figure(
            figsize=(width or min(PAGE, 0.9 + 1.25 * len(steps)), 0.5 + 1.35 * len(arms)), layout="constrained"
        )
        every = [histograms(study, arm) for arm in arms]
        table = figure.subplots(len(arms), len(steps), sharex=True, sharey=True, squeeze=False)
        # pooled densities span a wide range over training: a square-root scale shows both ends
        top = max(float(np.quantile(density(maps[step], "pooled"), 0.995)) for maps in every for step in steps)
        norm = PowerNorm(0.5, 0.0, next((limit for limit in (1.0, 2.0, 5.0) if top <= limit), 10.0))
        below = max(
            float(_share_below(maps[step]["histogram"], COSINE_RANGE[0]).max()) for maps in every for step in steps
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
