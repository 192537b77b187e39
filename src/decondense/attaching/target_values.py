"""Where targets come from: a number, one per layer, a measured profile, or a reference that the package ships."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from decondense.atlas import EntryError, find_reference, read_summary, references
from decondense.attaching.checks import AttachError
from decondense.blocks import resolve_layers
from decondense.layers import EMBEDDING, FINAL_NORM, Layer, block, parse

Target = float | Sequence[float] | str


def resolve_target(target: Target, layers: Sequence[Layer], blocks: int) -> list[float]:
    """The mean cosine over pairs of different tokens that each of ``layers`` is held to.

    Args:
        target: as for :func:`decondense.attach`.
        layers: the chosen states of a model of ``blocks`` blocks.
        blocks: number of blocks.

    Raises:
        AttachError: a wrong number of values; no such profile or reference; one that has no value for these layers.
    """
    if isinstance(target, str):
        return _from_name(target, layers, blocks)
    if not isinstance(target, Sequence):
        return [float(target)] * len(layers)
    if len(target) != len(layers):
        raise AttachError(
            f"target has {len(target)} values for {len(layers)} layers ({', '.join(map(str, layers))}); give one "
            "value for each, or one for all."
        )
    return [float(value) for value in target]


def _from_name(name: str, layers: Sequence[Layer], blocks: int) -> list[float]:
    try:
        entry = find_reference(name)
    except EntryError as error:
        raise AttachError(f"target {name!r}: {error}") from None
    shipped = any(entry is reference for reference in references())
    profile = None if shipped else _profile(name)
    if profile is not None:
        return _interpolated(name, _measured(name, profile), len(profile["layers"]) - 1, layers, blocks)
    if entry.mean_cosine is not None:
        theirs = len(entry.mean_cosine) - 1
        states = [EMBEDDING, *map(block, range(1, theirs)), FINAL_NORM if entry.final == "after" else block(theirs)]
        cosines = [_others(name, value, entry.tokens) for value in entry.mean_cosine]
        return _interpolated(name, dict(zip(states, cosines, strict=True)), theirs, layers, blocks)
    if entry.deep_half is None:
        able = [other.model for other in references() if other.mean_cosine or other.deep_half is not None]
        raise AttachError(
            f"target {name!r}: this reference has no mean cosine of its layers or of their deep half. These have: "
            f"{', '.join(able)}; or give a profile that decondense measure wrote."
        )
    outside = [str(layer) for layer in layers if layer not in _deep(blocks)]
    if outside:
        raise AttachError(
            f"target {name!r}: this reference has the mean of the deep half only, which does not apply to "
            f"{', '.join(outside)}; attach with layers='deep'."
        )
    return [_others(name, entry.deep_half, entry.tokens)] * len(layers)


def _deep(blocks: int) -> set[Layer]:
    return {FINAL_NORM, *(block(number + 1) for number in resolve_layers("deep", blocks))}


def _profile(path: str) -> dict[str, Any] | None:
    """The summary of a profile; None: the file is an entry of an atlas."""
    try:
        return read_summary(path)
    except EntryError:
        return None


def _measured(name: str, summary: Mapping[str, Any]) -> dict[Layer, float]:
    """Mean cosine over pairs of different tokens of every state of a profile, both last ones too."""
    skipped = summary["info"].get("skip_tokens")
    if skipped:
        raise AttachError(
            f"target {name!r} was measured without the first {skipped} tokens of each passage, but training includes "
            "them; measure again without skip_tokens."
        )
    if not summary.get("all_layers") or not summary.get("mean_cosine_others"):
        raise AttachError(
            f"target {name!r} lacks the mean cosines over pairs of different tokens (all_layers, mean_cosine_others): "
            "measure again."
        )
    tokens = summary["passage_tokens"]
    found = {parse(state): _others(name, v["mean_cosine"], tokens) for state, v in summary["all_layers"].items()}
    return found | {parse(n): c for n, c in zip(summary["layers"], summary["mean_cosine_others"], strict=True)}


def _others(name: str, cosine: float, tokens: int | None) -> float:
    """Without the pairs of a token with itself, which a mean cosine of a profile includes."""
    if tokens is None:
        raise AttachError(
            f"target {name!r}: its mean cosine depends on the number of tokens per passage, which is not recorded; "
            "give numbers, or measure again."
        )
    return (tokens * cosine - 1) / (tokens - 1)


def _interpolated(
    name: str, states: Mapping[Layer, float], theirs: int, layers: Sequence[Layer], blocks: int
) -> list[float]:
    """Linear in relative depth: state n of ``blocks`` lies at n / ``blocks`` of their depth."""
    inner = {
        state.number: cosine for state, cosine in states.items() if state.counts_as_depth and state.number < theirs
    }
    ends = {
        state.follows_blocks: cosine
        for state, cosine in states.items()
        if state.follows_blocks or state.number == theirs
    }
    found = []
    for layer in layers:
        after = layer == FINAL_NORM
        depth = (blocks if after else layer.number) * theirs / blocks
        known = {**inner, theirs: ends[after]} if after in ends else inner
        if max(known, default=-1) < depth:
            where = "after" if after else "before"
            raise AttachError(
                f"target {name!r} has no state at the depth of {layer} {where} the final norm; attach with "
                f"final_norm={not after}, or choose shallower layers."
            )
        places = sorted(known)
        found.append(float(np.interp(depth, places, [known[place] for place in places])))
    return found
