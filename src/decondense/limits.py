"""What a model can take: how many tokens it has positions for, and which token ids."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import nn

from decondense.blocks import base_model, unwrap


def text_config(model: nn.Module) -> Any:
    """The configuration of the part that reads text: of an encoder-decoder, of its decoder."""
    config = getattr(base_model(unwrap(model)), "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        with contextlib.suppress(Exception):
            return config.get_text_config(decoder=True)
    return config


_POSITION_FIELDS = (
    *("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"),
    *("max_decoder_position_embeddings", "max_encoder_position_embeddings"),  # LED
)


def model_positions(model: nn.Module) -> int | None:
    """The largest number of tokens that a model has positions for; None if there is no limit, or it declares none.

    A number in the configuration is the limit of a table, or the length that rotary positions were trained for. There
    is no limit where positions enter as a bias that depends on distance alone: T5 and its relatives (whose
    ``n_positions`` of 512 nothing reads), ALiBi (Bloom, some Falcons), DeBERTa without absolute positions.
    """
    config = text_config(model)
    values = [getattr(config, name, None) for name in _POSITION_FIELDS]
    known = [value for value in values if isinstance(value, int) and value > 0]
    if not known or _by_distance(model, config):
        return None
    value = known[0] if values[4] is None else min(known)
    for name, module in unwrap(model).named_modules():
        # RoBERTa counts its positions from the padding index on, so that many rows of the table are never used
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return value - module.padding_idx - 1
    return value


def _by_distance(model: nn.Module, config: Any) -> bool:
    """Whether positions enter as a bias between two tokens alone, for which any distance has a value."""
    if getattr(config, "alibi", False) or getattr(config, "model_type", None) == "bloom":
        return True
    if getattr(config, "relative_attention", False) and getattr(config, "position_biased_input", True) is False:
        return True
    relative = False
    for name, module in unwrap(model).named_modules():
        if name.endswith("relative_attention_bias"):
            relative = True
        if isinstance(module, nn.Embedding) and name.endswith(("position_embeddings", "embed_positions", "wpe")):
            return False  # MPNet has both
    return relative


def vocabulary_size(model: nn.Module) -> int | None:
    """Rows of the input embedding, or None where there is no such table."""
    core = base_model(unwrap(model))
    getter = getattr(core, "get_input_embeddings", None)
    if callable(getter):
        with contextlib.suppress(NotImplementedError, AttributeError):
            count = getattr(getter(), "num_embeddings", None)
            if isinstance(count, int):
                return count
    value = getattr(text_config(model), "vocab_size", None)
    if isinstance(value, int):
        return value
    tables = [module.num_embeddings for module in core.modules() if isinstance(module, nn.Embedding)]
    return max(tables) if tables else None
