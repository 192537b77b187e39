r"""The regulariser of VISReg over tokens: scale, shape and centre of a cloud, each with a gradient of its own.

VISReg (Wu, Balestriero, Levine 2026, arXiv:2606.02572) keeps the variance term of VICReg and replaces the covariance by
a sliced Wasserstein distance to the standard normal distribution:

.. math:: \frac1D \sum_a (1 - \sigma_a)^2
          + \frac1M \sum_m \frac1n \sum_i \big(y_{m(i)} - \Phi^{-1}(\tfrac{i - 1/2}{n})\big)^2
          + \frac1D \sum_a \bar z_a^2,

with the mean and the standard deviation (over n) of each feature, :math:`y_m = \langle a_m, (z - \bar z)/\sigma
\rangle` in ascending order, and M random unit directions. In the shape :math:`\sigma` is held constant, so that scale
and shape are separate. Where ``sigreg`` has a gradient that vanishes as the tokens collapse, that of the scale stays
constant and that of the shape grows with :math:`1/\sigma` (:math:`\sigma` at least 1e-4). Weights of the three terms:
1, as published. The invariance between views has no place in one sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from decondense.config import LossConfig
from decondense.losses import dense, features
from decondense.losses.form import Form
from decondense.losses.forms.sigreg import draw
from decondense.losses.pair_mask import PairMask

_LEAST = 1e-4


def _deviation(variance: Tensor) -> Tensor:
    """The square root, without a gradient where there is no spread."""
    spread = variance > 0
    return torch.where(spread, torch.where(spread, variance, 1.0).sqrt(), 0.0)


def _quantile(share: Tensor) -> Tensor:
    quantile: Tensor = torch.special.ndtri(share)
    return quantile


def definition(z_UND: Tensor, pairs_UNN: Tensor, valid_UN: Tensor, s: LossConfig, directions_DM: Tensor) -> Tensor:
    """Scale, shape and centre as they are written above. All tokens are real here."""
    n = z_UND.shape[1]
    x, _ = dense.centred(z_UND, valid_UN)
    deviation_UD = _deviation(x.square().mean(dim=1))
    normal = x / deviation_UD.detach().clamp(min=_LEAST).unsqueeze(1)
    ascending = (normal @ directions_DM).sort(dim=1, stable=True).values
    target_N = _quantile((torch.arange(n, device=x.device, dtype=x.dtype) + 0.5) / n)
    shape = (ascending - target_N[:, None]).square().mean(dim=(1, 2))
    return (1 - deviation_UD).square().mean(dim=1) + shape + z_UND.mean(dim=1).square().mean(dim=1)


def per_segment(z_RND: Tensor, pairs: PairMask, s: LossConfig, directions_DM: Tensor) -> Tensor:
    """All segments at once; memory is that of the projections, tokens x directions."""
    z, n_U = features.real_tokens(z_RND, pairs), features.safe_count(pairs)
    mean_UD = pairs.to_segments(z) / n_U.unsqueeze(1)
    x = features.centred(z, pairs)
    deviation_UD = _deviation(pairs.to_segments(x.square()) / n_U.unsqueeze(1))
    normal = x / pairs.to_tokens(deviation_UD.detach().clamp(min=_LEAST))
    y_RNM = normal @ directions_DM
    target_RNM = _targets(y_RNM.detach(), pairs, n_U)
    gap_U = pairs.to_segments((y_RNM - target_RNM).square()).mean(dim=1) / n_U
    value_U = (1 - deviation_UD).square().mean(dim=1) + gap_U + mean_UD.square().mean(dim=1)
    return features.or_zero(value_U, pairs)


@torch.no_grad()
def _targets(y_RNM: Tensor, pairs: PairMask, n_U: Tensor) -> Tensor:
    """The quantile of each projection's rank among the real tokens of its segment."""
    order = y_RNM.argsort(dim=1, stable=True)
    key = pairs.label_RN
    if key is None and pairs.valid_RN is not None:
        key = torch.where(pairs.valid_RN, 0, -1)
    first_RN = torch.zeros(y_RNM.shape[:2], dtype=torch.long, device=y_RNM.device)
    if key is not None:  # by segment, and within it by value; tokens that are not real come first
        keys = key.unsqueeze(-1).expand_as(order)
        order = order.gather(1, keys.gather(1, order).argsort(dim=1, stable=True))
        first_RN = torch.searchsorted(key.sort(dim=1).values, key)  # how many have a smaller key
    places = torch.arange(order.shape[1], device=order.device)[None, :, None].expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places) - first_RN.unsqueeze(-1)
    share = (rank.to(y_RNM.dtype) + 0.5) / pairs.to_tokens(n_U).unsqueeze(-1)
    return _quantile(share.clamp(0.5 / order.shape[1], 1 - 0.5 / order.shape[1]))


FORM = Form(definition=definition, per_segment=per_segment, draw=draw)
