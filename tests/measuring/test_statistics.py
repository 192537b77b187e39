"""The streamed statistics against all pairs in float64, and against numpy's histogram."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from measure_oracle import cosines, mean_cosine

from decondense.losses import dispersion_loss
from decondense.measuring.statistics import FINE_BINS, UNIT_SCALE, LayerStatistics, NotFiniteError, PairStream
from decondense.measuring.watching import batch_means

CPU = torch.device("cpu")


def statistics(states: list[torch.Tensor], **options: bool) -> LayerStatistics:
    layer = LayerStatistics(
        "block 1",
        passages=len(states),
        device=CPU,
        pooled=options.get("pooled", True),
        averaged=options.get("averaged", True),
        tokens=max(len(z) for z in states),
        metrics={},
    )
    for number, z in enumerate(states):
        layer.add(z[None], [number])
    return layer


def unpack(packed: np.ndarray, n: int) -> np.ndarray:
    full = np.zeros((n, n))
    full[np.triu_indices(n)] = packed
    return full + np.triu(full, 1).T


def test_a_batch_may_hold_passages_that_need_float64() -> None:
    """Zero and very large rows are computed in float64, the other passages of their batch in float32."""
    z_BND = torch.from_numpy(np.random.default_rng(0).normal(size=(4, 20, 7))).float()
    z_BND[0, 3], z_BND[2] = 0.0, z_BND[2] * 1e25
    alone = statistics(list(z_BND))
    layer = LayerStatistics("x", passages=4, device=CPU, pooled=True, averaged=True, tokens=20, metrics={})
    layer.add(z_BND, range(4))
    assert layer.pairs is not None
    assert alone.pairs is not None
    np.testing.assert_array_equal(layer.pairs.pooled_counts(), alone.pairs.pooled_counts())
    np.testing.assert_array_equal(layer.pairs.packed_sum(), alone.pairs.packed_sum())


@pytest.mark.parametrize("n", [2, 3, 127, 128, 129, 300])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_all_pairs_oracle(n: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(n)
    states = [torch.from_numpy(rng.normal(size=(n, 7)) * 3 + 1).to(dtype) for _ in range(2)]
    layer = statistics(states)
    tolerance = 1e-12 if dtype == torch.float64 else 3e-7
    matrices = [cosines(z.double()) for z in states]
    for passage, z in enumerate(states):
        both, others = mean_cosine(z.double())
        assert layer.cosine_P[passage] == pytest.approx(both, abs=tolerance)
        assert layer.cosine_others_P[passage] == pytest.approx(others, abs=tolerance * n / (n - 1))
        norms = np.linalg.norm(z.double(), axis=1)
        assert layer.norm_P[passage] == pytest.approx(norms.mean(), rel=1e-6)
        assert layer.norm_sd_P[passage] == pytest.approx(norms.std(), rel=1e-4)
        assert layer.norm_max_P[passage] == pytest.approx(norms.max(), rel=1e-6)
    assert layer.pairs is not None
    packed, counts = layer.pairs.packed_sum(), layer.pairs.pooled_counts()
    assert packed is not None
    assert counts is not None
    np.testing.assert_allclose(unpack(packed, n), sum(matrices), atol=4 * tolerance)
    assert counts.sum() == 2 * n * (n - 1)
    others = np.concatenate([m[~np.eye(n, dtype=bool)] for m in matrices])
    expected, _ = np.histogram(others, bins=128, range=(-1, 1))
    # only a cosine within rounding of an edge may be counted on the other side of it
    near = (np.abs((others + 1) * 64 - np.round((others + 1) * 64)) < 64 * tolerance).sum()
    assert np.abs(coarsen(counts, 128) - expected).sum() <= 2 * near


def coarsen(counts: np.ndarray, bins: int) -> np.ndarray:
    return counts.reshape(bins, -1).sum(axis=-1)


def counted(values: np.ndarray) -> np.ndarray:
    """Fine counts of these cosines as PairStream makes them: one passage of two rows, [1] and [c], for each."""
    stream = PairStream(pooled=True, averaged=False, tokens=2, device=torch.device("cpu"))
    stream.add([UNIT_SCALE * torch.tensor([[1.0], [c]]) for c in values.tolist()])
    counts = stream.pooled_counts()
    assert counts is not None
    return counts / 2  # (i, j) and (j, i)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=200), st.sampled_from([2, 64, 128, 1024, FINE_BINS]))
def test_counts_are_numpys_bit_for_bit(values: list[float], bins: int) -> None:
    cos = np.array(values, dtype=np.float32)
    expected, _ = np.histogram(cos, bins=bins, range=(-1, 1))
    np.testing.assert_array_equal(coarsen(counted(cos), bins), expected)


def test_counts_at_every_edge_and_one_step_beside_it() -> None:
    edges = np.linspace(-1, 1, FINE_BINS + 1).astype(np.float32)
    values = np.concatenate([edges, np.nextafter(edges, np.float32(2)), np.nextafter(edges, np.float32(-2))])
    counts = counted(values)
    for bins in (64, 128, 512, 2048):
        expected, _ = np.histogram(np.clip(values, -1, 1), bins=bins, range=(-1, 1))
        np.testing.assert_array_equal(coarsen(counts, bins), expected)


def test_cosines_that_rounding_carries_beyond_one_are_kept() -> None:
    counts = counted(np.array([1.0000002, -1.0000002], dtype=np.float32))
    assert counts[-1] == 1
    assert counts[0] == 1


def test_closed_forms() -> None:
    n = 16
    equal = torch.ones(n, 4, dtype=torch.float64) * torch.arange(1, n + 1)[:, None]
    orthogonal = torch.eye(n, dtype=torch.float64) * 3
    simplex = orthogonal - orthogonal.mean(dim=0)
    antipodal = torch.tensor([[1.0, 2], [-1, -2]], dtype=torch.float64).repeat(n // 2, 1)
    for z, both, others in (
        (equal, 1, 1),
        (orthogonal, 1 / n, 0),
        (simplex, 0, -1 / (n - 1)),
        (antipodal, 0, -1 / (n - 1)),
    ):
        layer = statistics([z])
        assert layer.cosine_P[0] == pytest.approx(both, abs=1e-14)
        assert layer.cosine_others_P[0] == pytest.approx(others, abs=1e-14)


def test_zero_rows_have_cosine_zero_with_everything() -> None:
    z = torch.tensor([[1.0, 0], [0, 0], [1, 0]], dtype=torch.float64)
    layer = statistics([z])
    assert layer.cosine_P[0] == pytest.approx(4 / 9)
    assert layer.cosine_others_P[0] == pytest.approx(2 / 6)


def test_scale_and_order_of_tokens_do_not_matter() -> None:
    z = torch.from_numpy(np.random.default_rng(0).normal(size=(200, 8)))
    permuted = (z * torch.linspace(0.01, 100, 200)[:, None])[torch.randperm(200, generator=torch.Generator())]
    one, other = statistics([z]), statistics([permuted])
    assert one.cosine_P[0] == pytest.approx(other.cosine_P[0], abs=1e-14)
    np.testing.assert_array_equal(one.pairs.pooled_counts(), other.pairs.pooled_counts())


def test_large_finite_states_are_not_called_infinite() -> None:
    z = torch.tensor([[1e30, 1e30], [1e30, -1e30], [2e30, 2e30]], dtype=torch.float32)
    assert statistics([z]).cosine_P[0] == pytest.approx(5 / 9, abs=1e-6)


def test_tiny_states_have_a_direction() -> None:
    z = torch.tensor([[1e-29, 1e-29], [1e-29, -1e-29], [2e-29, 2e-29]], dtype=torch.float32)
    assert statistics([z]).cosine_P[0] == pytest.approx(5 / 9, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tiny", [0.0, 1e-31, 1e-36, -1e-38])
def test_the_zero_rule_is_that_of_the_losses_and_of_the_watch(tiny: float, dtype: torch.dtype) -> None:
    z = torch.tensor([[3.0, 4.0], [tiny, tiny], [0.0, 2.0], [1e-20, 0.0]]).to(dtype)
    expected = torch.tensor([[0.6, 0.8], [0, 0], [0, 1], [1, 0]], dtype=torch.float64).sum(dim=0).square().sum().item()
    layer = statistics([z])
    assert layer.cosine_P[0] == pytest.approx(expected / 16, rel=1e-6)
    assert layer.cosine_others_P[0] == pytest.approx((expected - 3) / 12, rel=1e-6)
    loss = dispersion_loss(z.unsqueeze(0), form="mean_cosine")
    assert loss.item() == pytest.approx((expected - 3) / 12, rel=1e-6)
    cosine, _ = batch_means(z.unsqueeze(0))
    assert cosine.item() == pytest.approx(expected / 16, rel=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_states_are_named(bad: float) -> None:
    good, z = torch.ones(4, 3), torch.ones(4, 3)
    z[2, 1] = bad
    with pytest.raises(NotFiniteError, match=r"layer 'block 1'.*passage 1 \(first at token 2 of 4\)"):
        statistics([good, z])


def test_means_ignore_the_callers_matmul_precision() -> None:
    z = torch.from_numpy(np.random.default_rng(1).normal(size=(64, 32))).float()
    expected = statistics([z])
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            coarse = statistics([z])
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    np.testing.assert_array_equal(coarse.pairs.pooled_counts(), expected.pairs.pooled_counts())
    assert coarse.cosine_P[0] == expected.cosine_P[0]
