r"""A set of tokens as the side metrics see it: Gram matrices, spectra and sums, each computed once on demand.

Nothing here needs an SVD of Z: the smaller of :math:`Z^T Z` and :math:`Z Z^T` has the squared singular values as its
eigenvalues. All arithmetic is in float64.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackError, eigsh
from torch import Tensor

from decondense.geometry import unit

Array = NDArray[np.float64]

_ROUNDING = 1e-28
"""Centred states whose squared norm is below this share of the raw ones differ by the rounding of the mean alone."""


def wide(z: Tensor) -> Tensor:
    """``z`` in float64; a device that has none (Apple's) hands over to the CPU."""
    return z.cpu().double() if z.device.type == "mps" else z.double()


class Cloud:
    """The states of the tokens of one passage.

    Args:
        z_ND: States, any floating dtype.
        unit_ND: Their unit rows, if they are already computed.
    """

    def __init__(self, z_ND: Tensor, unit_ND: Tensor | None = None) -> None:
        self.n, self.width = z_ND.shape
        self._z_ND, self._unit_ND = z_ND, unit_ND
        self._grams: dict[bool, Tensor] = {}
        self._spectra: dict[bool, Array] = {}

    @cached_property
    def z(self) -> Tensor:
        """States [N, D]."""
        return wide(self._z_ND)

    @cached_property
    def units(self) -> Tensor:
        """Unit rows [N, D]; a zero row stays zero."""
        return wide(unit(self._z_ND) if self._unit_ND is None else self._unit_ND)

    @cached_property
    def mean(self) -> Tensor:
        """Mean row [D]."""
        return self.z.mean(dim=0)

    @cached_property
    def centred(self) -> Tensor:
        """States minus their mean row [N, D]; zero where nothing but rounding is left."""
        x_ND = self.z - self.mean
        return x_ND if x_ND.square().sum() > _ROUNDING * self.z.square().sum() else torch.zeros_like(x_ND)

    @cached_property
    def coordinate_squares(self) -> Tensor:
        """Sum over the tokens of each coordinate's square [D]."""
        return self.z.square().sum(dim=0)

    def total(self, centred: bool) -> float:
        r"""Squared Frobenius norm of the raw or the centred states, :math:`\sum_k \lambda_k`."""
        return float((self.centred if centred else self.z).square().sum())

    def gram(self, centred: bool) -> Tensor:
        """The smaller Gram matrix of the raw or the centred states."""
        if centred not in self._grams:
            self._grams[centred] = smaller_gram(self.centred if centred else self.z)
        return self._grams[centred]

    def spectrum(self, centred: bool) -> Array:
        r"""Eigenvalues :math:`\lambda_k` of the smaller Gram matrix, in descending order, none negative."""
        if centred not in self._spectra:
            values = torch.linalg.eigvalsh(self.gram(centred)).clamp_min(0).cpu().numpy()[::-1].copy()
            values[self.n - centred :] = 0  # beyond the rank there is rounding only
            self._spectra[centred] = values
        return self._spectra[centred]

    def largest(self, centred: bool) -> float:
        r"""Largest eigenvalue :math:`\lambda_1`."""
        known = self._spectra.get(centred)
        return max(largest_eigenvalue(self.gram(centred)), 0.0) if known is None else float(known[0])


class Corpus(Cloud):
    """The tokens of all passages of one layer, from their :class:`Moments`; :attr:`z` and what needs it are gone."""

    def __init__(self, moments: Moments) -> None:
        self.moments = moments
        self.n, self.width = moments.count, len(moments.mean_D)
        self._grams, self._spectra = {}, {}

    @cached_property
    def mean(self) -> Tensor:
        """Mean row [D]."""
        return torch.from_numpy(self.moments.mean_D)

    def gram(self, centred: bool) -> Tensor:
        """The D x D second moments, about the origin or the mean, as sums over tokens."""
        if centred not in self._grams:
            about_mean = torch.from_numpy(self.moments.scatter_DD)
            raw = about_mean + self.n * torch.outer(self.mean, self.mean)
            if about_mean.trace() <= _ROUNDING * raw.trace():
                about_mean = torch.zeros_like(about_mean)
            self._grams = {True: about_mean, False: raw}
        return self._grams[centred]

    def total(self, centred: bool) -> float:
        """Sum of the eigenvalues of :meth:`gram`."""
        return float(self.gram(centred).trace())

    @cached_property
    def coordinate_squares(self) -> Tensor:
        """Sum over the tokens of each coordinate's square [D]."""
        return self.gram(False).diagonal()


@dataclass(frozen=True)
class Moments:
    """What is kept of a layer for the metrics of the corpus. Two of them add up to that of all their passages."""

    count: int
    """Tokens."""
    mean_D: Array
    """Mean row."""
    scatter_DD: Array
    r"""Second moments about the mean, :math:`\sum_t (z_t - \bar z)(z_t - \bar z)^T`."""
    unit_D: Array
    """Sum of the unit rows."""
    means_PD: Array
    """Mean row of each passage."""

    def __add__(self, other: Moments) -> Moments:
        """Chan, Golub and LeVeque 1983: no difference of large numbers, however far the mean lies from the origin."""
        count = self.count + other.count
        gap = other.mean_D - self.mean_D
        return Moments(
            count,
            self.mean_D + gap * (other.count / count),
            self.scatter_DD + other.scatter_DD + np.outer(gap, gap) * (self.count * other.count / count),
            self.unit_D + other.unit_D,
            np.concatenate([self.means_PD, other.means_PD]),
        )


class MomentStream:
    """Collects the :class:`Moments` of one layer, passage by passage; addressed by passage number."""

    def __init__(self, width: int, device: torch.device) -> None:
        device = torch.device("cpu") if device.type == "mps" else device
        self.count = 0
        self.mean_D = torch.zeros(width, dtype=torch.float64, device=device)
        self.unit_D = torch.zeros_like(self.mean_D)
        self.scatter_DD = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.means: dict[int, Array] = {}

    def add(self, cloud: Cloud, passage: int) -> None:
        """Take in the tokens of a passage."""
        # as Moments.__add__, in place: one product of the passage's centred states
        x_ND = cloud.z - cloud.mean
        gap = cloud.mean - self.mean_D
        count = self.count + cloud.n
        self.scatter_DD.addmm_(x_ND.T, x_ND).addr_(gap, gap, alpha=self.count * cloud.n / count)
        self.mean_D += gap * (cloud.n / count)
        self.unit_D += cloud.units.sum(dim=0)
        self.means[passage] = cloud.mean.cpu().numpy()
        self.count = count

    def moments(self) -> Moments:
        """What was collected."""
        mean_D, scatter_DD, unit_D = (values.cpu().numpy() for values in (self.mean_D, self.scatter_DD, self.unit_D))
        means_PD = np.stack([self.means[passage] for passage in sorted(self.means)])
        return Moments(self.count, mean_D, scatter_DD, unit_D, means_PD)


def as_cloud(states: Cloud | Tensor, unit_ND: Tensor | None = None) -> Cloud:
    """A cloud as it is; a tensor [N, D] as a cloud."""
    return states if isinstance(states, Cloud) else Cloud(states, unit_ND)


def smaller_gram(z_ND: Tensor) -> Tensor:
    r""":math:`Z^T Z` or :math:`Z Z^T`, whichever is smaller."""
    n, d = z_ND.shape
    return z_ND.T @ z_ND if d <= n else z_ND @ z_ND.T


def largest_eigenvalue(gram_MM: Tensor) -> float:
    """The largest eigenvalue of a symmetric matrix."""
    m = gram_MM.shape[0]
    if m >= 32:
        # Lanczos to machine precision from a fixed start: O(M^2) an iteration instead of the O(M^3) of all eigenvalues
        start = np.cos(np.arange(m) + 0.5)
        with contextlib.suppress(ArpackError):  # a matrix of zeros, or a start that an eigenspace does not contain
            largest = eigsh(gram_MM.cpu().numpy(), k=1, which="LA", tol=0, v0=start, return_eigenvectors=False)
            return float(largest[0])
    return float(torch.linalg.eigvalsh(gram_MM)[-1])
