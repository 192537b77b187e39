"""The side metrics of a measurement that have no value of one passage: of the corpus, and between layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from decondense.measuring.metrics import METRICS, LayerPairs
from decondense.measuring.metrics.clouds import Array, Corpus, Moments
from decondense.metrics import Metric


@dataclass(frozen=True)
class Sides:
    """Side metrics of the corpus and between layers; those of the passages are ``Profile.metrics``."""

    corpus: dict[str, Array] = field(default_factory=dict)
    """Metrics of the corpus by name, each [states]."""
    moments: tuple[Moments | None, ...] | None = None
    """What they are computed from, by state (the logits have none); None: not measured, or not saved."""
    between: dict[str, Array] = field(default_factory=dict)
    """What the metrics between layers are computed from, by name, each [states, states, P]."""

    @classmethod
    def collected(
        cls, metrics: Mapping[str, Metric], moments: Sequence[Moments | None], between: LayerPairs | None = None
    ) -> Sides:
        """From what the layers took in; nan where a state has no moments."""
        names = [name for name, metric in metrics.items() if metric.scope == "corpus"]
        clouds = [None if state is None else Corpus(state) for state in moments]
        corpus = {
            name: np.array([np.nan if cloud is None else float(metrics[name](cloud)) for cloud in clouds])
            for name in names
        }
        return cls(corpus, tuple(moments) if names else None, {} if between is None else between.values())

    @classmethod
    def merged(cls, parts: Sequence[Sides]) -> Sides:
        """Of the passages of all parts.

        Raises:
            ValueError: a part has metrics of the corpus without what they are computed from.
        """
        first = parts[0]
        if len(parts) < 2:
            return first
        between = {name: np.concatenate([part.between[name] for part in parts], axis=2) for name in first.between}
        if not first.corpus:
            return cls(between=between)
        total = first.moments
        for part in parts[1:]:
            if total is None or part.moments is None:
                raise ValueError(
                    f"a profile saved with sums=False has no second moments, so {', '.join(first.corpus)} cannot be "
                    "merged; save with sums=True, or measure without metrics of the corpus."
                )
            pairs = zip(total, part.moments, strict=True)
            total = tuple(None if a is None or b is None else a + b for a, b in pairs)
        of_corpus = cls.collected({name: METRICS[name] for name in first.corpus}, total or ())
        return cls(of_corpus.corpus, total, between)

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.corpus, *self.between)

    def values(self, name: str, rows: Sequence[int]) -> Array:
        """A metric of these states: of the corpus, or between each of them and the one before it, nan for the first."""
        if name in self.corpus:
            return np.asarray(self.corpus[name][list(rows)])
        return np.concatenate([[np.nan], self.matrix(name, rows).diagonal(1)])

    def matrix(self, name: str, rows: Sequence[int]) -> Array:
        """A metric between each pair of these states [rows, rows]."""
        return np.asarray(METRICS[name].finished(mean_of_known(self.between[name][np.ix_(rows, rows)])))

    def arrays(self, *, sums: bool) -> dict[str, Any]:
        """Arrays to save, named by what they are; of the symmetric moments the upper triangle, with ``sums`` only."""
        arrays: dict[str, Any] = {f"corpus:{name}": values for name, values in self.corpus.items()}
        arrays.update({f"between:{name}": values for name, values in self.between.items()})
        for number, state in enumerate(self.moments or ()):
            if state is not None and sums:
                values = vars(state) | {"scatter_DD": state.scatter_DD[np.triu_indices(len(state.mean_D))]}
                arrays.update({f"moments:{number}:{name}": np.asarray(value) for name, value in values.items()})
        return arrays

    @classmethod
    def taken(cls, arrays: dict[str, Any], states: int) -> Sides:
        """What :meth:`arrays` gave, taken out of ``arrays``."""

        def under(prefix: str) -> dict[str, Any]:
            names = [name for name in arrays if name.startswith(prefix)]
            return {name.removeprefix(prefix): arrays.pop(name) for name in names}

        moments: list[Moments | None] = []
        for number in range(states):
            found = under(f"moments:{number}:")
            if found:
                upper_DD = np.zeros((len(found["mean_D"]),) * 2)
                upper_DD[np.triu_indices(len(upper_DD))] = found["scatter_DD"]
                found |= {"scatter_DD": upper_DD + np.triu(upper_DD, 1).T, "count": int(found["count"])}
            moments.append(Moments(**found) if found else None)
        return cls(under("corpus:"), tuple(moments) if any(moments) else None, under("between:"))


def mean_of_known(values: Array) -> Array:
    """Mean over passages, the last axis: of those that have a value, nan where none has."""
    known = ~np.isnan(values)
    if known.all():
        return np.asarray(values.mean(axis=-1))
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(known, values, 0).sum(axis=-1) / known.sum(axis=-1))
