"""Hand every layer's hidden state to an observer while the model runs, and keep none of them.

Forward hooks on the blocks see each state as it is produced, so that the peak memory is that of the forward pass;
asking the model for ``output_hidden_states`` would hold all L + 1 of them. The states are those that
``output_hidden_states`` lists (bit for bit), and the residual stream before the final norm, which it does not.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from decondense.blocks import Blocks
from decondense.layers import EMBEDDING, FINAL_NORM, STACK_OUTPUT, Layer, block
from decondense.layout import hidden_state

Observer = Callable[[Layer, Tensor], None]
Orient = Callable[[Tensor], Tensor]


class StateError(ValueError):
    """The hidden states of a model cannot be observed; the message names the state and the remedy."""


def first_state(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The hidden state with which a block is called."""
    if args and isinstance(args[0], Tensor):
        return args[0]
    named = kwargs.get("hidden_states")
    if isinstance(named, Tensor):
        return named
    return next((v for v in kwargs.values() if isinstance(v, Tensor) and v.is_floating_point() and v.ndim == 3), None)


def _same(a: Tensor, b: Tensor) -> bool:
    if a is b:
        return True
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    # offloading moves states between devices, so identity is not enough
    return bool(torch.equal(a, b.to(a.device)))


class StateTap:
    """Hooks on one model; ``observe(layer, state)`` is called for the embedding, every block and the final norm.

    Args:
        blocks: The blocks of the model.
        observe: Called with each state.
        orient: Brings a state to [batch, tokens, width], so that states of both layouts can be compared.
    """

    def __init__(self, blocks: Blocks, observe: Observer, orient: Orient = lambda state: state) -> None:
        self._blocks = blocks
        self._orient = orient
        self.tokens_first = False
        """Whether the blocks of the last pass returned [tokens, batch, width]."""
        self._observe = observe
        self._calls = 0
        self._last: Tensor | None = None
        self._normed: Tensor | None = None
        self._stack: Tensor | None = None

    @contextlib.contextmanager
    def attached(self) -> Iterator[StateTap]:
        """Install the hooks, and remove them on leaving."""
        root, path = self._blocks.root, self._blocks.path
        handles = []
        inside = {id(module) for block in self._blocks.modules for module in block.modules()}
        try:
            handles.append(self._blocks.modules[0].register_forward_pre_hook(self._on_entry, with_kwargs=True))
            handles.extend(block.register_forward_hook(self._on_block) for block in self._blocks.modules)
            for module in root.modules():
                if id(module) not in inside and "norm" in type(module).__name__.lower():
                    handles.append(module.register_forward_hook(self._on_norm))
            parts = path.split(".")
            for end in range(len(parts)):
                owner = root.get_submodule(".".join(parts[:end]))
                handles.append(owner.register_forward_hook(self._on_stack))
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def start(self) -> None:
        """Before a forward pass."""
        self._calls = 0
        self._last = self._normed = self._stack = None

    def finish(self) -> None:
        """After a forward pass: the state that left the stack is known only now."""
        if self._last is None:
            raise StateError(
                f"no block of {self._blocks.path!r} ran in the forward pass of {type(self._blocks.root).__name__}. "
                "Name the blocks that do run: blocks='dotted.path'; measure a compiled model before compiling it, or "
                "through the original module."
            )
        if self._stack is not None and not _same(self._stack, self._last):
            named = self._normed is not None and self._stack.shape == self._normed.shape
            self._observe(FINAL_NORM if named else STACK_OUTPUT, self._stack)
        elif self._stack is None and self._normed is not None:
            self._observe(FINAL_NORM, self._normed)
        self.start()

    def _on_entry(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._calls:  # a block that runs more than once (ALBERT) has one entry
            return
        state = first_state(args, kwargs)
        if state is None:
            raise StateError(
                f"the first block ({type(module).__name__}) was called without a recognisable hidden state: its first "
                "argument must be the tensor [batch, tokens, width]."
            )
        self._observe(EMBEDDING, self._orient(state))

    def _on_block(self, module: nn.Module, args: Any, output: Any) -> None:
        state = hidden_state(output)
        if state is None or state.ndim != 3 or not state.is_floating_point():
            what = f"{tuple(state.shape)}" if state is not None else type(output).__name__
            raise StateError(
                f"{block(self._calls + 1)} ({type(module).__name__}) returned {what}; expected hidden states "
                "[batch, tokens, width], alone or first in a tuple."
            )
        self._calls += 1
        oriented = self._orient(state)
        self.tokens_first = oriented is not state
        state = oriented
        self._last, self._normed, self._stack = state, None, None
        self._observe(block(self._calls), state)

    def _on_norm(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._last is None or self._normed is not None or not args or not isinstance(args[0], Tensor):
            return
        if isinstance(output, Tensor) and output.ndim == 3 and _same(self._orient(args[0]), self._last):
            self._normed = self._orient(output)

    def _on_stack(self, module: nn.Module, args: Any, output: Any) -> None:
        # owners finish from the inside out; the first one to finish after the last block owns the stack
        if self._last is None or self._stack is not None:
            return
        state = hidden_state(output)
        if state is None or state.ndim != 3 or not state.is_floating_point():
            return
        state = self._orient(state)
        explicit = not isinstance(output, Tensor) and hasattr(output, "last_hidden_state")
        # a plain module may return logits here: only a declared hidden state may change its width
        if state.shape[:2] == self._last.shape[:2] and (explicit or state.shape[2] == self._last.shape[2]):
            self._stack = state


def accepts(module: nn.Module, argument: str) -> bool:
    """Whether a module's ``forward`` names ``argument`` (a bare ``**kwargs`` does not count)."""
    try:
        return argument in inspect.signature(module.forward).parameters
    except (TypeError, ValueError):
        return False
