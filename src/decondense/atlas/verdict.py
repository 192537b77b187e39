r"""How condensed a model is, compared with other models, and where its metrics disagree: ids and numbers.

The scale rests on what a mean cosine is. With unit vectors :math:`\hat z_i` of the N tokens of a passage,
:math:`\mu = N^{-2}\sum_{ij} c_{ij} = \lVert N^{-1}\sum_i \hat z_i \rVert^2`: the share of the (unit) squared length
that all tokens have in common, in one direction; :math:`1 - \mu` is what distinguishes them. The bounds of
:data:`SCALE` are a fifth, a half and four fifths of it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from decondense.atlas.entry import Entry, EntryError
from decondense.atlas.references import references
from decondense.layers import deep_half

Level = Literal["low", "moderate", "high", "severe"]
Trend = Literal["rises", "none", "falls"]
Outcome = Literal["more", "alike", "less"]
Relation = Literal["chosen", "model", "family", "architecture", "size"]

SCALE: tuple[tuple[Level, float], ...] = (("low", 0.2), ("moderate", 0.5), ("high", 0.8), ("severe", math.inf))
"""Levels of the mean cosine of the deep half, each with its upper bound."""
TREND = 0.5
"""Spearman's rho at or above which the cosine rises with depth (or falls, if negative)."""
ALIKE = {"deep_half": 0.05, "last": 0.05, "spearman": 0.1, "kendall": 0.1}
"""Differences up to which two models count as alike. A correlation can be read from a published plot to within 0.03."""
SIZE = 2.0
"""Factor within which two models count as the same size."""


def level(cosine: float) -> Level:
    """The level of a mean cosine."""
    return next(name for name, bound in SCALE if cosine < bound)


@dataclass(frozen=True)
class Comparison:
    """A measurement beside a reference."""

    reference: Entry
    relation: Relation
    """Why this reference: it was chosen, or is the closest by name, family, architecture or size."""
    same_text: bool
    """Whether the text is the same, by its passages or by its name."""
    same_passages: bool | None
    """None: not known."""
    same_tokens: bool | None
    """Whether the passages are equally long; None: not known."""
    values: dict[str, tuple[float, float, Outcome]]
    """For each metric that both have: the value here, the value of the reference, and the outcome here."""


@dataclass(frozen=True)
class Disagreement:
    """Two numbers that disagree, by the rule ``id`` of :data:`RULES`."""

    id: str
    first: float
    second: float


@dataclass(frozen=True)
class Verdict:
    """What a profile says about a model; :func:`decondense.atlas.sentences` makes three sentences of it."""

    level: Level
    deep_half: float
    last: float
    last_level: Level
    trend: Trend
    spearman: float | None
    """None: every state has the same mean cosine."""
    kendall: float | None
    blocks: int
    final: Literal["after", "before"]
    text: str
    comparison: Comparison | None
    """None: no reference of this size, family or architecture."""
    disagreements: tuple[Disagreement, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        found = dataclasses.asdict(dataclasses.replace(self, comparison=None))
        found["disagreements"] = list(found["disagreements"])
        if self.comparison is not None:
            shown = {f.name: getattr(self.comparison, f.name) for f in dataclasses.fields(Comparison)}
            shown["reference"] = self.comparison.reference.model_dump()
            shown["values"] = {name: list(value) for name, value in self.comparison.values.items()}
            found["comparison"] = shown
        return found


def judge(summary: Mapping[str, Any], reference: Entry | None = None) -> Verdict:
    """The verdict on the summary of a profile.

    Args:
        summary: :meth:`decondense.measuring.Profile.summary`, or what ``read_summary`` reads.
        reference: what to compare with; None: the closest shipped reference, if one is close enough.

    Raises:
        EntryError: the reference takes the last state on the other side of the final norm, so the numbers are of
            different states.
    """
    own = Entry.from_summary(summary)
    assert own.mean_cosine is not None
    assert own.deep_half is not None
    assert own.last is not None
    rho = own.spearman
    comparison = nearest(own) if reference is None else relate(own, reference)
    return Verdict(
        level=level(own.deep_half),
        deep_half=own.deep_half,
        last=own.last,
        last_level=level(own.last),
        trend="none" if rho is None or abs(rho) < TREND else "rises" if rho > 0 else "falls",
        spearman=rho,
        kendall=own.kendall,
        blocks=len(own.mean_cosine) - 1,
        final=own.final,
        text=own.text,
        comparison=comparison,
        disagreements=tuple(
            Disagreement(name, *numbers) for name, rule in RULES.items() if (numbers := rule(own, summary)) is not None
        ),
    )


# ---- references ------------------------------------------------------------------------------------------------------


def relate(own: Entry, reference: Entry, relation: Relation = "chosen") -> Comparison:
    """Compare two entries.

    Raises:
        EntryError: one has its last state after the final norm, the other before it.
    """
    if reference.final != own.final:
        raise EntryError(
            f"the last state of {reference.model} is {reference.final} the final norm, that of {own.model} is "
            f"{own.final} it, so they are different states. Measure with final={reference.final!r} "
            f"(--final {reference.final}), or choose another reference."
        )
    values = {}
    for name, alike in ALIKE.items():
        here, there = getattr(own, name), getattr(reference, name)
        if here is not None and there is not None:
            outcome: Outcome = "alike" if abs(here - there) <= alike else "more" if here > there else "less"
            values[name] = (here, there, outcome)
    hashes = own.text_hash, reference.text_hash
    same_passages = None if None in hashes else hashes[0] == hashes[1]
    names = [{"wikitext": "wikitext-103"}.get(_folded(entry.text), _folded(entry.text)) for entry in (own, reference)]
    same_text = same_passages is True or names[0] == names[1]
    same_tokens = None if None in (own.tokens, reference.tokens) else own.tokens == reference.tokens
    return Comparison(reference, relation, same_text, same_passages, same_tokens, values)


def nearest(own: Entry) -> Comparison | None:
    """The closest shipped reference: the model itself, else its family, its architecture or its size, in this order.

    Other architectures and families count only within a factor :data:`SIZE` of the parameters; among equals, the
    reference on the same text comes first, then the one of the closest size.
    """
    ranked: list[tuple[tuple[Any, ...], Entry, Relation]] = []
    for entry in references():
        factor = _factor(own, entry)
        relation: Relation | None = None
        if _folded(entry.model) == _folded(own.model):
            relation = "model"
        elif entry.family and re.match(re.escape(_folded(entry.family)) + r"(?![\d.])", _folded(own.model)):
            relation = "family"
        elif factor <= SIZE:
            same = entry.model_type is not None and entry.model_type == own.model_type
            relation = "architecture" if same else "size"
        if relation is None or entry.final != own.final:
            continue
        far = relation == "family" and factor > SIZE
        order = ("model", "family", "architecture", "size").index(relation) + (10 if far else 0)
        ranked.append(((order, not relate(own, entry).same_text, factor), entry, relation))
    if not ranked:
        return None
    _, entry, relation = min(ranked, key=lambda item: item[0])
    return relate(own, entry, relation)


def _factor(own: Entry, other: Entry) -> float:
    if own.parameters is None or other.parameters is None:
        return math.inf
    return max(own.parameters, other.parameters) / min(own.parameters, other.parameters)


def _folded(name: str) -> str:
    """A name without owner and case, all separators alike; dots stay: Qwen2.5 is a family, Qwen2-5B a model."""
    return re.sub(r"[^a-z0-9.]+", "-", name.rpartition("/")[2].lower()).strip("-")


# ---- metrics that disagree ------------------------------------------------------------------------------------------

_Rule = Callable[[Entry, Mapping[str, Any]], tuple[float, float] | None]


def _rises_but_low(own: Entry, summary: Mapping[str, Any]) -> tuple[float, float] | None:
    rho, mu = own.spearman, own.deep_half
    return (rho, mu) if rho is not None and mu is not None and rho >= TREND and level(mu) == "low" else None


def _high_without_rise(own: Entry, summary: Mapping[str, Any]) -> tuple[float, float] | None:
    rho, mu = own.spearman, own.deep_half
    high = mu is not None and level(mu) in ("high", "severe")
    return (rho, mu) if rho is not None and mu is not None and high and rho < TREND else None


def _last_layer_apart(own: Entry, summary: Mapping[str, Any]) -> tuple[float, float] | None:
    mu, last = own.deep_half, own.last
    return (mu, last) if mu is not None and last is not None and abs(mu - last) >= 0.15 else None


def _norm_moves_last(own: Entry, summary: Mapping[str, Any]) -> tuple[float, float] | None:
    states = summary.get("all_layers") or {}
    before = states.get(f"block {own.blocks}")
    after = states.get("final norm") or states.get("stack output")
    if before is None or after is None or abs(before["mean_cosine"] - after["mean_cosine"]) < 0.1:
        return None
    return before["mean_cosine"], after["mean_cosine"]


def _few_pairs(own: Entry, summary: Mapping[str, Any]) -> tuple[float, float] | None:
    quantiles, means = summary.get("quantiles"), summary.get("mean_cosine_others")
    if not quantiles or not means:
        return None
    half = deep_half(len(means))
    mean = sum(means[-half:]) / half
    median = sum(row[len(row) // 2] for row in quantiles[-half:]) / half
    return (mean, median) if abs(mean - median) >= 0.1 else None


def _one_axis(own: Entry, summary: Mapping[str, Any]) -> tuple[float, float] | None:
    shares = (summary.get("metrics") or {}).get("explainable_variance")
    if not shares or own.deep_half is None or level(own.deep_half) != "low":
        return None
    half = [share for share in shares[-deep_half(len(shares)) :] if share is not None]
    share = sum(half) / len(half) if half else 0.0
    return (own.deep_half, share) if share >= 0.5 else None


RULES: dict[str, _Rule] = {
    "rises_but_low": _rises_but_low,
    "high_without_rise": _high_without_rise,
    "last_layer_apart": _last_layer_apart,
    "norm_moves_last": _norm_moves_last,
    "few_pairs": _few_pairs,
    "one_axis": _one_axis,
}
"""Each rule gives the two numbers that disagree, or None. The guide to measuring lists the conditions."""
