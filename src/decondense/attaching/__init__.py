r"""Add the dispersion loss to any model, whatever trains it: :func:`attach`, or :func:`attach_trainer` on a trainer.

The objective is (Liu et al. 2026, arXiv:2602.00217, section "Dispersion loss")

.. math:: L = L_{CE} + \lambda \, \frac{1}{|\mathcal L|} \sum_{l \in \mathcal L} \frac{1}{S} \sum_{s=1}^{S} D_s^{(l)}

with the hidden states after the blocks :math:`\mathcal L`, and :math:`S` sequences of at least two real tokens.

Hooks on the blocks only *store* each output; the loss is computed in the forward hook of the whole model. With
``placement="block"`` it is computed in the hook of the block, and its gradient added there
(:mod:`decondense.attaching.forward`). Nothing is patched: the hooks belong to
this one model, and :meth:`DispersionHandle.detach` removes them.

``layers`` are Python indices of the blocks; keys and messages number them from 1, "block 1" to "block L". The state of
the last block is the residual stream *before* the model's final norm; ``final_norm=True`` takes it after the norm,
which is what ``output_hidden_states`` of transformers returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from decondense.attaching.checks import AttachError
from decondense.attaching.handle import DispersionHandle
from decondense.attaching.hooks import attached
from decondense.attaching.part import Part
from decondense.config import DispersionConfig, LossConfig, LossOptions, WeightSchedule

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["AttachError", "DispersionHandle", "Part", "attach", "attached"]

_DEFAULT = DispersionConfig()


def attach(
    model: nn.Module,
    weight: float = _DEFAULT.weight,
    layers: str | Sequence[int] = _DEFAULT.layers,
    *,
    target: float | Sequence[float] | str | Path | None = _DEFAULT.target,
    teacher: nn.Module | None = None,
    config: DispersionConfig | None = None,
    schedule: WeightSchedule = _DEFAULT.schedule,
    blocks: str | None = _DEFAULT.blocks,
    final_norm: bool = _DEFAULT.final_norm,
    embedding: bool = _DEFAULT.embedding,
    gradient_ratio_every: int | None = _DEFAULT.gradient_ratio_every,
    tokens_first: bool | None = _DEFAULT.tokens_first,
    placement: Literal["output", "block"] = "output",
    part: Part | None = None,
    **loss: Unpack[LossOptions],
) -> DispersionHandle:
    """Add ``weight`` times the dispersion loss to the loss that ``model`` returns in training.

    In ``model.train()`` mode with gradients enabled, the model's ``loss`` (the entry of a dictionary-like output, or
    the one scalar of a tuple) becomes ``loss + weight * dispersion``; evaluation and generation do not change. With
    ``weight=0`` nothing is added and the values are still recorded for logs: a control arm.

    Args:
        model: A causal or masked language model, also inside PEFT, DDP, ``fully_shard`` or ``torch.compile`` wrappers.
        weight: The coefficient lambda; below 0 the loss is raised instead of lowered. Liu et al.: 0.1.
        layers: ``"all"``, ``"deep"`` (second half), ``"shallow"``, ``"last"``, or block numbers from 0.
        target: Hold each layer's mean cosine at or below this value; training then starts with ``weight`` and adjusts
            the weight of each layer (:mod:`decondense.attaching.target`). A number; one for each layer; the path of a
            profile that ``decondense measure`` or :meth:`Profile.save` wrote, its mean cosines interpolated over
            relative depth; or the name of a shipped reference (:func:`decondense.atlas.references`): its mean cosines,
            or for ``layers="deep"`` the mean of its deep half. Cosines are of pairs of different tokens; those of
            profiles are converted. Call :meth:`DispersionHandle.set_progress` every step. With ``form="profile"`` the
            weight stays fixed, and the loss is the squared difference from the target.
        teacher: For ``form="gram"``: the model whose cosines the layers should match. It needs the same tokenizer; its
            width and number of blocks may differ. A vocabulary of a different size is refused; a different vocabulary
            of the same size is not detected. It reads the same token ids in every training forward, in evaluation mode,
            without gradients.
        config: All of these settings as one object.
        schedule: How the weight changes over training; then call :meth:`DispersionHandle.set_progress` every step.
        blocks: Dotted path of the list of blocks, where :func:`decondense.blocks.find_blocks` cannot determine it.
        final_norm: Take the last block's state after the model's final norm.
        embedding: Also disperse the input of the first block.
        gradient_ratio_every: Log the gradient norm of the added term divided by that of the model's own loss, once
            every this many optimizer steps. Each time costs two extra backward passes.
        tokens_first: Whether the blocks return [tokens, batch, width] instead of [batch, tokens, width]. None: inferred
            from the class of the blocks, the shapes, or a probe (:mod:`decondense.layout`).
        placement: Where the gradient of a layer is added. ``"output"``: in the loss. ``"block"``: at the block, so that
            the gradients of all layers, each as large as a hidden state, are not held in memory together when backward
            begins. The returned loss and the gradients are the same up to rounding (except with random pairs, whose
            draws differ). Inside gradient checkpoints each layer's loss is computed twice. A compiled model gets
            ``"output"``.
        part: Which part of the whole model this module holds: a pipeline stage (then ``placement`` is ``"block"``,
            nothing is added to its output, and :attr:`DispersionHandle.scale` and :attr:`DispersionHandle.sequences`
            say what its trainer divides by), or a share of the tokens of each state.
        **loss: Fields of :class:`decondense.config.LossConfig`: ``form``, ``tau``, ``impl``, ``pairs``, ``seed``, ...

    Returns:
        A handle, also a context manager: ``with attach(model) as handle: ...`` detaches at the end.

    Raises:
        AttachError: the gradient would not be exact for this model, or the model already has a handle.

    With gradient accumulation or several ranks, each micro-batch takes the mean over its own sequences, and the result
    is the mean over micro-batches and ranks. This is exact if all of them have the same number of sequences. If the
    trainer divides by the number of tokens of all micro-batches (transformers' ``num_items_in_batch``), the term is
    scaled by the token share. :func:`attach_trainer` is exact without these conditions: prefer it with a transformers
    or TRL trainer.
    """
    settings: dict[str, Any] = {
        "weight": weight,
        "target": str(target) if isinstance(target, Path) else target,
        "layers": layers if isinstance(layers, str) else tuple(layers),
        "schedule": schedule,
        "blocks": blocks,
        "final_norm": final_norm,
        "embedding": embedding,
        "gradient_ratio_every": gradient_ratio_every,
        "tokens_first": tokens_first,
    }
    if config is None:
        loss_config = LossConfig.parse(dict(loss), where="attach()")
        config = DispersionConfig.parse({**settings, "loss": loss_config}, where="attach()")
        return DispersionHandle(model, config, teacher, placement, part)
    extra = [*(name for name, value in settings.items() if value != getattr(_DEFAULT, name)), *loss]
    if extra:
        raise AttachError(f"attach() got config= and also {', '.join(extra)}; set them in the DispersionConfig.")
    return DispersionHandle(model, config, teacher, placement, part)
