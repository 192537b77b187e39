"""Inputs with planted structure, and an oracle that shares no code with the package."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from decondense.losses import FORMS

FLOAT64 = torch.float64

ALONE = [name for name, info in FORMS.items() if not info.teacher]
"""The forms that need no teacher's states; gram has a file of its own."""


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = FLOAT64) -> Tensor:
    """Standard normal numbers from a generator of their own."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64).to(dtype)


def condensed(b: int, t: int, d: int, cosine: float, seed: int = 0) -> Tensor:
    """Tokens around one direction per sequence, with this mean cosine."""
    common = randn(b, 1, d, seed=seed)
    common = common / common.norm(dim=-1, keepdim=True)
    noise = randn(b, t, d, seed=seed + 1) / math.sqrt(d)
    return math.sqrt(cosine) * common + math.sqrt(1 - cosine) * noise


def with_duplicates(z: Tensor, share: float = 0.2) -> Tensor:
    """The same with every ``1/share``-th token repeated elsewhere."""
    z = z.clone()
    step = round(1 / share)
    z[:, ::step] = z[:, 1:2]
    return z


def orthonormal(count: int, features: int) -> Tensor:
    """Orthonormal vectors ``[count, features]``: every cosine 0."""
    return torch.eye(count, features, dtype=FLOAT64)


def simplex(count: int, features: int) -> Tensor:
    """Vertices of a regular simplex ``[count, features]``: every cosine -1/(count - 1), the least mean."""
    z = orthonormal(count, features)
    z = z - z.mean(dim=0)
    return z / z.norm(dim=-1, keepdim=True)


def antipodal(count: int, features: int) -> Tensor:
    """Vectors +e, -e in turn ``[count, features]``: about half of the pairs at cosine -1, the rest at +1."""
    z = torch.zeros(count, features, dtype=FLOAT64)
    z[0::2, 0], z[1::2, 0] = 1.0, -1.0
    return z


INPUTS = {
    "random": lambda b, t, d: randn(b, t, d),
    "condensed .99": lambda b, t, d: condensed(b, t, d, 0.99),
    "condensed .9999": lambda b, t, d: condensed(b, t, d, 0.9999),
    "20% duplicates": lambda b, t, d: with_duplicates(randn(b, t, d)),
    "all identical": lambda b, t, d: randn(b, 1, d).expand(b, t, d).clone(),
}


def exact_angular(z_TD: Tensor, tau: float, delta: float = 0.0) -> Tensor:
    """log mean_{i != j} exp(-theta/(pi tau)) of one sequence, in float64 with angles from explicit differences.

    theta = 2 atan2(|a - b|, |a + b|) is accurate to 1e-9 where arccos has lost every digit. ``delta`` smooths it as
    cos(theta_delta) = cos(theta)/sqrt(1 + delta^2), through the same half-angle identity.
    """
    z = z_TD.double()
    u = z / z.norm(dim=-1, keepdim=True)
    difference = (u.unsqueeze(0) - u.unsqueeze(1)).square().sum(dim=-1)
    i, j = torch.triu_indices(len(z), len(z), 1)
    kappa = 1 / math.sqrt(1 + delta * delta)
    # 1 - kappa c = (1 - kappa) + kappa |a - b|^2/2, without the cancellation of 1 - kappa
    one_minus = kappa * delta**2 / (1 / kappa + 1) + kappa * difference[i, j] / 2
    theta = 2 * torch.atan2((one_minus / 2).sqrt(), (1 - one_minus / 2).sqrt())
    return (-theta / (math.pi * tau)).logsumexp(dim=0) - math.log(len(i))
