"""Refuses models and states for which the gradient of the loss would not be exact."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from decondense.blocks import base_model, unwrap
from decondense.layers import Layer

# names of device-mesh dimensions along which a rank holds only part of a sequence, of a layer or of the model
_INEXACT_MESH_DIMENSIONS = ("tp", "cp", "sp", "pp", "ulysses")


class AttachError(ValueError):
    """The loss cannot be attached, or would not be exact; the message says what to do instead."""


def refuse(model: nn.Module) -> None:
    """Refuse the wrappers and models for which the gradient would not be exact."""
    if isinstance(model, nn.DataParallel):
        raise AttachError("nn.DataParallel is not supported, its replicas have no hooks; use DDP or FSDP2 (torchrun).")
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise AttachError(
            "FSDP1 (FullyShardedDataParallel) was never verified; use FSDP2 (fully_shard, fsdp_version 2)."
        )
    core = base_model(unwrap(model))
    if getattr(getattr(core, "config", None), "is_encoder_decoder", False):
        raise AttachError(
            f"{type(core).__name__} is an encoder-decoder model, whose attention mask is the encoder's; only "
            "decoder-only and encoder-only models are supported."
        )
    if (getattr(core, "_tp_size", None) or 1) > 1:  # set by from_pretrained(tp_plan=...)
        raise AttachError("tensor parallelism (tp_plan) is not supported; use data parallelism (DDP, FSDP2).")
    refuse_meshes(model)


def refuse_meshes(model: nn.Module) -> None:
    """Refuse parameters that are distributed over anything but data-parallel dimensions."""
    for name, parameter in model.named_parameters():
        mesh: Any = getattr(parameter, "device_mesh", None)
        for dimension in getattr(mesh, "mesh_dim_names", None) or ():
            if any(part in _INEXACT_MESH_DIMENSIONS for part in dimension.split("_")) and mesh[dimension].size() > 1:
                raise AttachError(
                    f"parameter {name} is distributed over the mesh dimension {dimension!r}: tensor, sequence, context "
                    "and pipeline parallelism are not supported, because a rank does not hold whole sequences of "
                    "whole states. Use data parallelism (DDP, FSDP2, HSDP)."
                )


def check_graph(states: Mapping[int, Tensor], layers: Mapping[int, Layer], sources: Mapping[int, nn.Module]) -> None:
    """Refuse states without a gradient although parameters below them are trained.

    Called after the forward: only then do the stored tensors have a graph under reentrant checkpointing.
    """
    for key, layer in layers.items():
        if states[key].requires_grad or key not in sources:
            continue
        if any(parameter.requires_grad for parameter in sources[key].parameters()):
            raise AttachError(
                f"the output of {layer} carries no gradient although its parameters are trained. With frozen "
                "embeddings and reentrant checkpointing call model.enable_input_require_grads(), or use "
                "use_reentrant=False."
            )
    if not any(states[key].requires_grad for key in layers):
        raise AttachError(
            f"nothing that is trained lies below the layers {', '.join(map(str, layers.values()))}, so their "
            "dispersion has no gradient. Choose deeper layers."
        )


def in_backward() -> bool:
    """Whether a backward pass runs, so that a block that is called is recomputed by a checkpoint."""
    # Private, but the only way to distinguish a block that a checkpoint recomputes from one that is called on its own;
    # in torch releases without it, calls outside the model are not checked.
    current = getattr(torch._C, "_current_graph_task_id", None)
    return current is None or current() != -1
