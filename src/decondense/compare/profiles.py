"""Quantities of a condensation profile: mean cosines and their trend with depth.

The dispersion loss is designed to reduce condensation, which is not good in itself: no direction counts as better.
State 0 of a profile is the embedding, states 1 to L are the blocks.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from decondense.compare.quantity import Quantity
from decondense.compare.study import Cell
from decondense.layers import deep_half
from decondense.records import Row


def _of_profile(take: Callable[[Row], float | None]) -> Callable[[Cell], float | None]:
    def of(cell: Cell) -> float | None:
        profile = cell.final_profile()
        return None if profile is None else take(profile)

    return of


def blocks(profile: Row) -> float | None:
    """Mean cosine averaged over the blocks, the embedding left out."""
    cosines = profile["mean_cosine"][1:]
    return float(np.mean(cosines)) if cosines else None


def last(profile: Row, n: int = 1) -> float:
    """Mean cosine averaged over the last ``n`` states."""
    return float(np.mean(profile["mean_cosine"][-n:]))


def half(profile: Row) -> int:
    """Number of blocks in the deep half."""
    return deep_half(len(profile["mean_cosine"]))


def deep(profile: Row) -> float:
    """Mean cosine averaged over the last L/2 blocks: the paper's alternative to the rank correlation."""
    return last(profile, half(profile))


def _number(name: str) -> Callable[[Row], float | None]:
    return lambda profile: None if profile[name] is None else float(profile[name])


def last_of(n: int) -> Callable[[Cell], float | None]:
    """Mean cosine of the last ``n`` states of a run's final checkpoint."""
    return _of_profile(lambda profile: last(profile, n))


def state(number: int, label: str, labels: tuple[str, ...]) -> Quantity:
    """Mean cosine of one state, of the runs whose states are ``labels``."""
    return Quantity(
        id=f"mean_cosine.state.{number}",
        title=f"mean cosine, {label}",
        of=_of_profile(lambda p: float(p["mean_cosine"][number]) if tuple(p["layers"]) == labels else None),
        unit="cosine",
        short=f"cosine, {label}",
    )


BLOCKS = Quantity(
    id="mean_cosine.blocks",
    title="mean cosine, all blocks",
    of=_of_profile(blocks),
    unit="cosine",
    short="cosine, blocks",
)
LAST = Quantity(
    id="mean_cosine.last",
    title="mean cosine, last layer",
    of=_of_profile(last),
    unit="cosine",
    short="cosine, last layer",
    shown=frozenset({"summary", "size"}),
)
DEEP = Quantity(
    id="mean_cosine.deep",
    title="mean cosine, last L/2 layers",
    of=_of_profile(deep),
    unit="cosine",
    short="cosine, last L/2",
    shown=frozenset(),
)
SPEARMAN = Quantity(
    id="spearman.depth",
    title="Spearman of mean cosine with depth",
    of=_of_profile(_number("spearman")),
    short="Spearman (depth)",
    shown=frozenset({"summary", "size"}),
)
KENDALL = Quantity(
    id="kendall.depth",
    title="Kendall of mean cosine with depth",
    of=_of_profile(_number("kendall")),
    short="Kendall (depth)",
    shown=frozenset({"summary", "size"}),
)
