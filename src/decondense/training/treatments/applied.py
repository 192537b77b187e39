"""A treatment at work in one run."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback


def process_rank() -> int:
    """Number of this process among those of the run (torchrun's RANK)."""
    return int(os.environ.get("RANK", "0"))


class Applied(TrainerCallback):
    """A callback of the Trainer, with hooks for what callbacks cannot change. The defaults change nothing."""

    loss_weight: float = 1.0
    """Factor of :meth:`extra_loss` in the loss."""

    def change_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Change the new optimizer, for example its parameter groups."""

    def change_scheduler(self, scheduler: Any) -> Any:
        """The learning-rate schedule to use in the place of the Trainer's."""
        return scheduler

    def extra_loss(self, input_ids_BT: Tensor, outputs: Any) -> Tensor | None:
        """A loss to add, as the mean over the predicted tokens of a micro-batch, before its weight; None: none.

        Rows of training steps log it under the treatment's id, which must be a field of
        :class:`decondense.records.schema.StepRow`.
        """
        return None

    def close(self) -> None:
        """Give the model and the trainer back as they were; called after training."""
