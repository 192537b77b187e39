"""Figures of a paired study: loss over training, mean cosine by layer, paired differences, cost."""

from decondense.figures.curves import MOST_BANDS, Panel, loss_curves, overview, profiles, times, when
from decondense.figures.differences import cost, forest, layer_differences
from decondense.figures.maps import MOST_MAPS, heat_maps, histograms, map_times
from decondense.figures.size import family, size_trend, trials

__all__ = [
    "MOST_BANDS", "MOST_MAPS", "Panel", "cost", "family", "forest", "heat_maps", "histograms", "layer_differences",
    "loss_curves", "map_times", "overview", "profiles", "size_trend", "times", "trials", "when",
]  # fmt: skip
