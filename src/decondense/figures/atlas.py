"""Condensation of many models against their size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from decondense.atlas import SCALE
from decondense.figures.condensation import spread_ticks
from decondense.figures.style import COLUMN, GREY, ArmStyle, figure_style, legend_above, new_figure
from decondense.formatting import count


def size_figure(families: Mapping[str, Sequence[tuple[float, float]]], looks: ArmStyle | None = None) -> Figure:
    """Mean cosine of the deep half against the number of parameters, one line per family, on the scale of the verdict.

    Args:
        families: by name, (parameters, mean cosine of the deep half) of each model.
        looks: colours and markers, to use the same ones in several figures.
    """
    looks = looks or ArmStyle(list(families), None)
    sizes = sorted({size for points in families.values() for size, _ in points})
    lowest = min([0.0, *(value for points in families.values() for _, value in points)])
    with figure_style():
        figure, (axes,) = new_figure(1.35 * COLUMN, 3.0)
        bounds = [bound for _, bound in SCALE[:-1]]
        for bound in bounds:
            axes.axhline(bound, color="#c4c7cb", linewidth=0.7, zorder=0)
        for (name, _), low, high in zip(SCALE, [0.0, *bounds], [*bounds, 1.0], strict=True):
            axes.text(0.99, (low + high) / 2, name, transform=axes.get_yaxis_transform(), ha="right", va="center",
                      fontsize=7, color=GREY)  # fmt: skip
        for family, points in families.items():
            ordered = sorted(points)
            axes.plot([s for s, _ in ordered], [v for _, v in ordered], linewidth=1.2, **looks.line(family))
        span = (sizes[-1] / sizes[0]) ** 0.12 if sizes[-1] > 1.2 * sizes[0] else 1.5
        axes.set_xscale("log")
        axes.set_xlim(sizes[0] / span, sizes[-1] * span**1.6)  # room for the names of the levels
        axes.set_ylim(1.05 * lowest, 1)
        axes.set_xticks(spread_ticks(sizes), [count(size, short=True) for size in spread_ticks(sizes)])
        axes.minorticks_off()
        axes.set_xlabel("parameters")
        axes.set_ylabel("mean cosine, deep half")
        legend_above(figure, [axes])
    return figure
