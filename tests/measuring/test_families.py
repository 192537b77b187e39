"""Every architecture family: the streamed statistics are those of the states that the model itself lists."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from measure_oracle import hidden_states, mean_cosine

from decondense import measure

V, W, L, T = 64, 32, 3, 14
ROPE = {
    "vocab_size": V,
    "hidden_size": W,
    "intermediate_size": 48,
    "num_hidden_layers": L,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER = {k: v for k, v in ROPE.items() if k != "num_key_value_heads"}
EXPERTS = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}

# class name -> (configuration, whether a final norm follows the blocks)
FAMILIES = {
    "GPT2LMHeadModel": ({"vocab_size": V, "n_embd": W, "n_layer": L, "n_head": 4, "n_positions": 64}, True),
    "GPTNeoXForCausalLM": ({**ENCODER, "rotary_pct": 0.5}, True),
    "OPTForCausalLM": (
        {
            "vocab_size": V,
            "hidden_size": W,
            "ffn_dim": 48,
            "num_hidden_layers": L,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": W,
            "pad_token_id": 1,
        },
        True,
    ),
    "BloomForCausalLM": ({"vocab_size": V, "hidden_size": W, "n_layer": L, "n_head": 4}, True),
    "LlamaForCausalLM": (ROPE, True),
    "MistralForCausalLM": ({**ROPE, "sliding_window": 8}, True),
    "Qwen2ForCausalLM": (ROPE, True),
    "Qwen3ForCausalLM": ({**ROPE, "head_dim": 8, "tie_word_embeddings": True}, True),
    "Gemma2ForCausalLM": ({**ROPE, "head_dim": 8, "sliding_window": 8}, True),
    "Gemma3ForCausalLM": ({**ROPE, "head_dim": 8, "sliding_window": 8}, True),
    "PhiForCausalLM": ({**ENCODER, "num_key_value_heads": 4}, True),
    "Phi3ForCausalLM": (ROPE, True),
    "OlmoForCausalLM": (ROPE, True),
    "Olmo2ForCausalLM": (ROPE, True),
    "Olmo3ForCausalLM": ({**ROPE, "sliding_window": 8}, True),
    "MixtralForCausalLM": ({**ROPE, "num_local_experts": 4, "num_experts_per_tok": 2}, True),
    "Qwen2MoeForCausalLM": ({**ROPE, **EXPERTS, "shared_expert_intermediate_size": 24}, True),
    "Qwen3MoeForCausalLM": ({**ROPE, **EXPERTS, "head_dim": 8}, True),
    "FalconForCausalLM": ({"vocab_size": V, "hidden_size": W, "num_hidden_layers": L, "num_attention_heads": 4}, True),
    "BertForMaskedLM": (ENCODER, False),
    "RobertaForMaskedLM": ({**ENCODER, "max_position_embeddings": 66, "pad_token_id": 1}, False),
    "ModernBertForMaskedLM": ({**ENCODER, "local_attention": 8, "cls_token_id": 1, "sep_token_id": 2}, True),
    "T5ForConditionalGeneration": (
        {
            "vocab_size": V,
            "d_model": W,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": L,
            "num_decoder_layers": L,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        True,
    ),
    "BartForConditionalGeneration": (
        {
            "vocab_size": V,
            "d_model": W,
            "encoder_layers": L,
            "decoder_layers": L,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "max_position_embeddings": 64,
        },
        False,
    ),
    "Lfm2ForCausalLM": (
        {**ROPE, "layer_types": ["conv", "full_attention", "conv"], "block_ff_dim": 48, "conv_L_cache": 3},
        True,
    ),
    "Qwen3NextForCausalLM": (
        {
            **ROPE,
            **EXPERTS,
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "shared_expert_intermediate_size": 24,
        },
        True,
    ),
    "JambaForCausalLM": (
        {
            **ROPE,
            "attn_layer_period": 3,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 2,
            "use_mamba_kernels": False,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
        },
        True,
    ),
    "BambaForCausalLM": (
        {
            **ROPE,
            "attn_layer_indices": [1],
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_d_state": 4,
            "mamba_n_groups": 1,
        },
        True,
    ),
    "MambaForCausalLM": ({"vocab_size": V, "hidden_size": W, "num_hidden_layers": L, "state_size": 4}, True),
}


def build(name: str, config: dict) -> torch.nn.Module:
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**config))
    with torch.no_grad():  # initial weights are so small that all layers look alike
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
            else:  # a norm with equal weights turns no vector
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, V, (3, T), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", FAMILIES)
def test_statistics_are_those_of_the_listed_states(name: str, ids: torch.Tensor) -> None:
    config, has_norm = FAMILIES[name]
    model = build(name, config)
    profile = measure(model, input_ids=ids, batch_size=1)

    assert profile.has_final_norm == has_norm
    assert profile.layers == [
        "embedding",
        *(f"block {i}" for i in range(1, L)),
        "final norm" if has_norm else f"block {L}",
    ]
    assert profile.at("before").layers[-1] == f"block {L}"
    expected = np.array([[mean_cosine(state) for state in hidden_states(model, row)] for row in ids])
    if name == "MambaForCausalLM":  # its list leaves out the embedding: entry i is block i + 1, the last one is normed
        assert len(expected[0]) == L + 1 or len(expected[0]) == L
        np.testing.assert_allclose(profile.mean_cosine[-1], expected[:, -1, 0].mean(), atol=2e-6)
        return
    rows = [profile.row(layer) for layer in profile.layers]
    np.testing.assert_allclose(profile.cosine[rows].T, expected[..., 0], atol=2e-6)
    np.testing.assert_allclose(profile.cosine_others[rows].T, expected[..., 1], atol=2e-6)
    if has_norm:
        assert abs(profile.at("before").mean_cosine[-1] - profile.mean_cosine[-1]) > 1e-9


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_and_company_in_the_batch_change_nothing(name: str, ids: torch.Tensor) -> None:
    model = build(name, FAMILIES[name][0])
    if "Moe" in name or name in ("MixtralForCausalLM", "Qwen3NextForCausalLM", "JambaForCausalLM"):
        model.set_experts_implementation("eager")  # the grouped kernel has no float64
    model = model.double()
    lengths = (T, 5, 9)
    passages = [row[:n] for row, n in zip(ids, lengths, strict=True)]
    alone = measure(model, input_ids=passages, batch_size=1)
    together = measure(model, input_ids=passages, batch_size=3)
    # some models compute parts in float32 whatever they are given
    np.testing.assert_allclose(together.cosine, alone.cosine, atol=1e-6)
    np.testing.assert_allclose(together.norm, alone.norm, rtol=1e-6)
    assert np.abs(together.pooled - alone.pooled).sum() <= 0.01 * alone.pooled.sum()
    assert together.pooled.sum(axis=1).tolist() == [sum(n * (n - 1) for n in lengths)] * len(alone.all_layers)


def test_a_projection_after_the_blocks_is_a_layer_too(ids: torch.Tensor) -> None:
    """OPT-350m has no final norm, but projects the last state to another width."""
    config = {
        **FAMILIES["OPTForCausalLM"][0],
        "word_embed_proj_dim": 16,
        "do_layer_norm_before": False,
    }
    model = build("OPTForCausalLM", config)
    profile = measure(model, input_ids=ids)
    assert profile.layers == ["embedding", "block 1", "block 2", "stack output"]
    expected = np.array([[mean_cosine(state)[0] for state in hidden_states(model, row)] for row in ids])
    np.testing.assert_allclose(profile.mean_cosine, expected.mean(axis=0), atol=2e-6)


def test_a_block_that_runs_several_times_is_several_layers(ids: torch.Tensor) -> None:
    model = build("AlbertModel", {**ENCODER, "embedding_size": 16, "num_hidden_groups": 1, "inner_group_num": 1})
    profile = measure(model, input_ids=ids)
    assert profile.layers == ["embedding", *(f"block {i}" for i in range(1, L + 1))]
    expected = np.array([[mean_cosine(state)[0] for state in hidden_states(model, row)] for row in ids])
    np.testing.assert_allclose(profile.mean_cosine, expected.mean(axis=0), atol=2e-6)
