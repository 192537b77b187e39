"""Statistics of runs that share a seed: correlation, partial correlation, and the share of an effect that goes with a
mediator. Arrays are [seeds, arms]; every number is in closed form and in float64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

Array = npt.NDArray[np.float64]
_EXACT_ARMS = 7
"""Up to this number of arms every order is tried (5040); beyond it orders are drawn."""
_ZERO = 1e-9
"""A residual shorter than this share of the values themselves is rounding, not variation."""


def partial_correlation(x_A: Array, y_A: Array, covariates: Sequence[Array] = ()) -> float | None:
    """Pearson's correlation of what least squares on a constant and the covariates leaves of x and of y.

    Without covariates: the plain correlation. On ranks: the partial rank correlation.

    Returns:
        None where fewer than two dimensions are left, in which any two vectors correlate by +-1, or where nothing of x
        or of y is left.
    """
    design = np.column_stack([np.ones(len(x_A)), *covariates])
    basis, sizes, _ = np.linalg.svd(design, full_matrices=False)
    basis = basis[:, sizes > _ZERO * sizes[0]]
    if len(x_A) - basis.shape[1] < 2:
        return None
    left = []
    for values in (x_A, y_A):
        rest = values - basis @ (basis.T @ values)
        size = np.linalg.norm(rest)
        if size <= _ZERO * np.linalg.norm(values):
            return None
        left.append(rest / size)
    rho = float(np.clip(left[0] @ left[1], -1, 1))
    return 0.0 if abs(rho) <= _ZERO else rho  # the sign of a rounding error differs between processors


def rank_correlations(x_SA: Array, y_SA: Array, covariates: Sequence[Array] = ()) -> list[float]:
    """The (partial) rank correlation over arms of every seed in which there is one."""
    found = []
    for s in range(len(x_SA)):
        ranked = [stats.rankdata(values[s]) for values in (x_SA, y_SA, *covariates)]
        rho = partial_correlation(ranked[0], ranked[1], ranked[2:])
        if rho is not None:
            found.append(rho)
    return found


def permutation_p(x_SA: Array, y_SA: Array, *, draws: int = 20_000, seed: int = 0) -> float | None:
    """Two-sided p of the mean over seeds of the rank correlation, arms exchanged for each other in all seeds at once.

    The arms are the units: more seeds of the same arms do not make it smaller than 2 / A!. Exact up to 7 arms.

    Returns:
        None where the values of a seed are all equal.
    """
    ranked = []
    for values_SA in (x_SA, y_SA):
        rank_SA = stats.rankdata(values_SA, axis=1) - (values_SA.shape[1] + 1) / 2
        size_S1 = np.linalg.norm(rank_SA, axis=1, keepdims=True)
        if not np.all(size_S1):
            return None
        ranked.append(rank_SA / size_S1)
    x, y = ranked
    arms = x.shape[1]
    if arms <= _EXACT_ARMS:
        order_PA = np.array(list(itertools.permutations(range(arms))))
    else:
        rng = np.random.default_rng(seed)
        order_PA = rng.permuted(np.tile(np.arange(arms), (draws, 1)), axis=1)
    mean_P = np.einsum("sa,spa->p", x, y[:, order_PA]) / len(x)
    reached = int(np.sum(np.abs(mean_P) >= abs(float(np.sum(x * y)) / len(x)) - 1e-12))
    return reached / len(order_PA) if arms <= _EXACT_ARMS else (1 + reached) / (1 + draws)


def smallest_permutation_p(arms: int) -> float:
    """The smallest p that :func:`permutation_p` can give with an exact enumeration."""
    return 2 / math.factorial(arms)


@dataclass(frozen=True)
class Mediation:
    """How much of a treatment's effect on y goes with its effect on m, in one seed."""

    total: float
    """Mean of y over the treated arms less the baseline's."""
    slope: float
    """Least-squares slope of y on m over the treated arms alone."""
    through: float
    """slope * (mean of m over the treated arms less the baseline's)."""

    @property
    def direct(self) -> float:
        """total - through: what the slope does not account for."""
        return self.total - self.through


def mediation(m_A: Array, y_A: Array, baseline: int) -> Mediation | None:
    """Least squares of ``y = a + c treated + b m`` over the arms of one seed; ``treated`` is 0 for the baseline only.

    One baseline run leaves no residual of its own, so b is the slope among the treated arms, the total effect is
    c + b (mean m of the treated - m of the baseline), and the share that goes with m is 1 - c / total
    (Baron and Kenny 1986). It is an effect only where nothing else moves both m and y between the treated arms.

    Returns:
        None with fewer than three treated arms, or where m does not vary among them.
    """
    treated = np.arange(len(m_A)) != baseline
    m, y = m_A[treated], y_A[treated]
    spread = m - m.mean()
    if len(m) < 3 or np.linalg.norm(spread) <= _ZERO * np.linalg.norm(m):
        return None
    slope = float(spread @ y / (spread @ spread))
    return Mediation(float(y.mean() - y_A[baseline]), slope, slope * float(m.mean() - m_A[baseline]))
