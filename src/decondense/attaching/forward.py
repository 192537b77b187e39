r"""One training forward, and the gradient of the added term where its layers are.

With ``placement="block"`` the loss of a layer is computed in the hook of its block, and its gradient joins that of the
training loss there: :class:`Carrier` returns the state unchanged, and in backward passes on the incoming gradient and

.. math:: s \, \frac{f_l}{|\mathcal L|} \frac{\partial}{\partial h_l} \sum_{s=1}^{S} D_s^{(l)}

for the state :math:`h_l`, with the relative weight :math:`f_l` of the layer. The factor :math:`s` is what the added
term is multiplied by before backward: weight, divisor, gradient scaler, accumulation. :class:`Tap` stands for the term
in the loss and receives exactly this number as its gradient; a pipeline stage has no loss and is told
(:attr:`DispersionHandle.scale`). Autograd reaches the tap before any carrier, because the tap consumes the last state.

Megatron and DeepSeek add the balance loss of their experts in this way (``MoEAuxLossAutoScaler``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from decondense.layout import Call


class Forward:
    """What the layers of one forward need, also when a checkpoint computes them again during backward."""

    def __init__(self, call: Call, number: int = 0) -> None:  # no dataclass: it is made in compiled graphs too
        self.call = call
        self.number = number
        """Training forwards of this optimizer step before this one: part of the clock of the random generator."""
        self.sums: dict[int, Tensor] = {}
        """Sums over sequences of the layers computed at their block, without a graph."""
        self.kept: dict[int, Tensor] = {}
        """States that wait for the end of the forward."""
        self.trained: dict[int, bool] = {}
        """Whether the state of a layer carries a gradient."""
        self.count: Tensor | None = None
        """Sequences of two real tokens or more."""
        self.is_read = False
        self.mask: Tensor | None = None
        self.segments: Tensor | None = None
        self.others: list[Tensor] | None = None
        """States of the teacher."""
        self.anchor: Tensor | None = None
        """The last state with a carrier below it."""
        self.scale: Tensor | None = None
        """Gradient of the training loss in the mean over layers of the sums; None: not reached by a backward pass."""

    def end(self) -> None:
        """Release every tensor with a graph, and the arguments; what a recomputation needs stays."""
        self.kept, self.anchor, self.others = {}, None, None
        tokens = self.call.tokens
        self.call = replace(self.call, arguments={}, tokens=tokens and (tokens[0], tokens[1].detach()[:0]))

    def announce(self, handle: Any) -> Callable[[Tensor], None]:
        """A hook of the outputs, for a forward without a tap: what is computed again after it belongs to this one."""

        def hook(gradient: Tensor) -> None:
            handle._in_backward = self

        return hook

    def unreached(self) -> None:
        """A backward pass has ended; the next may not come through the tap."""
        self.scale = None


class Carrier(torch.autograd.Function):
    """The state, unchanged; in backward the loss of its layer gets the gradient ``forward.scale * factor``."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, value: Tensor, forward: Forward, factor: Tensor | float) -> Tensor:
        """``state [..., D]``, ``value`` 0-dim with a graph that begins at ``state``."""
        ctx.forward, ctx.factor, ctx.like = forward, factor, (value.device, value.dtype)
        return state.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Nothing is added where the backward pass does not come from the added term."""
        scale: Tensor | None = ctx.forward.scale
        device, dtype = ctx.like
        return gradient, None if scale is None else (scale * ctx.factor).to(device, dtype), None, None


class Tap(torch.autograd.Function):
    """The value of the term; in backward its gradient is the scale of every carrier below ``anchor``."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, anchor: Tensor, forward: Forward, handle: Any) -> Tensor:
        """``total`` 0-dim, with a graph for the layers that have no carrier."""
        ctx.forward, ctx.handle = forward, handle
        return total.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """No gradient for the anchor: an edge that only orders."""
        ctx.forward.scale = gradient
        ctx.handle._in_backward = ctx.forward
        torch.autograd.Variable._execution_engine.queue_callback(ctx.forward.unreached)
        return gradient, None, None, None


def with_state(output: Any, state: Tensor) -> Any:
    """The output of a module with ``state`` in the place that :func:`decondense.layout.hidden_state` reads."""
    if isinstance(output, Tensor):
        return state
    if isinstance(output, dict) and isinstance(output.get("last_hidden_state"), Tensor):
        output["last_hidden_state"] = state
        return output
    if isinstance(output, tuple) and hasattr(output, "_replace"):
        fields: tuple[str, ...] = getattr(output, "_fields", ())
        named = "last_hidden_state" if "last_hidden_state" in fields else fields[0]
        return output._replace(**{named: state})
    if isinstance(output, tuple):
        return (state, *output[1:])
    if isinstance(output, list):
        output[0] = state
        return output
    output.last_hidden_state = state
    return output
