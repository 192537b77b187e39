"""``measure_states``: the statistics of hidden states that another program computed, passage by passage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from decondense.config import MeasureConfig, one_of
from decondense.formatting import plural
from decondense.layers import EMBEDDING, FINAL_NORM, Layer, block, parse
from decondense.measuring.metrics import LayerPairs, resolve_metrics
from decondense.measuring.profile import Profile, unequal
from decondense.measuring.running import MeasureError, Progress, assembled, check_length
from decondense.measuring.statistics import LayerStatistics

_D = MeasureConfig()


def measure_states(
    passages: Iterable[Any],
    *,
    final_norm: bool,
    layers: Sequence[str | int | Layer] | None = None,
    tokens: int | None = None,
    skip_tokens: int = 0,
    histograms: Sequence[str] = _D.histograms,
    metrics: str | Iterable[str] = _D.metrics,
    info: Mapping[str, Any] | None = None,
    total: int | None = None,
    progress: Progress | None = None,
) -> Profile:
    """Measure hidden states that already exist, from any engine: :func:`measure` without a model.

    One passage is in memory at a time. For the same states, the result equals that of :func:`measure` bit for bit.

    Args:
        passages: One item per passage: a floating-point tensor or array [S, N, D] (states, tokens, width), or a
            sequence of S of them, [N, D] or [1, N, D], as in Hugging Face's ``hidden_states``.
        final_norm: Whether the last state is after the model's final norm: True for Hugging Face's ``hidden_states``,
            False for what vLLM extracts.
        layers: What the S states are: 0 for the embedding, k for the state after block k, or labels as in
            ``Profile.all_layers``. None: the embedding and every block. With ``final_norm`` the highest number is the
            last block's state after the norm, unless ``"final norm"`` is listed itself.
        tokens: Length to which passages are cut. None: all their tokens.
        skip_tokens: Leave the first tokens of each passage out of every statistic.
        histograms: As for :func:`measure`.
        metrics: As for :func:`measure`.
        info: What was measured (``model``, ``source``, ``parameters``), kept in the profile.
        total: Number of passages, for ``progress``, if ``passages`` has no length.
        progress: Called with ("measuring", passages done, total passages).

    Raises:
        MeasureError: there are no passages; a shape or type is wrong; numbers of states, tokens or features do not
            match; or the layers are not in order.
        NotFiniteError: a state is NaN or infinite (named by layer and passage).
    """
    for kind in histograms:
        one_of("histogram", kind, ("pooled", "averaged"))
    chosen = resolve_metrics(metrics)
    total = total if total is not None or not hasattr(passages, "__len__") else len(passages)  # type: ignore[arg-type]
    averaged, no_averaged = "averaged" in histograms, ""
    seen: dict[Layer, LayerStatistics] = {}
    between = LayerPairs(chosen)
    widths: list[int] = []
    lengths: list[int] = []
    names: tuple[Layer, ...] = ()
    last_block = True
    room = total or 16
    for number, given in enumerate(passages):
        states = [state[:tokens] for state in _states(given, number)]
        if not names:
            names, last_block = named(layers, len(states), final_norm)
            widths = [state.shape[1] for state in states]
        if len(states) != len(names):
            raise MeasureError(
                f"passage {number} has {plural(len(states), 'state')}, but there are {len(names)} layers."
            )
        length = len(states[0])
        for layer, state, width in zip(names, states, widths, strict=True):
            if tuple(state.shape) != (length, width):
                raise MeasureError(
                    f"layer '{layer}' of passage {number} has states of shape {list(state.shape)}; expected [{length}, "
                    f"{width}] (tokens, width), as in the states before it."
                )
        check_length(number, length, skip_tokens)
        lengths.append(length - skip_tokens)
        if averaged and lengths[-1] != lengths[0]:
            averaged, no_averaged = False, unequal(lengths)
            if tuple(histograms) == ("averaged",):
                raise MeasureError(no_averaged)
        for layer, state in zip(names, states, strict=True):
            if layer not in seen:
                seen[layer] = LayerStatistics(
                    layer.label,
                    passages=room,
                    device=state.device,
                    pooled="pooled" in histograms,
                    averaged=averaged,
                    tokens=lengths[0],
                    metrics=chosen,
                    first=skip_tokens,
                )
            row = seen[layer]
            if number >= len(row.cosine_P):
                row.resize(2 * number)
            if row.pairs is not None and not averaged:
                row.pairs.strips = None
            row.add(state[None, skip_tokens:], [number])
            between.take(state[None, skip_tokens:])
        between.reduce([number])
        if progress is not None:
            progress("measuring", number + 1, total or number + 1)
    if not lengths:
        raise MeasureError("there are no passages to measure; give at least one.")
    for row in seen.values():
        row.resize(len(lengths))
    if no_averaged:
        no_averaged = unequal(lengths)
    told = {"model": "states", "parameters": None, **(info or {})}
    told |= {"skip_tokens": skip_tokens} if skip_tokens else {}
    return assembled(
        seen, np.array(lengths), chosen, between, no_averaged=no_averaged, info=told, last_block=last_block
    )


def _states(given: Any, number: int) -> list[Tensor]:
    """The states of a passage, [N, D] each."""
    items = list(given) if isinstance(given, (Tensor, np.ndarray, Sequence)) else [given]
    if isinstance(given, (Tensor, np.ndarray)) and given.ndim != 3:
        raise MeasureError(
            f"passage {number} has states of shape {list(given.shape)}; expected [states, tokens, width], or a "
            "sequence of [tokens, width]."
        )
    if not items:
        raise MeasureError(f"passage {number} has no states.")
    return [_state(item, number) for item in items]


def _state(item: Any, number: int) -> Tensor:
    if isinstance(item, np.ndarray):
        if not readable(item.dtype):
            raise MeasureError(
                f"passage {number} holds {item.dtype} values; states are float16, float32 or float64 numbers."
            )
        item = torch.from_numpy(np.array(item, dtype=item.dtype.newbyteorder("=")))
    if not isinstance(item, Tensor) or not item.is_floating_point():
        kind = str(item.dtype) if isinstance(item, Tensor) else type(item).__name__
        raise MeasureError(f"passage {number} holds {kind}; states are floating-point tensors or arrays.")
    if item.ndim == 3 and len(item) == 1:
        item = item[0]
    if item.ndim != 2 or not item.numel():
        raise MeasureError(f"passage {number} has a state of shape {list(item.shape)}; expected [tokens, width].")
    state: Tensor = item.detach().contiguous()
    return state


def readable(dtype: np.dtype[Any]) -> bool:
    """Whether torch has the type of an array of states: not integers, and not the longer floats of some machines."""
    return dtype.kind == "f" and dtype.itemsize <= 8


def named(layers: Sequence[str | int | Layer] | None, count: int, final_norm: bool) -> tuple[tuple[Layer, ...], bool]:
    """The identities of ``count`` states, and whether the last block's state before the final norm is one of them.

    Raises:
        MeasureError: a wrong number of layers, no layers, or layers that are not in the order of the computation.
    """
    chosen = [_layer(entry) for entry in (range(count) if layers is None else layers)]
    if len(chosen) != count:
        raise MeasureError(
            f"layers names {plural(len(chosen), 'layer')}, but each passage has {plural(count, 'state')}."
        )
    depth = [layer for layer in chosen if layer.counts_as_depth]
    tail = [layer for layer in chosen if not layer.counts_as_depth]
    numbers = [layer.number for layer in depth]
    if chosen != depth + tail or numbers != sorted(set(numbers)) or len(set(tail)) < len(tail) or not depth:
        raise MeasureError(f"layers must be in the order of the computation: {', '.join(map(str, chosen))}.")
    if not final_norm or any(layer.follows_blocks for layer in tail):
        if not final_norm and any(layer.follows_blocks for layer in tail):
            raise MeasureError(
                "layers contains 'final norm', but final_norm=False says that no state is after the norm; pass "
                "final_norm=True."
            )
        return tuple(chosen), True
    if depth[-1] == EMBEDDING:
        raise MeasureError("final_norm=True needs the state of the last block, but the embedding is the only state.")
    return (*depth[:-1], FINAL_NORM, *tail), False


def _layer(entry: str | int | Layer) -> Layer:
    if isinstance(entry, Layer):
        return entry
    if isinstance(entry, bool) or (isinstance(entry, int) and entry < 0):
        raise MeasureError(f"layer {entry!r}: expected 0 for the embedding, k for block k, or a label.")
    try:
        return parse(entry) if isinstance(entry, str) else block(entry) if entry else EMBEDDING
    except ValueError as error:
        raise MeasureError(str(error)) from error
