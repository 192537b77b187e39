# ruff: noqa: D102
"""The hooks on one model. Classes, not closures, so that models can still be copied and pickled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from decondense.blocks import unwrap

if TYPE_CHECKING:
    from decondense.attaching.computation import Computation
    from decondense.attaching.handle import DispersionHandle


class Hook:
    """A hook that knows its handle."""

    def __init__(self, handle: DispersionHandle) -> None:
        self.handle = handle


class Begin(Hook):
    """Before the forward of the whole model."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.handle._begin(module, args, kwargs)


class End(Hook):
    """After the forward of the whole model: the loss is added here."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return self.handle._end(output)


class Keep(Hook):
    """After a block: stores its output, or adds the gradient there."""

    def __init__(self, handle: DispersionHandle, key: int) -> None:
        super().__init__(handle)
        self.key = key

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return self.handle._keep(self.key, module, output)


class KeepInput(Keep):
    """Before the first block: stores its input, the embedding."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> Any:
        state = self.handle._keep(self.key, module, args[0] if args else kwargs.get("hidden_states"))
        if state is None:
            return None
        return ((state, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": state})


class Watch:
    """Counts a loss that is discarded without a gradient."""

    def __init__(self, handle: Computation) -> None:
        self.handle = handle
        self.used = False

    def reached(self, gradient: Tensor) -> None:
        """The gradient has reached the loss."""
        self.used = True
        self.handle._discarded = 0

    def __del__(self) -> None:
        if not self.used:
            self.handle._discarded += 1


def attached(model: nn.Module) -> DispersionHandle | None:
    """The handle that is attached to ``model`` or to one of its blocks, if there is one."""
    for module in unwrap(model).modules():
        # torch has no public way to list a module's hooks; without these attributes the list is empty
        tables: list[dict[int, Any]] = [vars(module).get(name, {}) for name in ("_forward_hooks", "_forward_pre_hooks")]
        for hook in (hook for table in tables for hook in table.values()):
            if isinstance(hook, Hook) and hook.handle.is_attached:
                return hook.handle
    return None
