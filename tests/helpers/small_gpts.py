"""Models of nanoGPT's and nanochat's shape, small and written anew: what people train without transformers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass
class GPTConfig:
    """Names as in both projects."""

    vocab_size: int = 64
    block_size: int = 16
    n_layer: int = 3
    n_head: int = 2
    n_embd: int = 16


class Attention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x_BTD: Tensor, value_BTD: Tensor | None = None) -> Tensor:
        q, k, v = self.c_attn(x_BTD).chunk(3, dim=-1)
        if value_BTD is not None:
            v = v + value_BTD
        q, k, v = (part.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for part in (q, k, v))
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.c_proj(functional.gelu(self.c_fc(x_BTD)))


class NanoGPT(nn.Module):
    """``transformer`` is a ModuleDict of embeddings, blocks and final norm; ``forward`` returns (logits, loss)."""

    class Block(nn.Module):
        def __init__(self, config: GPTConfig) -> None:
            super().__init__()
            self.ln_1, self.ln_2 = nn.LayerNorm(config.n_embd), nn.LayerNorm(config.n_embd)
            self.attn, self.mlp = Attention(config), MLP(config)

        def forward(self, x_BTD: Tensor) -> Tensor:
            x_BTD = x_BTD + self.attn(self.ln_1(x_BTD))
            return x_BTD + self.mlp(self.ln_2(x_BTD))

    def __init__(self, config: GPTConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or GPTConfig()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(0.0),
                "h": nn.ModuleList(self.Block(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x_BTD = self.transformer.wte(idx) + self.transformer.wpe(torch.arange(idx.shape[1], device=idx.device))
        for block in self.transformer.h:
            x_BTD = block(x_BTD)
        logits = self.lm_head(self.transformer.ln_f(x_BTD))
        if targets is None:
            return logits, None
        return logits, functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def loss(self, ids: Tensor) -> Tensor:
        """Of the next tokens."""
        return self(ids[:, :-1], ids[:, 1:])[1]


class NanoChat(nn.Module):
    """As nanochat: no final norm module, value embeddings in a ModuleDict with layer numbers, ``forward`` returns the
    loss."""

    class Block(nn.Module):
        def __init__(self, config: GPTConfig) -> None:
            super().__init__()
            self.attn, self.mlp = Attention(config), MLP(config)

        def forward(self, x_BTD: Tensor, value_BTD: Tensor | None, kv_cache: object = None) -> Tensor:
            x_BTD = x_BTD + self.attn(norm(x_BTD), value_BTD)
            return x_BTD + self.mlp(norm(x_BTD))

    def __init__(self, config: GPTConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or GPTConfig()
        size = (config.vocab_size, config.n_embd)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(*size),
                "h": nn.ModuleList(self.Block(config) for _ in range(config.n_layer)),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.resid_lambdas = nn.Parameter(torch.ones(config.n_layer))
        # as many as blocks: their number does not tell them apart
        self.value_embeds = nn.ModuleDict({str(number): nn.Embedding(*size) for number in range(config.n_layer)})

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, kv_cache: object = None, loss_reduction: str = "mean"
    ) -> Tensor:
        x_BTD = norm(self.transformer.wte(idx))
        for number, block in enumerate(self.transformer.h):
            value_BTD = self.value_embeds[str(number)](idx)
            x_BTD = block(self.resid_lambdas[number] * x_BTD, value_BTD, kv_cache)
        logits = 15 * torch.tanh(self.lm_head(norm(x_BTD)) / 15)
        if targets is None:
            return logits
        return functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction=loss_reduction
        )

    def loss(self, ids: Tensor) -> Tensor:
        """Of the next tokens."""
        return self(ids[:, :-1], ids[:, 1:])


def norm(x_BTD: Tensor) -> Tensor:
    """Without weights."""
    return functional.rms_norm(x_BTD, (x_BTD.shape[-1],))
