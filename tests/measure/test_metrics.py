"""Side metrics against their definitions by SVD and PCA, and in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from oracle import cosines

from decondense.config import METRIC_NAMES, MeasureConfig
from decondense.measuring.metrics import METRICS, resolve_metrics


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


def definitions(z: np.ndarray) -> dict[str, float]:
    sigma = np.linalg.svd(z, compute_uv=False)
    p = sigma / sigma.sum()
    entropy = -(p[p > 0] * np.log(p[p > 0])).sum()
    mean = np.repeat(z.mean(axis=0, keepdims=True), len(z), axis=0)
    variances = np.linalg.eigvalsh(np.cov(z.T))
    return {
        "singular_value_entropy": entropy,
        "effective_rank": math.exp(entropy),
        "explainable_variance": sigma[0] ** 2 / (sigma**2).sum(),
        "hfc_lfc": np.linalg.norm(z - mean, 2) / np.linalg.norm(mean, 2),
        "participation_ratio": variances.sum() ** 2 / (variances**2).sum(),
        "isoscore": isoscore_by_its_algorithm(z),
        "mean_square_cosine": (cosines(z) ** 2).mean(),
    }


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (60, 48), (48, 60)])
@pytest.mark.parametrize("name", METRICS)
def test_definitions(name: str, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(3)
    z = rng.normal(size=shape) * np.linspace(0.2, 3, shape[1]) + rng.normal(size=shape[1])
    assert METRICS[name](torch.from_numpy(z), None) == pytest.approx(definitions(z)[name], rel=1e-9)


def test_closed_forms() -> None:
    rank_one = torch.outer(torch.arange(1.0, 9), torch.tensor([1.0, 2, 3])).double()
    equal = torch.ones(8, 3, dtype=torch.float64)
    orthogonal = torch.eye(6, dtype=torch.float64)
    assert METRICS["effective_rank"](rank_one, None) == pytest.approx(1, abs=1e-6)
    assert METRICS["explainable_variance"](rank_one, None) == pytest.approx(1)
    assert METRICS["effective_rank"](orthogonal, None) == pytest.approx(6)
    assert METRICS["explainable_variance"](orthogonal, None) == pytest.approx(1 / 6)
    assert METRICS["hfc_lfc"](equal, None) == pytest.approx(0, abs=1e-12)
    assert METRICS["isoscore"](equal, None) == 0
    assert METRICS["participation_ratio"](rank_one, None) == pytest.approx(1)
    assert METRICS["isoscore"](rank_one, None) == pytest.approx(0, abs=1e-12)
    isotropic = torch.cat([torch.eye(5), -torch.eye(5)]).double()
    assert METRICS["isoscore"](isotropic, None) == pytest.approx(1)
    assert METRICS["hfc_lfc"](isotropic, None) == math.inf
    zero = torch.zeros(4, 3, dtype=torch.float64)
    assert METRICS["explainable_variance"](zero, None) == 0
    assert METRICS["effective_rank"](zero, None) == 1


@pytest.mark.parametrize("n", [40, 97])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_states_with_gram_matrices_large_enough_for_lanczos(n: int, dtype: torch.dtype) -> None:
    direction = torch.from_numpy(np.random.default_rng(n).normal(size=64)).to(dtype)
    expected = {  # explainable_variance, hfc_lfc, participation_ratio
        "equal": (direction.expand(n, 64), 1.0, 0.0, 0.0),
        "zero": (torch.zeros(n, 64, dtype=dtype), 0.0, math.inf, 0.0),
        "orthogonal": (3 * torch.eye(n, 128, dtype=dtype), 1 / n, 1.0, n - 1.0),
        "collinear": (
            torch.arange(1.0, n + 1, dtype=dtype)[:, None] * direction,
            1.0,
            math.sqrt((n - 1) / (n + 1) / 3),
            1,
        ),
        "one token stands out": (
            torch.eye(n, 64, dtype=dtype)[0].expand(n, 64) * (torch.arange(n) == 7)[:, None],
            1.0,
            math.sqrt(n - 1),
            1.0,
        ),
    }
    for name, (z, variance, high, ratio) in expected.items():
        values = {metric: function(z, None) for metric, function in METRICS.items()}
        assert values["explainable_variance"] == pytest.approx(variance, abs=1e-12), name
        assert values["hfc_lfc"] == pytest.approx(high, rel=1e-6, abs=1e-12), name
        if name != "equal" or dtype == torch.float32:  # in float64 the mean of equal tokens is rounded
            assert values["participation_ratio"] == pytest.approx(ratio, rel=1e-6), name


def test_choice_of_metrics() -> None:
    assert set(METRICS) == set(METRIC_NAMES)
    assert list(resolve_metrics("all")) == list(resolve_metrics(["isoscore", "all"])) == list(METRICS)
    with pytest.raises(ValueError, match="Did you mean 'isoscore'"):
        MeasureConfig(metrics=("effective_rank", "isoscor"))
    assert MeasureConfig(metrics=("all",)).metrics == ("all",)
    assert list(resolve_metrics(["isoscore"])) == ["isoscore"]
    assert resolve_metrics(()) == {}
    with pytest.raises(ValueError, match="Did you mean 'isoscore'"):
        resolve_metrics(["isoscor"])
