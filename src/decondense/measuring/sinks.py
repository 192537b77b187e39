"""Sink tokens: tokens whose norm is far from that of the others, and the numbers without them.

The rule: in a layer of a passage, a token is a sink when its norm is more than :data:`SINK_NORM` times the median norm
of the passage's tokens. In most decoders the first token is one from an early block on (massive activations: Sun et al.
2024, arXiv:2402.17762; attention sinks: Xiao et al. 2023, arXiv:2309.17453).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from decondense.measuring.profile import Profile

SINK_NORM = 10.0
"""How many times the passage's median norm a token's norm has to exceed."""

Array = NDArray[np.float64]


def sink_tokens(norms: NDArray[Any]) -> NDArray[np.bool_]:
    """Which tokens of a passage are sinks [N], from their norms [N]; none where the median is zero."""
    median = float(np.median(norms))
    return np.asarray(norms > SINK_NORM * median if median > 0 else np.zeros(norms.shape, dtype=bool))


@dataclass(frozen=True)
class Sinks:
    """The sink tokens of a measurement; each layer of each passage has its own."""

    count: NDArray[np.int64]
    """Sink tokens [states, P]."""
    cosine: Array
    """Mean cosine over the pairs without a sink token, diagonal included [states, P]."""
    norm: Array
    """Mean norm of the other tokens [states, P]."""
    positions: NDArray[np.int64]
    """Passages in which the token at a position, counted from 0 at the passage's start, is a sink [states, N]."""

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays under the names that a saved profile has for them."""
        return {f"sink:{name}": getattr(self, name) for name in self.__dataclass_fields__}

    @classmethod
    def taken(cls, arrays: dict[str, Any]) -> Sinks | None:
        """Take :meth:`arrays` out of a dictionary of them; None: the profile was saved before there were any."""
        own = {name: arrays.pop(f"sink:{name}", None) for name in cls.__dataclass_fields__}
        return None if any(value is None for value in own.values()) else cls(**own)

    @classmethod
    def merged(cls, parts: Sequence[Sinks | None]) -> Sinks | None:
        """Those of the passages of all parts; None where one part has none recorded."""
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return None
        positions = np.zeros((known[0].count.shape[0], max(part.positions.shape[1] for part in known)), dtype=np.int64)
        for part in known:
            positions[:, : part.positions.shape[1]] += part.positions
        joined = {name: np.concatenate([getattr(part, name) for part in known], axis=1) for name in _BY_PASSAGE}
        return cls(**joined, positions=positions)

    def summary(self, profile: Profile) -> dict[str, Any]:
        """The rule, :meth:`by_layer`, and the profile's numbers without the sinks, as plain data."""
        kept = profile.without_sinks()
        return {
            "rule": f"norm > {SINK_NORM:g} x the passage's median norm",
            "layers": self.by_layer(profile.all_layers),
            "mean_cosine_without": kept.mean_cosine.tolist(),
            "norms_without": kept.norms.tolist(),
            "spearman_without": kept.spearman if np.isfinite(kept.spearman) else None,
            "kendall_without": kept.kendall if np.isfinite(kept.kendall) else None,
            "last_half_without": kept.last(),
        }

    def by_layer(self, layers: Sequence[str]) -> list[dict[str, Any]]:
        """For each layer that has sinks: its name, the number of passages and of tokens, and the most common positions.

        ``layers``: the names of all states, in order. At most eight positions per layer, the most common first.
        """
        found = []
        for row in np.flatnonzero(self.count.any(axis=1)):
            order = np.argsort(-self.positions[row], kind="stable")[:8]
            found.append(
                {
                    "layer": layers[int(row)],
                    "passages": int((self.count[row] > 0).sum()),
                    "tokens": int(self.count[row].sum()),
                    "positions": {str(at): int(self.positions[row, at]) for at in order if self.positions[row, at]},
                }
            )
        return found


_BY_PASSAGE = ("count", "cosine", "norm")
