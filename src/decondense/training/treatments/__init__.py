"""What the treatments do to a run of the Hugging Face Trainer: one module each, named by the id in the registry.

A module ``NAME`` defines ``prepare(config, trainer, model, cell)``, which is called once, before training, and returns
an :class:`Applied`. The registry is :data:`decondense.config.TREATMENTS`.

Those that draw random numbers draw from generators of their own (:func:`decondense.seeding.generator`), named after the
seed, the purpose and the optimizer step: the order of the data and the dropout of a run stay those of its pair, and a
resumed run draws what it would have drawn.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Protocol

from transformers import PreTrainedModel

from decondense.config import TREATMENTS, Treatment
from decondense.training.treatments.applied import Applied

if TYPE_CHECKING:
    from decondense.training.cell import Cell
    from decondense.training.trainer import StudyTrainer

__all__ = ["Applied", "Prepare", "apply_treatments", "preparation_of"]


class Prepare(Protocol):
    """The function ``prepare`` of a treatment's module."""

    def __call__(self, config: Treatment, trainer: StudyTrainer, model: PreTrainedModel, cell: Cell) -> Applied:
        """Ready the treatment for one run.

        Raises:
            ConfigError: it cannot be combined with what else the run does, or what it needs cannot be loaded.
        """


def preparation_of(name: str) -> Prepare:
    """The function ``prepare`` of a registered treatment."""
    assert name in TREATMENTS, name
    prepare: Prepare = import_module(f"{__name__}.{name}").prepare
    return prepare


def apply_treatments(trainer: StudyTrainer, model: PreTrainedModel, cell: Cell) -> None:
    """Prepare the arm's treatments and hand them to the trainer."""
    for name, config in reversed(cell.arm.treatments.items()):
        applied = preparation_of(name)(config, trainer, model, cell)
        trainer.treatments[name] = applied
        trainer.add_callback(applied)
