"""Heat maps of token cosines over depth, and condensation against model size, distillation and training.

After figures 2, 4 and 5 of Liu et al. 2026, arXiv:2602.00217. A profile is plain data here: a mapping with

    label          title of the panel (str)
    mean_cosine    mean cosine of each layer [L + 1]
    pooled, averaged   densities [L + 1, bins] over [-1, 1]; or ``histogram``, pooled counts, as in a ``profile`` row
    spearman, kendall  rank correlation of mean_cosine with depth
    spearman_interval, kendall_interval   (low, high), optional
    parameters     number of parameters, for the trend over size
    step           optimizer step, for the trend over training
    passages       number of passages

Every function returns a ``matplotlib.figure.Figure`` and writes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray

from decondense.config import one_of
from decondense.figures.style import BLUE, COLUMN, INK, PAGE, figure_style, new_figure
from decondense.formatting import count

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Profile = Mapping[str, Any]
Kind = Literal["averaged", "pooled"]
Palette = Literal["reds", "cividis"]

COSINE_RANGE = (-0.25, 1.0)
DENSITY_RANGE = (0.0, 10.0)
_MAPS = {"reds": "Reds", "cividis": "cividis"}
_LINE = {"reds": INK, "cividis": "white"}
_NOTE = {"reds": "#5f6368", "cividis": "#d9dce0"}
# blue and vermillion of Okabe and Ito, which most colour-blind readers can tell apart; the markers differ too
_TRENDS = (("spearman", "Spearman ρ", "#d55e00", "o"), ("kendall", "Kendall τ", BLUE, "s"))


def density(profile: Profile, kind: Kind) -> NDArray[np.float64]:
    """The density [L + 1, bins] of a profile mapping; ValueError without a histogram of that kind."""
    one_of("histogram", kind, ("averaged", "pooled"))
    values = profile.get(kind)
    if values is not None:
        return np.asarray(values, dtype=np.float64)
    counts = profile.get("histogram") if kind == "pooled" else None
    if counts is None:
        raise ValueError(
            f"{profile.get('label', 'the profile')!r} holds no {kind} histogram; measure it with "
            f"histograms=({kind!r},), or draw the other kind."
        )
    table = np.asarray(counts, dtype=np.float64)
    return np.asarray(table / table.sum(axis=1, keepdims=True) * table.shape[1] / 2)


def heatmap(
    axes: Axes, profile: Profile, *, kind: Kind = "averaged", palette: Palette = "reds", mean_line: bool = True
) -> Any:
    """Draw one heat map into ``axes``: layer fraction l/L against cosine, colour the density (0 to 10).

    Returns:
        The colour mesh, for a colour bar.
    """
    one_of("palette", palette, _MAPS)
    values = density(profile, kind)
    layers, bins = values.shape
    half = 0.5 / max(1, layers - 1)
    mesh = axes.pcolormesh(
        np.linspace(-half, 1 + half, layers + 1),
        np.linspace(-1, 1, bins + 1),
        values.T,
        cmap=_MAPS[palette],
        vmin=DENSITY_RANGE[0],
        vmax=DENSITY_RANGE[1],
        rasterized=True,  # otherwise each of the thousands of cells is a path in the PDF
        linewidth=0,
    )
    mu = profile.get("mean_cosine")
    if mean_line and mu is not None:
        axes.plot(np.linspace(0, 1, layers), mu, color=_LINE[palette], linewidth=0.9, linestyle=(0, (2, 1.2)))
    axes.set_xlim(-half, 1 + half)
    axes.set_ylim(*COSINE_RANGE)
    axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    axes.set_yticks([-0.25, 0, 0.25, 0.5, 0.75, 1], ["−0.25", "0", "0.25", "0.5", "0.75", "1"])
    axes.spines[["top", "right"]].set_visible(True)
    return mesh


def _title(axes: Axes, profile: Profile) -> None:
    correlations = "  ".join(
        f"{symbol} {value:+.2f}".replace("-", "−")
        for symbol, value in (("ρ", profile.get("spearman")), ("τ", profile.get("kendall")))
        if value is not None and math.isfinite(value)
    )
    # two texts, because the second line is smaller: four panels share the width of a page
    axes.set_title(str(profile.get("label", "")), loc="center", fontsize=8, pad=13)
    offset: dict[str, Any] = {"xycoords": "axes fraction", "xytext": (0, 3.5), "textcoords": "offset points"}
    axes.annotate(correlations, (0.5, 1), ha="center", fontsize=7, **offset)


def colour_bar(figure: Figure, mesh: Any, axes: Any, ticks: Sequence[float] = (0, 5, 10), **place: Any) -> None:
    """The colour bar of one or several heat maps."""
    bar = figure.colorbar(mesh, ax=axes, extend="max", ticks=ticks, **place)
    bar.ax.set_yticklabels([f"{tick:g}" for tick in ticks])
    bar.set_label("density")
    bar.outline.set_linewidth(0.5)
    bar.ax.tick_params(size=2)


def _caption(kind: Kind, profiles: Sequence[Profile]) -> str:
    numbers = sorted({int(p["passages"]) for p in profiles if p.get("passages")})
    number = f"{numbers[0]} " if len(numbers) == 1 else ""
    return f"averaged over {number}passages" if kind == "averaged" else f"all pairs of {number}passages"


def heatmap_figure(
    profile: Profile, *, kind: Kind = "averaged", palette: Palette = "reds", mean_line: bool = True
) -> Figure:
    """One model's heat map at column width; the dashed line is the mean cosine."""
    with figure_style():
        figure, (axes,) = new_figure(COLUMN, 2.55)
        mesh = heatmap(axes, profile, kind=kind, palette=palette, mean_line=mean_line)
        _title(axes, profile)
        axes.set_xlabel("layer fraction")
        axes.set_ylabel("cosine")
        colour_bar(figure, mesh, axes, fraction=0.06, pad=0.02)
        note = _caption(kind, [profile])
        axes.text(0.98, 0.02, note, transform=axes.transAxes, fontsize=6, ha="right", color=_NOTE[palette])
    return figure


def _grid(profiles: Sequence[Profile], *, kind: Kind, palette: Palette) -> tuple[Figure, Axes]:
    """Heat maps, at most four in a row so that they stay legible on a page, and an empty panel beside them."""
    rows = math.ceil(len(profiles) / 4)
    columns = math.ceil(len(profiles) / rows)
    engine = ConstrainedLayoutEngine(wspace=0.02, w_pad=0.03)
    figure = Figure(figsize=(min(PAGE, 1.25 * columns + 2.75), 1.85 * rows + 0.35), layout=engine)
    spec = figure.add_gridspec(rows, columns + 2, width_ratios=[1] * columns + [0.02, 1.55])
    maps: list[Axes] = []
    mesh = None
    for number, profile in enumerate(profiles):
        row, column = divmod(number, columns)
        shared = maps[0] if maps else None
        axes = figure.add_subplot(spec[row, column], sharex=shared, sharey=shared)
        maps.append(axes)
        mesh = heatmap(axes, profile, kind=kind, palette=palette)
        _title(axes, profile)
        axes.tick_params(labelleft=column == 0, labelbottom=number + columns >= len(profiles))
        if column == 0:
            axes.set_ylabel("cosine")
        if number + columns >= len(profiles):
            axes.set_xlabel("layer fraction")
    colour_bar(figure, mesh, maps, fraction=0.14 / columns, pad=0.015, aspect=18 * rows)
    trend = figure.add_subplot(spec[:, columns + 1])
    if rows > 1:
        trend.set_box_aspect(1.15)
    return figure, trend


def _trend(axes: Axes, x: Sequence[float], profiles: Sequence[Profile]) -> None:
    axes.axhline(0, color="#c4c7cb", linewidth=0.7, zorder=0)
    for name, label, colour, marker in _TRENDS:
        values = [math.nan if p.get(name) is None else float(p[name]) for p in profiles]
        bounds = [p.get(f"{name}_interval") or (math.nan, math.nan) for p in profiles]
        low, high = (np.array([math.nan if b[i] is None else float(b[i]) for b in bounds]) for i in (0, 1))
        if np.isfinite(low).any():
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0, zorder=1)
            axes.vlines(x, low, high, color=colour, linewidth=0.8, zorder=2)
        # hollow squares on full circles: both stay visible where the two coincide
        face = colour if marker == "o" else "white"
        axes.plot(x, values, color=colour, marker=marker, markerfacecolor=face, label=label, linewidth=1.2, zorder=3)
    axes.set_ylim(-1.1, 1.1)
    axes.set_yticks([-1, -0.5, 0, 0.5, 1], ["−1", "−0.5", "0", "0.5", "1"])
    axes.set_ylabel("rank correlation with depth")
    axes.legend(loc="best")


def family_figure(
    profiles: Sequence[Profile], *, family: str = "", kind: Kind = "averaged", palette: Palette = "reds"
) -> Figure:
    """A model family: one heat map per model, and condensation against size (after figure 2 of the paper).

    Models are ordered by ``parameters``. Bars and bands are 95 % bootstrap intervals over passages.
    """
    if not profiles:
        raise ValueError("a family figure needs at least one profile.")
    unknown = [str(p.get("label")) for p in profiles if not p.get("parameters")]
    if unknown:
        raise ValueError(f"the trend over size needs the number of parameters of {', '.join(unknown)}.")
    ordered = sorted(profiles, key=lambda p: float(p["parameters"]))
    sizes = [float(p["parameters"]) for p in ordered]
    with figure_style():
        figure, axes = _grid(ordered, kind=kind, palette=palette)
        _trend(axes, sizes, ordered)
        log_axis(axes, sizes, "parameters", lambda size: count(size, short=True))
        axes.set_title(family, loc="center")
    return figure


def spread_ticks(values: Sequence[float]) -> list[float]:
    """Values that are far enough apart on a logarithmic axis for their labels."""
    factor = max(1.02, (max(values) / min(values)) ** 0.24)
    ticks: list[float] = []
    for value in sorted(set(values)):
        if not ticks or value >= ticks[-1] * factor:
            ticks.append(value)
    return ticks


def log_axis(axes: Axes, values: Sequence[float], label: str, text: Callable[[float], str]) -> None:
    """A logarithmic x-axis over sorted ``values``, with ticks at those whose labels do not overlap."""
    ratio = values[-1] / values[0]
    margin = ratio**0.08 if ratio > 1.2 else 1.5
    ticks = spread_ticks(values)
    axes.set_xscale("log")
    axes.set_xlim(values[0] / margin, values[-1] * margin)
    axes.set_xticks(ticks, [text(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(label)


def pairs_figure(
    pairs: Sequence[tuple[Profile, Profile]],
    *,
    names: tuple[str, str] = ("base", "distilled"),
    kind: Kind = "averaged",
    palette: Palette = "reds",
) -> Figure:
    """Pairs of models, one above the other (base and distilled, after figure 5 of the paper; or before and after)."""
    if not pairs:
        raise ValueError("a figure of pairs needs at least one pair of profiles.")
    with figure_style():
        figure = Figure(figsize=(max(2.7, min(PAGE, 1.5 * len(pairs) + 0.9)), 4.1), layout="constrained")
        table = figure.subplots(2, len(pairs), sharex=True, sharey=True, squeeze=False)
        mesh = None
        for column, pair in enumerate(pairs):
            for row, profile in enumerate(pair):
                mesh = heatmap(table[row, column], profile, kind=kind, palette=palette)
                _title(table[row, column], profile)
            table[1, column].set_xlabel("layer fraction")
        for row, name in enumerate(names):
            table[row, 0].set_ylabel(f"{name}\ncosine" if name else "cosine")
        colour_bar(figure, mesh, table.ravel().tolist(), fraction=0.035, pad=0.015, aspect=35)
    return figure


def checkpoints_figure(
    profiles: Sequence[Profile], *, kind: Kind = "averaged", palette: Palette = "reds", maps: int = 4, title: str = ""
) -> Figure:
    """Condensation over training: heat maps at up to ``maps`` steps, and the trend (after figure 4 of the paper)."""
    unknown = [str(p.get("label")) for p in profiles if p.get("step") is None]
    if unknown or not profiles:
        raise ValueError(
            f"a figure of checkpoints needs profiles with a step; missing for: {', '.join(unknown) or 'all'}."
        )
    ordered = sorted(profiles, key=lambda p: float(p["step"]))
    chosen = sorted({round(i) for i in np.linspace(0, len(ordered) - 1, min(maps, len(ordered)))})
    mapped = [{**ordered[i], "label": f"step {int(ordered[i]['step']):,}"} for i in chosen]
    steps = [float(p["step"]) for p in ordered]
    with figure_style():
        figure, axes = _grid(mapped, kind=kind, palette=palette)
        _trend(axes, steps, ordered)
        if len(steps) > 2 and steps[-1] > 50 * max(1.0, steps[1]):
            start = max(1.0, steps[1])
            axes.set_xscale("symlog", linthresh=start, linscale=0.4)
            # explicit limits: the scale would extend to negative steps
            axes.set_xlim(-0.15 * start if steps[0] <= 0 else steps[0] * 0.8, steps[-1] * 1.5)
            ticks = [10.0**e for e in range(math.ceil(math.log10(start)), math.floor(math.log10(steps[-1])) + 1)]
            ticks = ([0.0] if steps[0] <= 0 else []) + ticks
            axes.set_xticks(ticks, [count(tick, short=True) for tick in ticks])
            axes.minorticks_off()
        else:
            axes.margins(x=0.05)
        axes.set_xlabel("optimizer step")
        axes.set_title(title, loc="center")
    return figure
