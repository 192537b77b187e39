"""Side metrics of token vectors, each computed by its cheapest exact method. :mod:`decondense.metrics` is their
registry.

A metric's function takes a :class:`Cloud` (the tokens of a passage) or a :class:`Corpus` (those of all passages), which
share Gram matrices and spectra between the metrics that need them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from decondense.config import one_of
from decondense.measuring.metrics.clouds import Cloud, Corpus, Moments, MomentStream
from decondense.measuring.metrics.coordinates import kurtosis, outlier_kurtosis, top_dimension_share
from decondense.measuring.metrics.directions import mean_square_cosine
from decondense.measuring.metrics.entropy import dataset_entropy, prompt_entropy
from decondense.measuring.metrics.layers import LayerPairs
from decondense.measuring.metrics.spectrum import (
    alpha_req,
    effective_rank,
    effective_rank_centred,
    explainable_variance,
    hfc_lfc,
    isoscore,
    participation_ratio,
    rankme,
    singular_value_entropy,
    stable_rank,
    stable_rank_centred,
    top_direction_share,
)
from decondense.measuring.metrics.trajectory import cosine_lag, curvature
from decondense.metrics import Metric, find_metric, metric_names

__all__ = [
    "METRICS",
    "Cloud",
    "Corpus",
    "LayerPairs",
    "MomentStream",
    "Moments",
    "alpha_req",
    "cosine_lag",
    "curvature",
    "dataset_entropy",
    "effective_rank",
    "effective_rank_centred",
    "explainable_variance",
    "hfc_lfc",
    "isoscore",
    "kurtosis",
    "mean_square_cosine",
    "outlier_kurtosis",
    "participation_ratio",
    "prompt_entropy",
    "rankme",
    "resolve_metrics",
    "singular_value_entropy",
    "stable_rank",
    "stable_rank_centred",
    "top_dimension_share",
    "top_direction_share",
]


class _Metrics(Mapping[str, Metric]):
    """The registry as a mapping that grows when a metric is registered."""

    def __getitem__(self, name: str) -> Metric:
        return find_metric(name)

    def __iter__(self) -> Iterator[str]:
        return iter(metric_names())

    def __len__(self) -> int:
        return len(metric_names())


METRICS: Mapping[str, Metric] = _Metrics()
"""Side metrics by name; ``measure(metrics=...)`` takes any of them, or ``"all"``."""


def resolve_metrics(names: str | Iterable[str]) -> dict[str, Metric]:
    """The metrics with these names (or ``"all"``); an unknown name raises a ValueError that suggests the closest
    one."""
    chosen = [names] if isinstance(names, str) else list(names)
    known = metric_names() if chosen else ()  # looking for other packages' takes a moment
    for name in chosen:
        one_of("metric", name, [*known, "all"])
    return {name: find_metric(name) for name in (known if "all" in chosen else chosen)}
