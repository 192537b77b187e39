"""Matrix entropies of normalised states; equations and sources stand in the registry, :mod:`decondense.metrics`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from decondense.geometry import unit
from decondense.measuring.metrics.clouds import Cloud, Corpus, as_cloud
from decondense.measuring.metrics.spectrum import entropy


def prompt_entropy(states: Cloud | Tensor, unit_ND: Tensor | None = None) -> float:
    """Von Neumann entropy of the Gram matrix of the centred unit rows with trace 1, over its greatest value; 0 .. 1.

    Times ln min(N, D) it is the entropy in nats, over ln D the published normalisation ``logD``.
    """
    cloud = as_cloud(states)
    most = min(cloud.n, cloud.width)
    return entropy(Cloud(unit(cloud.centred)).spectrum(False)) / math.log(most) if most > 1 else math.nan


def dataset_entropy(corpus: Corpus) -> float:
    """:func:`prompt_entropy` of the mean rows of the passages."""
    return prompt_entropy(torch.from_numpy(corpus.moments.means_PD))
