"""Tiny random models of many families, and the loss written out once more, by hand, in float64."""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

VOCABULARY = 64

# what every family is cut down to; names that a family does not have are left out
_TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_DROPOUT_NAMES = (
    "activation_dropout attention_dropout attention_probs_dropout_prob attn_pdrop classifier_dropout dropout "
    "embd_pdrop embed_dropout hidden_dropout hidden_dropout_prob layerdrop resid_dropout resid_pdrop"
)
_DROPOUT = dict.fromkeys(_DROPOUT_NAMES.split(), 0.0)
_OWN = {
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "sliding_window": 8},
    "gptj": {"rotary_dim": 4},
    "gpt_neo": {"num_layers": 3, "attention_types": [[["global"], 3]], "num_heads": 4},
    "mpt": {"expansion_ratio": 2},
    "mamba": {"state_size": 4, "time_step_rank": 4, "conv_kernel": 4},
    "gemma2": {"sliding_window": 8},
    "gemma3_text": {"sliding_window": 8},
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention", "full_attention"],
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts_per_tok": 2,
    },
    "falcon": {"new_decoder_architecture": False, "multi_query": True},
}
DECODERS = [
    *("bloom", "falcon", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neo", "gpt_neox", "gpt_oss", "gptj", "granite"),
    *("llama", "mamba", "mistral", "mixtral", "mpt", "olmo2", "olmo3", "opt", "phi3", "qwen2", "qwen3", "qwen3_moe"),
    *("qwen3_next", "smollm3", "stablelm"),
]
ENCODERS = ["bert", "modernbert"]
_MASKED = (*ENCODERS, "albert")


def tiny(family: str = "llama", *, dtype: torch.dtype = torch.float64, seed: int = 0, **settings: object) -> nn.Module:
    """A random model of a family: 3 layers, width 32, 64 tokens, no dropout unless asked."""
    config = AutoConfig.for_model(family)
    wanted = {**_TINY, **_DROPOUT, **_OWN.get(family, {}), **settings}
    for name, value in wanted.items():
        known = hasattr(config, name) or name in getattr(config, "attribute_map", {}) or name in settings
        if known and not isinstance(getattr(type(config), name, None), property):
            setattr(config, name, value)
    types_are_a_field = not isinstance(getattr(type(config), "layer_types", None), property)
    if getattr(config, "layer_types", None) and types_are_a_field and "layer_types" not in _OWN.get(family, {}):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    kind = AutoModelForMaskedLM if family in _MASKED else AutoModelForCausalLM
    model = kind.from_config(config)
    torch.set_rng_state(state)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped products have no float64
    return model.to(dtype).train()


def tokens(rows: int = 4, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Random token ids, none of them special."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def angular(z_TD: torch.Tensor, tau: float = 1.0, delta: float = 1e-3) -> torch.Tensor:
    """log mean over ordered pairs i != j of exp(-theta_ij / (pi tau)), of one sequence, in float64."""
    z_TD = z_TD.double()
    unit_TD = z_TD / z_TD.norm(dim=-1, keepdim=True)
    cosine_TT = (unit_TD @ unit_TD.T) / math.sqrt(1 + delta**2)
    n = len(z_TD)
    different = ~torch.eye(n, dtype=torch.bool)
    logits = -torch.arccos(cosine_TT[different]) / (math.pi * tau)
    return torch.logsumexp(logits, 0) - math.log(n * (n - 1))


def dispersion(
    states: list[torch.Tensor], sequences: list[list[tuple[int, list[int]]]] | None = None, **settings: float
):
    """Mean over layers and sequences; a sequence is (row, its real tokens)."""
    per_layer = []
    for z_BTD in states:
        found = sequences or [[(row, list(range(z_BTD.shape[1])))] for row in range(z_BTD.shape[0])]
        values = [angular(z_BTD[row][places], **settings) for group in found for row, places in group]
        per_layer.append(torch.stack(values).mean())
    return torch.stack(per_layer).mean()


def block_outputs(modules: list[nn.Module]) -> tuple[list[torch.Tensor], list]:
    """Hooks that keep the outputs of modules, newest forward only."""
    kept: list[torch.Tensor] = [None] * len(modules)  # type: ignore[list-item]

    def keep(place: int):
        def hook(module, arguments, output):
            kept[place] = output[0] if isinstance(output, tuple) else output

        return hook

    return kept, [module.register_forward_hook(keep(place)) for place, module in enumerate(modules)]


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Clones of all gradients by name."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def greatest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Largest absolute difference of two sets of tensors with the same names."""
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


def mean_residual(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """|sum of differences| over the sum of magnitudes: a lost factor shows here however small the tensors are."""
    difference = sum((first[name] - second[name]).sum() for name in first)
    size = sum(first[name].abs().sum() for name in first)
    return abs(float(difference / size))
