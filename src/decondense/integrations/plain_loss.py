"""The trainer's own loss without the dispersion term, summed for the log: the key ``cross_entropy``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from decondense.attaching import DispersionHandle


class PlainLoss:
    """Running sum of losses since the last log; the caller chooses the divisor."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        device = torch.device(device)
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._sum = torch.zeros((), device=device, dtype=dtype)
        self._count = 0

    def add(self, loss: Tensor, factor: float = 1.0) -> None:
        """Add the loss of a micro-batch, without its graph and without waiting for the device."""
        self._sum += factor * loss.detach().to(self._sum.device, self._sum.dtype)
        self._count += 1

    def pop(self, reduce: Callable[[Tensor], Tensor] | None = None) -> tuple[float, int]:
        """The sum since the last call, summed over ranks by ``reduce``, and the number of losses on this rank."""
        total, count = self._sum.clone(), self._count
        self.reset()
        return float(total if reduce is None else reduce(total)), count

    def reset(self) -> None:
        """Start from zero."""
        self._sum.zero_()
        self._count = 0


class KeepPlainLoss:
    """A forward hook that passes the loss in a model's output to ``add``, before :func:`decondense.attach` adds to it.

    A class, not a closure, so that models can still be copied and pickled. Register it before attaching: hooks run in
    the order in which they were registered.
    """

    def __init__(self, add: Callable[[Tensor, dict[str, Any]], None]) -> None:
        self.add = add

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Pass the one differentiable scalar of the output to ``add``; :func:`attach` refuses a model without one."""
        if not module.training or not torch.is_grad_enabled():
            return
        if isinstance(output, dict):
            entries = [output.get("loss")]
        else:
            entries = list(output) if isinstance(output, (tuple, list)) else [getattr(output, "loss", output)]
        losses = [entry for entry in entries if isinstance(entry, Tensor) and entry.ndim == 0 and entry.requires_grad]
        if len(losses) == 1:
            self.add(losses[0], kwargs)


def keep_plain_loss(root: nn.Module, attach: Callable[[], DispersionHandle], hook: KeepPlainLoss) -> DispersionHandle:
    """Attach with ``hook`` in front; detaching the handle removes both."""
    registered = root.register_forward_hook(hook, with_kwargs=True)
    try:
        handle = attach()
    except BaseException:
        registered.remove()
        raise
    handle.on_detach(registered.remove)
    return handle
