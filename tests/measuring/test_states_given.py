"""States from another engine equal the hooked measurement bit for bit; sink and skipped tokens against closed forms."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import decondense
from decondense import Profile
from decondense.blocks import find_blocks
from decondense.cli import main
from decondense.layers import Layer
from decondense.measuring import MeasureError, NotFiniteError, measure_states
from decondense.measuring.dumps import StateFiles
from decondense.measuring.sinks import SINK_NORM
from decondense.measuring.states import StateTap
from decondense.seeding import fence

P, N, L, D = 3, 24, 3, 16
ARRAYS = ("cosine", "cosine_others", "norm", "norm_sd", "norm_max", "pooled", "summed", "lengths")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=50, hidden_size=D, intermediate_size=32, num_hidden_layers=L, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    with fence():
        torch.manual_seed(3)
        return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.arange(P * N).reshape(P, N) * 7 % 50


@pytest.fixture(scope="module")
def states(model: LlamaForCausalLM, ids: Tensor) -> dict[str, Tensor]:
    """Every state that the hooks see, [P, N, D] by label."""
    seen: dict[str, Tensor] = {}

    def keep(layer: Layer, state: Tensor) -> None:
        seen[layer.label] = state.clone()

    tap = StateTap(find_blocks(model, None), keep)
    with tap.attached(), torch.no_grad():
        tap.start()
        model.model(input_ids=ids)
        tap.finish()
    assert list(seen) == ["embedding", *(f"block {i}" for i in range(1, L + 1)), "final norm"]
    return seen


def equal(ours: Profile, theirs: Profile, rows: list[int] | None = None) -> None:
    for name in ARRAYS:
        mine, other = getattr(ours, name), getattr(theirs, name)
        assert np.array_equal(mine, other if rows is None or name == "lengths" else other[rows]), name
    assert ours.sinks is not None
    assert theirs.sinks is not None
    assert np.array_equal(ours.sinks.cosine, theirs.sinks.cosine if rows is None else theirs.sinks.cosine[rows])


def passages(states: dict[str, Tensor]) -> Iterator[Tensor]:
    yield from torch.stack(list(states.values()), dim=1)


@pytest.mark.parametrize("skip", [0, 2])
def test_states_equal_the_hooked_measurement_bit_for_bit(
    model: LlamaForCausalLM, ids: Tensor, states: dict[str, Tensor], skip: int
) -> None:
    metrics = ["isoscore", "cosine_lag", "corpus_stable_rank", "dataset_entropy", "cka"]
    hooked = decondense.measure(model, input_ids=ids, skip_tokens=skip, metrics=metrics, batch_size=P)
    given = decondense.measure_states(
        passages(states), layers=list(states), final_norm=True, skip_tokens=skip, metrics=metrics
    )
    assert given.states == hooked.states
    equal(given, hooked)
    assert len(given.metric_names) == 13
    for name in given.metric_names:
        np.testing.assert_array_equal(given.metric(name), hooked.metric(name))
    assert given.layers == hooked.layers
    assert given.at("before").spearman == hooked.at("before").spearman


def test_hidden_states_of_hugging_face_lack_one_state(model: LlamaForCausalLM, ids: Tensor, tmp_path: Path) -> None:
    with torch.no_grad():
        found = [model(input_ids=row[None], output_hidden_states=True).hidden_states for row in ids]
    given = measure_states(found, final_norm=True)
    hooked = decondense.measure(model, input_ids=ids, batch_size=1)
    equal(given, hooked, [0, 1, 2, 4])
    assert given.layers == hooked.layers == ["embedding", "block 1", "block 2", "final norm"]
    assert np.array_equal(given.mean_cosine, hooked.mean_cosine)
    with pytest.raises(ValueError, match="only after the final norm"):
        given.at("before")
    given.save(tmp_path / "profile")
    again = Profile.load(tmp_path)
    assert again.layers == given.layers
    assert given.merge(again).layers == given.layers
    with pytest.raises(ValueError, match="cannot be merged"):
        given.merge(replace(again, last_block=True))


def write(folder: Path, states: dict[str, Tensor], layout: str, /, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    whole = torch.stack(list(states.values()))  # [S, P, N, D]
    if layout == "vllm":
        for passage in range(P):
            tensors = {"hidden_states": whole[:, passage].transpose(0, 1).contiguous(), "token_ids": torch.arange(N)}
            save_file(tensors, folder / f"req-{passage + 8}.safetensors")  # 10 comes after 9
    elif layout == "passages":
        for passage in range(P):
            np.save(folder / f"passage_{passage + 8}.npy", whole[:, passage].numpy())
    else:
        for number, state in enumerate(whole):
            np.save(folder / f"layer{number + 8}.npy", state.numpy())
    manifest = {"layout": layout, "layers": list(states), "final_norm": True, "model": "owner/tiny", "source": "seven"}
    manifest = {key: value for key, value in {**manifest, **changes}.items() if value is not ...}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize("layout", ["vllm", "passages", "layers"])
def test_every_layout_of_a_directory_is_the_hooked_measurement(
    model: LlamaForCausalLM, ids: Tensor, states: dict[str, Tensor], tmp_path: Path, layout: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = write(tmp_path / "states", states, layout, parameters=77)
    assert main(["measure", "--states", str(folder), "--out", str(tmp_path / "out"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["schema_version"] == 1
    (one,) = printed["models"]
    assert one["info"]["model"] == "owner/tiny"
    assert (one["info"]["source"], one["info"]["parameters"], one["label"]) == ("seven", 77, "tiny")
    equal(Profile.load(tmp_path / "out"), decondense.measure(model, input_ids=ids, batch_size=P))


def test_vllm_names_its_layers_by_number_before_the_norm(states: dict[str, Tensor], tmp_path: Path) -> None:
    some = {name: states[name] for name in ("block 1", "block 3")}
    files = StateFiles(write(tmp_path / "some", some, "vllm", layers=[1, 3], final_norm=False))
    profile = measure_states(files, layers=files.manifest.layers, final_norm=False)
    assert profile.all_layers == ("block 1", "block 3")
    assert profile.layers == ["block 1", "block 3"]
    assert (len(files), profile.n_passages) == (P, P)


def test_one_passage_at_a_time_of_any_number_and_length(states: dict[str, Tensor]) -> None:
    held: list[int] = []

    def many() -> Iterator[Tensor]:
        for number in range(40):  # more than there is room for at first
            held.append(number)
            yield torch.stack(list(states.values()))[:, number % P, : 20 + number % 2]
            assert held == [number]
            held.clear()

    profile = measure_states(many(), layers=list(states), final_norm=True)
    assert profile.n_passages == 40
    assert np.isfinite(profile.cosine).all()
    assert profile.summed is None
    assert "20 to 21 tokens" in profile.no_averaged
    assert np.array_equal(profile.cosine[:, 0], profile.cosine[:, 6])


# ---- refused ---------------------------------------------------------------------------------------------------------


def _change(folder: Path, layout: str, how: str) -> None:
    file = sorted(folder.glob("*.npy"))[-1]
    array = np.load(file)
    if how == "objects":
        np.save(file, np.array([[[{}]]], dtype=object), allow_pickle=True)
    elif how == "width":
        np.save(file, array[..., :-1])
    elif how == "nan":
        array[-1, 5, 0] = np.nan
        np.save(file, array)
    elif how == "integers":
        np.save(file, array.astype(np.int32))
    elif how == "flat":
        np.save(file, array[0])
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:200])


@pytest.mark.parametrize("layout", ["passages", "layers"])
@pytest.mark.parametrize(
    ("how", "match"),
    [
        ("objects", r"\.npy cannot be read.*not loaded"),
        ("nan", "NaN or infinite"),
        ("integers", "holds int32"),
        ("flat", r"three dimensions"),
        ("cut", r"\.npy cannot be read"),
    ],
)
def test_damaged_files_are_refused_and_nothing_is_written(
    states: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str, how: str, match: str
) -> None:
    folder = write(tmp_path / "states", states, layout)
    _change(folder, layout, how)
    assert main(["measure", "--states", str(folder), "--out", str(tmp_path / "out"), "--json"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.search(match, " ".join(shown.err.split()))
    assert not (tmp_path / "out").exists()


def test_states_that_do_not_fit_each_other_are_refused(states: dict[str, Tensor], tmp_path: Path) -> None:
    one = torch.stack(list(states.values()))[:, 0]
    named = {"layers": list(states), "final_norm": True}
    for bad, match in (
        ([one, one[:, :, :-1]], r"layer 'embedding' of passage 1 has states of shape \[24, 15\]; expected \[24, 16\]"),
        ([one, one[:-1]], "passage 1 has 4 states, but there are 5 layers"),
        ([[*one[:-1], one[-1][:-1]]], "layer 'final norm' of passage 0"),
        ([one[0]], r"expected \[states, tokens, width\]"),
        ([one.long()], r"int64"),
        ([one[:, :1]], "passage 0 has 1 token; a cosine needs two"),
        ([], "no passages"),
        ([[]], "no states"),
        ([["text"] * 5], "str"),
    ):
        with pytest.raises(MeasureError, match=match):
            measure_states(bad, **named)
    broken = one.clone()
    broken[2, 3] = float("inf")
    with pytest.raises(NotFiniteError, match=r"block 2.*passage 1"):
        measure_states([one, broken], **named)
    for layers, match in (
        ([0, 2, 1, 3, "final norm"], "must be in the order"),
        ([0, 1, 1, 2, 3], "must be in the order"),
        ([0, 1, 2], "names 3 layers, but each passage has 5 states"),
        ([0, 1, 2, 3, "last"], "not a layer"),
        ([0, 1, 2, 3, -1], "expected 0 for the embedding"),
    ):
        with pytest.raises(MeasureError, match=match):
            measure_states([one], layers=layers, final_norm=True)
    with pytest.raises(MeasureError, match="no state is after the norm"):
        measure_states([one], layers=list(states), final_norm=False)


@pytest.mark.parametrize("key", ["layout", "layers", "final_norm", "model", "source"])
def test_an_incomplete_manifest_names_the_missing_key(states: dict[str, Tensor], tmp_path: Path, key: str) -> None:
    folder = write(tmp_path / "states", states, "layers", **{key: ...})
    with pytest.raises(MeasureError, match=rf"manifest\.json.*{key}(.|\n)*A complete one"):
        StateFiles(folder)


def test_a_manifest_that_names_what_is_not_there(states: dict[str, Tensor], tmp_path: Path) -> None:
    for number, (changes, match) in enumerate(
        (
            ({"files": ["absent.npy"]}, "no .npy file 'absent.npy'"),
            ({"files": ["../layer8.npy"]}, "no .npy file"),
            ({"layout": "vllm"}, r"holds no \.safetensors files"),
            ({"layers": [0, 1, 2]}, "holds 5 files"),
            ({"kind": "x"}, "kind"),
        )
    ):
        with pytest.raises(MeasureError, match=match):
            StateFiles(write(tmp_path / str(number), states, "layers", **changes))
    (tmp_path / "empty").mkdir()
    with pytest.raises(MeasureError, match=r"no manifest\.json"):
        StateFiles(tmp_path / "empty")


# ---- sink tokens and skipped tokens ----------------------------------------------------------------------------------


def test_sink_tokens_are_found_by_the_rule_and_left_out_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 4, 20, 8, generator=generator)  # passages, states, tokens, width
    z /= z.norm(dim=-1, keepdim=True)
    z[0, 1, 0] *= 1.01 * SINK_NORM
    z[1, 1, [0, 7]] *= 50
    z[1, 2, 3] *= 0.99 * SINK_NORM
    profile = measure_states(iter(z), final_norm=False)
    assert profile.sinks is not None
    assert profile.sinks.count.tolist() == [[0, 0], [1, 2], [0, 0], [0, 0]]
    assert np.flatnonzero(profile.sinks.positions[1]).tolist() == [0, 7]
    assert profile.sinks.positions[1, [0, 7]].tolist() == [2, 1]
    kept = torch.cat([z[1, 1, 1:7], z[1, 1, 8:]]).double()
    unit = kept / kept.norm(dim=-1, keepdim=True)
    oracle = float((unit @ unit.T).mean())
    without = profile.without_sinks()
    assert without.cosine[1, 1] == pytest.approx(oracle, abs=1e-6)
    assert without.norm[1, 1] == pytest.approx(1, abs=1e-6)
    assert np.array_equal(without.cosine[[0, 2, 3]], profile.cosine[[0, 2, 3]])
    told = profile.summary()["sinks"]
    assert told["layers"] == [{"layer": "block 1", "passages": 2, "tokens": 3, "positions": {"0": 2, "7": 1}}]
    assert told["mean_cosine_without"] == without.mean_cosine.tolist()
    skipped = measure_states(iter(z), final_norm=False, skip_tokens=1)
    assert skipped.sinks is not None
    assert np.flatnonzero(skipped.sinks.positions[1]).tolist() == [7]


def test_sinks_are_saved_merged_and_printed(tmp_path: Path) -> None:
    from decondense.measuring.tables import sink_lines

    z = torch.ones(3, 12, 4)
    z[1:, 0] = torch.tensor([100.0, -100, 100, -100])
    long, short = (measure_states([z[:, :length]], final_norm=False) for length in (12, 9))
    long.save(tmp_path / "profile")
    again = Profile.load(tmp_path)
    merged = short.merge(again)
    assert merged.sinks is not None
    assert merged.sinks.positions[:, 0].tolist() == [0, 2, 2]
    assert merged.without_sinks().mean_cosine == pytest.approx([1, 1, 1])
    lines = sink_lines(merged)
    assert "2 states, block 1 to block 2; in up to 2 of 2 passages; most common positions: 0." in lines[0]
    assert sink_lines(measure_states([torch.ones(2, 4, 3)], final_norm=False)) == []
    with pytest.raises(ValueError, match="measure again"):
        replace(merged, sinks=None).without_sinks()


def test_skipped_tokens_are_read_and_not_counted(tmp_path: Path) -> None:
    with fence():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=8, n_layer=2, n_head=2, n_positions=32)).eval()
    ids = torch.arange(60).reshape(3, 20) % 40
    profile = decondense.measure(model, input_ids=ids, skip_tokens=4, logits=True)
    with torch.no_grad():
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
    unit = hidden[1][:, 4:].double() / hidden[1][:, 4:].double().norm(dim=-1, keepdim=True)
    oracle = (unit @ unit.transpose(1, 2)).mean(dim=(1, 2)).numpy()
    assert np.allclose(profile.cosine[1], oracle, atol=1e-6)
    assert profile.lengths.tolist() == [16, 16, 16]
    assert profile.counts("pooled").sum(axis=1).tolist() == [3 * 16 * 16] * len(profile.all_layers)
    assert profile.counts("averaged").sum(axis=1).tolist() == [16 * 16] * len(profile.all_layers)
    assert profile.info["skip_tokens"] == 4
    with pytest.raises(MeasureError, match="1 token after the first 19"):
        decondense.measure(model, input_ids=ids, skip_tokens=19)
    with pytest.raises(MeasureError, match="skip_tokens=-1"):
        decondense.measure(model, input_ids=ids, skip_tokens=-1)
