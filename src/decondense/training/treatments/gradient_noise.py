r"""Isotropic noise of equal norm in the place of the dispersion loss's gradient.

Let :math:`g_{s}` be the gradient of the weighted dispersion loss in the states of sequence s (a packed row counts as
one) at one layer, all of its real tokens and features as one vector. The layer gets

.. math:: \tilde g_s = |g_s| \, \epsilon_s / |\epsilon_s|, \quad \epsilon_s \sim N(0, I)

instead, drawn anew for each layer, sequence and micro-batch: as much disturbance at the same places, in a direction
that does not depend on the other tokens. The norm is equal per sequence and layer; where gradients of sequences add up
in the weights, noise adds up to less than gradients that agree. Where the loss is computed is where its gradient
branches off, so the cross-entropy's gradient is not touched. The value that is logged is that of the loss.

Draws are a function of (seed, rank, step, number of the draw within the step), so that a resumed run draws what it
would have drawn, and a second backward pass through one graph the same again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments

from decondense.config import GradientNoiseConfig
from decondense.seeding import generator
from decondense.training.treatments.applied import Applied, process_rank
from decondense.training.treatments.dispersion import AttachedDispersion

if TYPE_CHECKING:
    from decondense.training.cell import Cell
    from decondense.training.trainer import StudyTrainer


class _Isotropic(torch.autograd.Function):
    """The identity, whose gradient is noise of the norm of each sequence's gradient."""

    @staticmethod
    def forward(ctx: Any, z_BTD: Tensor, mask_BT: Tensor | None, name: tuple[int, str, int]) -> Tensor:
        ctx.mask_BT, ctx.name = mask_BT, name
        return z_BTD.view_as(z_BTD)

    @staticmethod
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor | None, ...]:
        noise = torch.empty(grad_BTD.shape, dtype=torch.float32, device=grad_BTD.device)
        seed, purpose, step = ctx.name
        noise.normal_(generator=generator(seed, purpose, step, grad_BTD.device))
        if ctx.mask_BT is not None:
            noise.masked_fill_(~ctx.mask_BT.bool().unsqueeze(-1), 0.0)
        norms = [torch.linalg.vector_norm(x.float(), dim=(1, 2), keepdim=True) for x in (grad_BTD, noise)]
        return (noise * (norms[0] / norms[1].clamp(min=1e-30))).to(grad_BTD.dtype), None, None


class GradientNoise(Applied):
    """Branches the states off before the loss of an attached handle (:attr:`DispersionHandle.branch`)."""

    def __init__(self, seed: int, rank: int = 0) -> None:
        self.seed, self.rank = seed, rank
        self._step = self._drawn = 0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Name the draws after this step."""
        self._step, self._drawn = state.global_step, 0

    def __call__(self, z_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
        """The states of one layer in one micro-batch, for the loss alone."""
        self._drawn += 1
        name = (self.seed, f"gradient noise, rank {self.rank}, draw {self._drawn}", self._step)
        noisy: Tensor = _Isotropic.apply(z_BTD, mask_BT, name)  # type: ignore[no-untyped-call]
        return noisy


def prepare(config: GradientNoiseConfig, trainer: StudyTrainer, model: PreTrainedModel, cell: Cell) -> GradientNoise:
    """Put the noise before the arm's dispersion loss, which is attached by now."""
    attached = trainer.treatments["dispersion"]
    assert isinstance(attached, AttachedDispersion)
    noise = GradientNoise(cell.seed, rank=process_rank())
    attached.handle.branch = noise
    return noise
