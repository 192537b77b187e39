"""Refuses models and states for which the gradient of the loss would not be exact."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from decondense.blocks import base_model, unwrap
from decondense.config import DispersionConfig, one_of
from decondense.layers import Layer

if TYPE_CHECKING:
    from decondense.attaching.part import Part

PLACEMENTS = ("output", "block")
# names of device-mesh dimensions along which a rank holds only part of a sequence, of a layer or of the model
_INEXACT_MESH_DIMENSIONS = ("tp", "cp", "sp", "pp", "ulysses")
_INEXACT_IN_PARTS = ("cp", "ulysses")


class AttachError(ValueError):
    """The loss cannot be attached, or its gradient would not be exact; the message says what to do instead."""


def refuse(model: nn.Module, part: Part | None = None) -> None:
    """Refuse the wrappers and models for which the gradient would not be exact."""
    if isinstance(model, nn.DataParallel):
        raise AttachError("nn.DataParallel is not supported; use DDP or FSDP2 (torchrun).")
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise AttachError(
            "FSDP1 (FullyShardedDataParallel) has not been tested; use FSDP2 (fully_shard, fsdp_version 2)."
        )
    core = base_model(unwrap(model))
    if getattr(getattr(core, "config", None), "is_encoder_decoder", False):
        raise AttachError(
            f"{type(core).__name__} is an encoder-decoder model, and its attention_mask describes the encoder's "
            "tokens. Only decoder-only and encoder-only models are supported."
        )
    if (getattr(core, "_tp_size", None) or 1) > 1:  # set by from_pretrained(tp_plan=...)
        raise AttachError("tensor parallelism (tp_plan) has not been tested; use data parallelism (DDP, FSDP2).")
    refuse_meshes(model, part)


def refuse_settings(config: DispersionConfig, teacher: nn.Module | None, placement: str, part: Part | None) -> None:
    """Refuse choices that do not go together."""
    if config.loss.info.teacher != (teacher is not None):
        what = (
            "needs a teacher: attach(model, teacher=...)"
            if teacher is None
            else ("does not use a teacher; omit teacher=")
        )
        raise AttachError(f"form {config.loss.form!r} {what}.")
    one_of("placement", placement, PLACEMENTS)
    if teacher is not None and placement == "block":
        raise AttachError(
            "placement='block' does not work with a teacher, whose states it would have to keep for recomputation; "
            "omit placement."
        )
    if part is None:
        return
    cut = {
        "a teacher": teacher is not None,
        "within='world', which gathers the tokens of all ranks": config.loss.within == "world",
        "a target, which moves the weights by the cosines of all layers": part.is_stage and config.target is not None,
        "gradient_ratio_every": config.gradient_ratio_every is not None,
    }
    for what, given in cut.items():
        if given:
            raise AttachError(f"part= cannot be combined with {what}.")


def refuse_meshes(model: nn.Module, part: Part | None = None) -> None:
    """Refuse parameters distributed over other than data-parallel dimensions, and tensor-parallel ones of a part."""
    refused = _INEXACT_MESH_DIMENSIONS if part is None else _INEXACT_IN_PARTS
    for where, parameter in model.named_parameters():
        mesh: Any = getattr(parameter, "device_mesh", None)
        for dimension in getattr(mesh, "mesh_dim_names", None) or ():
            if any(name in refused for name in dimension.split("_")) and mesh[dimension].size() > 1:
                raise AttachError(
                    f"parameter {where} is distributed over the mesh dimension {dimension!r}, so a rank may hold only "
                    "part of a sequence or of a hidden state. With tensor or pipeline parallelism, declare what each "
                    "rank holds: attach(model, part=Part(...)). Context parallelism is not supported; use data "
                    "parallelism (DDP, FSDP2, HSDP)."
                )


def check_graph(trained: Mapping[int, bool], layers: Mapping[int, Layer], sources: Mapping[int, nn.Module]) -> None:
    """Refuse states without a gradient although parameters below them are trained.

    Called after the forward: only then do the stored tensors have a graph under reentrant checkpointing.
    """
    for key, layer in layers.items():
        if trained[key] or key not in sources:
            continue
        if any(parameter.requires_grad for parameter in sources[key].parameters()):
            raise AttachError(
                f"the output of {layer} does not require a gradient although its parameters are trained. With frozen "
                "embeddings and reentrant checkpointing call model.enable_input_require_grads(), or use "
                "use_reentrant=False."
            )
    if not any(trained[key] for key in layers):
        raise AttachError(
            f"there are no trainable parameters below the layers {', '.join(map(str, layers.values()))}, so their "
            "dispersion loss has no gradient. Choose deeper layers."
        )


def in_backward() -> bool:
    """Whether a backward pass runs, so that a block that is called is recomputed by a checkpoint."""
    # Private, but the only way to distinguish a block that a checkpoint recomputes from one that is called on its own;
    # in torch releases without it, calls outside the model are not checked.
    current = getattr(torch._C, "_current_graph_task_id", None)
    return current is None or current() != -1


def infers_shapes() -> bool:
    """Whether torch's pipeline runs a stage on tensors without content, to learn the shapes of what it returns.

    Gradients are enabled there, and nothing but the caller's name tells such a call from one that trains.
    """
    frame = sys._getframe(1) if not torch.compiler.is_compiling() else None
    while frame is not None and frame.f_code.co_name != "_forward_metadata_inference":
        frame = frame.f_back
    return frame is not None
