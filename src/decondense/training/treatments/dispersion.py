"""The dispersion loss in a study's run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from decondense.attaching import DispersionHandle
from decondense.config import DispersionConfig
from decondense.integrations.huggingface import attach_trainer
from decondense.training.treatments.applied import Applied
from decondense.training.treatments.distillation import Teacher

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
    """Attach the loss to the trainer; with the arm's teacher where the form compares with one."""
    distillation = trainer.treatments.get("distillation") if config.loss.info.teacher else None
    teacher = distillation.model if isinstance(distillation, Teacher) else None
    return AttachedDispersion(attach_trainer(trainer, config=config, teacher=teacher))
