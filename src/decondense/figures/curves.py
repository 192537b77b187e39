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

from decondense.compare import VALIDATION, Cell, Key, Study
from decondense.figures.style import COLUMN, INK, PAGE, Looks, figure_style, grid, legend_above, new_figure
from decondense.records import Row

Array = npt.NDArray[np.float64]
Panel = Literal["training", "validation", "difference"]
MOST_BANDS = 6
"""With more arms than that, bands and single seeds would hide each other, and only means are drawn."""


def looks_of(study: Study) -> Looks:
    """Colours and labels of a study's arms."""
    return Looks(study.arms, study.baseline, study.labels, study.dispersed)


def _width(panels: int) -> float:
    return COLUMN if panels == 1 else PAGE


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
        legend_above(figure, axes)
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
        line = looks.line(arm) | ({"marker": ""} if panel == "training" else {})
        if many:
            pass
        elif panel == "difference":
            for row in values:
                axes.plot(x, row, color=colour, linewidth=0.7, alpha=0.55)
        elif len(values) > 1:
            axes.fill_between(x, values.min(0), values.max(0), color=colour, alpha=0.22, linewidth=0)
        axes.plot(x, values.mean(0), zorder=3, **line)
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
        legend_above(figure, axes)
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
            **looks.line(arm),
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
        legend_above(figure, axes)
    return figure
