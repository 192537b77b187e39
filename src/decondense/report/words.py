"""Outcomes and power in words: the one place where they become text."""

from __future__ import annotations

from collections.abc import Sequence

from decondense.compare import Difference, Outcome
from decondense.formatting import number, plural

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
