"""What ``decondense env --gpu`` says: whether the fused kernels run on a device, give correct results, and how fast."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from decondense.config import LossConfig
from decondense.config.loss import Impl
from decondense.forms import FORMS
from decondense.losses import engine
from decondense.losses.functional import dispersion_loss

ALLOWED = {"float32": 3e-4, "bfloat16": 8e-3, "float16": 6e-3}
"""Relative error of the gradient (norm) by dtype: float32 pairs of repeated tokens, and bfloat16's own rounding."""


@dataclass
class DeviceCheck:
    """What :func:`check_device` saw."""

    device: str
    errors: dict[str, float] = field(default_factory=dict)
    """By dtype: the largest relative error of the gradient (norm) over all forms, against dense float64."""
    broken: str | None = None
    """The error that stopped the kernels."""
    milliseconds: dict[str, float] = field(default_factory=dict)
    """Forward and backward of one call by ``fused`` and ``chunked``, median."""
    timed: str = ""
    auto: dict[str, str] = field(default_factory=dict)
    """By dtype: the implementation that ``impl="auto"`` takes."""

    @property
    def right(self) -> bool:
        """Whether the kernels ran and every error is allowed."""
        return self.broken is None and all(error <= ALLOWED[dtype] for dtype, error in self.errors.items())


def check_device(
    device: str = "cuda",
    shape: tuple[int, int, int] = (4, 512, 256),
    timed: tuple[int, int, int] = (8, 1024, 768),
    rounds: int = 20,
) -> DeviceCheck:
    """Compare the kernels with dense float64 for every form and dtype on ``shape``, then time them on ``timed``."""
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device
    found = DeviceCheck(name)
    draw = torch.Generator().manual_seed(0)
    z = torch.randn(shape, generator=draw) + 0.4
    z[:, 1] = z[:, 0]  # a repeated token is where rounding hurts most
    mask = (torch.rand(shape[:2], generator=draw) > 0.2).to(device)
    try:
        for name in ALLOWED:
            states = z.to(device, getattr(torch, name))
            found.errors[name] = max(_error(states, mask, form) for form, info in FORMS.items() if info.fused)
        states = torch.randn(timed, generator=draw).to(device, torch.bfloat16)
        found.timed = " x ".join(map(str, timed))
        for impl in ("fused", "chunked"):
            taken = [_milliseconds(states, impl) for _ in range(rounds + 1)]
            found.milliseconds[impl] = statistics.median(taken[1:])
    except Exception as error:  # a compiler, a driver or a kernel can raise anything
        found.broken = engine.failure(error)
    try:
        found.auto = {name: engine.choose(LossConfig(), z.to(device, getattr(torch, name))) for name in ALLOWED}
    except Exception as error:  # after an illegal access nothing runs on the device any more
        found.broken = found.broken or engine.failure(error)
    return found


def _gradient(z: Tensor, mask: Tensor | None, form: str, impl: Impl) -> Tensor:
    z = z.clone().requires_grad_()
    dispersion_loss(z, mask, form=form, impl=impl).backward()  # type: ignore[no-untyped-call]
    assert z.grad is not None
    return z.grad.double()


def _error(z: Tensor, mask: Tensor, form: str) -> float:
    exact = _gradient(z.double(), mask, form, "reference")
    return float((_gradient(z, mask, form, "fused") - exact).norm() / exact.norm())


def _milliseconds(z: Tensor, impl: Impl) -> float:
    def wait() -> None:
        if z.is_cuda:
            torch.cuda.synchronize()

    wait()
    start = time.perf_counter()
    _gradient(z, None, "angular", impl)
    wait()
    return 1000 * (time.perf_counter() - start)


def sentences(found: DeviceCheck) -> list[str]:
    """The check in plain sentences, the verdict last."""
    auto = ", ".join(f"{impl} for {name}" for name, impl in found.auto.items())
    end = f"impl='auto', the default, selects {auto} here." if auto else "The device does not work after that error."
    if found.broken is not None:
        return [f"The fused kernels do not run on {found.device}: {found.broken}.", end]
    errors = ", ".join(f"{name} {error:.1e}" for name, error in found.errors.items())
    allowed = ", ".join(f"{bound:.0e}" for bound in ALLOWED.values())
    ratio = found.milliseconds["chunked"] / found.milliseconds["fused"]
    return [
        f"The fused kernels run on {found.device}.",
        f"Their gradients are {'correct' if found.right else 'WRONG'}: largest relative error against float64 over all "
        f"forms, {errors} (allowed: {allowed}).",
        f"One call on {found.timed} bfloat16 states, forward and backward: fused {found.milliseconds['fused']:.3g} ms, "
        f"tiled engine {found.milliseconds['chunked']:.3g} ms, {ratio:.2g} times as long.",
        end,
    ]
