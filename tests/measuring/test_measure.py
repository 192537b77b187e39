"""What `measure` promises beside its numbers: nothing is disturbed, batches do not matter, bad input is explained."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from measure_oracle import cosines, hidden_states
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

from decondense import Profile, measure
from decondense.measuring import MeasureError, NotFiniteError

V, T = 64, 24


def gpt2(**options: object) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    settings = {"vocab_size": V, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 32, **options}
    return GPT2LMHeadModel(GPT2Config(bos_token_id=None, eos_token_id=None, initializer_range=0.2, **settings)).eval()


@pytest.fixture
def model() -> GPT2LMHeadModel:
    return gpt2().double()


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, V, (7, T), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(V)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0")


def text(row: torch.Tensor) -> str:
    return " ".join(f"w{int(i)}" for i in row)


# ---- what is measured ------------------------------------------------------------------------------------------------


def test_all_statistics_of_a_whole_model(model: GPT2LMHeadModel, ids: torch.Tensor) -> None:
    profile = measure(model, input_ids=ids)
    matrices = np.array([[cosines(state) for state in hidden_states(model, row)] for row in ids])  # [P, L + 1, N, N]
    np.testing.assert_allclose(profile.mean_cosine, matrices.mean(axis=(0, 2, 3)), atol=1e-12)
    off = ~np.eye(T, dtype=bool)
    np.testing.assert_allclose(profile.mean_cosine_others, matrices[:, :, off].mean(axis=(0, 2)), atol=1e-12)
    pooled, edges = profile.histogram("pooled")
    averaged, _ = profile.histogram("averaged", diagonal=False)
    for layer in range(4):
        expected, _ = np.histogram(matrices[:, layer].clip(-1, 1), bins=edges, density=True)
        np.testing.assert_allclose(pooled[layer], expected, atol=1e-9)
        expected, _ = np.histogram(matrices[:, layer].mean(axis=0)[off], bins=edges, density=True)
        np.testing.assert_allclose(averaged[layer], expected, atol=1e-9)
        exact = np.quantile(matrices[:, layer][:, off], (0.1, 0.5, 0.9))
        np.testing.assert_allclose(profile.quantiles((0.1, 0.5, 0.9))[layer], exact, atol=1.5e-3)
    norms = [[np.linalg.norm(state, axis=1).mean() for state in hidden_states(model, row)] for row in ids]
    np.testing.assert_allclose(profile.norms, np.mean(norms, axis=0), rtol=1e-12)


def test_before_and_after_the_final_norm_and_the_logits(model: GPT2LMHeadModel, ids: torch.Tensor) -> None:
    profile = measure(model, input_ids=ids, logits=True)
    assert profile.all_layers == ("embedding", "block 1", "block 2", "block 3", "final norm", "logits")
    seen = {}
    hook = model.transformer.h[-1].register_forward_hook(lambda m, a, out: seen.update(z=out))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    hook.remove()
    state = seen["z"] if isinstance(seen["z"], torch.Tensor) else seen["z"][0]
    expected = np.mean([cosines(z).mean() for z in state])
    assert profile.at("before").mean_cosine[-1] == pytest.approx(expected, abs=1e-12)
    assert profile.cosine[profile.row("logits")].mean() == pytest.approx(
        np.mean([cosines(z).mean() for z in logits]), abs=1e-12
    )
    assert len(profile.mean_cosine) == 4  # the logits are no layer of the depth


def test_any_module_with_blocks(ids: torch.Tensor) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(V, 16)
            self.body = nn.ModuleDict(
                {"h": nn.ModuleList(nn.Linear(16, 16) for _ in range(2)), "ln_f": nn.LayerNorm(16)}
            )
            self.head = nn.Linear(16, V)

        def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, None]:
            z = self.table(tokens)
            for block in self.body["h"]:
                z = z + block(z)
            # the states are the blocks' outputs: here the last one is not what the norm sees
            return self.head(self.body["ln_f"](z)), None

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(16, 16)

        def forward(self, z: torch.Tensor) -> torch.Tensor:
            return z + self.inner(z)

    torch.manual_seed(0)
    plain = Plain().double()
    assert measure(plain, input_ids=ids, blocks="body.h").layers == ["embedding", "block 1", "block 2"]
    plain.body["h"] = nn.ModuleList(Residual() for _ in range(2)).double()
    plain.forward = lambda tokens: (  # type: ignore[method-assign]
        plain.head(plain.body["ln_f"](plain.body["h"][1](plain.body["h"][0](plain.table(tokens))))),
        None,
    )
    profile = measure(plain, input_ids=ids, logits=True, blocks="body.h")
    assert profile.all_layers == ("embedding", "block 1", "block 2", "final norm", "logits")
    with torch.no_grad():
        z = plain.table(ids)
        expected = [np.mean([cosines(s).mean() for s in z])]
        for block in plain.body["h"]:
            z = block(z)
            expected.append(np.mean([cosines(s).mean() for s in z]))
    np.testing.assert_allclose(profile.at("before").mean_cosine, expected, atol=1e-12)


def test_side_metrics_and_last_layers(model: GPT2LMHeadModel, ids: torch.Tensor) -> None:
    profile = measure(model, input_ids=ids, metrics="all")
    states = [hidden_states(model, row) for row in ids]
    sigma = [[np.linalg.svd(z, compute_uv=False) for z in passage] for passage in states]
    expected = np.mean([[s[0] ** 2 / (s**2).sum() for s in passage] for passage in sigma], axis=0)
    np.testing.assert_allclose(profile.metric("explainable_variance"), expected, rtol=1e-9)
    assert profile.last(2) == pytest.approx(profile.mean_cosine[-2:].mean())
    assert profile.last() == pytest.approx(profile.mean_cosine[-1:].mean())  # half of three blocks: one
    with pytest.raises(ValueError, match="n must be from 1 to 4"):
        profile.last(5)


# ---- nothing else changes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 7, None])
def test_batch_size_and_order_of_passages(model: GPT2LMHeadModel, ids: torch.Tensor, batch_size: int | None) -> None:
    one = measure(model, input_ids=ids, batch_size=3)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    other = measure(model, input_ids=ids[order], batch_size=batch_size)
    np.testing.assert_allclose(other.cosine, one.cosine[:, order], atol=1e-13)
    np.testing.assert_allclose(other.summed, one.summed, atol=1e-12)
    assert np.abs(other.pooled - one.pooled).sum() <= 4  # a cosine within 1e-15 of an edge
    assert other.spearman == one.spearman


def test_model_and_random_state_are_left_alone(ids: torch.Tensor) -> None:
    model = gpt2(resid_pdrop=0.5).train()
    model.transformer.h[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    first = measure(model, input_ids=ids)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    np.testing.assert_array_equal(measure(model, input_ids=ids).cosine, first.cosine)  # dropout was off


def test_hooks_and_modes_are_restored_after_an_error(ids: torch.Tensor) -> None:
    model = gpt2().train()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight[0, 0] = float("nan")
    with pytest.raises(NotFiniteError, match=r"layer 'block 2'.*passage \d"):
        measure(model, input_ids=ids)
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_tokenizers_extras_are_not_passed_on(
    model: GPT2LMHeadModel, ids: torch.Tensor, tokenizer: PreTrainedTokenizerFast
) -> None:
    """GPT-2 adds token_type_ids as embeddings; a plain fast tokenizer returns them."""
    expected = measure(model, input_ids=ids)
    actual = measure(model, tokenizer, [text(row) for row in ids])
    np.testing.assert_array_equal(actual.cosine, expected.cosine)


def test_padding_on_either_side_never_counts(model: GPT2LMHeadModel, ids: torch.Tensor) -> None:
    lengths = (T, 9, 15)
    expected = measure(model, input_ids=[row[:n].tolist() for row, n in zip(ids, lengths, strict=False)])
    for left in (True, False):
        padded, mask = torch.zeros(3, T, dtype=torch.long), torch.zeros(3, T, dtype=torch.long)
        for row, n in enumerate(lengths):
            place = slice(T - n, T) if left else slice(0, n)
            padded[row, place], mask[row, place] = ids[row, :n], 1
        actual = measure(model, input_ids=padded, attention_mask=mask)
        np.testing.assert_array_equal(actual.cosine, expected.cosine)
        np.testing.assert_array_equal(actual.pooled, expected.pooled)


def test_unequal_lengths_have_no_averaged_histogram(model: GPT2LMHeadModel, ids: torch.Tensor) -> None:
    profile = measure(model, input_ids=[ids[0], ids[1, :5]])
    assert profile.counts("pooled").sum(axis=1).tolist() == [T * T + 25] * 5
    with pytest.raises(ValueError, match=r"5 to 24 tokens.*tokens=5"):
        profile.histogram("averaged")
    with pytest.raises(MeasureError, match="passages of equal length"):
        measure(model, input_ids=[ids[0], ids[1, :5]], histograms=("averaged",))
    assert measure(model, input_ids=[ids[0], ids[1, :5]], tokens=5).histogram("averaged")[0].shape == (4, 128)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_have_float32_statistics(ids: torch.Tensor, dtype: torch.dtype) -> None:
    model = gpt2().to(dtype)
    profile = measure(model, input_ids=ids, batch_size=1)
    expected = [np.mean([cosines(z).mean() for z in layer]) for layer in zip(*(hidden_states(model, r) for r in ids))]  # noqa: B905
    np.testing.assert_allclose(profile.mean_cosine, expected, atol=1e-6)
    assert profile.info["dtype"] == str(dtype).removeprefix("torch.")


def test_compiled_and_wrapped_models(model: GPT2LMHeadModel, ids: torch.Tensor) -> None:
    expected = measure(model, input_ids=ids)
    np.testing.assert_array_equal(measure(torch.compile(model), input_ids=ids).cosine, expected.cosine)
    np.testing.assert_array_equal(measure(nn.DataParallel(model), input_ids=ids).cosine, expected.cosine)


def test_more_than_memory_through_disk_offload(tmp_path: Path, ids: torch.Tensor) -> None:
    """A budget that holds a fraction of the weights: the rest is read from disk block by block."""
    from decondense.measuring.loading import load_model

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4, pad_token_id=0
    )
    original = LlamaForCausalLM(config).eval()
    original.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    expected = measure(original, input_ids=ids)
    model, tokenizer = load_model(
        tmp_path / "model", device_map="auto", max_memory={"cpu": "300KB"}, offload_folder=tmp_path / "offload"
    )
    assert tokenizer is None
    places = set(model.hf_device_map.values())
    assert "disk" in places
    assert sum(p.device.type == "meta" for p in model.parameters()) > 20
    profile = measure(model, input_ids=ids)
    assert profile.layers == expected.layers
    np.testing.assert_allclose(profile.cosine, expected.cosine, atol=1e-7)


def test_eight_bit_linear_layers(ids: torch.Tensor) -> None:
    """Quantised linear layers have no parameters to look at; the states are ordinary floats."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    )
    model = LlamaForCausalLM(config).eval()
    full = measure(model, input_ids=ids)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    profile = measure(quantised, input_ids=ids)
    assert profile.layers == full.layers
    np.testing.assert_allclose(profile.mean_cosine, full.mean_cosine, atol=0.05)
    assert not np.array_equal(profile.mean_cosine, full.mean_cosine)


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_bad_input(model: GPT2LMHeadModel, ids: torch.Tensor, tokenizer: PreTrainedTokenizerFast) -> None:
    mask = torch.ones_like(ids)
    mask[1, 5] = 0
    for match, arguments in {
        "texts need a tokenizer": {"texts": ["w1 w2"]},
        "one string": {"tokenizer": tokenizer, "texts": "w1 w2"},
        "no passages": {"tokenizer": tokenizer, "texts": []},
        "passage 1 has 1 token;": {"tokenizer": tokenizer, "texts": ["w1 w2", "w3"]},
        "passage 0 has 0 tokens;": {"tokenizer": tokenizer, "texts": [""]},
        "text 0 is a int": {"tokenizer": tokenizer, "texts": [3]},
        "tokens=33 is longer than the 32 positions": {"input_ids": ids, "tokens": 33},
        "tokens must be at least 2": {"input_ids": ids, "tokens": 1},
        "token id 64, but the model's vocabulary is 0 to 63": {"input_ids": ids.index_fill(1, torch.tensor([3]), 64)},
        "token id -1": {"input_ids": ids.index_fill(1, torch.tensor([3]), -1)},
        "not both": {"input_ids": ids, "texts": ["w1 w2"]},
        "must be integers": {"input_ids": ids.float()},
        r"must be \[passages, tokens\]": {"input_ids": ids[0]},
        "has a gap": {"input_ids": ids, "attention_mask": mask},
        "does not fit": {"input_ids": ids, "attention_mask": mask[:2]},
        "Did you mean 'pooled'": {"input_ids": ids, "histograms": ("poled",)},
        "Did you mean 'effective_rank'": {"input_ids": ids, "metrics": ["effectiv_rank"]},
    }.items():
        with pytest.raises(ValueError, match=match):
            measure(model, **arguments)


def test_positions_of_a_model_limit_the_default(ids: torch.Tensor) -> None:
    model = gpt2(n_positions=16)
    assert measure(model, input_ids=ids).tokens == 16
    roberta = RobertaModel(
        RobertaConfig(
            vocab_size=V,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=32,
            max_position_embeddings=18,
            pad_token_id=1,
        )
    )
    assert measure(roberta, input_ids=ids).tokens == 16  # two rows of its table are never used
    with pytest.raises(ValueError, match="16 positions"):
        measure(roberta, input_ids=ids, tokens=17)


def test_states_that_are_not_the_passages(model: GPT2LMHeadModel, ids: torch.Tensor) -> None:
    class Prompted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(V, 8)
            self.h = nn.ModuleList([nn.Linear(8, 8)])

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            z = self.table(input_ids)
            return self.h[0](torch.cat([z[:, :2], z], dim=1))

    with pytest.raises(MeasureError, match=r"\(7, 26, 8\) for 7 passages of 24 tokens"):
        measure(Prompted(), input_ids=ids, batch_size=7, blocks="h")


def test_batch_size_falls_with_the_size_of_a_passage() -> None:
    from decondense.blocks import find_blocks
    from decondense.measuring.running import _batch_size

    sizes = []
    for width, tokens in ((32, 16), (256, 512), (768, 512), (768, 4096)):
        model = gpt2(n_embd=width, n_layer=1, n_positions=8)
        sizes.append(_batch_size(model, find_blocks(model), tokens, False, torch.device("cpu")))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 64
    assert sizes[-1] == 1


def test_progress_and_no_logits(model: GPT2LMHeadModel, ids: torch.Tensor) -> None:
    calls: list[tuple[str, int, int]] = []
    measure(model, input_ids=ids, batch_size=3, progress=lambda *call: calls.append(call))
    assert calls == [("measuring", 3, 7), ("measuring", 6, 7), ("measuring", 7, 7)]
    with pytest.raises(MeasureError, match="returns no logits"):
        measure(model.transformer, input_ids=ids, logits=True)


def test_embedded_passages_are_the_default(tokenizer: PreTrainedTokenizerFast) -> None:
    profile = measure(gpt2(), tokenizer, tokens=16)
    assert isinstance(profile, Profile)
    assert (profile.n_passages, profile.tokens) == (100, 16)
