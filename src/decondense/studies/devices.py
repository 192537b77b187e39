"""Which GPUs this process may use, without importing torch: that would cost the runner seconds."""

from __future__ import annotations

import os
import re
from pathlib import Path

_CUDA = ("CUDA_VISIBLE_DEVICES",)
_ROCM = ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")


def gpus(root: Path = Path("/")) -> tuple[str, list[str]]:
    """(the variable that gives a process its GPU, the names of the GPUs that are visible).

    Read from the drivers' files below ``root``: NVIDIA's device files, or the nodes of AMD's ``kfd`` that have
    compute units. GPUs hidden by the platform's variables are not counted.
    """
    nvidia = len(list((root / "dev").glob("nvidia[0-9]*")))
    if nvidia:
        return _CUDA[0], _visible(nvidia, _CUDA)
    return _ROCM[0], _visible(_amd(root), _ROCM)


def _amd(root: Path) -> int:
    count = 0
    for properties in (root / "sys/class/kfd/kfd/topology/nodes").glob("*/properties"):
        try:
            units = re.search(r"^simd_count\s+(\d+)", properties.read_text(), re.MULTILINE)
        except OSError:  # a node that this process may not use
            continue
        count += units is not None and int(units[1]) > 0  # a processor is a node with none
    return count


def _visible(count: int, variables: tuple[str, ...]) -> list[str]:
    if not count:
        return []
    for variable in variables:
        chosen = os.environ.get(variable)
        if chosen is not None:
            names = [name.strip() for name in chosen.split(",")]
            # everything after an invalid name is hidden, as in the drivers
            return names[: names.index("-1")] if "-1" in names else [name for name in names if name]
    return [str(number) for number in range(count)]
