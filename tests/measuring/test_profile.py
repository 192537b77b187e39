"""Profiles: files, rows, merging, intervals."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from decondense import Profile, measure
from decondense.layers import EMBEDDING, block
from decondense.measuring import tables
from decondense.measuring.tables import as_mapping
from decondense.records import make_row

V, T, P = 64, 20, 6


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=V, n_embd=32, n_layer=3, n_head=4, n_positions=32, initializer_range=0.2)
    config.bos_token_id = config.eos_token_id = None
    return GPT2LMHeadModel(config).double().eval()


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, V, (P, T), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def profile(model: GPT2LMHeadModel, ids: torch.Tensor) -> Profile:
    return measure(model, input_ids=ids, metrics=["isoscore", "hfc_lfc"], logits=True)


def same(one: Profile, other: Profile) -> None:
    assert one.all_layers == other.all_layers
    for name in ("lengths", "cosine", "cosine_others", "norm", "norm_sd", "norm_max", "pooled", "summed"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert one.metrics.keys() == other.metrics.keys()
    for name in one.metrics:
        np.testing.assert_array_equal(one.metrics[name], other.metrics[name])
    assert (one.final, one.no_averaged, one.info) == (other.final, other.no_averaged, other.info)


@pytest.mark.parametrize("given", ["profile", "profile.json", "profile.npz"])
def test_save_and_load(tmp_path: Path, profile: Profile, given: str) -> None:
    readable = profile.at("before").save(tmp_path / given)
    assert readable == tmp_path / "profile.json"
    for path in (tmp_path, tmp_path / given):
        same(Profile.load(path), profile.at("before"))
    summary = json.loads(readable.read_text())["summary"]
    assert summary["mean_cosine"] == profile.at("before").mean_cosine.tolist()
    assert set(summary["metrics"]) == {"isoscore", "hfc_lfc"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["profile.json", "profile.npz"]


def test_dotted_names_keep_their_dots(tmp_path: Path, profile: Profile) -> None:
    assert profile.save(tmp_path / "qwen2.5").name == "qwen2.5.json"
    same(Profile.load(tmp_path / "qwen2.5"), profile)


def test_without_sums(tmp_path: Path, profile: Profile) -> None:
    profile.save(tmp_path / "small", sums=False)
    loaded = Profile.load(tmp_path / "small")
    np.testing.assert_array_equal(loaded.counts("pooled"), profile.counts("pooled"))
    with pytest.raises(ValueError, match="sums=False"):
        loaded.histogram("averaged")


def test_unreadable_files_are_explained(tmp_path: Path, profile: Profile) -> None:
    with pytest.raises(ValueError, match=r"no profile at .*profile\.json is missing"):
        Profile.load(tmp_path)
    profile.save(tmp_path / "profile")
    (tmp_path / "profile.json").write_text('{"format": 1}')
    with pytest.raises(ValueError, match="not a readable profile"):
        Profile.load(tmp_path)
    (tmp_path / "profile.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="format 99"):
        Profile.load(tmp_path)


def test_the_row_fits_its_schema(profile: Profile) -> None:
    row = make_row("profile", study="s", study_fingerprint="f", arm="a", seed=0, step=3, tokens=7, **profile.to_row())
    assert row["layers"] == ["embedding", "block 1", "block 2", "final norm"]
    assert row["passages"] == P
    assert np.array(row["histogram"]).sum(axis=1).tolist() == [P * T * T] * 4


def test_one_layer_has_no_correlation() -> None:
    flat = Profile(
        states=(EMBEDDING, block(1)),
        lengths=np.array([4]),
        **{name: np.ones((2, 1)) for name in ("cosine", "cosine_others", "norm", "norm_sd", "norm_max")},
    )
    assert flat.to_row()["spearman"] is None
    assert flat.to_row()["histogram"] is None
    assert np.isnan(flat.interval("spearman")).all()


def test_merging_shards_is_measuring_the_whole(model: GPT2LMHeadModel, ids: torch.Tensor) -> None:
    whole = measure(model, input_ids=ids, batch_size=1, metrics=["isoscore"])
    parts = [measure(model, input_ids=part, batch_size=1, metrics=["isoscore"]) for part in ids.split([1, 3, 2])]
    merged = parts[0].merge(*parts[1:])
    np.testing.assert_array_equal(merged.cosine, whole.cosine)
    np.testing.assert_array_equal(merged.pooled, whole.pooled)
    np.testing.assert_allclose(merged.summed, whole.summed, atol=1e-13)
    np.testing.assert_array_equal(merged.metric("isoscore"), whole.metric("isoscore"))
    assert merged.interval("spearman") == whole.interval("spearman")
    np.testing.assert_allclose(merged.histogram("averaged")[0], whole.histogram("averaged")[0])


def test_merging_what_does_not_fit(model: GPT2LMHeadModel, ids: torch.Tensor, profile: Profile) -> None:
    with pytest.raises(ValueError, match="different layers"):
        profile.merge(measure(model, input_ids=ids, metrics=["isoscore", "hfc_lfc"]))
    with pytest.raises(ValueError, match="different metrics"):
        profile.merge(measure(model, input_ids=ids, logits=True))
    short = measure(model, input_ids=ids[:2, :9])
    mixed = measure(model, input_ids=ids).merge(short)
    assert mixed.n_passages == P + 2
    with pytest.raises(ValueError, match="9 to 20 tokens"):
        mixed.histogram("averaged")


def test_intervals(profile: Profile) -> None:
    low, high = profile.interval("mean_cosine")
    assert low.shape == (4,)
    assert (low < profile.mean_cosine).all()
    assert (profile.mean_cosine < high).all()
    for what in ("spearman", "kendall", "last 2"):
        assert -1 <= profile.interval(what)[0] <= profile.interval(what)[1] <= 1
    assert profile.interval("isoscore")[0].shape == (4,)
    narrow = profile.interval("mean_cosine", confidence=0.5)
    assert (narrow[0] > low).all()
    with pytest.raises(ValueError, match="Did you mean 'spearman'"):
        profile.interval("spearmen")


def test_histograms_by_bins(profile: Profile) -> None:
    fine, coarse = profile.counts("pooled", bins=512), profile.counts("pooled", bins=128)
    np.testing.assert_array_equal(fine.reshape(len(fine), 128, 4).sum(axis=2), coarse)
    density, edges = profile.histogram("averaged", bins=64)
    np.testing.assert_allclose((density * np.diff(edges)).sum(axis=1), 1)
    for bins in (100, 1, 4096):
        with pytest.raises(ValueError, match="power of two"):
            profile.counts("pooled", bins=bins)
    assert (profile.counts("pooled").sum(axis=1) - profile.counts("pooled", diagonal=False).sum(axis=1) == P * T).all()


def test_names_and_lookups(profile: Profile) -> None:
    assert profile.row("logits") == 5
    assert profile.row(-1) == profile.row("final norm")
    with pytest.raises(ValueError, match="Did you mean 'final norm'"):
        profile.row("final nrm")
    with pytest.raises(ValueError, match=r"was not measured.*metrics=\['effective_rank'\]"):
        profile.metric("effective_rank")
    with pytest.raises(ValueError, match="Did you mean 'before'"):
        profile.at("befor")
    with pytest.raises(ValueError, match="between 0 and 1"):
        profile.quantiles([1.5])
    assert "3 blocks, 6 passages" in repr(profile)


def test_means_only(model: GPT2LMHeadModel, ids: torch.Tensor) -> None:
    bare = measure(model, input_ids=ids, histograms=())
    for attempt in (lambda: bare.histogram("pooled"), lambda: bare.histogram("averaged"), bare.quantiles):
        with pytest.raises(ValueError, match="histograms="):
            attempt()
    assert as_mapping(bare)["pooled"] is None
    assert "5 %" not in tables.layer_table(bare).columns


def test_tables(profile: Profile) -> None:
    table = tables.layer_table(profile)
    assert [row[0] for row in table.text()] == list(profile.all_layers)
    assert table.columns[-2:] == ("isoscore", "hfc_lfc")
    first = next(csv.DictReader(io.StringIO(table.to_csv())))
    assert float(first["mean cosine"]) == profile.mean_cosine[0]  # full precision
    low, high = profile.interval("mean_cosine")
    assert float(first["95 % interval, low"]) == low[0]
    assert float(first["95 % interval, high"]) == high[0]
    assert tables.terminal_layers(profile).columns[:3] == ("layer", "mean cosine", "95 % interval")
    models = next(csv.DictReader(io.StringIO(tables.model_table([("a", profile)]).to_csv())))
    assert float(models["Spearman"]) == profile.spearman
