"""Loss and mean cosine by layer over training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from decondense.compare import VALIDATION, Cell, Comparison, Key, Study
from decondense.figures.style import COLUMN, INK, PAGE, ArmStyle, figure_style, grid, legend_above, new_figure
from decondense.records import Row

Array = npt.NDArray[np.float64]
Panel = Literal["training", "validation", "difference"]
MOST_BANDS = 6
"""With more arms, bands and single seeds would hide each other: only means are drawn."""


def style_of(study: Study | Comparison) -> ArmStyle:
    """Colours and labels of a study's arms."""
    return ArmStyle(study.arms, study.baseline, study.labels, study.dispersed)


def _width(panels: int) -> float:
    return COLUMN if panels == 1 else PAGE


def _token_axis(axes: Axes, most: float) -> None:
    scales = ((1e9, "training tokens (billion)"), (1e6, "training tokens (million)"), (1.0, "training tokens"))
    scale, label = next((entry for entry in scales if most >= 0.1 * entry[0]), scales[-1])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / scale:g}"))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel(label)
    axes.set_xlim(left=0, right=most * 1.02 if most else 1)


def _stack(curves: Sequence[tuple[Array, Array]]) -> tuple[Array, Array] | None:
    """(x, values [runs, points]) over the points that all curves share."""
    points = [dict(zip(x.tolist(), y.tolist(), strict=True)) for x, y in curves if len(x)]
    shared = sorted(set.intersection(*map(set, points))) if points else []
    return (np.array(shared), np.array([[curve[x] for x in shared] for curve in points])) if shared else None


def _arm_curves(study: Study, arm: str, panel: Panel, key: Key) -> list[tuple[Array, Array]]:
    cells = [cell for cell in study.of_arm(arm) if not cell.untrained]
    if panel != "difference":
        return [cell.training_curve() if panel == "training" else cell.curve(key) for cell in cells]
    curves = []
    for cell in cells:
        assert study.baseline is not None
        baseline = study.cells.get((study.baseline, cell.seed))
        if baseline is None or baseline.status != "finished" or baseline.untrained:
            continue
        if (pair := _stack([cell.curve(key), baseline.curve(key)])) is not None:
            curves.append((pair[0], pair[1][0] - pair[1][1]))
    return curves


def loss_curves(
    study: Study, panels: Sequence[Panel] = ("training", "validation", "difference"), *, key: Key = VALIDATION
) -> Figure:
    """Loss against training tokens: mean over seeds, band from the least to the greatest seed.

    ``"training"`` is the logged cross-entropy, ``"validation"`` the held-out loss at the evaluated checkpoints,
    ``"difference"`` the paired difference of the held-out loss, one thin line per seed. The range of the vertical axis
    ignores the first tenth of training, so that the end is legible.
    """
    style = style_of(study)
    with figure_style():
        figure, axes = new_figure(_width(len(panels)), 2.55, len(panels))
        for place, panel in zip(axes, panels, strict=True):
            _loss_panel(place, study, panel, style, key)
        legend_above(figure, axes)
    return figure


def _loss_panel(axes: Axes, study: Study, panel: Panel, style: ArmStyle, key: Key) -> None:
    is_difference = panel == "difference"
    curves: list[tuple[Array, Array]] = []
    for arm in study.arms:
        if is_difference and study.baseline in (None, arm):
            continue
        stacked = _stack(_arm_curves(study, arm, panel, key))
        if stacked is None:
            continue
        x, values = stacked
        colour = style.colour(arm)
        if len(study.arms) <= MOST_BANDS and is_difference:
            axes.plot(x, values.T, color=colour, linewidth=0.7, alpha=0.55)
        elif len(study.arms) <= MOST_BANDS and len(values) > 1:
            axes.fill_between(x, values.min(0), values.max(0), color=colour, alpha=0.22, linewidth=0)
        axes.plot(x, values.mean(0), zorder=3, **style.line(arm) | ({"marker": ""} if panel == "training" else {}))
        curves.append(stacked)
    grid(axes)
    name = "validation loss" if key == VALIDATION else f"{key[0]} {key[1]}"
    unit = " (nats/token)" if key[1] == "loss" else ""
    labels = {"training": "training loss (nats/token)", "validation": f"{name}{unit}", "difference": f"Δ {name}{unit}"}
    axes.set_ylabel(labels[panel])
    if not curves:
        axes.text(0.5, 0.5, "no rows", ha="center", va="center", transform=axes.transAxes, color=INK)
        return
    last = max(float(x[-1]) for x, _ in curves)
    _token_axis(axes, last)
    if is_difference:
        axes.axhline(0, color=INK, linewidth=0.8)
        bounded = [np.zeros((1, 1)), *(values for _, values in curves)]
    else:
        bounded = [values[:, x >= 0.08 * last] for x, values in curves]
        if min(values.shape[1] for values in bounded) < 3:
            return
    low, high = (float(pick([pick(values) for values in bounded])) for pick in (np.min, np.max))
    pad = (0.08 if is_difference else 0.06) * (high - low or 1)
    axes.set_ylim(low - pad, high + pad)


def times(study: Study, count: int = 3) -> list[int]:
    """The steps of the profile panels: the start, then up to ``count - 2`` early ones, and the end."""
    cells = [cell for cell in study.cells.values() if cell.status == "finished" and cell.profiles]
    # an untrained model is the same at all times
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
    """The profile at a step; of an untrained model, its only profile."""
    return cell.profiles.get(0 if cell.untrained else step)


def profiles(study: Study, steps: Sequence[int] | None = None) -> Figure:
    """Mean cosine of every layer, one panel per step: mean over seeds, band from the least to the greatest seed."""
    steps = times(study) if steps is None else list(steps)
    style = style_of(study)
    with figure_style():
        panels = max(1, len(steps))
        figure, axes = new_figure(_width(panels), 2.55, panels, sharey=True)
        # all steps share one axis, in one figure or in several
        every = [profile for cell in study.cells.values() for profile in cell.profiles.values()]
        lowest = min((min(profile["mean_cosine"]) for profile in every), default=0.0)
        for place, step in zip(axes, steps, strict=False):
            _profile_panel(place, study, step, style)
            place.set_ylim(min(-0.03, math.floor(lowest * 10) / 10), 1.02)
        if steps:
            axes[0].set_ylabel("mean cosine similarity")
        legend_above(figure, axes)
    return figure


def _profile_panel(axes: Axes, study: Study, step: int, style: ArmStyle) -> None:
    grid(axes)
    cosines = {
        arm: [profile["mean_cosine"] for cell in study.of_arm(arm) if (profile := _profile_at(cell, step)) is not None]
        for arm in study.arms
    }
    # models of several depths share an axis only as fractions of their depth
    fractions = len({len(cosine) for seeds in cosines.values() for cosine in seeds}) > 1
    for arm, seeds in cosines.items():
        if not seeds:
            continue
        depth = min(map(len, seeds))
        values = np.array([cosine[:depth] for cosine in seeds])
        x = np.linspace(0, 1, depth) if fractions else np.arange(depth)
        if len(values) > 1 and len(cosines) <= MOST_BANDS:
            axes.fill_between(x, values.min(0), values.max(0), color=style.colour(arm), alpha=0.22, linewidth=0)
        axes.plot(x, values.mean(0), **style.line(arm), zorder=3, clip_on=False)
    if fractions:
        axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        axes.set_xlabel("layer fraction (0 = embedding)")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.set_xlabel("layer (0 = embedding)")
    axes.set_title(when(study, step))


def overview(study: Study) -> Figure:
    """The study at a glance: mean cosine by layer early and at the end, and the held-out loss over training."""
    style = style_of(study)
    steps = times(study)[-2:]
    with figure_style():
        figure, axes = new_figure(PAGE, 2.55, len(steps) + 1)
        for place, step in zip(axes, steps, strict=False):
            _profile_panel(place, study, step, style)
            place.set_ylim(-0.03, 1.02)
        axes[0].set_ylabel("mean cosine similarity")
        _loss_panel(axes[-1], study, "validation", style, VALIDATION)
        legend_above(figure, axes)
    return figure
