"""Heat maps of the cosines over training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from decondense.compare import Study
from decondense.figures.condensation import COSINE_RANGE, colour_bar, density, heatmap
from decondense.figures.curves import style_of, when
from decondense.figures.style import PAGE, figure_style

Array = npt.NDArray[np.float64]
MOST_MAPS = 6
"""Rows of heat maps that fit a page."""


def histograms(study: Study, arm: str) -> dict[int, dict[str, Any]]:
    """Step -> the arm's pooled histogram summed over its finished seeds, as ``figures.condensation`` takes it.

    Steps at which a seed has no histogram are omitted, so that every map of an arm covers the same runs.
    """
    cells = [cell for cell in study.of_arm(arm) if cell.profiles]
    maps: dict[int, dict[str, Any]] = {}
    for step in sorted(set.intersection(*(set(cell.profiles) for cell in cells)) if cells else ()):
        rows = [cell.profiles[step] for cell in cells]
        counts = [np.asarray(row["histogram"], float) for row in rows if row.get("histogram")]
        same_bins = len(counts) == len(rows) and len({count.shape for count in counts}) == 1
        if same_bins and np.sum(counts, axis=(0, 2)).all():
            maps[step] = {
                "label": style_of(study).label(arm),
                "histogram": np.sum(counts, axis=0),
                "mean_cosine": np.mean([row["mean_cosine"] for row in rows], axis=0),
            }
    return maps


def map_times(study: Study, arms: Sequence[str], count: int = 5) -> list[int]:
    """At most ``count`` steps at which all arms have a histogram, the first and the last among them."""
    return _times([histograms(study, arm) for arm in arms], count)


def _times(maps: Sequence[Mapping[int, object]], count: int) -> list[int]:
    steps = sorted(set.intersection(*map(set, maps))) if maps else []
    chosen = np.linspace(0, len(steps) - 1, min(count, len(steps))) if steps else ()
    return [steps[place] for place in sorted({round(place) for place in chosen})]


def _share_below(counts: Array, cosine: float) -> Array:
    """Share of each layer's pairs whose cosine lies below ``cosine``."""
    edges = np.linspace(-1, 1, counts.shape[1] + 1)[:-1]
    return np.asarray(counts[:, edges < cosine].sum(axis=1) / counts.sum(axis=1))


def heat_maps(
    study: Study, arms: Sequence[str], *, count: int = 5, width: float | None = None, among: Sequence[str] | None = None
) -> Figure:
    """Cosines of all pairs over layer fraction, one row per arm, one column per step (after figure 7 of the paper).

    Pooled over the passages and the seeds; the dashed line is the mean cosine. ``among`` are the arms of all figures
    that belong together, default ``arms``: they share steps and scales.

    Raises:
        ValueError: there is no step at which every arm has a histogram.
    """
    by_arm = {arm: histograms(study, arm) for arm in among or arms}
    steps = _times(list(by_arm.values()), count)
    if not steps:
        raise ValueError(f"no evaluated step has histograms for all of {', '.join(arms)}.")
    style = style_of(study)
    with figure_style():
        size = (width or min(PAGE, 0.9 + 1.25 * len(steps)), 0.5 + 1.35 * len(arms))
        figure = Figure(figsize=size, layout="constrained")
        table = figure.subplots(len(arms), len(steps), squeeze=False)
        every = [maps[step] for maps in by_arm.values() for step in steps]
        # pooled densities span a wide range over training: a square-root scale shows both ends
        top = max(float(np.quantile(density(profile, "pooled"), 0.995)) for profile in every)
        norm = PowerNorm(0.5, 0.0, next((limit for limit in (1.0, 2.0, 5.0) if top <= limit), 10.0))
        below = max(float(_share_below(profile["histogram"], COSINE_RANGE[0]).max()) for profile in every)
        mesh = None
        for row, arm in zip(table, arms, strict=True):
            for axes, step in zip(row, steps, strict=True):
                mesh = heatmap(axes, by_arm[arm][step], kind="pooled")
                mesh.set_norm(norm)
                if below > 0.02:  # the published range would cut these off
                    axes.set_ylim(-1, 1)
                    axes.set_yticks([-1, -0.5, 0, 0.5, 1], ["−1", "−0.5", "0", "0.5", "1"])
                axes.label_outer()
            row[0].set_ylabel(f"{style.tick(arm)}\ncosine" if len(arms) > 1 else "cosine")
        for axes, step in zip(table[0], steps, strict=True):
            axes.set_title(when(study, step).replace(" (", "\n("), fontsize=8)
        for axes in table[-1]:
            axes.set_xlabel("layer fraction")
        assert norm.vmax is not None
        ticks = (0.0, norm.vmax / 4, norm.vmax)
        colour_bar(figure, mesh, table.ravel().tolist(), ticks, fraction=0.03, pad=0.015, aspect=25)
    return figure
