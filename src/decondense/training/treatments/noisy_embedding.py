"""NEFTune's noise on the token embeddings (Liu et al. 2026, arXiv:2602.00217, table 2)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments

from decondense.config import NoisyEmbeddingConfig
from decondense.seeding import generator
from decondense.training.treatments.applied import Applied, process_rank

if TYPE_CHECKING:
    from decondense.training.cell import Cell
    from decondense.training.trainer import StudyTrainer


class NoisyEmbedding(Applied):
    r"""Uniform noise on the token embeddings while training (NEFTune, Jain et al. 2023, arXiv:2310.05914).

    .. math:: x \leftarrow x + u, \quad u \sim \mathrm{Uniform}(-a, a), \quad a = \alpha / \sqrt{S H}

    for S tokens of a sequence and H features. Nothing is added outside of training mode.
    """

    def __init__(self, model: PreTrainedModel, config: NoisyEmbeddingConfig, seed: int, rank: int = 0) -> None:
        self.config, self.seed, self.rank = config, seed, rank
        self._generator: torch.Generator | None = None
        self._step = 0
        self._hook = model.get_input_embeddings().register_forward_hook(self._add)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A generator for this step; its micro-batches draw from it one after the other."""
        self._generator, self._step = None, state.global_step

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model as it was found."""
        self._hook.remove()

    def _add(self, module: nn.Module, inputs: Any, embedded_BTH: Tensor) -> Tensor:
        if not module.training or not torch.is_grad_enabled():
            return embedded_BTH
        if self._generator is None:
            # ranks see different sequences, so their noise must differ too
            self._generator = generator(
                self.seed, f"noisy embedding, rank {self.rank}", self._step, embedded_BTH.device
            )
        tokens, features = embedded_BTH.shape[-2:]
        bound = self.config.alpha / math.sqrt(tokens * features)
        noise = torch.empty_like(embedded_BTH).uniform_(-bound, bound, generator=self._generator)
        return embedded_BTH + noise


def prepare(config: NoisyEmbeddingConfig, trainer: StudyTrainer, model: PreTrainedModel, cell: Cell) -> NoisyEmbedding:
    """Hook the embedding."""
    return NoisyEmbedding(model, config, cell.seed, rank=process_rank())
