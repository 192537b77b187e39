r"""Randomness with an owner: named generators, a fence around everything that is not the training step, and hashes.

A run is paired with another when both start from the same weights and see the same tokens in the same order. That only
holds if nothing else draws from the generators that training uses, so whatever needs random numbers takes a generator
named after its purpose, and whatever cannot be trusted runs inside :func:`fence`. torch is imported by the functions
that need it: the order of the data is decided by processes that never do.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

# training and its tests name weights by the hashes below; they live in `hashing`
from decondense.hashing import hash_array as hash_array
from decondense.hashing import hash_parameters as hash_parameters

if TYPE_CHECKING:
    import torch
    from torch import nn


def derive(seed: int, purpose: str, step: int = 0) -> int:
    """A 63-bit seed for (seed, purpose, step): the head of their SHA-256, so that neighbours are unrelated."""
    digest = hashlib.sha256(f"{seed}\x1f{purpose}\x1f{step}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, purpose: str, step: int = 0, device: str | torch.device = "cpu") -> torch.Generator:
    """A separate torch generator for (seed, purpose, step); the global generators are neither read nor advanced."""
    import torch

    return torch.Generator(device=device).manual_seed(derive(seed, purpose, step))


@contextlib.contextmanager
def fence() -> Iterator[None]:
    """Restore the random state of Python, numpy and torch (CPU and every CUDA device) on exit."""
    import torch

    state = (random.getstate(), np.random.get_state(), torch.get_rng_state())
    # only a process that uses CUDA has a state there; asking must not start the driver
    cuda = torch.cuda.get_rng_state_all() if torch.cuda._initialized else None
    try:
        yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.set_rng_state(state[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients in the block; every module's mode and the random state are then restored."""
    import torch

    modes = [(module, module.training) for module in model.modules()]
    with fence(), torch.no_grad():
        try:
            model.eval()
            yield
        finally:
            for module, training in modes:
                module.training = training


def seed_everything(seed: int, purpose: str) -> None:
    """Seed the global generators of Python, numpy and torch. Only for the owner of a process: a training run."""
    import torch

    value = derive(seed, purpose)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)
