"""The dispersion loss in a study's run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from decondense.attaching import DispersionHandle
from decondense.config import DispersionConfig
from decondense.integrations.huggingface import attach_trainer
from decondense.training.treatments.applied import Applied

if TYPE_CHECKING:
    from decondense.training.cell import Cell
    from decondense.training.trainer import StudyTrainer


class AttachedDispersion(Applied):
    """The handle that :func:`decondense.integrations.huggingface.attach_trainer` gives."""

    def __init__(self, handle: DispersionHandle) -> None:
        self.handle = handle

    def close(self) -> None:
        """Detach."""
        self.handle.detach()


def prepare(config: DispersionConfig, trainer: StudyTrainer, model: PreTrainedModel, cell: Cell) -> AttachedDispersion:
    """Attach the loss to the trainer."""
    return AttachedDispersion(attach_trainer(trainer, config=config))
