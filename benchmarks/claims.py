"""The published claims as data, and the rule that judges them.

A claim names a study, the direction in which its contrasts lie, and the contrasts themselves, which are fixed in
advance: an arm less another, the end less the start, a slope per doubling of size, a ratio less a stated bound. None is
chosen by what the rows show.

All contrasts that the claims on one study make share its runs, so their p-values are corrected together (Holm). A
contrast *agrees* when it is detected on the expected side, *disagrees* when on the other; it is *equivalent* when it is
not detected and its interval lies within the study's margin; *not tested* when it does not vary between seeds, or there
is one seed; *not testable* when its statistic is at its largest possible value in more than half of the runs, so that
no trend can show at this scale; else *undecided*. A claim takes the verdict that all of its contrasts share; one that
disagrees decides it, and where all are decided, some equivalent and the others agreeing, it is equivalent: better than
some and than the others not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from decondense.compare import Cell, Difference, family_of, holm
from decondense.report import number
from study_rows import (
    Committed,
    blocks,
    committed,
    deep_half,
    depth,
    estimate,
    last,
    loss_difference,
    mean,
    paired,
    shown,
    slope,
)

Verdict = Literal["agrees", "disagrees", "equivalent", "undecided", "not tested", "not testable", "not run"]
Side = Literal["below", "above"]
ALPHA = 0.05


@dataclass(frozen=True)
class Contrast:
    """One estimate that a claim rests on."""

    label: str
    difference: Difference
    context: str = ""
    """Values behind it."""
    saturated: bool = False
    """Whether the statistic is at its largest possible value in more than half of the runs."""

    def text(self) -> str:
        tail = f" ({self.context})" if self.context else ""
        return f"{self.label}: {shown(self.difference)}{tail}"


@dataclass(frozen=True)
class Claim:
    """One published result and what ours is judged by."""

    study: str
    published: str
    expected: Side
    contrasts: Callable[[Committed], list[Contrast]]
    majority: bool = False
    """Whether more than half of the contrasts decide, instead of all."""


def judge(d: Difference, expected: Side, p: float | None = None) -> Verdict:
    """The verdict of one contrast; ``p`` is its p-value corrected over all contrasts of the study."""
    p = d.p if p is None else p
    if p is None:
        return "not tested"
    if p <= ALPHA:
        return "agrees" if (d.mean < 0) == (expected == "below") else "disagrees"
    return "equivalent" if d.within_margin else "undecided"


def joint(verdicts: Sequence[Verdict], *, majority: bool = False) -> Verdict:
    """One verdict of several contrasts."""
    if not verdicts:
        return "not run"
    if "disagrees" in verdicts:
        return "disagrees"
    if majority and 2 * verdicts.count("agrees") > len(verdicts):
        return "agrees"
    kinds = set(verdicts)
    if kinds == {"agrees", "equivalent"}:
        return "equivalent"
    return verdicts[0] if len(kinds) == 1 else "undecided"


def verdicts(f: Committed, claims: Sequence[Claim]) -> dict[str, tuple[str, Verdict]]:
    """Text and verdict of each claim on a study, by the published text; p-values are corrected over all of them."""
    made = {claim.published: claim.contrasts(f) for claim in claims}
    tested = [c for contrasts in made.values() for c in contrasts if c.difference.p is not None]
    corrected = holm([c.difference.p for c in tested if c.difference.p is not None])
    p_of = {id(c): p for c, p in zip(tested, corrected, strict=True)}
    result: dict[str, tuple[str, Verdict]] = {}
    for claim in claims:
        contrasts = made[claim.published]
        each = [
            "not testable" if c.saturated else judge(c.difference, claim.expected, p_of.get(id(c))) for c in contrasts
        ]
        text = "; ".join(c.text() for c in contrasts) if len(contrasts) <= 4 else _counted(contrasts, each)
        result[claim.published] = text, joint(each, majority=claim.majority)
    return result


def _counted(contrasts: Sequence[Contrast], each: Sequence[Verdict]) -> str:
    kinds = ", ".join(f"{each.count(kind)} {kind}" for kind in dict.fromkeys(each))
    means = [c.difference.mean for c in contrasts]
    below = sum(all(value < 0 for value in c.difference.differences) for c in contrasts)
    span = f"{number(min(means), sign=True)} to {number(max(means), sign=True)}"
    return f"{len(contrasts)} contrasts, {span}, {below} below 0 in every seed: {kinds} after Holm's correction"


# ---- contrasts -------------------------------------------------------------------------------------------------------


def by_size(
    title: str, of: Callable[[Cell], float], *, largest: float = math.inf
) -> Callable[[Committed], list[Contrast]]:
    """The slope per doubling of the parameters, one contrast per family; ``largest``: what the value cannot exceed."""

    def made(f: Committed) -> list[Contrast]:
        families: dict[str, list[str]] = {}
        for arm in f.study.arms:
            families.setdefault(family_of(f.study, arm), []).append(arm)
        contrasts = []
        for family, arms in families.items():
            d = slope(f, arms, of)
            if d is not None:
                ends = " to ".join(number(mean([of(cell) for cell in f.cells(arm)]), 2) for arm in (arms[0], arms[-1]))
                values = [of(cell) for arm in arms for cell in f.cells(arm)]
                at_most = sum(value >= largest - 1e-9 for value in values)
                label = f"{title} per doubling of size, {len(arms)} sizes of {family}"
                context = f"{ends} from the smallest to the largest"
                context += f"; {at_most} of {len(values)} runs are at {number(largest, 0)}" if at_most else ""
                contrasts.append(Contrast(label, d, context, saturated=2 * at_most > len(values)))
        return contrasts

    return made


def over_training(title: str, of: Callable[[Cell, int], float]) -> Callable[[Committed], list[Contrast]]:
    """The end less the start of cross-entropy."""

    def made(f: Committed) -> list[Contrast]:
        ends, context = _ends(f, of)
        return [Contrast(f"{title}, end less start", estimate([b - a for a, b in ends], of=f), context)]

    return made


def _ends(f: Committed, of: Callable[[Cell, int], float]) -> tuple[list[tuple[float, float]], str]:
    """Start and end of cross-entropy, seed by seed, and their means as text."""
    ends = [(of(cell, 0), of(cell, cell.final_step or 0)) for cell in f.cells(f.comparison.baseline)]
    return ends, f"{number(mean([a for a, _ in ends]), 2)} to {number(mean([b for _, b in ends]), 2)}"


def _depth_at(cell: Cell, step: int) -> float:
    return float(cell.profiles[step]["spearman"])


def at_start(f: Committed) -> list[Contrast]:
    cells = f.cells(f.comparison.baseline)
    cosine = number(mean([last(cell, 0) for cell in cells]), 2)
    d = estimate([_depth_at(cell, 0) for cell in cells], of=f)
    return [Contrast("Spearman with depth at the start", d, f"the mean cosine of the last layer is {cosine} there")]


def kept(arm: str, of: Callable[[Cell], float], bound: float) -> Callable[[Committed], list[Contrast]]:
    """The arm's value over cross-entropy's, less 1, less a bound, seed by seed."""

    def made(f: Committed) -> list[Contrast]:
        base = {cell.seed: of(cell) for cell in f.cells(f.comparison.baseline)}
        ratios = [of(cell) / base[cell.seed] - 1 for cell in f.cells(arm) if cell.seed in base]
        context = f"a change of {number(100 * mean(ratios), 0, sign=True)} %"
        label = f"relative change of the mean cosine with {f.label(arm)}, less {number(bound, 2, sign=True)}"
        return [Contrast(label, estimate(ratios, of=f, null=bound), context)]

    return made


def kept_in_training(bound: float) -> Callable[[Committed], list[Contrast]]:
    """The end over the start of cross-entropy, less 1, less a bound: of the last L/2 layers and of the last one."""

    def made(f: Committed) -> list[Contrast]:
        contrasts = []
        for title, of in (("last L/2 layers", deep_half), ("last layer", last)):
            ends, context = _ends(f, of)
            label = f"relative change of the mean cosine of the {title}, less {number(bound, 2, sign=True)}"
            contrasts.append(Contrast(label, estimate([b / a - 1 for a, b in ends], of=f, null=bound), context))
        return contrasts

    return made


def dispersed(of: Callable[[Cell], float]) -> Callable[[Committed], list[Contrast]]:
    """Every arm with a dispersion loss less cross-entropy."""

    def made(f: Committed) -> list[Contrast]:
        arms = [arm for arm in f.comparison.treated if arm in f.comparison.dispersed]
        return [Contrast(f.label(arm), paired(f, arm, f.comparison.baseline, of)) for arm in arms]

    return made


def losses_of(*pairs: tuple[str, str]) -> Callable[[Committed], list[Contrast]]:
    """Held-out loss of an arm less that of another (an empty name: the baseline)."""

    def made(f: Committed) -> list[Contrast]:
        contrasts = []
        for arm, other in pairs:
            d = loss_difference(f, arm, other or None)
            contrasts.append(Contrast(f"held-out loss of {f.label(arm)} less that of {f.label(d.baseline)}", d))
        return contrasts

    return made


def both(f: Committed) -> list[Contrast]:
    return [
        Contrast("mean cosine with dispersion loss beside distillation", paired(f, "both", "distillation", blocks)),
        Contrast("held-out loss", loss_difference(f, "both", "distillation")),
    ]


def best_form(f: Committed) -> list[Contrast]:
    """Angular less every other regulariser: which is compared with which does not depend on who did best."""
    others = [arm for arm in f.comparison.dispersed if arm != "angular"]
    return [Contrast(f.label(arm), loss_difference(f, "angular", arm)) for arm in others]


def every_setting(f: Committed) -> list[Contrast]:
    assert f.comparison.validation is not None
    return [Contrast(f.label(d.arm), d) for d in f.comparison.validation.differences]


SPEARMAN = by_size("Spearman with depth", depth, largest=1.0)
DEEP = by_size("mean cosine of the last L/2 layers", deep_half)

CLAIMS = (
    Claim(
        "fig2",
        "larger models of a family have a lower Spearman correlation of mean cosine with depth",
        "below",
        SPEARMAN,
    ),
    Claim("figS2", "and a lower mean cosine in their last L/2 layers", "below", DEEP),
    Claim("fig3", "a wider MLP (64 to 4096) lowers the Spearman correlation: .97, .91, .69, .43", "below", SPEARMAN),
    Claim("fig3", "(the same, by the mean cosine of the last L/2 layers)", "below", DEEP),
    Claim("fig4", "condensation is there at initialisation (Spearman 1.0)", "above", at_start),
    Claim(
        "fig4", "and falls during pre-training (to about −.4)", "below", over_training("Spearman with depth", _depth_at)
    ),
    Claim(
        "fig4",
        "(the same, by the mean cosine of the last L/2 layers)",
        "below",
        over_training("mean cosine of the last L/2 layers", deep_half),
    ),
    Claim("fig5", "distillation does not remove condensation", "above", kept("distillation", blocks, -0.25)),
    Claim("fig5", "(dispersion loss beside distillation: not published)", "below", both),
    Claim(
        "fig7",
        "mid-training with cross-entropy alone leaves the last layers condensed (about .95)",
        "above",
        kept_in_training(-0.1),
    ),
    Claim("fig7", "dispersion loss spreads them out", "below", dispersed(last)),
    Claim(
        "table2",
        "mid-training with angular dispersion loss beats cross-entropy alone (35.4 to 35.5 against 34.95 points)",
        "below",
        losses_of(("angular", "")),
    ),
    Claim("table2", "angular dispersion has the best mean rank (2.2)", "below", best_form),
    Claim("table3", "dispersing the deep half beats dispersing all layers", "below", losses_of(("deep", "all"))),
    Claim("table3", "and the shallow half", "below", losses_of(("deep", "shallow"))),
    Claim("table4", "better over a wide range of lambda and tau", "below", every_setting, majority=True),
    Claim(
        "table5",
        "pre-training with dispersion loss (0.1) ends better (+1.17 points on average)",
        "below",
        losses_of(("dispersion-0.1", "")),
    ),
)


INSTEAD = {("fig7", "tiny"): "fig7-smollm2"}
"""(study, scale) -> the study that judges its claims. The shipped start of figure 7 at scale ``tiny`` is 60 steps old:
it is in the transient of figure 4, which any further training ends. A pretrained model is past it."""


def judged(scale: str) -> dict[tuple[str, str], tuple[str, Verdict]]:
    """(study, published) -> text and verdict at one scale."""
    result: dict[tuple[str, str], tuple[str, Verdict]] = {}
    for name in dict.fromkeys(claim.study for claim in CLAIMS):
        used = INSTEAD.get((name, scale), name)
        f = committed(used, scale)
        claims = [claim for claim in CLAIMS if claim.study == name]
        each: dict[str, tuple[str, Verdict]] = {claim.published: ("not run", "not run") for claim in claims}
        if f is not None:
            origin = "" if used == name else f"`{used}`: "
            each = {published: (origin + text, verdict) for published, (text, verdict) in verdicts(f, claims).items()}
        result |= {(name, published): entry for published, entry in each.items()}
    return result
