"""An input embedding that is forgotten in periods (Liu et al. 2026, arXiv:2602.00217, table 2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments

from decondense.config import ActiveForgettingConfig, ConfigError
from decondense.seeding import generator
from decondense.training.treatments.applied import Applied

if TYPE_CHECKING:
    from decondense.training.cell import Cell
    from decondense.training.trainer import StudyTrainer


class ActiveForgetting(Applied):
    r"""Forget the input embedding every K optimizer steps (Chen et al. 2023, arXiv:2307.01163).

    After steps K, 2K, ... (never after the last one) the embedding is drawn anew from :math:`N(0, \sigma^2)`, the
    padding row is zeroed and the embedding's Adam state is cleared. The embedding has a learning rate of its own,
    which rises and falls once in every period; everything else follows the run's schedule.

    Where input and output embedding are one tensor (GPT-2), the output embedding is forgotten with it, and the arm
    pays for that too.
    """

    def __init__(self, model: PreTrainedModel, config: ActiveForgettingConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        weight = model.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        self.weight: Tensor = weight
        if type(self.weight).__name__ == "DTensor":
            raise ConfigError("active forgetting needs whole parameters: use one process or DDP instead of FSDP.")
        self.padding = getattr(model.config, "pad_token_id", None)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Forget, if a period has ended and training goes on."""
        if state.global_step % self.config.every or state.global_step >= state.max_steps:
            return
        with torch.no_grad():
            fresh = torch.empty(self.weight.shape, dtype=torch.float32)
            fresh.normal_(0.0, self.config.std, generator=generator(self.seed, "active forgetting", state.global_step))
            if self.padding is not None:
                fresh[self.padding] = 0.0
            self.weight.copy_(fresh)
        for holder in (optimizer, getattr(optimizer, "optimizer", None)):
            if holder is not None and self.weight in holder.state:
                for value in holder.state[self.weight].values():
                    if torch.is_tensor(value):
                        value.zero_()
                break

    def factor(self, step: int) -> float:
        """The embedding's learning-rate factor: up over the warm-up, then down to 0, once in every period."""
        position = (step % self.config.every) / self.config.every
        if position < self.config.warmup:
            return (position * self.config.every + 1) / (self.config.warmup * self.config.every + 1)
        return (1 - position) / (1 - self.config.warmup)

    def change_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Give the embedding a parameter group of its own, the last one."""
        own_group(optimizer, self.weight)

    def change_scheduler(self, scheduler: LambdaLR) -> LambdaLR:
        """The same schedule for every group but the last, which follows the periods."""
        optimizer = scheduler.optimizer
        lambdas = [*scheduler.lr_lambdas[: len(optimizer.param_groups) - 1], self.factor]
        return LambdaLR(optimizer, lambdas)


def prepare(
    config: ActiveForgettingConfig, trainer: StudyTrainer, model: PreTrainedModel, cell: Cell
) -> ActiveForgetting:
    """Refused for adapters, which freeze the embedding, and for sharded parameters."""
    if cell.model.lora is not None:
        raise ConfigError(
            f"arm {cell.arm.name!r}: active forgetting trains the input embedding, which model.lora freezes; use only "
            "one of the two."
        )
    return ActiveForgetting(model, config, cell.seed)


def own_group(optimizer: torch.optim.Optimizer, weight: Tensor) -> None:
    """Move one parameter into the optimizer's last group, with the settings of the group that it came from."""
    for group in optimizer.param_groups:
        kept = [parameter for parameter in group["params"] if parameter is not weight]
        if len(kept) < len(group["params"]):
            group["params"] = kept
            optimizer.add_param_group(
                {**{key: value for key, value in group.items() if key != "params"}, "params": [weight]}
            )
            return
    raise AssertionError("the embedding is a parameter of the optimizer")
