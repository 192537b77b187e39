"""The sentences of a verdict, for people who do not know the metrics."""

from __future__ import annotations

from decondense.atlas.entry import Entry
from decondense.atlas.verdict import Comparison, Disagreement, Verdict, level
from decondense.formatting import count, listed, number

_ANGLES = {
    "low": "deep in the model the tokens of a text keep directions of their own",
    "moderate": "deep in the model the tokens of a text share a part of their direction",
    "high": "deep in the model the tokens of a text point largely the same way",
    "severe": "deep in the model the tokens of a text point almost the same way",
}
_TRENDS = {
    "rises": "The cosine rises with depth",
    "none": "The cosine neither rises nor falls steadily with depth",
    "falls": "The cosine falls with depth",
}
_RELATIONS = {
    "chosen": "the chosen reference",
    "model": "the same model",
    "family": "the same family",
    "architecture": "the same architecture and about the same size",
    "size": "about the same size, another family",
}
_METRICS = {
    "deep_half": "mean cosine of the deep half",
    "last": "mean cosine of the last layer",
    "spearman": "Spearman",
    "kendall": "Kendall",
}
_OUTCOMES = {"more": "more condensed", "alike": "about as condensed", "less": "less condensed"}
_STEADY = {"more": "more steadily upward", "alike": "alike", "less": "less steadily upward"}
_APART = {
    "rises_but_low": "Spearman is {0:+} because the cosine rises with depth, but it stays low ({1} in the deep half)",
    "high_without_rise": "the cosine does not rise with depth (Spearman {0:+}), but it is high throughout ({1} in the "
    "deep half)",
    "last_layer_apart": "the deep half ({0}) and the last layer ({1}) disagree",
    "norm_moves_last": "the final norm takes the last block's cosine from {0} to {1}, so the value of the last layer "
    "depends on which side of the norm is used",
    "few_pairs": "the mean over pairs of tokens in the deep half ({0}) is far from their median ({1}): some tokens, "
    "often the first one, differ from the others",
    "one_axis": "the mean cosine is low ({0}), but one axis has {1} of the squared length: tokens lie along it in both "
    "directions",
}


def sentences(verdict: Verdict) -> tuple[str, str, str]:
    """Three sentences: how condensed the model is, the comparison with a reference, and which metrics disagree."""
    return _how(verdict), _compared(verdict), _apart(verdict.disagreements)


def _how(v: Verdict) -> str:
    last = f"{_two(v.last)} in the last layer"
    if v.last_level != v.level:
        last += f", which alone would be {v.last_level}"
    rho = "is the same in every layer" if v.spearman is None else f"Spearman {_signed(v.spearman)}"
    return (
        f"Condensation is {v.level}: {_ANGLES[v.level]} (mean cosine {_two(v.deep_half)} in the deeper half of "
        f"{v.blocks} blocks, {last}; 0 is unrelated, 1 is identical). {_TRENDS[v.trend]} ({rho})."
    )


def _compared(v: Verdict) -> str:
    if v.comparison is None:
        return "No comparable reference: none is of this family, or of this size within a factor of 2."
    c = v.comparison
    shown = [
        f"{_METRICS[name]} {_value(name, here)} here, {_value(name, there)} there"
        for name, (here, there, _) in c.values.items()
        if name != "kendall"
    ]
    if not shown:
        return f"{describe(c.reference)} has no number in common with this measurement."
    cosines = [outcome for name, (_, _, outcome) in c.values.items() if name in ("deep_half", "last")]
    if cosines:
        outcomes = list(dict.fromkeys(_OUTCOMES[outcome] for outcome in cosines))
        verdict = outcomes[0] if len(outcomes) == 1 else f"mixed, {listed(outcomes)}"
    else:  # a trend says nothing of the level
        verdict = f"only the trend can be compared; it is {_STEADY[c.values['spearman'][2]]}"
    where = f"{describe(c.reference)} ({_RELATIONS[c.relation]})"
    return f"Compared with {where}: {verdict} ({'; '.join(shown)}).{caution(c, v.text)}"


def describe(entry: Entry) -> str:
    """A reference with its size and source."""
    size = "" if entry.parameters is None else f", {count(entry.parameters)} parameters"
    read = ", read off a figure" if entry.approximate else ""
    return f"{entry.model}{size}, {entry.source or 'source not stated'}{read}"


def caution(c: Comparison, text: str) -> str:
    """What limits the comparison of the two measurements, if anything."""
    differs = []
    if not c.same_text:
        differs.append(f"on a different text ({c.reference.text}, here {text})")
    elif c.same_passages is False:
        differs.append(f"on different passages of {c.reference.text}")
    if c.same_tokens is False:
        differs.append(f"on passages of {c.reference.tokens} tokens")
    return f" It was measured {listed(differs)}: a hint, not a test." if differs else ""


def _apart(found: tuple[Disagreement, ...]) -> str:
    if not found:
        return "The metrics agree on level, trend with depth and last layer."
    parts = [_APART[d.id].replace("{0:+}", _signed(d.first)).format(_two(d.first), _two(d.second)) for d in found]
    return f"The metrics disagree: {'; '.join(parts)}."


def _two(value: float) -> str:
    # 0.497 is moderate, and 0.50 would be high
    return number(value, 2 if level(round(value, 2)) == level(value) else 3)


def _signed(value: float) -> str:
    return number(value, 2, sign=True)


def _value(name: str, value: float) -> str:
    return _signed(value) if name in ("spearman", "kendall") else _two(value)
