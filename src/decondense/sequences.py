r"""Which tokens of a batch are real, and which belong to the same sequence, read off a model's ``forward`` arguments.

Two tokens form a pair only if both are real and both stand in the same document. What says so differs between
frameworks; the rules here are those of transformers, TRL, Axolotl and LLaMA-Factory.

Shapes: B rows, T positions. ``mask_BT`` is True at real tokens; ``segments_BT`` numbers the documents of a packed row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class SequencesError(ValueError):
    """The attention mask or the positions do not fit the hidden states, so that pairs cannot be told."""


def real_and_same(
    batch: Mapping[str, Any], rows: int, positions: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """``(mask_BT, segments_BT)`` of a batch; ``None`` stands for "all tokens are real" and "one sequence per row".

    Documents are told by ``seq_idx``, else by ``position_ids`` (or ``positions``), which start again at 0 with each
    document, else by ``cu_seq_lens_q``, the document boundaries of variable-length attention kernels; and also by an
    integer ``attention_mask`` that numbers the documents 1, 2, ... (Axolotl, LLaMA-Factory).

    Raises:
        SequencesError: a mask or positions whose shape is not ``[rows, positions]``.
    """
    mask = batch.get("attention_mask")
    if mask is not None and not isinstance(mask, Tensor):
        raise SequencesError(
            f"the attention mask is a {type(mask).__name__}; dispersion needs the two-dimensional mask of real tokens "
            "(1 = real), which transformers models also take."
        )
    if mask is not None and tuple(mask.shape) != (rows, positions):
        raise SequencesError(
            f"the attention mask has shape {tuple(mask.shape)} and the hidden states {rows} rows of {positions} "
            "positions, so the real tokens cannot be told. Pass the two-dimensional mask of the same tokens (prompt "
            "tuning, which adds tokens inside the model, is not supported)."
        )
    segments = _segments(batch, rows, positions, device)
    if mask is not None:
        mask = mask.to(device)
        if mask.dtype in (torch.int64, torch.int32):
            numbered = (mask - 1).clamp(min=0).long()
            segments = numbered if segments is None else _refine(segments, numbered)
    # Off the GPU one look costs nothing and saves the segment arithmetic for plain masks and plain positions; on the
    # GPU the look would wait for the device, and in a compiled graph it would break the graph.
    looking_is_free = segments is not None and segments.device.type == "cpu" and not torch.compiler.is_compiling()
    if looking_is_free and segments is not None and not bool(segments.any()):
        segments = None
    return None if mask is None else mask != 0, segments


def count_sequences(mask_BT: Tensor | None, segments_BT: Tensor | None, rows: int, positions: int) -> Tensor | int:
    """Number of sequences that have a pair: at least two real tokens. The divisor of the mean over sequences."""
    if segments_BT is None:
        if mask_BT is None:
            return rows if positions >= 2 else 0
        return (mask_BT.sum(-1) >= 2).sum()
    real = torch.ones_like(segments_BT) if mask_BT is None else mask_BT.to(segments_BT.dtype)
    tokens = torch.zeros_like(segments_BT).scatter_add(1, segments_BT.clamp(max=positions - 1), real)
    return (tokens >= 2).sum()


def count_in_batch(batch: Mapping[str, Any]) -> Tensor | int:
    """Number of sequences with a pair in a collated batch, before any model has seen it."""
    tokens = next(
        (batch[key] for key in ("input_ids", "inputs_embeds", "attention_mask") if isinstance(batch.get(key), Tensor)),
        None,
    )
    if tokens is None or tokens.ndim < 2:
        raise SequencesError(
            f"the sequences of a batch with the entries {', '.join(sorted(map(str, batch)))} cannot be counted; "
            "dispersion needs 'input_ids' or 'inputs_embeds' of shape [rows, positions, ...]."
        )
    rows, positions = tokens.shape[:2]
    return count_sequences(*real_and_same(batch, rows, positions, tokens.device), rows, positions)


def _segments(batch: Mapping[str, Any], rows: int, positions: int, device: torch.device) -> Tensor | None:
    numbered = batch.get("seq_idx")
    if isinstance(numbered, Tensor):
        return _fit("seq_idx", numbered, rows, positions, device)
    position_ids = batch.get("position_ids")
    if position_ids is None:
        position_ids = batch.get("positions")
    # three-dimensional positions are the (time, height, width) of vision models and mark no documents
    if isinstance(position_ids, Tensor) and position_ids.ndim <= 2:
        position_ids = _fit("position_ids", position_ids, rows, positions, device)
        return ((position_ids == 0).cumsum(-1) - 1).clamp(min=0)
    boundaries = batch.get("cu_seq_lens_q")
    if isinstance(boundaries, Tensor):
        if rows != 1:
            raise SequencesError(f"cu_seq_lens_q describes one packed row; the batch has {rows}.")
        places = torch.arange(positions, device=device)
        return torch.bucketize(places, boundaries[1:-1].to(device), right=True)[None]
    return None


def _refine(first_BT: Tensor, second_BT: Tensor) -> Tensor:
    """Number the runs of tokens that have the same id in both."""
    new_BT = (first_BT.diff(dim=-1) != 0) | (second_BT.diff(dim=-1) != 0)
    return torch.nn.functional.pad(new_BT.cumsum(-1), (1, 0))


def _fit(name: str, values: Tensor, rows: int, positions: int, device: torch.device) -> Tensor:
    values = values.to(device)
    if values.ndim == 1:
        values = values[None]
    if values.shape[-1] != positions or values.shape[0] not in (1, rows):
        raise SequencesError(
            f"{name} has shape {tuple(values.shape)}; expected [{rows} or 1, {positions}] to tell the documents apart."
        )
    return values.expand(rows, positions).long()
