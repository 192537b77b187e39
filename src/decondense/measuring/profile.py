"""The result of a measurement: per-layer statistics of one model on one set of passages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from decondense.atlas import Verdict, find_reference, judge
from decondense.config import MeasureConfig, one_of, suggest
from decondense.layers import Layer, deep_half
from decondense.measuring import depth, files
from decondense.measuring.sides import Sides, mean_of_known
from decondense.measuring.sinks import Sinks
from decondense.privacy import publishable

_D = MeasureConfig()

Array = NDArray[np.float64]
Counts = NDArray[np.int64]
Final = Literal["after", "before"]
Kind = Literal["pooled", "averaged"]


def _check_bins(bins: int, finest: int) -> int:
    if bins < 2 or bins > finest or bins & (bins - 1):
        raise ValueError(f"bins must be a power of two from 2 to {finest}, got {bins}; the paper uses 128.")
    return bins


@dataclass(frozen=True)
class Profile:
    r"""Token geometry of a model, layer by layer.

    ``layers``, ``mean_cosine``, ``spearman`` and the like follow the convention of the paper (Liu et al. 2026,
    arXiv:2602.00217): L + 1 values, the token embedding first, and the last block's state *after* the final norm, which
    is what Hugging Face returns as the last hidden state. :meth:`at` gives the same profile with the state *before* the
    norm. All measured states, including the logits if requested, are in ``all_layers`` and can be accessed by name.

    For a passage of N tokens, :math:`\mu = N^{-2} \sum_{ij} c_{ij}` (diagonal included); a layer's mean cosine is the
    mean of :math:`\mu` over passages, all with equal weight. Intervals resample passages (percentile bootstrap).
    """

    states: tuple[Layer, ...]
    """All measured states, in the order of the computation."""
    lengths: NDArray[np.int64]
    """Tokens of each passage [P]."""
    cosine: Array
    """Mean cosine of each state and passage, diagonal included [states, P]."""
    cosine_others: Array
    """The same over the pairs i != j [states, P]."""
    norm: Array
    """Mean token norm [states, P]."""
    norm_sd: Array
    """Standard deviation of the token norms within a passage [states, P]."""
    norm_max: Array
    """Largest token norm [states, P]."""
    metrics: dict[str, Array] = field(default_factory=dict)
    """Side metrics of the passages by name, each [states, P]; see ``decondense.measuring.METRICS``."""
    sides: Sides = field(default_factory=Sides)
    """Side metrics of the corpus and between layers."""
    pooled: Counts | None = None
    """Fine counts of the cosines of the ordered pairs i != j of all passages [states, 2048]."""
    summed: Array | None = None
    """Upper triangle (row by row, diagonal included) of the cosine matrix, summed over passages [states, N(N+1)/2]."""
    no_averaged: str = ""
    """Why there is no averaged histogram, if there is none."""
    final: Literal["after", "before", "all"] = "after"
    """Which state the last layer is: after or before the final norm (``"all"``: every measured state is a layer)."""
    sinks: Sinks | None = None
    """The sink tokens, and the numbers without them; None: not recorded."""
    last_block: bool = True
    """Whether the last block's state before the final norm is there; not in states as Hugging Face lists them."""
    info: dict[str, Any] = field(default_factory=dict)
    """What was measured: model, passages' source, settings, versions."""

    # ---- layers ----------------------------------------------------------------------------------------------------

    @property
    def all_layers(self) -> tuple[str, ...]:
        """Names of all measured states, in the order of the computation."""
        return tuple(state.label for state in self.states)

    @property
    def n_passages(self) -> int:
        """Number of passages."""
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        """Tokens of the longest passage."""
        return int(self.lengths.max())

    @property
    def has_final_norm(self) -> bool:
        """Whether the model transforms the last block's output before its head."""
        return any(state.follows_blocks for state in self.states)

    def _rows(self) -> list[int]:
        if self.final == "all":
            return list(range(len(self.states)))
        rows = [i for i, state in enumerate(self.states) if state.counts_as_depth]
        if self.final == "after" and self.has_final_norm:
            last = next(i for i, state in enumerate(self.states) if state.follows_blocks)
            rows[len(rows) - self.last_block :] = [last]
        return rows

    def row(self, layer: str | int) -> int:
        """Position of a state in the arrays: by its name in ``all_layers``, or by depth in ``layers``."""
        if isinstance(layer, int):
            return self._rows()[layer]
        if layer not in self.all_layers:
            raise ValueError(
                f"no layer {layer!r} in this profile.{suggest(layer, self.all_layers)} "
                f"It has: {', '.join(self.all_layers)}."
            )
        return self.all_layers.index(layer)

    def at(self, final: Final) -> Profile:
        """The same measurement with the last layer taken ``"after"`` or ``"before"`` the final norm."""
        one_of("place of the last layer", final, ("after", "before"))
        if final == "before" and not self.last_block:
            raise ValueError("the last block's state was measured only after the final norm; use final='after'.")
        return replace(self, final=final)

    def with_all_layers(self) -> Profile:
        """The same measurement with every measured state listed: both last layers, and the logits if measured."""
        return replace(self, final="all")

    def without_sinks(self) -> Profile:
        """The same profile with means and norms over the tokens that are not sinks; without histograms and side
        metrics."""
        if self.sinks is None:
            raise ValueError("this profile does not record sink tokens (an older version wrote it); measure again.")
        reason = "histograms include all tokens; to leave out the first N tokens, measure with skip_tokens=N."
        kept: dict[str, Any] = {"cosine": self.sinks.cosine, "norm": self.sinks.norm}
        return replace(self, **kept, metrics={}, sides=Sides(), pooled=None, summed=None, no_averaged=reason)

    @property
    def layers(self) -> list[str]:
        """Names of the L + 1 layers over which depth is counted."""
        return [self.all_layers[row] for row in self._rows()]

    # ---- means -----------------------------------------------------------------------------------------------------

    @property
    def mean_cosine(self) -> Array:
        """Mean cosine of each layer, diagonal included [L + 1]."""
        return np.asarray(self.cosine[self._rows()].mean(axis=1))

    @property
    def mean_cosine_others(self) -> Array:
        """Mean cosine of each layer over pairs of different tokens [L + 1]."""
        return np.asarray(self.cosine_others[self._rows()].mean(axis=1))

    @property
    def norms(self) -> Array:
        """Mean token norm of each layer [L + 1]."""
        return np.asarray(self.norm[self._rows()].mean(axis=1))

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The measured side metrics, as :meth:`metric` takes them."""
        return (*self.metrics, *self.sides.names)

    def metric(self, name: str) -> Array:
        """A side metric of each layer [L + 1].

        A passage metric is the mean over the passages that have a value, nan if none has. A corpus metric is the value
        of the corpus. A metric between layers is the value of each layer and the one before it, nan for the first.
        """
        if name not in self.metric_names:
            raise ValueError(
                f"metric {name!r} was not measured.{suggest(name, self.metric_names)} Measured: "
                f"{', '.join(self.metric_names) or 'none'}. Ask for it: measure(..., metrics=[{name!r}])."
            )
        if name in self.metrics:
            return mean_of_known(self.metrics[name][self._rows()])
        return self.sides.values(name, self._rows())

    def between_layers(self, name: str = "cka") -> Array:
        """A side metric of each pair of layers [L + 1, L + 1]."""
        if name not in self.sides.between:
            raise ValueError(
                f"no metric {name!r} between layers was measured; ask for it: measure(..., metrics=['cka'])."
            )
        return self.sides.matrix(name, self._rows())

    def last(self, n: int | None = None) -> float:
        """Mean of the last ``n`` layers' mean cosines; None: half of the blocks (Liu et al. 2026, "last n")."""
        mu = self.mean_cosine
        n = deep_half(len(mu)) if n is None else n
        if not 1 <= n <= len(mu):
            raise ValueError(f"last n layers: n must be from 1 to {len(mu)}, got {n}.")
        return float(mu[-n:].mean())

    @property
    def spearman(self) -> float:
        """Spearman's rho of the mean cosine against depth."""
        return float(depth.spearman(self.mean_cosine))

    @property
    def kendall(self) -> float:
        """Kendall's tau-b of the mean cosine against depth."""
        return float(depth.kendall(self.mean_cosine))

    def interval(
        self,
        what: str = "mean_cosine",
        *,
        confidence: float = _D.confidence,
        resamples: int = _D.resamples,
        seed: int = 0,
    ) -> tuple[Any, Any]:
        """Percentile bootstrap interval over passages.

        Args:
            what: ``"mean_cosine"``, ``"mean_cosine_others"``, ``"norms"``, ``"spearman"``, ``"kendall"``,
                ``"last 1"``, ``"last 2"``, ..., or the name of a measured side metric.
            confidence: Share of the resamples inside the interval.
            resamples: Number of bootstrap draws.
            seed: Seed of the bootstrap's own generator.

        Returns:
            (low, high): arrays over the layers, or floats. nan for a single passage.
        """
        rows = self._rows()
        if what in self.sides.names:
            raise ValueError(f"{what!r} has no interval over passages, because it has no value per passage.")
        known = ["mean_cosine", "mean_cosine_others", "norms", "spearman", "kendall", "last 1", *self.metrics]
        name, _, number = what.partition(" ")
        if name == "last" and number.isdigit() and 1 <= int(number) <= len(rows):
            values = self.cosine[rows[-int(number) :]].mean(axis=0, keepdims=True)
        elif what in self.metrics:
            values = self.metrics[what][rows]
        else:
            one_of("statistic", what, known)
            table = {"mean_cosine_others": self.cosine_others, "norms": self.norm}
            values = table.get(what, self.cosine)[rows]
        scalar = what in ("spearman", "kendall") or name == "last"
        if self.n_passages < 2:
            nan = float("nan") if scalar else np.full(len(rows), np.nan)
            return nan, nan
        weights = depth.resample_weights(self.n_passages, resamples, seed)
        samples = weights @ values.T
        if np.isnan(values).any():
            known = ~np.isnan(values)  # as in metric(): passages without a value do not count
            with np.errstate(invalid="ignore"):
                samples = (weights @ np.where(known, values, 0).T) / (weights @ known.T)
        if what == "spearman":
            samples = depth.spearman(samples)
        elif what == "kendall":
            samples = depth.kendall(samples)
        elif scalar:
            samples = samples[:, 0]
        low, high = depth.percentile_interval(samples, confidence)
        return (float(low), float(high)) if scalar else (low, high)

    def verdict(self, reference: str | Path | None = None) -> Verdict:
        """How condensed the model is, compared with what is known about other models, and where metrics disagree.

        The guide to measuring describes the scale and the rules; :func:`decondense.atlas.sentences` turns the result
        into three sentences.

        Args:
            reference: name of a shipped reference, or the path of a profile or of an atlas entry; None: the closest
                shipped reference, if one is close enough.

        Raises:
            ValueError: there is no such reference, or it takes the last layer on the other side of the final norm.
        """
        chosen = None if reference is None else find_reference(reference)
        return judge((self.at("after") if self.final == "all" else self).summary(), chosen)

    # ---- distributions ---------------------------------------------------------------------------------------------

    def counts(self, kind: Kind = "pooled", *, bins: int = _D.bins, diagonal: bool = True) -> Counts:
        """Integer counts of cosines in equal bins on [-1, 1], for all measured states [states, bins].

        ``"pooled"``: every ordered pair of tokens of every passage. ``"averaged"``: the entries of the matrix averaged
        position by position over the passages (the published heat maps); its width shrinks as passages are added, so
        compare only equal numbers of them. ``diagonal=False`` leaves out the pairs of a token with itself.
        """
        one_of("histogram", kind, ("pooled", "averaged"))
        if kind == "pooled":
            if self.pooled is None:
                raise ValueError("no pooled histogram was measured; ask for it: measure(..., histograms=('pooled',)).")
            _check_bins(bins, self.pooled.shape[1])
            result = self.pooled.reshape(self.pooled.shape[0], bins, -1).sum(axis=2)
            if diagonal:
                result[:, -1] += int(self.lengths.sum())
            return np.asarray(result)
        if self.summed is None:
            raise ValueError(self.no_averaged or "the averaged histogram was not measured; ask for it: "
                             "measure(..., histograms=('averaged',)).")  # fmt: skip
        _check_bins(bins, 1 << 20)
        n = self.tokens
        start = np.concatenate([[0], np.cumsum(np.arange(n, 1, -1))])  # where row i, that is entry (i, i), begins
        result = np.zeros((len(self.all_layers), bins), dtype=np.int64)
        for row, packed in enumerate(self.summed):
            index = np.clip(np.floor(packed / self.n_passages * (bins / 2)) + bins // 2, 0, bins - 1).astype(np.int64)
            own = np.bincount(index[start], minlength=bins)
            result[row] = 2 * (np.bincount(index, minlength=bins) - own) + (own if diagonal else 0)
        return result

    def histogram(self, kind: Kind = "pooled", *, bins: int = _D.bins, diagonal: bool = True) -> tuple[Array, Array]:
        """Density of the cosines of each layer [L + 1, bins] and the bin edges [bins + 1]; see :meth:`counts`."""
        counts = self.counts(kind, bins=bins, diagonal=diagonal)[self._rows()]
        density = counts / counts.sum(axis=1, keepdims=True) * (bins / 2)
        return density, np.linspace(-1, 1, bins + 1)

    def quantiles(self, q: Sequence[float] = (0.05, 0.25, 0.5, 0.75, 0.95)) -> Array:
        """Quantiles of the pooled cosines of different tokens [L + 1, len(q)], exact to half a fine bin (5e-4)."""
        if self.pooled is None:
            raise ValueError("quantiles need the pooled histogram: measure(..., histograms=('pooled',)).")
        levels = np.asarray(q, dtype=np.float64)
        if levels.size == 0 or levels.min() < 0 or levels.max() > 1:
            raise ValueError(f"quantile levels must lie between 0 and 1, got {list(q)}.")
        cells = self.pooled.shape[1]
        edges = np.linspace(-1, 1, cells + 1)
        result = np.empty((len(self._rows()), levels.size))
        for out, row in enumerate(self._rows()):
            cumulative = np.concatenate([[0], np.cumsum(self.pooled[row])]) / self.pooled[row].sum()
            cell = np.clip(np.searchsorted(cumulative, levels, side="left") - 1, 0, cells - 1)
            inside = cumulative[cell + 1] - cumulative[cell]
            share = np.divide(levels - cumulative[cell], inside, out=np.full(levels.size, 0.5), where=inside > 0)
            result[out] = edges[cell] + share * (2 / cells)
        return result

    # ---- putting together ------------------------------------------------------------------------------------------

    def merge(self, *others: Profile) -> Profile:
        """Merge profiles of the same model (shards, ranks or several text sources) into one profile of all passages.

        Raises:
            ValueError: the profiles do not have the same layers, or have nothing in common to add.
        """
        every = (self, *others)
        for other in others:
            if (other.states, other.last_block) != (self.states, self.last_block):
                raise ValueError(
                    f"profiles of different layers cannot be merged: {len(self.all_layers)} states ending in "
                    f"{self.all_layers[-1]!r} against {len(other.all_layers)} ending in {other.all_layers[-1]!r}."
                )
            if set(other.metric_names) != set(self.metric_names):
                raise ValueError(
                    f"profiles with different metrics cannot be merged: {sorted(self.metric_names)} against "
                    f"{sorted(other.metric_names)}."
                )

        def joined(name: str) -> Array:
            return np.concatenate([getattr(profile, name) for profile in every], axis=1)

        pooled = [profile.pooled for profile in every if profile.pooled is not None]
        summed = [profile.summed for profile in every if profile.summed is not None]
        lengths = np.concatenate([profile.lengths for profile in every])
        one_length = len(set(lengths.tolist())) == 1
        reason = next((profile.no_averaged for profile in every if profile.no_averaged), "")
        if not one_length:
            reason = unequal(lengths)
        return replace(
            self,
            lengths=lengths,
            cosine=joined("cosine"),
            cosine_others=joined("cosine_others"),
            norm=joined("norm"),
            norm_sd=joined("norm_sd"),
            norm_max=joined("norm_max"),
            metrics={
                name: np.concatenate([profile.metrics[name] for profile in every], axis=1) for name in self.metrics
            },
            sides=Sides.merged([profile.sides for profile in every]),
            pooled=np.sum(pooled, axis=0) if len(pooled) == len(every) else None,
            summed=np.sum(summed, axis=0) if len(summed) == len(every) and one_length else None,
            no_averaged=reason,
            sinks=Sinks.merged([profile.sinks for profile in every]),
        )

    # ---- files -----------------------------------------------------------------------------------------------------

    def to_row(self) -> dict[str, Any]:
        """Plain data of a ``profile`` row (see ``decondense.records``): the summary that tables and figures use."""
        return {
            "layers": self.layers,
            "mean_cosine": self.mean_cosine.tolist(),
            "spearman": _number(self.spearman),
            "kendall": _number(self.kendall),
            "passages": self.n_passages,
            "passage_tokens": self.tokens,
            "norms": self.norms.tolist(),
            "histogram": None if self.pooled is None else self.counts("pooled")[self._rows()].tolist(),
        }

    def summary(self) -> dict[str, Any]:
        """Everything that is human-readable: :meth:`to_row`, intervals, all measured states, side metrics, what was
        measured (``info``, without folders of this machine and credentials)."""
        low, high = self.interval("mean_cosine")
        result = self.to_row()
        for kind in ("spearman", "kendall"):
            result[f"{kind}_interval"] = [_number(value) for value in self.interval(kind)]
        result["mean_cosine_interval"] = [[_number(a), _number(b)] for a, b in zip(low, high, strict=True)]
        result["mean_cosine_others"] = self.mean_cosine_others.tolist()
        result["last"] = {str(n): self.last(n) for n in range(1, min(5, len(self.layers)) + 1)}
        result["last"]["half"] = self.last()
        result["metrics"] = {name: [_number(v) for v in self.metric(name)] for name in self.metric_names}
        result["between_layers"] = {
            name: [[_number(v) for v in row] for row in self.between_layers(name)] for name in self.sides.between
        }
        result["quantiles"] = None if self.pooled is None else self.quantiles().tolist()
        result["all_layers"] = {
            name: {"mean_cosine": float(self.cosine[i].mean()), "norm": float(self.norm[i].mean())}
            for i, name in enumerate(self.all_layers)
        }
        result["sinks"] = None if self.sinks is None else self.sinks.summary(self)
        result["final"] = self.final
        result["info"] = publishable(self.info)
        return result

    def save(self, path: str | Path, *, sums: bool = True) -> Path:
        """Write ``PATH.json`` (readable summary) and ``PATH.npz`` (all arrays); a suffix on ``path`` is replaced.

        ``sums=False`` leaves out the position-wise sums and the second moments, by far the largest parts; the loaded
        profile then has no averaged histogram, and with metrics of the corpus it cannot be merged.

        Returns:
            The path of the JSON file.
        """
        return files.write(self, path, sums=sums)

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read what :meth:`save` wrote; ``path`` as given to it, with or without suffix, or its directory."""
        return cls(**files.read(path))

    def __repr__(self) -> str:
        model = self.info.get("model", "model")
        return (
            f"Profile({model}: {len(self.layers) - 1} blocks, {self.n_passages} passages of up to {self.tokens} "
            f"tokens, mean cosine {self.mean_cosine[0]:.3f} -> {self.mean_cosine[-1]:.3f}, "
            f"spearman {self.spearman:.2f}, kendall {self.kendall:.2f})"
        )


def unequal(lengths: Any) -> str:
    """Why passages of these lengths have no averaged matrix, with the remedy."""
    shortest, longest = int(np.min(lengths)), int(np.max(lengths))
    return (
        f"the averaged histogram needs passages of equal length, but these have {shortest} to {longest} tokens, so "
        f"positions cannot be averaged. Measure with tokens={shortest}, give longer texts, or use the pooled histogram."
    )


def _number(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None
