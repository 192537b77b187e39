"""The figure of ``docs/geometry.md``: end cosine against end loss, one point a run, less the seed's baseline."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from decondense.figures.style import GREY, INK, PAGE, ArmStyle, figure_style, grid
from geometry import Doses, all_doses

_COLUMNS = 2
_HEIGHT = 2.35
_LABEL = 5.6
"""Size of the arms' names, in points."""
_LINE = 0.072
"""Least distance of two names, as a share of the panel's height."""


def _spread(wanted: list[float]) -> list[float]:
    """The heights nearest to the wanted ones, in their order, that are a line apart and inside of 0 .. 1."""
    order = np.argsort(wanted, kind="stable")
    places = np.array(wanted)[order] - _LINE * np.arange(len(wanted))
    # least squares under "not falling" (pool adjacent violators) puts each name as near to its point as others allow
    blocks: list[list[float]] = []
    for place in places:
        blocks.append([place])
        while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    flat = np.concatenate([np.full(len(block), np.mean(block)) for block in blocks])
    room = max(0.0, 1 - _LINE * (len(wanted) - 1))
    result = np.empty(len(wanted))
    result[order] = np.clip(flat, 0, room) + _LINE * np.arange(len(wanted))
    return [float(value) for value in result]


def _panel(axes: Axes, f: Doses) -> None:
    base = f.arms.index(f.baseline)
    looks = ArmStyle(f.arms, f.baseline, f.rows.study.labels, f.rows.study.dispersed)
    dx, dy = (values - values[:, base : base + 1] for values in (f.cosine, f.loss))
    axes.axhline(0, color=GREY, linewidth=0.6, zorder=1)
    axes.axvline(0, color=GREY, linewidth=0.6, zorder=1)
    for a, arm in enumerate(f.arms):
        if a == base:
            axes.plot(0, 0, marker="+", color=INK, markersize=6, linestyle="", zorder=4)
        else:
            axes.plot(
                dx[:, a], dy[:, a], linestyle="", marker=looks.marker(arm), color=looks.colour(arm), markersize=3.2,
                alpha=0.85, zorder=3,
            )  # fmt: skip
    axes.margins(0.06, 0.08)
    axes.set_title(f.title.replace("`", ""))
    axes.locator_params(axis="x", nbins=4)
    grid(axes, "both")
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    axes.set_xlim(left, right)
    axes.set_ylim(low, high)
    centres = [(float(dx[:, a].mean()), float(dy[:, a].mean())) for a in range(len(f.arms))]
    heights = _spread([(y - low) / (high - low) for _, y in centres])
    for arm, (x, y), height in zip(f.arms, centres, heights, strict=True):
        colour = INK if arm == f.baseline else looks.colour(arm)
        axes.annotate(
            looks.label(arm), xy=(x, y), xycoords="data", xytext=(1.05, height), textcoords="axes fraction",
            fontsize=_LABEL, color=colour, va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.35, "alpha": 0.55, "shrinkA": 1, "shrinkB": 2},
        )  # fmt: skip


def dose_figure() -> Figure:
    studies = all_doses()
    rows = math.ceil(len(studies) / _COLUMNS)
    with figure_style():
        figure = Figure(figsize=(PAGE, _HEIGHT * rows), layout=ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06))
        panels = figure.subplots(rows, _COLUMNS, squeeze=False)
        for f, axes in zip(studies, panels.flat, strict=False):
            _panel(axes, f)
        for axes in panels.flat[len(studies) :]:
            axes.set_visible(False)
        figure.supxlabel("mean cosine of the blocks at the end, less the baseline's of the same seed", fontsize=8)
        figure.supylabel("held-out loss at the end, less the baseline's, nats/token", fontsize=8)
    return figure
