"""The side metrics by their definitions: SVD, PCA and loops in float64, no shared code with the package."""

from __future__ import annotations

import math

import numpy as np
from measure_oracle import cosines


def isoscore_by_its_algorithm(z: np.ndarray) -> float:
    """Rudman et al. 2022, steps 1-7 as published."""
    n = z.shape[1]
    centred = z - z.mean(axis=0)
    _, _, basis = np.linalg.svd(centred, full_matrices=True)
    variances = (centred @ basis.T).var(axis=0)
    normalised = math.sqrt(n) * variances / np.linalg.norm(variances)
    defect = np.linalg.norm(normalised - 1) / math.sqrt(2 * (n - math.sqrt(n)))
    share = (n - defect**2 * (n - math.sqrt(n))) ** 2 / n**2
    return (n * share - 1) / (n - 1)


def shannon(p: np.ndarray) -> float:
    return -sum(x * math.log(x) for x in p if x > 0)


def weighted_slope(x: np.ndarray, y: np.ndarray, w: np.ndarray) -> float:
    """Slope of a weighted least squares line, from the normal equations."""
    a = np.stack([x, np.ones_like(x)], axis=1)
    return float(np.linalg.solve(a.T @ (w[:, None] * a), a.T @ (w * y))[0])


def of_spectra(z: np.ndarray) -> dict[str, float]:
    """What exists of a passage and of a corpus."""
    n = len(z)
    mean = np.repeat(z.mean(axis=0, keepdims=True), n, axis=0)
    sigma, centred = np.linalg.svd(z, compute_uv=False), np.linalg.svd(z - mean, compute_uv=False)
    variances = np.linalg.eigvalsh(np.cov(z.T))
    rank = int((centred**2 > 1e-13 * (z**2).sum()).sum())  # a layer norm takes one direction
    k = np.arange(11, min(rank, 500) + 1)
    rms = np.sqrt((z**2).mean(axis=0))
    raw = shannon(sigma / sigma.sum())
    return {
        "singular_value_entropy": raw,
        "effective_rank": math.exp(raw),
        "effective_rank_centred": math.exp(shannon(centred / centred.sum())),
        "explainable_variance": sigma[0] ** 2 / (sigma**2).sum(),
        "stable_rank": (np.linalg.norm(z, "fro") / np.linalg.norm(z, 2)) ** 2,
        "stable_rank_centred": (np.linalg.norm(z - mean, "fro") / np.linalg.norm(z - mean, 2)) ** 2,
        "top_direction_share": variances.max() / variances.sum(),
        "hfc_lfc": np.linalg.norm(z - mean, 2) / np.linalg.norm(mean, 2),
        "participation_ratio": variances.sum() ** 2 / (variances**2).sum(),
        "isoscore": isoscore_by_its_algorithm(z),
        "rankme": math.exp(-sum((p + 1e-7) * math.log(p + 1e-7) for p in sigma / sigma.sum())),
        "alpha_req": -weighted_slope(np.log(k), 2 * np.log(centred[k - 1]), 1 / k) if rank >= 20 else math.nan,
        "top_dimension_share": max((z**2).sum(axis=0)) / (z**2).sum(),
        "outlier_kurtosis": (rms**4).mean() / (rms**2).mean() ** 2,
    }


def entropy_of_rows(z: np.ndarray) -> float:
    """Layer by Layer: centred unit rows, Gram matrix of trace 1, von Neumann entropy over log min(N, D)."""
    x = z - z.mean(axis=0)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    return shannon(np.linalg.eigvalsh(x @ x.T / len(x)).clip(0)) / math.log(min(z.shape))


def angle(u: np.ndarray, v: np.ndarray) -> float:
    return math.acos(np.clip(u @ v / np.linalg.norm(u) / np.linalg.norm(v), -1, 1))


def of_passage(z: np.ndarray) -> dict[str, float]:
    n, c = len(z), cosines(z)
    x = z - z.mean(axis=1, keepdims=True)
    lags = {f"cosine_lag_{2**k}": float(np.diagonal(c, 2**k).mean()) if 2**k < n else math.nan for k in range(9)}
    return {
        **of_spectra(z),
        **lags,
        "mean_square_cosine": (c**2).mean(),
        "kurtosis": ((x**4).mean(axis=1) / (x**2).mean(axis=1) ** 2).mean(),
        "curvature": float(np.mean([angle(z[i + 1] - z[i], z[i + 2] - z[i + 1]) for i in range(n - 2)])),
        "prompt_entropy": entropy_of_rows(z),
    }


def of_corpus(passages: list[np.ndarray]) -> dict[str, float]:
    z = np.concatenate(passages)
    return {
        **{f"corpus_{name}": value for name, value in of_spectra(z).items()},
        "corpus_mean_cosine": cosines(z).mean(),
        "dataset_entropy": entropy_of_rows(np.stack([passage.mean(axis=0) for passage in passages])),
    }


def hsic(a: np.ndarray, b: np.ndarray) -> float:
    """Song et al. 2012, equation 5, of the linear kernels."""
    n = len(a)
    k, m = a @ a.T, b @ b.T
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    one = np.ones(n)
    mixed = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return float((np.trace(k @ m) + mixed - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3)))


def cka(states: list[list[np.ndarray]]) -> np.ndarray:
    """Mini-batch CKA of states[layer][passage]."""
    s = len(states)
    h = np.array([[np.mean([hsic(a, b) for a, b in zip(states[i], states[j], strict=True)]) for j in range(s)]
                  for i in range(s)])  # fmt: skip
    return h / np.sqrt(np.outer(np.diag(h), np.diag(h)))
