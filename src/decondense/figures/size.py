"""Condensation against model size, and loss against the learning rates that were tried."""

from __future__ import annotations

import textwrap

from matplotlib.figure import Figure

from decondense.compare import Comparison, Study
from decondense.compare.profiles import KENDALL, SPEARMAN
from decondense.compare.quantities import shown_in
from decondense.figures.condensation import family_figure, spread_ticks
from decondense.figures.maps import histograms
from decondense.figures.style import COLUMN, PAGE, Looks, figure_style, grid, legend_above, new_figure
from decondense.formatting import count


def size_trend(comparison: Comparison) -> Figure:
    """Condensation against the number of parameters, a panel a measure and a line a family (after figure 2)."""
    assert comparison.size is not None
    families = comparison.size.families
    looks = Looks(families, None)
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
                    **looks.line(family),
                )
            axes.set_xscale("log")
            axes.set_xlim(sizes[0] / (sizes[-1] / sizes[0]) ** 0.08, sizes[-1] * (sizes[-1] / sizes[0]) ** 0.08)
            ticks = spread_ticks(sizes)
            axes.set_xticks(ticks, [count(size, short=True) for size in ticks])
            axes.minorticks_off()
            axes.set_xlabel("parameters")
            axes.set_ylabel(quantity.short_title)
        legend_above(figure, panels)
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
                "spearman": point.value(SPEARMAN.id),
                "kendall": point.value(KENDALL.id),
            }
        )
    return family_figure(found, family=name, kind="pooled") if len(found) > 1 else None


def trials(comparison: Comparison) -> Figure:
    """Loss of each trial against its learning rate, a line an arm; the chosen rates are filled, failures crossed."""
    looks = Looks(comparison.arms, comparison.baseline, comparison.labels, comparison.dispersed)
    with figure_style():
        figure, (axes,) = new_figure(COLUMN, 2.4)
        grid(axes)
        rates = sorted({trial.learning_rate for sweep in comparison.trials for trial in sweep.trials})
        for sweep in comparison.trials:
            colour = looks.colour(sweep.arm)
            finished = [trial for trial in sweep.by_rate if trial.value is not None]
            axes.plot(
                [trial.learning_rate for trial in finished],
                [trial.value or 0.0 for trial in finished],
                markerfacecolor="white",
                linewidth=1.2,
                **looks.line(sweep.arm),
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
            failed = [trial.learning_rate for trial in sweep.by_rate if trial.value is None]
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
        legend_above(figure, [axes])
    return figure
