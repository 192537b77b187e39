"""Distillation from a larger model (Liu et al. 2026, arXiv:2602.00217, figure 5)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from decondense.checkpoints import ModelError
from decondense.config import ConfigError, DistillationConfig
from decondense.models import load_model
from decondense.training.treatments.applied import Applied

if TYPE_CHECKING:
    from decondense.training.cell import Cell
    from decondense.training.trainer import StudyTrainer


class Teacher(Applied):
    r"""Knowledge distillation (Hinton et al. 2015, arXiv:1503.02531) from a frozen larger model.

    .. math:: L_\mathrm{KD} = -T^2 \sum_a p_a \log q_a, \quad
              p = \mathrm{softmax}(\text{teacher}/T), \; q = \mathrm{softmax}(\text{student}/T)

    averaged over the predicted tokens: the cross-entropy with the teacher's softened prediction, which has the
    gradient of the Kullback-Leibler divergence (paper, section on distillation, figure 5). The teacher is in
    evaluation mode, without gradients, in bfloat16 on a GPU.

    Raises:
        ConfigError: the teacher cannot be loaded, or its tokenizer is not the student's.
    """

    def __init__(self, config: DistillationConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self.config, self.loss_weight = config, config.weight
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        try:
            teacher, theirs = load_model(config.teacher, revision=config.revision, head="causal", dtype=dtype)
        except ModelError as error:
            raise ConfigError(f"distillation.teacher {config.teacher!r} cannot be loaded: {error}") from error
        if theirs is None:
            raise ConfigError(
                f"distillation.teacher {config.teacher!r} has no tokenizer to compare with the student's; use a model "
                "with its tokenizer."
            )
        if theirs.get_vocab() != tokenizer.get_vocab():
            raise ConfigError(
                f"distillation.teacher {config.teacher!r} has a different tokenizer than the student (vocabularies of "
                f"{len(theirs)} and {len(tokenizer)} entries), so their predictions are not over the same tokens. "
                "Train both on one corpus with one vocabulary."
            )
        self.model = teacher.train(False).requires_grad_(False)

    def extra_loss(self, input_ids_BT: Tensor, outputs: Any) -> Tensor:
        """Mean over the predicted tokens of the distillation loss, in float32 nats."""
        student_BTV = outputs.logits
        if self.model.device != input_ids_BT.device:
            self.model.to(input_ids_BT.device)
        heat = self.config.temperature
        with torch.no_grad():
            teacher_BTV = self.model(input_ids=input_ids_BT).logits
        # a teacher may have rows beyond the tokenizer's entries, to fill a multiple of 64
        size = min(teacher_BTV.shape[-1], student_BTV.shape[-1])
        p = (teacher_BTV[:, :-1, :size].float() / heat).softmax(-1)
        q = (student_BTV[:, :-1, :size].float() / heat).log_softmax(-1)
        loss: Tensor = (p * q).sum(-1).mean() * -(heat**2)
        return loss


def prepare(config: DistillationConfig, trainer: StudyTrainer, model: PreTrainedModel, cell: Cell) -> Teacher:
    """Load the teacher and compare its tokenizer with the corpus's."""
    return Teacher(config, cell.corpus.tokenizer())
