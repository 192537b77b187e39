"""Tokens of all ranks as one set: an exact gather.

Forward exchanges the tokens once. Backward exchanges nothing: every rank computes the same loss of the same set, so the
sum over the ranks' losses has W times a rank's own gradient, and averaging gradients over the W ranks, as data-parallel
training does, gives the gradient of the loss itself.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from decondense.losses.pair_mask import differentiated_once


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z_SD: Tensor, longest: int, group: Any) -> Tensor:
        world, rank = dist.get_world_size(group), dist.get_rank(group)
        padded = z_SD
        if z_SD.shape[0] < longest:
            padded = torch.nn.functional.pad(z_SD, (0, 0, 0, longest - z_SD.shape[0]))
        parts = [torch.empty_like(padded) for _ in range(world)]
        dist.all_gather(parts, padded.contiguous(), group=group)
        ctx.own = slice(rank * longest, rank * longest + z_SD.shape[0])
        ctx.world = world
        return torch.cat(parts)

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, grad_output_SD: Tensor) -> tuple[Tensor | None, ...]:
        return grad_output_SD[ctx.own] * ctx.world, None, None


def gather(z_BTD: Tensor, mask_BT: Tensor | None, group: Any = None) -> tuple[Tensor, Tensor | None]:
    """All ranks' tokens ``[1, S, D]`` and which of them are real ``[1, S]``; own tokens carry the gradient.

    Ranks may hold batches of different shapes. Without an initialised process group this is the rank's own batch.
    All ranks must call it together, with the same ``D`` and dtype.
    """
    z_SD = z_BTD.reshape(-1, z_BTD.shape[-1])
    mask_S = None if mask_BT is None else mask_BT.reshape(-1).bool()
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return z_SD.unsqueeze(0), None if mask_S is None else mask_S.unsqueeze(0)
    world = dist.get_world_size(group)
    size = torch.tensor([z_SD.shape[0]], device=z_SD.device)
    sizes = [torch.empty_like(size) for _ in range(world)]
    dist.all_gather(sizes, size, group=group)
    # the one wait for the device in this package: buffers of unknown length cannot be received
    longest = int(torch.cat(sizes).max())
    gathered: Tensor = _Gather.apply(z_SD, longest, group)  # type: ignore[no-untyped-call]
    real = torch.zeros(longest, dtype=torch.uint8, device=z_SD.device)
    real[: z_SD.shape[0]] = 1 if mask_S is None else mask_S.to(torch.uint8)
    reals = [torch.empty_like(real) for _ in range(world)]
    dist.all_gather(reals, real, group=group)
    return gathered.unsqueeze(0), torch.cat(reals).bool().unsqueeze(0)
