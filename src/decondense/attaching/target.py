r"""The controller behind ``target=``: it moves the weight of each layer so that its mean cosine stays at its target.

The mean cosine of a layer in an optimizer step is

.. math:: c_l = \frac1S \sum_s \frac{1}{n_s (n_s - 1)} \Big(\big|\sum_i \hat z_i\big|^2 - n_s\Big),

over all S sequences (packed documents count as sequences) of two real tokens or more, of all micro-batches and ranks:
the mean over the pairs of different tokens, each sequence counting the same, as in
:attr:`decondense.measuring.Profile.mean_cosine_others`. Batches differ,
so it is smoothed, :math:`\bar c_l \leftarrow \bar c_l + B (c_l - \bar c_l)`. With the target :math:`c^*_l` the error is
:math:`e_l = \mathrm{clip}((\bar c_l - c^*_l) / \max(|c^*_l|, 0.05), -1, 1)`, and after each optimizer step

.. math:: \ln \lambda_l \leftarrow \mathrm{clip}\big(\ln \lambda_l + K e_l + P (e_l - e^\mathrm{before}_l)\big)

between :data:`LOWEST` and :data:`HIGHEST` times the weight that training starts with. The first term integrates: the
weight stands still only at the target, and decays to its lower end where the cosine stays below. The second is zero at
rest; it damps the weight while the cosine falls, and without it the two oscillate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from decondense.attaching.checks import AttachError
from decondense.losses import sum_and_count

RATE = 0.05
"""K: the largest change of the logarithm of a weight in one step by the integral term."""
BRAKE = 5.0
"""P: change of the logarithm of a weight per change of the error."""
SMOOTHING = 0.1
"""B: the share of the newest step in the smoothed cosine."""
LOWEST = 1e-3
"""Lower bound of a weight, as a multiple of the initial weight: the layer is barely dispersed."""
HIGHEST = 1e2
"""Upper bound of a weight, as a multiple of the initial weight: reached if the target cannot be met."""
SMALLEST_SCALE = 0.05
"""Errors are divided by the magnitude of the target, or by this value if that is smaller."""


class Controller:
    """One weight per layer. Lives on the device: a training step never waits for it."""

    def __init__(self, weight: float, targets: Sequence[float], device: torch.device) -> None:
        assert weight > 0, weight
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.targets_L = torch.tensor(targets, dtype=dtype, device=device)
        self._start = math.log(weight)
        # all are changed in place: a compiled graph reads them
        self.log_L = self.targets_L.clone()
        self.smooth_L = self.targets_L.clone()
        self.relative_L = self.targets_L.clone()
        """Weights over their mean."""
        self.mean = torch.zeros((), dtype=dtype, device=device)
        """Mean of the weights."""
        self._pending = torch.zeros(len(targets) + 1, dtype=dtype, device=device)  # sums of cosines, sequences
        self._log = torch.zeros(len(targets) + 1, dtype=dtype, device=device)  # sums of cosines over steps, steps
        self._used_L = self.targets_L.clone()
        self.ended = True
        """Whether the current optimizer step has been counted."""
        self.restart()

    def restart(self) -> None:
        """Start from the first weight."""
        self.log_L.fill_(self._start)
        self.smooth_L.fill_(math.nan)  # nothing before the first step
        self._pending.zero_()
        self._log.zero_()
        self.ended = True
        self._apply()
        self._used_L.copy_(self.log_L.exp())

    def weigh(self, sums_L: Tensor) -> Tensor:
        """Mean over the layers of ``sums_L`` times the weights over their mean."""
        return (sums_L * self.relative_L.to(sums_L.device, sums_L.dtype)).mean()

    @torch.no_grad()
    def observe(self, place: int, z_BTD: Tensor, mask: Tensor | None, segments: Tensor | None) -> None:
        """Add the sequences of one layer in one forward, ``[batch, tokens, width]``."""
        total, count = sum_and_count(z_BTD.detach(), mask, segments_BT=segments, form="mean_cosine")
        if place == 0 and self._pending.device != z_BTD.device:
            self._pending = self._pending.to(z_BTD.device)
        self._pending[place] += total.to(self._pending)
        if place == 0:
            self._pending[-1] += count.to(self._pending)

    @torch.no_grad()
    def end_step(self) -> None:
        """Move the weights by what was observed since the last call; the one reduction over ranks. Every rank calls."""
        if self.ended:
            return
        self.ended = True
        if world_size() > 1:
            dist.all_reduce(self._pending)
        observed = self._pending.to(self.log_L.device)
        count = observed[-1]
        cosine_L = observed[:-1] / count.clamp(min=1)
        before_L = torch.where(self.smooth_L.isnan(), cosine_L, self.smooth_L)
        smooth_L = before_L + SMOOTHING * (cosine_L - before_L)
        error_L, error_before_L = self._error(smooth_L), self._error(before_L)
        # nothing observed, or a state that is NaN, which others report: the weight stands still
        known_L = (count > 0) & cosine_L.isfinite()
        change_L = RATE * error_L + BRAKE * (error_L - error_before_L)
        bounds = self._start + math.log(LOWEST), self._start + math.log(HIGHEST)
        self._used_L.copy_(self.log_L.exp())
        self.log_L.copy_(torch.where(known_L, (self.log_L + change_L).clamp(*bounds), self.log_L))
        self.smooth_L.copy_(torch.where(known_L, smooth_L, self.smooth_L))
        self._log += torch.cat([torch.where(known_L, cosine_L, 0.0), known_L.all().reshape(1).to(cosine_L.dtype)])
        self._pending.zero_()
        self._apply()

    def _error(self, cosine_L: Tensor) -> Tensor:
        return ((cosine_L - self.targets_L) / self.targets_L.abs().clamp(min=SMALLEST_SCALE)).clamp(-1, 1)

    def _apply(self) -> None:
        weights_L = self.log_L.exp()
        self.mean.copy_(weights_L.mean())
        self.relative_L.copy_(weights_L / self.mean)

    def pop(self, keys: Sequence[str]) -> dict[str, float]:
        """For a log: the weights of the last step, and the mean cosines of the steps since the last call."""
        weights, (*sums, steps) = self._used_L.tolist(), self._log.tolist()
        self._log.zero_()
        values = {"dispersion_weight": sum(weights) / len(weights)}
        values.update({f"dispersion_weight/{key}": weight for key, weight in zip(keys, weights, strict=True)})
        if steps:
            values["dispersion_cosine"] = sum(sums) / len(sums) / steps
            values.update({f"dispersion_cosine/{key}": total / steps for key, total in zip(keys, sums, strict=True)})
        return values

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers.

        Raises:
            AttachError: there are several ranks, and the current step has not ended.
        """
        if not self.ended and world_size() > 1:
            raise AttachError(
                "the cosines of this step have not been summed over the ranks: call handle.end_step() on every rank "
                "after the optimizer step, then save the state."
            )
        numbers = {name: getattr(self, f"{name}_L").tolist() for name in ("targets", "log", "smooth")}
        numbers["smooth"] = [None if math.isnan(value) else value for value in numbers["smooth"]]
        return {**numbers, "pending": self._pending.tolist(), "ended": self.ended}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume.

        Raises:
            AttachError: the targets differ, for example because the profile has changed.
        """
        if list(state["targets"]) != self.targets_L.tolist():
            raise AttachError(
                f"the saved state has the targets {_shown(state['targets'])}, but this model has "
                f"{_shown(self.targets_L)}. Attach with the saved targets (has the profile changed?)."
            )
        smooth = [math.nan if value is None else value for value in state["smooth"]]
        for tensor, values in ((self.log_L, state["log"]), (self.smooth_L, smooth), (self._pending, state["pending"])):
            tensor.copy_(torch.tensor(values, dtype=tensor.dtype))
        self.ended = bool(state["ended"])
        self._apply()
        self._used_L.copy_(self.log_L.exp())


def world_size() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _shown(targets: Any) -> str:
    return ", ".join(f"{float(value):.4g}" for value in targets)
