"""Outcomes and power in words: the one place where they become text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from decondense.compare import Clock, Difference, Interval, Outcome, Speed
from decondense.formatting import NBSP, number, plural

CLOCKS: dict[Clock, str] = {"cpu": "CPU time", "wall": "wall-clock time"}

ORDER: tuple[Outcome, ...] = ("better", "worse", "lower", "higher", "equivalent", "undecided", "not tested")
"""The outcomes in the order in which a sentence about many arms lists them."""


def outcome(d: Difference) -> str:
    """The outcome, and why nothing was tested where that is so."""
    if d.tested:
        return d.outcome
    return f"{d.outcome}: {'one seed' if d.n < 2 else 'equal in every seed'}"


def direction(d: Difference) -> str:
    """``lower`` or ``higher``, and which of them is good where the quantity has a direction."""
    way = "lower" if d.mean < 0 else "higher"
    return way if d.higher_is_better is None or not d.detected else f"{way}, which is {d.outcome}"


def shares(d: Difference) -> tuple[float, Interval | None]:
    """Mean and interval of a difference of logarithms as a share of the baseline's."""
    bounds = None if d.interval is None else (math.exp(d.interval[0]), math.exp(d.interval[1]))
    return math.exp(d.mean), bounds


def _share(d: Difference, what: str) -> str:
    share, bounds = shares(d)
    span = "" if bounds is None else f" [{100 * bounds[0]:.0f}, {100 * bounds[1]:.0f}]"
    return f"{100 * share:.0f}{NBSP}%{span} of the {what}"


def same_loss(speed: Speed) -> str:
    """Tokens and time to the loss that both reach, as shares of the baseline's."""
    if not speed.resolved:
        return "evaluated too rarely to say when a loss that both reach is reached"
    if speed.in_tokens is None:
        return "the start has a loss that both reach already"
    time = "" if speed.in_time is None else f" and {_share(speed.in_time, CLOCKS[speed.clock])}"
    return f"a loss that both reach after {_share(speed.in_tokens, 'tokens')}{time} ({outcome(speed.in_tokens)})"


def power(differences: Sequence[Difference]) -> str:
    """The smallest effect that these numbers of seeds detect, and the seeds that detect the margin; empty: not tested.

    Of several arms their range.
    """
    tested = [d for d in differences if d.detectable is not None]
    if not tested:
        return ""
    unit = f" {tested[0].unit}" if tested[0].unit and tested[0].unit != "cosine" else ""
    smallest = _span([number(d.detectable) for d in sorted(tested, key=lambda d: d.detectable or 0.0)])
    words = f"a true difference of {smallest}{unit} is detected in 80 % of such studies"
    margin = tested[0].margin
    if margin is None:
        return words
    needed = sorted(d.seeds_needed for d in tested if d.seeds_needed is not None)
    if not needed:
        return f"{words}, and one of {margin:g} with no number of seeds (too few items)"
    seeds = plural(needed[0], "seed") if needed[0] == needed[-1] else f"{needed[0]} to {plural(needed[-1], 'seed')}"
    lost = f" ({len(tested) - len(needed)} arms with no number)" if len(needed) < len(tested) else ""
    return f"{words}, and one of {margin:g} with {seeds}{lost}"


def _span(texts: Sequence[str]) -> str:
    return texts[0] if texts[0] == texts[-1] else f"{texts[0]} to {texts[-1]}"
