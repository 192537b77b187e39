r"""The registry of the side metrics: what each is, where it comes from, what it is sensitive to. Without torch.

:func:`metric_names` and :func:`find_metric` are the only way to them. A metric is one function (``measuring/metrics``,
a file for each group) and one :class:`Metric`; other packages add theirs with :func:`register_metric`, or with an entry
point of the group ``decondense.metrics`` whose name is the metric's and which holds the :class:`Metric`.

Notation of the equations: :math:`Z` [N, D] the states of a set of tokens, rows :math:`z_i`, mean row :math:`\bar z`,
:math:`X = Z - 1 \bar z^T`; :math:`\sigma_k(\cdot)` singular values, :math:`\lambda_k = \sigma_k^2`, in descending
order; :math:`H(w) = -\sum_k p_k \ln p_k` with :math:`p = w / \sum w`, and 0 where :math:`\sum w = 0`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

__all__ = ["BUILT_IN", "GROUP", "Metric", "find_metric", "metric_names", "register_metric"]

GROUP = "decondense.metrics"
"""The entry point group of other packages' metrics."""

CORPUS = "corpus_"
_HERE = "decondense.measuring.metrics."

Scope = Literal["passage", "corpus", "layers"]
Cost = Literal["rows", "gram", "spectrum", "moments", "layers"]


@dataclass(frozen=True)
class Metric:
    """What a side metric is. ``equation`` is LaTeX in the module's notation."""

    name: str
    title: str
    equation: str
    source: str
    function: str | Callable[..., Any]
    """``function(cloud)`` gives the value, of a passage (a ``decondense.measuring.metrics.Cloud``) or of all
    passages (``Corpus``). Scope ``layers``: ``function(clouds)`` of all states of a passage gives [S, S].
    ``"module:function"`` is imported when it is needed."""
    sensitive: str
    """What it is sensitive to: a sink token (one huge norm), a constant vector added to all tokens, scale."""
    undefined: str = ""
    """Its values where the definition gives none: zero states, equal tokens, width 1."""
    scope: Scope = "passage"
    """``passage``: of each passage, then the mean over passages. ``corpus``: of the tokens of all passages as one set.
    ``layers``: between all pairs of states."""
    cost: Cost = "spectrum"
    """``rows``: O(N D). ``gram``: the smaller Gram matrix, O(N D min(N, D)). ``spectrum``: its eigenvalues too.
    ``moments``: D x D second moments of each layer. ``layers``: an N x N Gram matrix of each layer, and the states of a
    batch are kept. All arithmetic is in float64."""
    parts: tuple[str, ...] = ()
    """For a function that gives several values: they are named ``name_part``."""
    finish: str | Callable[..., Any] | None = None
    """Scope ``layers``: maps the mean of ``function`` over passages [S, S] to the value [S, S]."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the values."""
        return tuple(f"{self.name}_{part}" for part in self.parts) or (self.name,)

    def __call__(self, *arguments: Any) -> Any:
        """The value of :attr:`function`."""
        return _resolve(self.function)(*arguments)

    def finished(self, mean_SS: Any) -> Any:
        """The value of :attr:`finish`."""
        return mean_SS if self.finish is None else _resolve(self.finish)(mean_SS)


def _resolve(function: str | Callable[..., Any]) -> Callable[..., Any]:
    if not isinstance(function, str):
        return function
    module, _, name = function.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


_REGISTRY: dict[str, Metric] = {}


def register_metric(metric: Metric) -> Metric:
    """Add a metric, for :func:`decondense.measure`, the command line and study files.

    Raises:
        ValueError: the name is not an identifier, or is taken by another metric.
    """
    if not metric.name.isidentifier() or metric.name == "all":
        raise ValueError(
            f"the metric name {metric.name!r} is not valid: use only letters, digits and _, and not 'all'."
        )
    taken = {column: other.name for other in _REGISTRY.values() for column in (other.name, *other.columns)}
    for column in (metric.name, *metric.columns):
        if taken.get(column, metric.name) != metric.name or _REGISTRY.get(metric.name, metric) != metric:
            raise ValueError(f"the metric name {column!r} is taken; choose another.")
    _REGISTRY[metric.name] = metric
    return metric


def _plugins() -> dict[str, importlib.metadata.EntryPoint]:
    return {point.name: point for point in importlib.metadata.entry_points(group=GROUP)}


def metric_names() -> tuple[str, ...]:
    """Names of all metrics, those of other packages last; imports nothing."""
    return (*_REGISTRY, *(name for name in sorted(_plugins()) if name not in _REGISTRY))


def find_metric(name: str) -> Metric:
    """The metric of this name (one of :func:`metric_names`).

    Raises:
        ValueError: another package's entry point holds no such metric.
    """
    if name not in _REGISTRY:
        point = _plugins()[name]
        try:
            metric = point.load()
            if not isinstance(metric, Metric) or metric.name != name:
                raise TypeError(f"it holds {metric!r:.80}, not a Metric named {name!r}")
            register_metric(metric)
        except Exception as error:  # another package's code: whatever it raises is the cause
            raise ValueError(
                f"the metric {name!r} of the entry point {point.value!r} cannot be loaded: {error}."
            ) from error
    return _REGISTRY[name]


def _add(*metrics: Metric, corpus: bool = False) -> None:
    """Register metrics of the passages, and with ``corpus`` the same of the whole corpus."""
    for metric in metrics:
        register_metric(replace(metric, function=_HERE + str(metric.function)))
    for metric in metrics if corpus else ():
        over_all = {"name": CORPUS + metric.name, "title": f"{metric.title}, of the corpus", "scope": "corpus"}
        register_metric(replace(metric, function=_HERE + str(metric.function), cost="moments", **over_all))  # type: ignore[arg-type]


_ROY = "Roy and Vetterli, EUSIPCO 2007"
_PAPER = "Liu et al. 2026, arXiv:2602.00217"
_RAW = "one sink token or a constant vector brings it to that of rank one"
_CENTRED = "one sink token dominates; a constant vector cancels"
_SKEAN = "Skean et al. 2025 (Layer by Layer), arXiv:2502.02013"

_add(
    Metric(
        "effective_rank",
        "effective rank",
        r"\exp H(\sigma(Z))",
        _ROY,
        "spectrum:effective_rank",
        _RAW,
        "zero states: 1",
    ),
    Metric(
        "singular_value_entropy",
        "entropy of the singular values, nats",
        r"H(\sigma(Z))",
        _ROY,
        "spectrum:singular_value_entropy",
        _RAW,
        "zero states: 0",
    ),
    Metric(
        "explainable_variance",
        "maximum explainable variance",
        r"\sigma_1^2 / \lVert Z \rVert_F^2",
        _PAPER,
        "spectrum:explainable_variance",
        "one sink token or a constant vector brings it to 1",
        "zero states: 0",
        cost="gram",
    ),
    Metric(
        "hfc_lfc",
        "high over low frequency",
        r"\sigma_1(X) / (\sqrt N \lvert \bar z \rvert)",
        f"Wang et al., ICLR 2022; {_PAPER}",
        "spectrum:hfc_lfc",
        "one sink token raises it; a constant vector lowers it towards 0",
        "mean row zero: inf; equal tokens: 0",
        cost="gram",
    ),
    Metric(
        "isoscore",
        "IsoScore",
        r"(\mathrm{PR} - 1) / (D - 1), \ \mathrm{PR} = (\sum \lambda(X))^2 / \sum \lambda(X)^2",
        "Rudman et al., Findings of ACL 2022",
        "spectrum:isoscore",
        _CENTRED,
        "equal tokens: 0; width 1: nan",
        cost="gram",
    ),
    Metric(
        "participation_ratio",
        "participation ratio",
        r"(\sum_k \lambda_k(X))^2 / \sum_k \lambda_k(X)^2",
        "Gao et al. 2017, bioRxiv 214262",
        "spectrum:participation_ratio",
        _CENTRED,
        "equal tokens: 0",
        cost="gram",
    ),
    corpus=True,
)
_add(
    Metric(
        "mean_square_cosine",
        "mean squared cosine",
        r"N^{-2} \sum_{ij} c_{ij}^2",
        "with the mean cosine it gives the standard deviation of the cosines",
        "directions:mean_square_cosine",
        "a constant vector brings it to 1; one sink token counts as one of N",
        "zero rows: their cosines are 0",
        cost="gram",
    ),
)
_add(
    Metric(
        "effective_rank_centred",
        "effective rank, centred",
        r"\exp H(\sigma(X))",
        _ROY,
        "spectrum:effective_rank_centred",
        _CENTRED,
        "equal tokens: 1",
    ),
    Metric(
        "stable_rank",
        "stable rank",
        r"\lVert Z \rVert_F^2 / \sigma_1(Z)^2",
        "Rudelson and Vershynin 2007, arXiv:math/0503442",
        "spectrum:stable_rank",
        _RAW,
        "zero states: 0",
        cost="gram",
    ),
    Metric(
        "stable_rank_centred",
        "stable rank, centred",
        r"\lVert X \rVert_F^2 / \sigma_1(X)^2",
        "Rudelson and Vershynin 2007, arXiv:math/0503442",
        "spectrum:stable_rank_centred",
        _CENTRED,
        "equal tokens: 0",
        cost="gram",
    ),
    Metric(
        "top_direction_share",
        "share of the top direction",
        r"\lambda_1(X) / \sum_k \lambda_k(X)",
        "variance of the first principal component",
        "spectrum:top_direction_share",
        _CENTRED,
        "equal tokens: 0",
        cost="gram",
    ),
    Metric(
        "rankme",
        "RankMe",
        r"\exp(-\sum_k p_k \ln p_k), \ p_k = \sigma_k(Z) / \sum \sigma(Z) + 10^{-7}",
        "Garrido et al. 2023, arXiv:2210.02885 (of a data set: `corpus_rankme`)",
        "spectrum:rankme",
        _RAW,
        "zero states: 1",
    ),
    Metric(
        "alpha_req",
        "alpha-ReQ",
        r"-\text{slope of } \ln \lambda_k(X) \text{ on } \ln k, \ k = 11 .. \min(r, 500), "
        r"\text{weights } 1/k, \ r = \mathrm{rank}\,X",
        "Agrawal et al. 2022, NeurIPS (of a data set: "
        "`corpus_alpha_req`); fit range and weights of Stringer et al. 2019",
        "spectrum:alpha_req",
        "a constant vector cancels; one sink token is a rank below 11; few tokens bend the last ranks down",
        "rank below 20: nan",
    ),
    Metric(
        "top_dimension_share",
        "share of the top dimension",
        r"\max_d \sum_i z_{id}^2 / \lVert Z \rVert_F^2",
        "outlier dimensions: Timkey and van Schijndel 2021, arXiv:2109.04404",
        "coordinates:top_dimension_share",
        "a sink token or a constant vector with one large coordinate brings it to 1",
        "zero states: 0",
        cost="rows",
    ),
    Metric(
        "outlier_kurtosis",
        "kurtosis of the dimensions",
        r"\frac1D \sum_d s_d^4 / (\frac1D \sum_d s_d^2)^2, \ "
        r"s_d^2 = \frac1N \sum_i z_{id}^2",
        "He et al. 2024, arXiv:2405.19279; 1 .. D",
        "coordinates:outlier_kurtosis",
        "a sink token or a constant vector with few large coordinates raises it",
        "zero states: nan",
        cost="rows",
    ),
    corpus=True,
)
_add(
    Metric(
        "kurtosis",
        "kurtosis of the tokens' coordinates",
        r"\frac1N \sum_i \frac{\frac1D \sum_d (z_{id} - m_i)^4}"
        r"{(\frac1D \sum_d (z_{id} - m_i)^2)^2}, \ m_i = \frac1D \sum_d z_{id}",
        "Elhage et al. 2023, Privileged bases in the transformer residual stream; 3 for a normal distribution",
        "coordinates:kurtosis",
        "each token counts the same; a constant vector with few large coordinates raises it",
        "tokens with equal coordinates do not count; none left: nan",
        cost="rows",
    ),
    Metric(
        "cosine_lag",
        "mean cosine of tokens k apart",
        r"\frac{1}{N-k} \sum_i c_{i,i+k}, \ k = 1, 2, 4, \dots, 256",
        "the mean cosine by the distance of the tokens",
        "trajectory:cosine_lag",
        "a constant vector brings it to 1; one sink token counts as one of N",
        "k >= N: nan",
        cost="rows",
        parts=tuple(str(2**k) for k in range(9)),
    ),
    Metric(
        "curvature",
        "curvature of the trajectory, radians",
        r"\text{mean}_i\, \angle(z_{i+1} - z_i,\ z_{i+2} - "
        r"z_{i+1})",
        f"Hosseini and Fedorenko 2023, arXiv:2311.04930; {_SKEAN} (its code takes the absolute value of the cosine)",
        "trajectory:curvature",
        "a constant vector cancels; one sink token counts as three of N; independent tokens: 2 pi / 3",
        "angles at a repeated token do not count; none left: nan",
        cost="rows",
    ),
    Metric(
        "prompt_entropy",
        "prompt entropy",
        r"H(\lambda(\hat X)) / \ln \min(N, D), \ \hat x_i = x_i / \lvert x_i "
        r"\rvert",
        f"{_SKEAN}, normalisation `maxEntropy`: von Neumann entropy of the Gram matrix of the centred unit "
        "rows with trace 1 (Renyi order 1)",
        "entropy:prompt_entropy",
        "each token counts the same; a constant vector cancels",
        "equal tokens: 0; N or D of 1: nan",
    ),
    Metric(
        "dataset_entropy",
        "dataset entropy",
        r"H(\lambda(\hat M)) / \ln \min(P, D), \ M: \text{mean rows of the } P "
        r"\text{ passages, centred, unit rows}",
        f"{_SKEAN}, the prompt entropy of the passages' mean rows (its code centres within passages)",
        "entropy:dataset_entropy",
        "a sink token at the same place of each passage cancels with the mean",
        "equal means: 0; one passage or width 1: nan",
        scope="corpus",
        cost="moments",
    ),
    Metric(
        "corpus_mean_cosine",
        "mean cosine of the corpus",
        r"\lvert \frac1T \sum_t \hat z_t \rvert^2 \text{ over the }"
        r" T \text{ tokens of all passages}",
        "anisotropy: Ethayarajh 2019, arXiv:1909.00512",
        "directions:mean_cosine",
        "a constant vector brings it to 1; one sink token counts as one of T",
        "zero rows: their cosines are 0",
        scope="corpus",
        cost="moments",
    ),
    Metric(
        "cka",
        "linear CKA of two layers",
        r"\overline{\mathrm{HSIC}_1}(K, L) / \sqrt{\overline{\mathrm{HSIC}_1}(K, K)"
        r"\, \overline{\mathrm{HSIC}_1}(L, L)}, \ K = Z Z^T, \text{ mean over passages}",
        "Kornblith et al. 2019, "
        "arXiv:1905.00414; unbiased, over mini-batches (here passages): Nguyen et al. 2021, arXiv:2010.15327",
        "layers:hsic",
        "one sink token dominates; a constant vector cancels",
        "fewer than 4 tokens or equal tokens: nan",
        scope="layers",
        cost="layers",
        finish=_HERE + "layers:cka",
    ),
)

BUILT_IN = tuple(_REGISTRY)
"""Names of this package's metrics."""
