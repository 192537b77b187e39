"""Running sums of what a handle logs, on the device, so that a training step never waits for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Totals:
    """Sums since the last log: over sequences per layer, and of the model's own loss."""

    def __init__(self, layers: int, device: torch.device) -> None:
        # sums over sequences per layer, then the number of sequences
        self._sums = torch.zeros(layers + 1, device=device)
        # sum of the losses, then the sum of their shares of an optimizer step's tokens
        self._loss = torch.zeros(2, device=device)

    def add(self, sums_L: Tensor, count: Tensor) -> None:
        """Add the sums over the ``count`` sequences of one forward."""
        if self._sums.device != sums_L.device:
            self._sums = self._sums.to(sums_L.device)
        # tensors, in place: a Python counter would give a compiled model a new graph at every step
        self._sums += torch.cat([sums_L, count.reshape(1).to(sums_L.dtype)]).to(self._sums.dtype)

    def add_loss(self, loss: Tensor, share: Tensor | float) -> None:
        """Add the loss of one forward; ``share``: of the tokens that it was divided by (1: it is a mean)."""
        if self._loss.device != loss.device:
            self._loss = self._loss.to(loss.device)
        part = torch.as_tensor(share, device=loss.device, dtype=self._loss.dtype)
        self._loss += torch.stack([loss.detach().to(self._loss.dtype), part])

    def reset(self) -> None:
        """Start from zero."""
        self._sums.zero_()
        self._loss.zero_()

    def pop(self, reduce: Callable[[Tensor], Tensor] | None) -> tuple[Sequence[float] | None, float | None]:
        """(means of the layers, mean loss) since the last call, None where there was none; waits for the device."""
        totals = torch.cat([self._sums, self._loss.to(self._sums.device)])
        if totals.device.type != "mps":
            totals = totals.double()
        self.reset()
        if reduce is not None:
            totals = reduce(totals)
        *sums, count, loss, share = totals.tolist()
        means = [value / count for value in sums] if count else None
        return means, loss / share if share else None
