"""A tiny Llama written twice: as safetensors, and as a GGUF file the way llama.cpp's converter writes one."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from decondense.seeding import fence

TEXT = "the cat sat on the mat and the dog sat on the log while the rain fell on the hill " * 4
HEADS = 2


def _tokenizer() -> Tokenizer:
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=288, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    words.train_from_iterator([TEXT], trainer)
    return words


def _as_stored(name: str, weight: np.ndarray) -> np.ndarray:
    """Queries and keys lie in the order of llama.cpp's rotary embedding: pairs beside each other."""
    if not ("q_proj" in name or "k_proj" in name):
        return weight
    rows, columns = weight.shape
    return weight.reshape(HEADS, 2, rows // HEADS // 2, columns).swapaxes(1, 2).reshape(rows, columns)


_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def _stored_name(name: str) -> str:
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in whole or name == "lm_head.weight":
        return whole.get(name, "output.weight")
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{_NAMES[rest.removesuffix('.weight')]}.weight"


def write_pair(folder: Path, *, packed: bool = True, name: str = "tiny.gguf", arch: str = "llama") -> tuple[Path, Path]:
    """A GGUF file (matrices as Q8_0 blocks where ``packed``, vectors as F32) and a directory with the same weights."""
    words = _tokenizer()
    config = LlamaConfig(
        vocab_size=words.get_vocab_size(),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    with fence():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    whole, file = folder / "whole", folder / name
    folder.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(file, arch)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = sorted(words.get_vocab().items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if number == 0 else 1 for _, number in vocabulary])
    merges = json.loads(words.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
    state = model.state_dict()
    for key, tensor in state.items():
        values = _as_stored(key, tensor.numpy())
        kind = gguf.GGMLQuantizationType.Q8_0
        if packed and values.ndim == 2:
            blocks = gguf.quants.quantize(values, kind)
            writer.add_tensor(_stored_name(key), blocks, raw_dtype=kind)
            rows = gguf.quants.dequantize(blocks, kind)
            if "q_proj" in key or "k_proj" in key:
                rows = rows.reshape(HEADS, 16 // 2, 2, 32).swapaxes(1, 2).reshape(32, 32)
            tensor.copy_(torch.from_numpy(rows))
        else:
            writer.add_tensor(_stored_name(key), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model.save_pretrained(whole)
    fast = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    fast.save_pretrained(whole)
    return file, whole
