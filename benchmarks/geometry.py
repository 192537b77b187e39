"""The tables of ``docs/geometry.md``: does the end cosine go with the end loss, within a seed?

Every committed study takes part in which at least four arms start from one model and were trained, in the seeds in
which all of them finished.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from operator import attrgetter
from pathlib import Path
from pipes import pipe_table

import numpy as np
from scipy import special

from decondense.compare import CONFIDENCE, VALIDATION, Cell, Difference, Study, compare, holm, profiles
from decondense.records import read_rows
from decondense.report import interval, number, probability
from study_rows import CONTROLS, Committed, blocks, deep_half, estimate, every_committed, loss_difference, mean
from within_seed import Array, Mediation, mediation, permutation_p, rank_correlations

ALPHA = 1 - CONFIDENCE
FEWEST_ARMS = 4
FEWEST_TESTED = 5
"""Arms below which no order has a permutation p of 0.05: 2 / 4! is .083."""
BANDS = (0.05, 0.02, 0.01)
"""How far apart two mean cosines may lie and count as equal."""
REFERENCES = {
    "rivals": "angular",
    "table2": "angular",
    "table3": "all",
    "table4": "l1-t1",
    "schedule": "constant-1",
    "pairs": "all",
    "target": "weight-1",
    "cause": "dispersion",
}
"""The arm that every other is compared with at its cosine: the angular form over all layers and pairs at a constant
weight and temperature 1; of the weight 1, or the study's own."""
POINTS = (0.1, 0.5, 1.0)
SHOWS = "**What the rows show.**"
NEAR = 0.02
"""How far from a point of training, as a share of it, a checkpoint may lie."""
EARLY = 0.25
"""The early loss is that of the first checkpoint from this share of training on."""


@dataclass(frozen=True)
class Doses:
    """The runs of one study that can be set against each other."""

    rows: Committed
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    baseline: str

    @property
    def title(self) -> str:
        return f"`{self.rows.name}`" + ("" if self.rows.scale == "tiny" else f" ({self.rows.scale})")

    @property
    def treated(self) -> tuple[str, ...]:
        return tuple(arm for arm in self.arms if arm != self.baseline)

    def values(self, of: Callable[[Cell], float | None]) -> Array | None:
        """[seeds, arms]; None where a run does not have the value."""
        found = [[of(self.rows.study.cells[arm, seed]) for arm in self.arms] for seed in self.seeds]
        return None if any(None in line for line in found) else np.array(found, float)

    def whole(self, of: Callable[[Cell], float | None]) -> Array:
        values = self.values(of)
        assert values is not None
        return values

    @property
    def cosine(self) -> Array:
        return self.whole(blocks)

    @property
    def loss(self) -> Array:
        return self.whole(lambda cell: cell.final_score(VALIDATION))

    @property
    def others(self) -> Array:
        """Which arms are not the baseline."""
        return np.array([arm != self.baseline for arm in self.arms])


def doses_of(rows: Committed) -> Doses | None:
    """The study's runs; None where fewer than four arms share a model and were trained."""
    study = rows.study

    def usable(cell: Cell) -> bool:
        whole = cell.final_profile() is not None and cell.final_score(VALIDATION) is not None
        return cell.status == "finished" and not cell.untrained and whole

    arms = tuple(
        arm
        for arm in study.arms
        if not study.has_own_model(arm) and any(usable(study.cells[arm, seed]) for seed in study.seeds)
    )
    seeds = tuple(seed for seed in study.seeds if all(usable(study.cells[arm, seed]) for arm in arms))
    baseline = "cross-entropy" if "cross-entropy" in arms else study.baseline
    if len(arms) < FEWEST_ARMS or not seeds or baseline not in arms:
        return None
    return Doses(rows, arms, seeds, baseline)


def _control(path: Path) -> Committed | None:
    rows = read_rows(path)
    if not any(row["kind"] == "run" for row in rows):  # a sweep without runs
        return None
    study = Study.from_rows(rows)
    return Committed(path.name.removesuffix(".jsonl.gz"), "control", study, compare(study, incomplete="omit"))


@cache
def all_doses() -> tuple[Doses, ...]:
    rows: list[Committed | None] = [*every_committed()]
    rows += [_control(path) for path in sorted(CONTROLS.glob("*.jsonl.gz"))]
    return tuple(found for each in rows if each is not None and (found := doses_of(each)) is not None)


# ---- what the sentences count ----------------------------------------------------------------------------------------


def detected(p_values: Sequence[float | None]) -> list[bool]:
    """Which p-values are at most 0.05 after Holm's correction over all that there are."""
    tested = [p for p in p_values if p is not None]
    corrected = iter(holm(tested))
    return [p is not None and next(corrected) <= ALPHA + 1e-12 for p in p_values]


def correlation(values: Sequence[float], digits: int = 2) -> str:
    """Mean and Student interval over seeds of a correlation, which lies between -1 and 1."""
    if not values:
        return ""
    d = estimate(values)
    bounds = None if d.interval is None else (max(-1.0, d.interval[0]), min(1.0, d.interval[1]))
    return f"{number(d.mean, digits, sign=True)} {interval(bounds, digits)}"


def span(values: Sequence[float], digits: int = 0) -> str:
    low, high = (f"{value:.{digits}f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def limits() -> str:
    """How small all of this is."""
    studies = all_doses()
    cells = [cell for f in studies for cell in f.rows.study.cells.values() if cell.status == "finished"]
    sizes = [cell.run["parameters"] / 1e6 for cell in cells]
    tokens = [cell.run["tokens"] / 1e6 for cell in cells if cell.run["tokens"]]
    return (
        f"{span([len(f.seeds) for f in studies])} seeds, {span([len(f.arms) for f in studies])} arms a study, models "
        f"of {span(sizes, 1)} M parameters and {span(tokens, 1)} M tokens"
    )


def names(found: Sequence[Doses]) -> str:
    return ", ".join(f.title for f in found) if found else "none"


# ---- 1. dose and response --------------------------------------------------------------------------------------------


def dose_response() -> str:
    studies = all_doses()
    lines, with_baseline, without = [], [], []
    for f in studies:
        x, deep, y, others = f.cosine, f.whole(deep_half), f.loss, f.others
        p_all = permutation_p(x, y)
        p_others = permutation_p(x[:, others], y[:, others])
        each, among = rank_correlations(x, y), rank_correlations(x[:, others], y[:, others])
        with_baseline.append(p_all if len(f.arms) >= FEWEST_TESTED else None)
        without.append(p_others if len(f.treated) >= FEWEST_TESTED else None)
        lines.append(
            [
                f.title,
                str(len(f.arms)),
                ", ".join(number(rho, 2, sign=True) for rho in each),
                correlation(each),
                probability(p_all) if len(f.arms) >= FEWEST_TESTED else "too few",
                correlation(rank_correlations(deep, y)),
                correlation(among),
                probability(p_others) if len(f.treated) >= FEWEST_TESTED else "too few",
            ]
        )
    header = (
        "study",
        "arms",
        "rank correlation, by seed",
        "over seeds",
        "p over arms",
        "deep half",
        "without the baseline",
        "p over arms",
    )
    table = pipe_table(header, lines, right=range(1, 8))
    n, yes, alone = _counted(studies, with_baseline)
    m, yes_treated, alone_treated = _counted(studies, without)
    return (
        f"{table}\n\n{SHOWS} A lower end cosine goes with a lower end loss in every seed of "
        f"{len(same_sign(1))} of {len(studies)} studies and with a higher one in {len(same_sign(-1))}; over the arms "
        f"the correlation is detected in {yes} of {n} studies ({alone} before Holm's correction), and in "
        f"{yes_treated} of {m} without the baseline ({alone_treated}); a dose that is better than none is no evidence "
        f"that more dispersion is better, and {limits()} cannot show what a long training does."
    )


def same_sign(sign: int) -> list[Doses]:
    """The studies whose rank correlation has this sign in every seed."""
    return [f for f in all_doses() if min(sign * rho for rho in rank_correlations(f.cosine, f.loss)) > 0]


def _counted(studies: Sequence[Doses], p_values: Sequence[float | None]) -> tuple[int, str, int]:
    """Tested studies, those detected with their names, and how many there are before the correction."""
    yes = [f for f, found in zip(studies, detected(p_values), strict=True) if found]
    tested = [p for p in p_values if p is not None]
    return len(tested), f"{len(yes)} ({names(yes)})" if yes else "none", sum(p <= ALPHA for p in tested)


# ---- 2. equal cosine -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Largest:
    """The largest difference of loss among the arms whose cosine lies within a band of the reference's, less what the
    straight line from the baseline to the reference gives for the difference of their cosines."""

    arm: str
    n: int
    """Arms in the band."""
    mean: float
    bounds: tuple[float, float] | None
    """Holds for all arms of the band at once (Bonferroni)."""

    @property
    def differs(self) -> bool:
        return self.bounds is not None and not self.bounds[0] <= 0 <= self.bounds[1]


def simultaneous(d: Difference, n: int) -> tuple[float, float] | None:
    """The interval of a difference that was picked out of ``n``: each end further off by the ratio of the quantiles.

    The ratio is that of S - 1 degrees of freedom, S seeds, which is no smaller than that of an interval with more.
    """
    if d.interval is None:
        return None
    quantile = [float(special.stdtrit(d.n - 1, 1 - ALPHA / 2 / k)) for k in (n, 1)]
    factor = quantile[0] / quantile[1]
    return d.mean - factor * (d.mean - d.interval[0]), d.mean + factor * (d.interval[1] - d.mean)


def at_equal_cosine(f: Doses, reference: str, band: float) -> Largest | None:
    """None: no other arm lies within the band."""
    cosines = dict(zip(f.arms, f.cosine.mean(0), strict=True))
    others = [arm for arm in f.arms if arm not in (reference, f.baseline)]
    arms = [arm for arm in others if abs(cosines[arm] - cosines[reference]) <= band]
    if not arms:
        return None
    x, y = f.cosine, f.loss
    at, base = f.arms.index(reference), f.arms.index(f.baseline)
    slope_S = (y[:, base] - y[:, at]) / (x[:, base] - x[:, at])
    found = {}
    for arm in arms:
        a = f.arms.index(arm)
        d = estimate(y[:, a] - y[:, at] - slope_S * (x[:, a] - x[:, at]))
        plain = loss_difference(f.rows, arm, reference)
        if d.interval is not None and plain.interval is not None:
            # the held-out documents are in the interval of the plain difference only
            half = max(d.interval[1] - d.mean, (plain.interval[1] - plain.interval[0]) / 2)
            d = dataclasses.replace(d, interval=(d.mean - half, d.mean + half))
        found[arm] = d
    arm = max(found, key=lambda arm: abs(found[arm].mean))
    return Largest(arm, len(arms), found[arm].mean, simultaneous(found[arm], len(arms)))


def equal_cosine() -> str:
    lines = []
    for f, each in _bands():
        reference = REFERENCES[f.rows.name]
        cells = [
            ""
            if found is None
            else f"{f.rows.label(found.arm)}: {number(found.mean, 3, sign=True)} {interval(found.bounds, 2)} "
            f"(of {found.n}){' ✓' if found.differs else ''}"
            for found in each
        ]
        cosine = mean(list(f.cosine[:, f.arms.index(reference)]))
        lines.append([f.title, f"{f.rows.label(reference)}, {number(cosine, 3)}", *cells])
    header = ("study", "reference, its mean cosine", *(f"within {band:g} of it" for band in BANDS))
    n, differing = differing_at_equal_cosine()
    example = ""
    if differing:
        f, found = max(differing, key=lambda entry: abs(entry[1].mean))
        example = (
            f"; the largest is {f.rows.label(found.arm)} in {f.title}, {number(found.mean, 3, sign=True)} "
            f"{interval(found.bounds, 2)} nats at the cosine of {f.rows.label(REFERENCES[f.rows.name])}"
        )
    return (
        f"{pipe_table(header, lines)}\n\n{SHOWS} In {len(differing)} of {n} studies "
        f"({names([f for f, _ in differing])}) an arm ends within {BANDS[0]:g} of the reference's mean cosine and at a "
        f"detectably different loss{example}: where that is so the end cosine does not fix the loss, but the rows "
        "cannot show what else these arms changed, nor that each stands at its best weight."
    )


@cache
def _bands() -> tuple[tuple[Doses, tuple[Largest | None, ...]], ...]:
    found = [f for f in all_doses() if f.rows.name in REFERENCES]
    return tuple((f, tuple(at_equal_cosine(f, REFERENCES[f.rows.name], band) for band in BANDS)) for f in found)


def differing_at_equal_cosine() -> tuple[int, list[tuple[Doses, Largest]]]:
    """Studies with a reference, and those with a detected difference in the widest band."""
    widest = [(f, each[0]) for f, each in _bands()]
    return len(widest), [(f, found) for f, found in widest if found is not None and found.differs]


# ---- 3. partial correlation and share --------------------------------------------------------------------------------


def _rate(cell: Cell) -> float | None:
    rate = cell.run.get("learning_rate")
    return None if not rate else math.log(rate)


def _early_loss(cell: Cell) -> float | None:
    """Held-out loss of the first checkpoint after a quarter of training and before its end."""
    last = cell.final_step or 0
    steps = [step for step in sorted(cell.scores[VALIDATION]) if EARLY * last <= step < last]
    return float(cell.scores[VALIDATION][steps[0]]["value"]) if steps else None


def covariates(f: Doses) -> dict[str, Array | None]:
    """What is held fixed, by title; None where it is the same in all runs of a seed, or the rows do not have it."""
    above = {(plateau.arm, plateau.seed): plateau.share for plateau in f.rows.comparison.plateaus}
    found = {
        "learning rate": f.values(_rate),
        "time on the plateau": f.values(lambda cell: above.get((cell.arm, cell.seed))),
        "early loss": f.values(_early_loss),
    }
    return {title: None if v is None or np.all(v == v[:, :1]) else v for title, v in found.items()}


def partial() -> str:
    studies = all_doses()
    titles = ("nothing", "learning rate", "time on the plateau", "early loss")
    found: dict[str, list[list[float]]] = {title: [] for title in titles}
    for f in studies:
        found["nothing"].append(rank_correlations(f.cosine, f.loss))
        for title, values in covariates(f).items():
            found[title].append([] if values is None else rank_correlations(f.cosine, f.loss, [values]))
    lines = [[f.title, *(correlation(found[title][i]) for title in titles)] for i, f in enumerate(studies)]
    said = []
    for title in titles[1:]:
        kept = [(f, d) for f, v in zip(studies, found[title], strict=True) if v and (d := estimate(v)).tested]
        yes = detected([d.p for _, d in kept])
        positive, negative = (
            names([f for (f, d), y in zip(kept, yes, strict=True) if y and sign * d.mean > 0]) for sign in (1, -1)
        )
        signs = f"positive in {positive} and negative in {negative} of {len(kept)}" if kept else "not tested"
        said.append(f"given the {title}, {signs}")
    table = pipe_table(("study", *(f"given {title}" for title in titles)), lines, right=range(1, 5))
    return (
        f"{table}\n\n{SHOWS} Of the studies with an interval, the partial correlation is detectably (Holm): "
        f"{'; '.join(said)}; the time on the plateau and the early loss follow from the arm as the cosine does, so "
        "that none of these is an effect, and so few arms exclude none."
    )


@dataclass(frozen=True)
class Share:
    """The seeds' mediations of one study."""

    study: Doses
    seeds: tuple[Mediation, ...]

    def of(self, take: Callable[[Mediation], float]) -> Difference:
        return estimate([take(each) for each in self.seeds])


def share_of(f: Doses) -> Share | None:
    """None where the treated arms span less than a quarter of the cosine's distance to the baseline in a seed: a slope
    over them would be drawn out too far."""
    x, y, base = f.cosine, f.loss, f.arms.index(f.baseline)
    treated = x[:, f.others]
    if np.any(np.ptp(treated, axis=1) < np.abs(treated.mean(1) - x[:, base]) / 4):
        return None
    each = [mediation(x[s], y[s], base) for s in range(len(x))]
    return Share(f, tuple(entry for entry in each if entry is not None))


def mediated() -> str:
    found = [share for f in all_doses() if (share := share_of(f)) is not None]
    takes = (attrgetter("total"), attrgetter("through"), attrgetter("direct"))
    columns = [[share.of(take) for share in found] for take in takes]
    differ, unexplained = (detected([d.p for d in columns[i]]) for i in (0, 2))
    lines = []
    for i, share in enumerate(found):
        total, through, _ = each = [column[i] for column in columns]
        lines.append(
            [
                share.study.title,
                *(f"{number(d.mean, 4, sign=True)} {interval(d.interval, 4)}" for d in each),
                number(through.mean / total.mean, 2) if differ[i] else "",
            ]
        )
    header = ("study", "arms less baseline, nats", "expected from the cosine", "the rest", "share")
    whole = [share.study for share, yes in zip(found, differ, strict=True) if yes]
    rest = [share.study for share, yes, left in zip(found, differ, unexplained, strict=True) if yes and left]
    return (
        f"{pipe_table(header, lines, right=range(1, 5))}\n\n{SHOWS} The mean of the arms differs detectably from "
        f"the baseline in {len(whole)} of {len(found)} studies ({names(whole)}), and in {len(rest)} of these "
        f"({names(rest)}) detectably by another amount than the slope over the arms expects (interval over seeds, Holm "
        "over the studies); where they do not, the interval is too wide to say that all goes with the cosine, and a "
        "slope over arms that we chose is no effect of the cosine."
    )


# ---- 4. early or final -----------------------------------------------------------------------------------------------


def cosine_at(share: float) -> Callable[[Cell], float | None]:
    """Mean cosine over the blocks at a share of training; None where no checkpoint lies near."""

    def of(cell: Cell) -> float | None:
        last = cell.final_step or 0
        step = min(cell.profiles, key=lambda step: abs(step - share * last))
        return profiles.blocks(cell.profiles[step]) if abs(step - share * last) <= NEAR * last else None

    return of


def early_or_final() -> str:
    lines, changed = [], []
    for f in all_doses():
        found = [f.values(cosine_at(point)) for point in POINTS]
        each = [[] if values is None else rank_correlations(values, f.loss) for values in found]
        change = [a - b for a, b in zip(each[0], each[-1], strict=True)] if len(each[0]) == len(each[-1]) else []
        text = ""
        if change:
            d = estimate(change)
            text = f"{number(d.mean, 2, sign=True)} {interval(d.interval, 2)}"
            if d.tested:
                changed.append((f, d))
        lines.append([f.title, *map(correlation, each), text])
    header = ("study", *(f"cosine at {100 * point:.0f} %" for point in POINTS), "10 % less 100 %")
    yes = detected([d.p for _, d in changed])
    early, late = (
        names([f for (f, d), y in zip(changed, yes, strict=True) if y and sign * d.mean > 0]) for sign in (1, -1)
    )
    return (
        f"{pipe_table(header, lines, right=range(1, 5))}\n\n{SHOWS} Of {len(changed)} studies with a checkpoint at "
        f"10 % and an interval, the early cosine goes detectably more with the final loss than the final one does in "
        f"{early} and less in {late} (Holm): the rows cannot say which of them it is, nor whether the early cosine "
        "moves the loss or is what a faster start shows first."
    )


def answer() -> str:
    """For the questions: what the page comes to."""
    n, differing = differing_at_equal_cosine()
    tested = [f for f in all_doses() if len(f.arms) >= FEWEST_TESTED]
    count, yes, _ = _counted(tested, [permutation_p(f.cosine, f.loss) for f in tested])
    return (
        f"In {len(differing)} of {n} studies an arm ends within {BANDS[0]:g} of the mean cosine of the angular form "
        f"and at a detectably different loss. A lower end cosine goes with a lower end loss in every seed of "
        f"{len(same_sign(1))} of {len(all_doses())} studies; over the arms that is detectably more than chance in "
        f"{yes} of {count}, so that these rows neither show nor exclude that the geometry is the cause."
    )


TABLES: dict[str, Callable[[], str]] = {
    "geometry-dose": dose_response,
    "geometry-equal": equal_cosine,
    "geometry-partial": partial,
    "geometry-share": mediated,
    "geometry-early": early_or_final,
    "geometry-answer": answer,
}
