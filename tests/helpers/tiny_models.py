"""Tiny GPT-2-like models with a tokenizer of their own, saved as directories, and a text that they can read."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

V = 96
TEXT = "\n\n".join(" ".join(f"w{(i * 7 + j * j) % V}" for j in range(40)) for i in range(30))


def save(folder: Path, width: int, *, tokenizer: bool = True) -> Path:
    torch.manual_seed(width)
    config = GPT2Config(vocab_size=V, n_embd=width, n_layer=3, n_head=4, n_positions=64, initializer_range=0.2)
    config.bos_token_id = config.eos_token_id = None
    GPT2LMHeadModel(config).save_pretrained(folder)
    if tokenizer:
        inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w0"))
        inner.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0").save_pretrained(folder)
    return folder
