"""The one loader: complete weights, adapters on their base, positions and vocabularies as they are."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from model_folders import WORDS, edit, save_model, save_tokenizer, write_text
from safetensors.torch import load_file, save_file

from decondense.checkpoints import ModelError, adapter_of, checkpoint_folders
from decondense.config import ConfigError, CorpusConfig, DistillationConfig, ModelConfig
from decondense.limits import model_positions
from decondense.models import build_model, load_config, load_model, load_network
from decondense.tokenizers import load_tokenizer, read_tokenizer, vocabulary_of

IDS = torch.arange(40).reshape(2, 20) % WORDS


def drop_tensor(file: Path, word: str) -> str:
    """Remove the first tensor whose name holds ``word``; its name."""
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if word in name)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    return name


# ---- complete or refused ---------------------------------------------------------------------------------------------


def test_a_checkpoint_that_lacks_a_tensor_is_refused_wherever_it_is_loaded(tmp_path: Path) -> None:
    from decondense.training.treatments.distillation import Teacher

    folder = tmp_path / "gap"
    save_model(folder)
    drop_tensor(folder / "model.safetensors", "h.1.mlp.c_fc.bias")
    for load in (load_model, load_network, lambda path: load_network(path, head="causal")):
        with pytest.raises(ModelError, match=r"lack 1 of the tensors.*h\.1\.mlp\.c_fc\.bias"):
            load(folder)
    with pytest.raises(ConfigError, match=r"model\.pretrained.*lack 1 of the tensors"):
        build_model(ModelConfig(pretrained=str(folder)), WORDS, 16, 0)
    with pytest.raises(ConfigError, match=r"distillation\.teacher.*lack 1 of the tensors"):
        Teacher(DistillationConfig(teacher=str(folder)), load_tokenizer(folder))


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
def test_weights_of_a_wrapped_model_are_named_as_such(tmp_path: Path, prefix: str) -> None:
    save_model(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({prefix + name: value for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"begin with '{prefix}'"):
        load_model(tmp_path)


def test_a_head_may_be_missing_only_where_no_head_is_used(tmp_path: Path) -> None:
    folder = tmp_path / "headless"
    save_model(folder, tie_word_embeddings=False)
    assert drop_tensor(folder / "model.safetensors", "lm_head") == "lm_head.weight"
    load_model(folder)
    with pytest.raises(ModelError, match=r"lm_head\.weight"):
        load_network(folder, head="causal")
    with pytest.raises(ConfigError, match=r"lm_head\.weight"):
        build_model(ModelConfig(pretrained=str(folder)), WORDS, 16, 0)


# ---- adapters --------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapted(tmp_path: Path) -> tuple[Path, Path]:
    """A run of two LoRA checkpoints, and its base."""
    peft = pytest.importorskip("peft")
    base, run = tmp_path / "base", tmp_path / "run"
    save_model(base, seed=3)
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, lora_alpha=6, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True
    )
    model = peft.get_peft_model(transformers.GPT2LMHeadModel.from_pretrained(base), settings)
    generator = torch.Generator().manual_seed(0)
    for step in (10, 20):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(0, 0.3, generator=generator)
        model.save_pretrained(run / f"checkpoint-{step}")
    return run, base


def by_hand(folder: Path, base: Path) -> transformers.GPT2LMHeadModel:
    """W + alpha / r * (B A)^T in float64: GPT-2 keeps its weights transposed."""
    model = transformers.GPT2LMHeadModel.from_pretrained(base).double().eval()
    stored = load_file(folder / "adapter_model.safetensors")
    scale = 6 / 2
    for name, a in stored.items():
        if ".lora_A." in name:
            b = stored[name.replace(".lora_A.", ".lora_B.")]
            path = name.removeprefix("base_model.model.").partition(".lora_A.")[0]
            with torch.no_grad():
                model.get_submodule(path).weight += scale * (b.double() @ a.double()).T
    return model


def test_an_adapter_is_loaded_on_its_base(adapted: tuple[Path, Path]) -> None:
    run, base = adapted
    assert checkpoint_folders(run) == [run / "checkpoint-10", run / "checkpoint-20"]
    outputs = []
    for folder in checkpoint_folders(run):
        before = torch.get_rng_state()
        model, tokenizer = load_model(folder)
        merged = load_network(folder, head="causal", merge=True)
        start = build_model(ModelConfig(pretrained=str(folder)), WORDS, 16, 0)
        assert torch.equal(torch.get_rng_state(), before)
        assert tokenizer is not None
        assert tokenizer("w5")["input_ids"] == [5]
        expected = by_hand(folder, base)(input_ids=IDS).logits
        for found in (model, merged, start.eval()):
            assert torch.allclose(found(input_ids=IDS).logits.double(), expected, atol=1e-5)
        assert type(merged) is type(start) is transformers.GPT2LMHeadModel
        assert load_config(folder).n_embd == 16
        outputs.append(expected)
    plain = transformers.GPT2LMHeadModel.from_pretrained(base)(input_ids=IDS).logits
    assert min((one - other).abs().max() for one, other in zip(outputs, (plain, outputs[0]), strict=True)) > 0.01


def test_an_adapter_is_measured_like_what_it_amounts_to(adapted: tuple[Path, Path], tmp_path: Path) -> None:
    import decondense

    run, base = adapted
    model, tokenizer = load_model(run / "checkpoint-20")
    texts = [json.loads(line)["text"] for line in write_text(tmp_path / "t.jsonl", 300).read_text().splitlines()]
    found = decondense.measure(model, tokenizer, texts, tokens=32)
    expected = decondense.measure(by_hand(run / "checkpoint-20", base), tokenizer, texts, tokens=32)
    assert np.allclose(found.mean_cosine, expected.mean_cosine, atol=1e-6)
    assert found.info["model"] == str(run / "checkpoint-20")


def test_a_base_is_looked_for_from_the_adapters_place_too(adapted: tuple[Path, Path], tmp_path: Path) -> None:
    run, base = adapted
    folder = tmp_path / "moved" / "adapter"
    shutil.copytree(run / "checkpoint-10", folder)
    shutil.move(base, tmp_path / "moved" / "base")
    with pytest.raises(ModelError, match="needs its base model, and there is no directory"):
        adapter_of(folder)
    edit(folder / "adapter_config.json", base_model_name_or_path="../base")
    assert load_network(folder).eval()(input_ids=IDS).logits.shape == (2, 20, WORDS)


def test_an_adapter_that_does_not_fit_is_refused(
    adapted: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, base = adapted
    folder = run / "checkpoint-10"
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(sys.modules, "peft", None)
        with pytest.raises(ModelError, match="needs the package peft: pip install peft"):
            load_network(folder)
    stored = (folder / "adapter_model.safetensors").read_bytes()
    name = drop_tensor(folder / "adapter_model.safetensors", "h.1.attn.c_attn.lora_B")
    with pytest.raises(ModelError, match=f"does not fit.*lacks {name}"):
        load_network(folder)
    (folder / "adapter_model.safetensors").write_bytes(stored)
    # trained on two layers, loaded on one; then on another width
    for settings in ({"n_layer": 1}, {"n_embd": 32}):
        save_model(base, **settings)
        with pytest.raises(ModelError, match=r"does not fit its base|cannot be loaded on"):
            load_network(folder)
    (folder / "adapter_model.safetensors").write_bytes(stored[:200])
    save_model(base)
    with pytest.raises(ModelError, match="cannot be loaded on"):
        load_network(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no adapter_model\.safetensors"):
        load_network(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model_name_or_path": None}, "does not name the base model"),
        ({"base_model_name_or_path": "/nowhere/at/all"}, "there is no directory /nowhere/at/all"),
        ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "imports a module by name"),
        ({"peft_type": "XLORA"}, "not supported"),
    ],
)
def test_what_an_adapter_may_not_ask_for(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path), **changes}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=message):
        load_network(tmp_path)


def test_a_model_and_an_adapter_in_one_folder_are_not_guessed(adapted: tuple[Path, Path]) -> None:
    run, base = adapted
    for file in (run / "checkpoint-10").glob("adapter_*"):
        shutil.copy(file, base)
    with pytest.raises(ModelError, match="holds a whole model"):
        load_network(base)


# ---- positions -------------------------------------------------------------------------------------------------------

T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
FALCON = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 24}
BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
BERT = {**BERT, "max_position_embeddings": 24, "max_relative_positions": 8}
POSITIONS = [
    # what the configuration says may be anything: the model is asked itself, with more tokens
    ("mt5", {**T5, "n_positions": 24}, "seq2seq", None),
    ("switch_transformers", {**T5, "n_positions": 24, "num_experts": 2}, "seq2seq", None),
    ("bloom", {"hidden_size": 16, "n_layer": 2, "n_head": 2, "seq_length": 24}, "causal", None),
    ("falcon", {**FALCON, "alibi": True}, "causal", None),
    ("deberta-v2", {**BERT, "relative_attention": True, "position_biased_input": False}, "masked", None),
    ("deberta-v2", {**BERT, "relative_attention": True, "position_biased_input": True}, "masked", 24),
    ("mpnet", BERT, "masked", 22),
    ("gpt2", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 24}, "causal", 24),
    ("mpt", {"d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 24}, "causal", 24),
]


@pytest.mark.parametrize(("family", "settings", "kind", "limit"), POSITIONS)
def test_the_limit_is_what_the_model_itself_takes(
    family: str, settings: dict[str, object], kind: str, limit: int | None
) -> None:
    auto = {
        "seq2seq": transformers.AutoModelForSeq2SeqLM,
        "causal": transformers.AutoModelForCausalLM,
        "masked": transformers.AutoModelForMaskedLM,
    }[kind]
    config = transformers.AutoConfig.for_model(family, vocab_size=WORDS, **settings)
    model = auto.from_config(config).eval()
    assert model_positions(model) == limit

    def takes(tokens: int) -> bool:
        ids = torch.arange(2, tokens + 2)[None] % (WORDS - 4) + 3
        try:
            with torch.no_grad():
                model(input_ids=ids, **({"decoder_input_ids": ids} if kind == "seq2seq" else {}))
        except (RuntimeError, IndexError, ValueError):
            return False
        return True

    assert takes(40) == (limit is None)
    assert takes(limit or 40)


def test_a_start_without_a_limit_takes_any_length_and_one_with_a_limit_does_not(tmp_path: Path) -> None:
    config = transformers.BloomConfig(vocab_size=WORDS, hidden_size=16, n_layer=1, n_head=2, seq_length=8)
    transformers.BloomForCausalLM(config).save_pretrained(tmp_path / "bloom")
    build_model(ModelConfig(pretrained=str(tmp_path / "bloom")), WORDS, 128, 0)
    save_model(tmp_path / "gpt2")
    with pytest.raises(ConfigError, match=r"has 64 positions, fewer than train\.max_seq_length 65"):
        build_model(ModelConfig(pretrained=str(tmp_path / "gpt2")), WORDS, 65, 0)


# ---- vocabularies ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ids", "rows"), [(list(range(7)), 7), ([0, 3, 90], 91), ([70_001, 5, 0], 70_002)])
def test_a_vocabulary_reaches_to_its_largest_id(ids: list[int], rows: int, tmp_path: Path) -> None:
    from decondense.corpora.packed import prepare

    folder = tmp_path / "words"
    save_tokenizer(folder, ids)
    tokenizer = read_tokenizer(folder)
    assert len(tokenizer) == len(ids)
    assert vocabulary_of(tokenizer) == rows
    corpus = prepare(
        CorpusConfig(source=str(write_text(tmp_path / "t.jsonl")), tokenizer=str(folder), held_out=0.2),
        cache=tmp_path / "cache",
    )
    assert corpus.vocabulary == rows
    assert set(np.unique(corpus.train_tokens).tolist()) <= set(ids)
    architecture = ModelConfig(architecture="gpt2", overrides={"n_layer": 1, "n_embd": 8, "n_head": 1})
    model = build_model(architecture, vocabulary_of(tokenizer), 16, tokenizer.eos_token_id)
    assert model.get_input_embeddings().num_embeddings == rows
    model(input_ids=torch.tensor([ids]))
    save_model(tmp_path / "small")
    if rows > WORDS:
        with pytest.raises(ConfigError, match=f"has a vocabulary of 64, but the corpus needs {rows}"):
            build_model(ModelConfig(pretrained=str(tmp_path / "small")), vocabulary_of(tokenizer), 16, 0)


@pytest.mark.parametrize("value", ["two", -1, 7, [1], None, 1.5])
def test_an_override_of_a_wrong_kind_is_a_message(value: object) -> None:
    config = ModelConfig.model_construct(architecture="gpt2", overrides={"n_head": value, "n_embd": 16}, start=None)
    with pytest.raises(ConfigError, match="gpt2 with"):
        build_model(config, WORDS, 16, 0)
