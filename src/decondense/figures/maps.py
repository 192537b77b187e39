"""Heat maps of the cosines over training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from decondense.compare import Study
from decondense.figures.condensation import COSINE_RANGE, density, heatmap
from decondense.figures.curves import looks_of, when
from decondense.figures.style import PAGE, figure_style

Array = npt.NDArray[np.float64]
MOST_MAPS = 6
"""Rows of heat maps that fit a page."""


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
