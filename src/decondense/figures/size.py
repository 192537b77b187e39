"""Condensation against model size, and loss against the learning rates of the trials."""

from __future__ import annotations

import textwrap

import numpy as np
from matplotlib.figure import Figure

from decondense.compare import Comparison, Study
from decondense.compare.profiles import KENDALL, SPEARMAN
from decondense.compare.quantities import shown_in
from decondense.figures.condensation import family_figure, log_axis
from decondense.figures.curves import style_of
from decondense.figures.maps import histograms
from decondense.figures.style import COLUMN, PAGE, ArmStyle, figure_style, grid, legend_above, new_figure
from decondense.formatting import count


def size_trend(comparison: Comparison) -> Figure:
    """Condensation against the number of parameters, one panel per measure, one line per family (after figure 2)."""
    assert comparison.size is not None
    families = comparison.size.families
    style = ArmStyle(families, None)
    with figure_style():
        figure, panels = new_figure(PAGE, 2.55, len(shown_in("size")))
        sizes = sorted({float(point.parameters) for point in comparison.size.points})
        for axes, quantity in zip(panels, shown_in("size"), strict=True):
            grid(axes)
            for family in families:
                points = sorted(
                    (p for p in comparison.size.points if p.family == family and quantity.id in p.values),
                    key=lambda p: p.parameters,
                )
                if not points:
                    continue
                values = [p.values[quantity.id] for p in points]
                axes.errorbar(
                    [p.parameters for p in points],
                    [value.mean for value in values],
                    yerr=[value.sd or 0.0 for value in values],
                    elinewidth=0.9,
                    linewidth=1.2,
                    **style.line(family),
                )
            log_axis(axes, sizes, "parameters", lambda size: count(size, short=True))
            axes.set_ylabel(quantity.short_title)
        legend_above(figure, panels)
    return figure


def family(study: Study, comparison: Comparison, name: str) -> Figure | None:
    """The heat maps of a family from the smallest to the largest model; None without histograms or with one model."""
    assert comparison.size is not None
    profiles = []
    for point in comparison.size.points:
        if point.family != name:
            continue
        maps = histograms(study, point.arm)
        if not maps:
            return None
        profiles.append(
            {
                **maps[max(maps)],
                "label": textwrap.fill(study.labels[point.arm], 14, max_lines=2, placeholder="…"),
                "parameters": point.parameters,
                "spearman": point.value(SPEARMAN.id),
                "kendall": point.value(KENDALL.id),
            }
        )
    return family_figure(profiles, family=name, kind="pooled") if len(profiles) > 1 else None


def trials(comparison: Comparison) -> Figure:
    """Loss of each trial against its learning rate, one line per arm; chosen rates are filled, failures crossed."""
    style = style_of(comparison)
    with figure_style():
        figure, (axes,) = new_figure(COLUMN, 2.4)
        grid(axes)
        rates = sorted({trial.learning_rate for sweep in comparison.trials for trial in sweep.trials})
        for sweep in comparison.trials:
            colour, marker = style.colour(sweep.arm), style.marker(sweep.arm)
            finished = [(trial.learning_rate, trial.value) for trial in sweep.by_rate if trial.value is not None]
            rates_and_values = np.array(finished).reshape(-1, 2).T
            axes.plot(*rates_and_values, markerfacecolor="white", linewidth=1.2, **style.line(sweep.arm))
            chosen = sweep.chosen
            if chosen is not None and chosen.value is not None:
                axes.plot([chosen.learning_rate], [chosen.value], marker, color=colour, markersize=6, zorder=4)
            failed = [trial.learning_rate for trial in sweep.by_rate if trial.value is None]
            # a failed trial has no loss: its cross stands at the top
            axes.plot(failed, [0.97] * len(failed), "x", color=colour, transform=axes.get_xaxis_transform())
        log_axis(axes, rates, "learning rate", lambda rate: f"{rate:g}")
        axes.margins(y=0.12)
        axes.set_ylabel("loss, documents set aside")
        legend_above(figure, [axes])
    return figure
