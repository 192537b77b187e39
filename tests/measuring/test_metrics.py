"""Side metrics against their definitions by SVD and PCA, and in closed form."""

from __future__ import annotations

import math
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from metric_oracle import cka, of_corpus, of_passage
from transformers import GPT2Config, GPT2LMHeadModel

import decondense
from decondense.config import METRIC_NAMES, MeasureConfig
from decondense.measuring import Profile, tables
from decondense.measuring.metrics import METRICS, Cloud, Corpus, LayerPairs, MomentStream, resolve_metrics
from decondense.measuring.sides import Sides
from decondense.metrics import Metric, find_metric, metric_names, register_metric

CPU = torch.device("cpu")
PASSAGE = [name for name in METRIC_NAMES if METRICS[name].scope == "passage"]
CORPUS = [name for name in METRIC_NAMES if METRICS[name].scope == "corpus"]


def value(name: str, z: np.ndarray | torch.Tensor) -> float | np.ndarray:
    """A metric of one passage, or of a corpus of the one passage."""
    cloud = Cloud(torch.as_tensor(z))
    return METRICS[name](cloud if METRICS[name].scope == "passage" else corpus([z]))


def corpus(passages: list[np.ndarray | torch.Tensor]) -> Corpus:
    stream = MomentStream(passages[0].shape[1], CPU)
    for number, z in enumerate(passages):
        stream.add(Cloud(torch.as_tensor(z)), number)
    return Corpus(stream.moments())


def anisotropic(shape: tuple[int, int], seed: int = 3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape) * np.linspace(0.2, 3, shape[1]) + rng.normal(size=shape[1])


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (60, 48), (48, 60)])
@pytest.mark.parametrize("name", PASSAGE)
def test_definitions(name: str, shape: tuple[int, int]) -> None:
    z, metric = anisotropic(shape), METRICS[name]
    expected = [of_passage(z)[column] for column in metric.columns]
    assert np.atleast_1d(metric(torch.from_numpy(z), None)) == pytest.approx(expected, rel=1e-9, nan_ok=True)


@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_definitions_over_a_corpus(shift: float) -> None:
    passages = [anisotropic((n, 30), seed=n) + shift for n in (17, 40, 8)]
    expected = of_corpus(passages)
    whole = corpus(passages)
    assert set(expected) == set(CORPUS)
    for name in CORPUS:
        assert METRICS[name](whole) == pytest.approx(expected[name], rel=1e-6 if shift else 1e-9), name


def test_two_parts_of_a_corpus_are_the_whole() -> None:
    passages = [anisotropic((n, 30), seed=n) + 50 for n in (17, 40, 8, 25)]
    whole, first, last = corpus(passages), corpus(passages[:1]), corpus(passages[1:])
    for name in CORPUS:
        assert METRICS[name](Corpus(first.moments + last.moments)) == pytest.approx(METRICS[name](whole), rel=1e-10), (
            name
        )


def spectrum(values: np.ndarray, n: int = 0) -> np.ndarray:
    """Tokens +-s_k e_k: mean zero, eigenvalues 2 s_k^2 of the covariance."""
    rows = np.diag(np.sqrt(values / 2))
    return np.concatenate([rows, -rows])


K = np.arange(1.0, 61)
ORTHOGONAL = np.eye(6)
RANK_ONE = np.outer(np.arange(1.0, 9), [1.0, 2, 3])
EQUAL = np.ones((8, 3))
ISOTROPIC = np.concatenate([np.eye(5), -np.eye(5)])
CLUSTERS = np.repeat([[3.0, 4, 0, 0], [3, -4, 0, 0]], 8, axis=0)  # two points, each eight times
LINE = np.outer(np.arange(10.0), [1.0, 2, 2]) + np.array([5.0, 0, 1])
CIRCLE = np.stack([np.cos(2 * np.pi * np.arange(24) / 24), np.sin(2 * np.pi * np.arange(24) / 24)], axis=1)
OUTLIER = np.eye(16)[[3]].repeat(20, axis=0) * 7  # one coordinate holds everything


@pytest.mark.parametrize(
    ("name", "z", "expected"),
    [
        ("effective_rank", RANK_ONE, 1),
        ("effective_rank", ORTHOGONAL, 6),
        ("effective_rank_centred", ISOTROPIC, 5),
        ("effective_rank_centred", ORTHOGONAL, 5),
        ("explainable_variance", RANK_ONE, 1),
        ("explainable_variance", ORTHOGONAL, 1 / 6),
        ("stable_rank", ORTHOGONAL, 6),
        ("stable_rank", spectrum(np.array([4.0, 2, 1, 1])), 2),
        ("stable_rank_centred", RANK_ONE, 1),
        ("stable_rank_centred", CLUSTERS, 1),
        ("stable_rank", CLUSTERS, 25 / 16),
        ("top_direction_share", CLUSTERS, 1),
        ("top_direction_share", spectrum(np.array([4.0, 2, 1, 1])), 0.5),
        ("hfc_lfc", EQUAL, 0),
        ("hfc_lfc", ISOTROPIC, math.inf),
        ("hfc_lfc", CLUSTERS, 4 / 3),
        ("participation_ratio", RANK_ONE, 1),
        ("participation_ratio", spectrum(np.array([4.0, 2, 1, 1])), 64 / 22),
        ("isoscore", EQUAL, 0),
        ("isoscore", RANK_ONE, 0),
        ("isoscore", ISOTROPIC, 1),
        ("rankme", ISOTROPIC, 5),
        ("rankme", RANK_ONE, 1),
        ("alpha_req", spectrum(K**-1.5), 1.5),
        ("alpha_req", spectrum(K**-0.25), 0.25),
        ("alpha_req", spectrum(K[:20] ** -2.0), 2),
        ("alpha_req", spectrum(K[:19] ** -2.0), math.nan),
        ("top_dimension_share", OUTLIER, 1),
        ("top_dimension_share", ORTHOGONAL, 1 / 6),
        ("outlier_kurtosis", OUTLIER, 16),
        ("outlier_kurtosis", ORTHOGONAL, 1),
        ("kurtosis", np.tile([1.0, -1], (5, 3)), 1),
        ("kurtosis", OUTLIER, (16**2 - 3 * 16 + 3) / 15),
        ("curvature", LINE, 0),
        ("curvature", CIRCLE, 2 * math.pi / 24),
        ("curvature", np.tile([[0.0, 1], [0, 2]], (5, 1)), math.pi),
        ("curvature", np.repeat(LINE, 2, axis=0), math.nan),
        ("prompt_entropy", ISOTROPIC, 1),
        ("prompt_entropy", CLUSTERS, 0),
        ("mean_square_cosine", CLUSTERS, (1 + (7 / 25) ** 2) / 2),
    ],
)
def test_closed_forms(name: str, z: np.ndarray, expected: float) -> None:
    # 1e-7 is added to each share of rankme; a singular value of 0 comes out near 1e-8, whose -p log p is near 2e-7
    tolerance = {"rankme": 2e-5, "effective_rank": 2e-6}.get(name.removesuffix("_centred"), 1e-7)
    names = [name, f"corpus_{name}"] if f"corpus_{name}" in METRICS else [name]
    assert [value(each, z) for each in names] == pytest.approx([expected] * len(names), abs=tolerance, nan_ok=True)


def test_cosine_by_distance_of_a_circle() -> None:
    lags = [2**k for k in range(9)]
    expected = [math.cos(2 * math.pi * lag / 24) if lag < 24 else math.nan for lag in lags]
    assert value("cosine_lag", CIRCLE) == pytest.approx(expected, nan_ok=True)


def test_dataset_entropy_of_means_on_a_simplex_and_of_equal_means() -> None:
    spread = [np.random.default_rng(1).normal(size=(6, 9)) for _ in range(5)]
    at = [z - z.mean(axis=0) + 4 * np.eye(9)[number] for number, z in enumerate(spread)]
    assert METRICS["dataset_entropy"](corpus(at)) == pytest.approx(math.log(4) / math.log(5))
    assert METRICS["dataset_entropy"](corpus([at[0]] * 3)) == 0
    assert math.isnan(METRICS["dataset_entropy"](corpus(at[:1])))
    assert METRICS["corpus_mean_cosine"](corpus([np.eye(4), -np.eye(4)])) == 0


DEGENERATE = {
    "zero": torch.zeros(6, 4),
    "equal": torch.tensor([0.1, -0.7, 3.3]).expand(9, 3),
    "one token": torch.tensor([[1.0, 2.0, 3.0]]),
    "two tokens": torch.tensor([[1.0, 2.0], [2.0, 1.0]]),
    "width 1": torch.arange(1.0, 7)[:, None],
    "one zero row": torch.cat([torch.zeros(1, 40), torch.eye(40)]),
    "wide": torch.eye(40)[:3] * 5,
}


@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_states_have_the_values_that_the_registry_states(kind: str, dtype: torch.dtype) -> None:
    z = DEGENERATE[kind].to(dtype)
    values = {name: value(name, z) for name in (*PASSAGE, *CORPUS)}
    told = {"zero": "zero states: ", "equal": "equal tokens: ", "width 1": "width 1: "}.get(kind, "no such words")
    stated = {name: METRICS[name].undefined.partition(told)[2] for name in values}
    for name, text in stated.items():
        if text:
            assert np.atleast_1d(values[name]) == pytest.approx(float(text.split(";")[0]), nan_ok=True), name


def test_some_metrics_state_their_degenerate_values() -> None:
    for told, least in (("zero states: ", 12), ("equal tokens: ", 12), ("width 1: ", 2)):
        assert sum(told in METRICS[name].undefined for name in METRIC_NAMES) >= least


def moved(z: np.ndarray, by: float) -> np.ndarray:
    return z + by * np.random.default_rng(8).normal(size=z.shape[1])


@pytest.mark.parametrize(
    "name", [name for name in (*PASSAGE, *CORPUS) if "constant vector cancels" in METRICS[name].sensitive]
)
def test_a_constant_vector_cancels(name: str) -> None:
    z = anisotropic((60, 30))
    assert value(name, moved(z, 50)) == pytest.approx(value(name, z), rel=1e-8, nan_ok=True)


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in (*PASSAGE, *CORPUS)
        if "sink token or a constant vector brings it to" in METRICS[name].sensitive
        and "coordinate" not in METRICS[name].sensitive
    ],
)
def test_a_sink_token_or_a_constant_vector_hides_the_rest(name: str) -> None:
    z = anisotropic((60, 30))
    sink = np.concatenate([z[:-1], 1e6 * z[-1:]])
    rank_one = value(name, np.outer(np.ones(60), np.ones(30)))
    assert value(name, sink) == pytest.approx(rank_one, abs=2e-3)
    assert value(name, moved(z, 1e6)) == pytest.approx(rank_one, abs=2e-3)
    assert value(name, z) != pytest.approx(rank_one, abs=0.1)


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
    for name, (z, *numbers) in expected.items():
        values = [value(metric, z) for metric in ("explainable_variance", "hfc_lfc", "participation_ratio")]
        assert values == pytest.approx(numbers, rel=1e-6, abs=1e-12), name


def pairs_of(states: list[list[np.ndarray]]) -> np.ndarray:
    """CKA as collected passage by passage, states[layer][passage]."""
    pairs = LayerPairs(resolve_metrics("cka"))
    for passage in range(len(states[0])):
        for layer in states:
            pairs.take(torch.from_numpy(layer[passage])[None])
        pairs.reduce([passage])
    return Sides(between=pairs.values()).matrix("cka", range(len(states)))


def test_cka() -> None:
    rng = np.random.default_rng(0)
    one = [rng.normal(size=(n, 12)) + 30 for n in (9, 14, 20)]
    turn = np.linalg.qr(rng.normal(size=(12, 12)))[0]
    states = [one, [3 * z @ turn + 5 for z in one], [z[:, :5] ** 2 for z in one], [np.ones((len(z), 4)) for z in one]]
    found = pairs_of(states)
    np.testing.assert_allclose(
        found[:3, :3], cka([[z - z.mean(axis=0) for z in layer] for layer in states[:3]]), rtol=1e-9
    )
    assert found[0, 1] == pytest.approx(1)  # a rotation, a factor and a constant vector change nothing
    assert np.isnan(found[3]).all()
    independent = [[rng.normal(size=(60, 3)) for _ in range(60)] for _ in range(2)]
    assert abs(pairs_of(independent)[0, 1]) < 0.02  # the biased estimator would give about .05 + 3 / 60
    assert np.isnan(pairs_of([[np.eye(3)], [np.eye(3)]])).all()


def small_model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=2, n_head=2, n_positions=64, vocab_size=50)).eval()


def test_all_metrics_of_a_model_merged_saved_and_in_tables(tmp_path: Path) -> None:
    model = small_model()
    ids = torch.randint(0, 50, (5, 40), generator=torch.Generator().manual_seed(1))
    whole = decondense.measure(model, input_ids=ids, metrics="all", batch_size=2)
    with torch.no_grad():
        hidden = [state.double().numpy() for state in model(ids, output_hidden_states=True).hidden_states]
    columns = [column for name in METRIC_NAMES for column in METRICS[name].columns]
    assert sorted(whole.metric_names) == sorted(columns)
    for layer, states in enumerate(hidden):
        passages = [of_passage(z) for z in states]
        for name, expected in of_corpus(list(states)).items():
            assert whole.metric(name)[layer] == pytest.approx(expected, rel=1e-5, abs=1e-7), name
        for name in whole.metrics:
            expected = np.mean([values[name] for values in passages])
            assert whole.metric(name)[layer] == pytest.approx(expected, rel=1e-5, abs=1e-7, nan_ok=True), name
    np.testing.assert_allclose(whole.between_layers("cka"), cka([list(states) for states in hidden]), rtol=1e-4)
    assert whole.metric("cka")[1:] == pytest.approx(whole.between_layers("cka").diagonal(1), nan_ok=True)

    halves = [decondense.measure(model, input_ids=part, metrics="all", batch_size=2) for part in ids.split(3)]
    loaded = [Profile.load(half.save(tmp_path / str(number))) for number, half in enumerate(halves)]
    for merged in (halves[0].merge(halves[1]), loaded[0].merge(loaded[1])):
        for name in columns:
            assert merged.metric(name) == pytest.approx(whole.metric(name), rel=1e-6, nan_ok=True), name
    bare = Profile.load(halves[0].save(tmp_path / "bare", sums=False))
    assert bare.metric("corpus_rankme") == pytest.approx(halves[0].metric("corpus_rankme"))
    with pytest.raises(ValueError, match=r"sums=False.*corpus_effective_rank"):
        bare.merge(halves[1])
    with pytest.raises(ValueError, match="no value per passage"):
        whole.interval("corpus_rankme")
    low, high = whole.interval("cosine_lag_1")
    assert (low <= whole.metric("cosine_lag_1")).all()
    assert (whole.metric("cosine_lag_1") <= high).all()
    assert tables.metric_tables(whole)[0].columns[1:] == tuple(c.replace("_", " ") for c in columns[:6])
    assert set(columns) <= set(tables.layer_table(whole).columns)
    assert tables.between_table(whole, "cka").to_csv().count("\n") == 4
    assert whole.summary()["metrics"]["corpus_alpha_req"] == [
        pytest.approx(v) for v in whole.metric("corpus_alpha_req")
    ]


def test_passages_without_a_value_do_not_count_and_the_logits_have_no_corpus() -> None:
    ids = [list(range(3)), list(range(30))]
    profile = decondense.measure(
        small_model(), input_ids=ids, metrics=["cosine_lag", "corpus_rankme", "cka"], logits=True
    )
    for lag, passages in (("2", [0, 1]), ("16", [1]), ("32", [])):
        of_each = profile.metrics[f"cosine_lag_{lag}"]
        assert np.isnan(of_each).any(axis=0).tolist() == [p not in passages for p in range(2)]
        expected = of_each[profile.row("block 1"), passages].mean() if passages else math.nan
        assert profile.metric(f"cosine_lag_{lag}")[1] == pytest.approx(expected, nan_ok=True)
    low, high = profile.interval("cosine_lag_16")
    assert low[1] == high[1] == pytest.approx(profile.metric("cosine_lag_16")[1])
    assert np.isnan(profile.with_all_layers().metric("corpus_rankme")).tolist() == [False] * 4 + [True]
    assert np.isfinite(profile.between_layers("cka")).all()


def test_old_profiles_without_the_new_fields_are_read(tmp_path: Path) -> None:
    ids = torch.arange(20)[None]
    readable = decondense.measure(small_model(), input_ids=ids, metrics=["isoscore"]).save(tmp_path / "old")
    text = readable.read_text()
    assert "between_layers" in text
    readable.write_text(text.replace('"between_layers": {},', ""))
    old = Profile.load(readable)
    assert (old.metric_names, old.sides) == (("isoscore",), Sides())


def test_choice_of_metrics() -> None:
    assert metric_names() == METRIC_NAMES == tuple(METRICS)
    assert list(resolve_metrics("all")) == list(resolve_metrics(["isoscore", "all"])) == list(METRICS)
    assert MeasureConfig(metrics=("all",)).metrics == ("all",)
    assert MeasureConfig().metrics == ()
    assert list(resolve_metrics(["isoscore", "corpus_rankme"])) == ["isoscore", "corpus_rankme"]
    assert resolve_metrics(()) == {}
    for make in (lambda name: MeasureConfig(metrics=("effective_rank", name)), lambda name: resolve_metrics([name])):
        with pytest.raises(ValueError, match=r"Did you mean 'isoscore'.*Known: .*corpus_alpha_req.*cka"):
            make("isoscor")
    with pytest.raises(KeyError):
        METRICS["isoscor"]


def own(name: str = "largest_norm", **options: object) -> Metric:
    """A metric of another package."""
    return Metric(name, "largest norm", "", "", lambda cloud: cloud.z.norm(dim=1).max(), "", **options)  # type: ignore[arg-type]


@pytest.mark.usefixtures("registry")
def test_a_registered_metric_is_measured() -> None:
    register_metric(own())
    assert register_metric(own("corpus_tokens", scope="corpus")).name in metric_names()
    ids = torch.arange(20)[None]
    profile = decondense.measure(small_model(), input_ids=ids, metrics=["largest_norm"])
    assert profile.metric("largest_norm") == pytest.approx(profile.norm_max[[0, 1, 3], 0])
    for name in ("isoscore", "cosine_lag", "cosine_lag_4", "all", "two words", ""):
        with pytest.raises(ValueError, match="metric name"):
            register_metric(own(name))


@pytest.mark.usefixtures("registry")
def test_a_metric_of_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    points = metadata.EntryPoints(
        metadata.EntryPoint(name, f"{__name__}:{place}", "decondense.metrics")
        for name, place in (("plugged", "PLUGGED"), ("misnamed", "PLUGGED"), ("gone", "NOTHING"))
    )
    monkeypatch.setattr(metadata, "entry_points", lambda group: points.select(group=group))
    assert metric_names()[-3:] == ("gone", "misnamed", "plugged")
    assert MeasureConfig(metrics=("plugged",)).metrics == ("plugged",)
    assert find_metric("plugged") is PLUGGED
    for name, cause in (("misnamed", "not a Metric named 'misnamed'"), ("gone", "has no attribute 'NOTHING'")):
        with pytest.raises(ValueError, match=f"metric '{name}' of the entry point .*{cause}"):
            resolve_metrics([name])


PLUGGED = own("plugged")
