"""What a rank holds of a model that is split over several ranks: a pipeline stage, or part of each state's tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from decondense.attaching.checks import AttachError
from decondense.layout import Call


@dataclass(frozen=True)
class Part:
    """A part of a model: ``attach(stage, part=Part(first_block=4, blocks=8))``.

    ``layers`` (``"deep"``, Python indices) and the mean over layers refer to the whole model; give every stage the same
    values. A stage without a chosen block adds nothing.
    """

    first_block: int = 0
    """Index in the whole model of the part's first block."""
    blocks: int | None = None
    """Number of blocks of the whole model; None: the part has all of them."""
    group: Any = None
    """The process group of the W ranks that each hold 1/W of the tokens of every state, in order (sequence parallelism:
    ``mesh["tp"].get_group()``). The tokens are gathered, and each rank gets the gradient of its own. None: every rank
    holds whole states, or they are DTensors, whose placements say what each rank holds."""

    @property
    def is_stage(self) -> bool:
        """Whether other blocks of the model may be elsewhere."""
        return self.blocks is not None

    def place(self, own: int) -> tuple[int, int]:
        """Index of the first of the ``own`` blocks of this part, and the number of blocks of the whole model.

        Raises:
            AttachError: the part does not fit into the model.
        """
        total = own if self.blocks is None else self.blocks
        if self.first_block < 0 or self.first_block + own > total:
            raise AttachError(
                f"{self} has {own} blocks from index {self.first_block}, which do not fit into {total}; give the index "
                "of the part's first block and the number of blocks of the whole model."
            )
        return self.first_block, total

    def begin(self, call: Call) -> Call:
        """The call of a later stage, whose input is a state, in tokens of the whole sequences."""
        if self.group is None or call.tokens is None or not call.tokens[1].is_floating_point():
            return call
        return replace(call, positions=call.positions * dist.get_world_size(self.group))

    def whole(self, state: Tensor, call: Call, axis: int) -> Tensor:
        """The state with all tokens of the call, along ``axis``; the gradient of a rank is that of its own tokens."""
        if type(state).__name__ == "DTensor":
            from torch.distributed.tensor import DTensor, Replicate, Shard

            assert isinstance(state, DTensor)
            # sequences may be shared out; whatever else is cut or still to be summed is not
            kept = [p if isinstance(p, Shard) and p.dim == 1 - axis else Replicate() for p in state.placements]
            return state.redistribute(placements=kept).to_local(grad_placements=kept)
        if self.group is None or state.ndim != 3 or state.shape[axis] == call.positions:
            return state
        gathered: Tensor = _GatherTokens.apply(state, axis, self.group)  # type: ignore[no-untyped-call]
        return gathered


class _GatherTokens(torch.autograd.Function):
    """Every rank computes the same loss of the same states, so the gradient of its own tokens is a slice."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, axis: int, group: Any) -> Tensor:
        parts = [torch.empty_like(z, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, z.contiguous(), group=group)
        ctx.axis, ctx.start, ctx.length = axis, dist.get_rank(group) * z.shape[axis], z.shape[axis]
        return torch.cat(parts, dim=axis)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient.narrow(ctx.axis, ctx.start, ctx.length), None, None
