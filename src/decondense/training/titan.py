r"""Pre-training with torchtitan 0.3: its own trainer and configurations, the dispersion loss attached, no fork.

    torchrun --nproc-per-node 8 -m torchtitan.train --module decondense.training.titan \
        --config qwen3_0_6b_dispersion --dispersion.weight 0.1 --dispersion.layers deep

The gradient of one optimizer step is that of the token mean of the cross-entropy plus lambda times the mean dispersion
over all packed documents of the step, over all micro-batches and data-parallel ranks. Data parallelism only (FSDP2,
HSDP): this integration was never run with pipeline or tensor parallelism, for which :class:`decondense.attaching.Part`
exists, and with context parallelism a rank does not hold whole sequences; the trainer refuses all three.

:func:`to_huggingface` turns a checkpoint into a directory that ``decondense measure`` and transformers read.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchtitan.config import TrainingConfig
from torchtitan.models.qwen3 import model_registry
from torchtitan.models.qwen3.config_registry import qwen3_0_6b, qwen3_debugmodel
from torchtitan.trainer import Trainer

from decondense.attaching import AttachError, attach
from decondense.config import ConfigError
from decondense.config.titan import Dispersion

__all__ = [
    "DispersionTrainer",
    "qwen3_0_6b_cross_entropy",
    "qwen3_0_6b_dispersion",
    "qwen3_debugmodel_dispersion",
    "to_huggingface",
]


class DispersionTrainer(Trainer):  # type: ignore[misc]
    """torchtitan's trainer with a ``dispersion`` section."""

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):  # type: ignore[misc]
        """torchtitan's configuration and the dispersion loss."""

        dispersion: Dispersion = field(default_factory=Dispersion)

    def __init__(self, config: DispersionTrainer.Config) -> None:
        settings = config.dispersion.config()
        if settings.target is not None:
            raise ConfigError(
                "dispersion.target is not supported: torchtitan's checkpoints do not store the weights that a target "
                "adjusts, so a resumed run would differ. Set a weight and a schedule."
            )
        if not config.training.disable_cuda_graphs:
            raise ConfigError(
                "CUDA graphs would replay the weight and the divisor of the first step; set "
                "--training.disable_cuda_graphs."
            )
        super().__init__(config)  # applies checkpointing, compile and FSDP2
        dims = self.parallel_dims
        causes = dict.fromkeys(("pp", "tp"), "this integration has not been tested with it")
        for name, cause in {**causes, "cp": "a rank does not hold whole sequences"}.items():
            if getattr(dims, f"{name}_enabled"):
                raise AttachError(f"{name.upper()} parallelism is not supported: {cause}; use data parallelism.")
        self.dispersion = attach(self.model_parts[0], config=settings)
        self.dispersion.defer = True
        self._sequences: Tensor | None = None
        self._cross_entropy = torch.zeros((), device=self.device)  # of the step: that is what torchtitan logs as loss
        # the validator was built with the plain loss, and keeps it
        plain: Any = self.loss_fn  # type: ignore[has-type]
        self._plain_loss = plain
        self.loss_fn = self._loss_with_dispersion
        self._plain_log, self.metrics_processor.log = self.metrics_processor.log, self._log_with_dispersion

    def train_step(self, data_iterator: Iterator[tuple[dict[str, Tensor], Tensor]]) -> None:
        """One optimizer step; its micro-batches are fetched first, to know how many sequences they hold."""
        micro_batches = [next(data_iterator) for _ in range(self.gradient_accumulation_steps)]
        self.dispersion.set_progress(self.step - 1, self.config.training.steps)
        counts = [
            1
            if self.dispersion.counts_batches
            else self.dispersion.count_sequences({**inputs, "input_ids": inputs["input"]})
            for inputs, _ in micro_batches
        ]
        self._cross_entropy = torch.zeros((), device=self.device)
        self._sequences = self._sum_over_ranks(torch.as_tensor(sum(counts), dtype=torch.float32))
        super().train_step(itertools.chain(micro_batches, data_iterator))

    def _loss_with_dispersion(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor | None = None, **keywords: Any
    ) -> tuple[Tensor, Any]:
        loss, metrics = self._plain_loss(pred, labels, global_valid_tokens, **keywords)
        self._cross_entropy += loss.detach()
        taken = self.dispersion.take_sum_and_count()
        if taken is None or self._sequences is None:
            return loss, metrics
        # torchtitan sums the gradients of micro-batches and ranks, each divided by what is global
        extra = self.dispersion.weighted(taken[0] / self._sequences.clamp(min=1))
        # added, never multiplied: the chunked loss has its gradients ready and ignores what comes back
        return loss + extra, metrics

    def _log_with_dispersion(
        self, *arguments: Any, extra_metrics: dict[str, Any] | None = None, **keywords: Any
    ) -> Any:
        values = self.dispersion.pop(self._sum_over_ranks)
        values["cross_entropy"] = float(self._sum_over_ranks(self._cross_entropy.clone()))
        return self._plain_log(*arguments, extra_metrics={**(extra_metrics or {}), **values}, **keywords)

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        values = values.to(self.device)
        if self.parallel_dims.dp_enabled:
            torch.distributed.all_reduce(values, group=self.parallel_dims.get_mesh("batch").get_group())
        return values


def qwen3_0_6b_dispersion() -> DispersionTrainer.Config:
    """Qwen3-0.6B from scratch on C4 with dispersion loss (Liu et al. 2026, arXiv:2602.00217, table 5).

    From the paper: model, corpus, 156 billion tokens, lambda .1, tau 1, all layers. AdamW (.9, .95), weight decay .1
    and the peak rate 3e-4 are torchtitan's for this model. Our choices: 1,048,576 tokens per step, 2,000 steps of
    warm-up, cosine decay to a tenth. A control arm is the same with ``--dispersion.weight 0``
    (:func:`qwen3_0_6b_cross_entropy`).
    """
    base = qwen3_0_6b()
    base.training = TrainingConfig(
        local_batch_size=4, global_batch_size=256, seq_len=4096, steps=148_773, disable_cuda_graphs=True
    )
    base.lr_scheduler.warmup_steps = 2000
    base.lr_scheduler.decay_type = "cosine"
    base.lr_scheduler.min_lr_factor = 0.1
    base.metrics.log_freq = 10
    base.checkpoint.enable = True
    base.checkpoint.interval = 5000
    return _with_dispersion(base, Dispersion())


def qwen3_0_6b_cross_entropy() -> DispersionTrainer.Config:
    """The control arm of :func:`qwen3_0_6b_dispersion`: weight 0, the dispersion watched and not trained."""
    config = qwen3_0_6b_dispersion()
    config.dispersion = Dispersion(weight=0.0)
    return config


def qwen3_debugmodel_dispersion() -> DispersionTrainer.Config:
    """torchtitan's own debug model (8 layers, width 256) for a try-out."""
    base = qwen3_debugmodel()
    base.training.disable_cuda_graphs = True
    return _with_dispersion(base, Dispersion())


def _with_dispersion(base: Any, dispersion: Dispersion) -> DispersionTrainer.Config:
    values = {item.name: getattr(base, item.name) for item in fields(base) if item.init}
    return DispersionTrainer.Config(**values, dispersion=dispersion)


def to_huggingface(
    checkpoint: str | Path, out: str | Path, *, flavor: str = "0.6B", tokenizer: str | Path | None = None
) -> Path:
    """Convert a torchtitan checkpoint of a dense Qwen3 model into a Hugging Face model directory.

    Args:
        checkpoint: A ``step-...`` folder written by torchtitan's checkpointer.
        out: Folder to write: ``config.json``, ``model.safetensors``, and the tokenizer when given.
        flavor: torchtitan's name of the model: ``"0.6B"``, ``"1.7B"``, ``"debugmodel"``, ...
        tokenizer: Folder of the tokenizer that the model was trained with (``hf_assets_path``).

    Returns:
        ``out``.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from decondense.tokenizers import read_tokenizer

    checkpoint, out = Path(checkpoint), Path(out)
    if not (checkpoint / ".metadata").is_file():
        raise ConfigError(f"{checkpoint} is not a torchtitan checkpoint (no .metadata); give a step-... folder.")
    spec = model_registry(flavor)
    titan = spec.model
    with torch.device("meta"):
        state = titan.build().state_dict()
    saved = FileSystemReader(str(checkpoint)).read_metadata().state_dict_metadata
    missing = [name for name in state if name not in saved]
    if missing:
        raise ConfigError(
            f"{checkpoint} lacks {missing[0]!r}; is it a checkpoint of flavor {flavor!r}? Pass the flavor that was "
            "trained."
        )
    state = {name: torch.empty_like(value, device="cpu") for name, value in state.items()}
    load(state, storage_reader=FileSystemReader(str(checkpoint)))
    weights = spec.state_dict_adapter(titan, None).to_hf(state)

    attention = titan.layers[0].attention
    config = Qwen3Config(
        vocab_size=titan.vocab_size,
        hidden_size=titan.dim,
        intermediate_size=weights["model.layers.0.mlp.gate_proj.weight"].shape[0],
        num_hidden_layers=len(titan.layers),
        num_attention_heads=attention.n_heads,
        num_key_value_heads=attention.n_kv_heads or attention.n_heads,
        head_dim=attention.head_dim,
        max_position_embeddings=attention.rope.max_seq_len,
        rope_parameters={"rope_type": "default", "rope_theta": attention.rope.theta},
        rms_norm_eps=titan.norm.eps,
        tie_word_embeddings=titan.enable_weight_tying,
        attention_bias=False,
    )
    with torch.device("meta"):
        converted = Qwen3ForCausalLM(config)
    converted.load_state_dict(weights, strict=not titan.enable_weight_tying, assign=True)
    converted.tie_weights()
    converted.save_pretrained(out)
    if tokenizer is not None:
        read_tokenizer(tokenizer).save_pretrained(out)
    return out
