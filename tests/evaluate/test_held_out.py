"""Held-out loss: against float64, with every module's mode kept, and NaN named."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from decondense.evaluate import held_out_loss
from decondense.measuring import NotFiniteError


@pytest.fixture
def model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    settings = {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": 32}
    return GPT2LMHeadModel(GPT2Config(**settings, tie_word_embeddings=False))


DOCUMENTS = [("a", np.arange(1, 20)), ("b", np.arange(7, 14)), ("c", np.array([3]))]


def test_it_is_the_cross_entropy_of_every_token_but_a_windows_first(model: GPT2LMHeadModel) -> None:
    scores = held_out_loss(model.double().train(), DOCUMENTS, window=8, batch_windows=2)
    model.eval()
    for document, (name, ids) in zip(scores.documents, DOCUMENTS, strict=False):
        pieces = [torch.tensor(ids[first : first + 8]) for first in range(0, len(ids), 8)]
        log_p = [model(input_ids=piece[None]).logits[0].log_softmax(-1) for piece in pieces]
        parts = [-p[t - 1, piece[t]] for p, piece in zip(log_p, pieces, strict=True) for t in range(1, len(piece))]
        assert document.identity == name
        assert document.tokens == len(parts)
        assert document.total == pytest.approx(float(sum(parts).detach()), rel=1e-6)
    assert [document.identity for document in scores.documents] == ["a", "b"]


@pytest.mark.parametrize("fails", [False, True])
def test_every_module_keeps_its_own_mode_and_the_random_state_stays(model: GPT2LMHeadModel, fails: bool) -> None:
    model.train()
    model.transformer.h[0].eval()  # a frozen part, as people freeze one
    model.transformer.h[1].mlp.dropout.eval()
    before = {name: module.training for name, module in model.named_modules()}
    state = torch.get_rng_state()
    if fails:
        with torch.no_grad():
            model.lm_head.weight[5] = float("nan")
        with pytest.raises(NotFiniteError, match="document a is nan"):
            held_out_loss(model, DOCUMENTS, window=8)
    else:
        held_out_loss(model, DOCUMENTS, window=8)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert len(set(before.values())) == 2
    assert torch.equal(torch.get_rng_state(), state)


def test_text_with_nothing_to_predict_is_no_divergence(model: GPT2LMHeadModel) -> None:
    with pytest.raises(ValueError, match="nothing to predict") as caught:
        held_out_loss(model, DOCUMENTS[2:], window=8)
    assert not isinstance(caught.value, NotFiniteError)
