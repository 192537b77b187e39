"""Metrics between layers; equations and sources stand in the registry, :mod:`decondense.metrics`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from decondense.measuring.metrics.clouds import Array, Cloud
from decondense.metrics import Metric


def hsic(clouds: Sequence[Cloud]) -> Array:
    r"""Unbiased :math:`\mathrm{HSIC}_1` of the linear kernels of all pairs of states of a passage [S, S].

    Song et al. 2012, JMLR 13, equation 5. With fewer than 4 tokens it is nan.
    """
    n, s = clouds[0].n, len(clouds)
    if n < 4:
        return np.full((s, s), np.nan)
    # the kernel of centred rows gives the same value, and no large numbers cancel
    device = clouds[0].centred.device  # the layers of a model may lie on several
    kernels_SNN = torch.stack([(cloud.centred @ cloud.centred.T).to(device) for cloud in clouds])
    kernels_SNN.diagonal(dim1=1, dim2=2).zero_()
    rows_SN = kernels_SNN.sum(dim=2)
    flat_SM = kernels_SNN.flatten(1)
    sums_S = rows_SN.sum(dim=1)
    products_SS = flat_SM @ flat_SM.T + torch.outer(sums_S, sums_S) / ((n - 1) * (n - 2))
    return ((products_SS - 2 / (n - 2) * rows_SN @ rows_SN.T) / (n * (n - 3))).cpu().numpy()


def cka(hsic_SS: Array) -> Array:
    """Linear CKA [S, S] of the mean HSIC [S, S]; nan for a state that does not vary."""
    own_S = hsic_SS.diagonal()
    scale_SS = np.sqrt(np.maximum(np.outer(own_S, own_S), 0))
    return np.divide(hsic_SS, scale_SS, out=np.full_like(hsic_SS, np.nan), where=scale_SS > 0)


class LayerPairs:
    """Collects the metrics between layers, batch by batch: :meth:`take` each state, then :meth:`reduce` the batch."""

    def __init__(self, metrics: dict[str, Metric]) -> None:
        self.metrics = {name: metric for name, metric in metrics.items() if metric.scope == "layers"}
        self._states: list[Tensor] = []
        self._values: dict[str, dict[int, Array]] = {name: {} for name in self.metrics}

    def take(self, z_BND: Tensor) -> None:
        """Keep a state of the batch: a copy, because a model may change its states in place."""
        if self.metrics:
            self._states.append(z_BND.detach().clone())

    def reduce(self, passages: Sequence[int]) -> None:
        """All states of the batch are there; ``passages`` are its numbers."""
        for name, metric in self.metrics.items():
            for place, passage in enumerate(passages):
                self._values[name][passage] = metric([Cloud(z_BND[place]) for z_BND in self._states])
        self._states = []

    def values(self) -> dict[str, Array]:
        """By metric [S, S, P]."""
        return {name: np.stack([seen[p] for p in sorted(seen)], axis=-1) for name, seen in self._values.items()}
