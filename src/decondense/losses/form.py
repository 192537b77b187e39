"""The object that the file of a form defines: its equation in dense torch, and how the engines compute it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from decondense.config import LossConfig
from decondense.losses.pair_forms import PairForm
from decondense.losses.pair_mask import PairMask


@dataclass(frozen=True, kw_only=True)
class Form:
    """A form for the engines. Give ``pair_form`` for the kind ``pairs``, else ``per_segment``; neither: dense only."""

    definition: Callable[..., Tensor]
    """``(z_UND, pairs_UNN, valid_UN, options)`` to the loss of each segment ``[U]``, with plain autograd.

    ``pairs_UNN`` are the ordered pairs that count, ``valid_UN`` the real tokens (both bool). Forms with a ``draw`` take
    its result as a last argument, here and in ``per_segment``; forms with a teacher the number of features before the
    teacher's."""
    pair_form: Callable[[LossConfig], PairForm] | None = None
    """A sum over pairs, for the tiles and the Triton kernels."""
    extra: Callable[[Tensor, PairMask, LossConfig], Tensor] | None = None
    """A term ``[U]`` that is added to the sum over pairs."""
    per_segment: Callable[..., Tensor] | None = None
    """``(z_RND, pairs, options)`` to the loss of each segment ``[U]``, in memory linear in the tokens."""
    draw: Callable[[int, LossConfig, torch.Generator, Tensor], Tensor] | None = None
    """``(width, options, generator, like)`` to the random numbers of the form."""
