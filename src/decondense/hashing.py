"""SHA-256 hashes of files, arrays and parameters, which identify weights, text and data everywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import nn

_BLOCK = 1 << 20


def hash_file(path: Path) -> str:
    """All 64 hexadecimal digits of the SHA-256 of a file, which may be larger than memory."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def hash_array(array: np.ndarray[Any, Any]) -> str:
    """First 16 hexadecimal digits of the SHA-256 of an array's dtype, shape and bytes."""
    digest = hashlib.sha256(f"{array.dtype.str}{array.shape}".encode())
    digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def hash_texts(texts: Iterable[str]) -> str:
    """First 16 hexadecimal digits of the SHA-256 of texts in their order."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:16]


def hash_parameters(model: nn.Module | Mapping[str, torch.Tensor]) -> str:
    """First 16 hexadecimal digits of the SHA-256 of all parameters and buffers, in the order of their names.

    ``model``: a module, or its state dictionary.
    """
    import torch

    state = model if isinstance(model, Mapping) else model.state_dict()
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        data = tensor.detach().cpu().contiguous()
        # bfloat16 has no numpy type; its bytes do
        digest.update(data.reshape(-1).view(torch.uint8).numpy().tobytes() if data.numel() else b"")
    return digest.hexdigest()[:16]
