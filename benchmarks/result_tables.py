"""The tables of ``docs/results.md``: each published claim beside ours, with a verdict that follows a rule.

Rows lie in ``results/studies/NAME-SCALE.jsonl.gz``, as ``decondense study NAME --scale SCALE`` wrote them.

Verdicts. A claim says in which direction a quantity lies. *agrees*: the 95 % interval of our estimate lies wholly on
that side; *disagrees*: wholly on the other side; *inconclusive*: it does not exclude zero. Other rules are said where
they are used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from decondense.compare import VALIDATION, Cell, Comparison, Difference, Study, compare, paired_difference
from decondense.figures import comparison as draw
from decondense.figures.style import export
from decondense.records import read_rows
from decondense.report import interval, number, probability

FOLDER = Path(__file__).resolve().parent / "results" / "studies"
SCALES = ("tiny", "gpu", "paper")
NOT_RUN = "not run"

Verdict = Literal["agrees", "disagrees", "inconclusive", "not run"]


@dataclass(frozen=True)
class Found:
    """One study at one scale, as committed."""

    name: str
    scale: str
    study: Study
    comparison: Comparison

    def against(self, baseline: str) -> Comparison:
        return compare(self.study, baseline, incomplete="omit")

    def cells(self, arm: str) -> list[Cell]:
        return self.study.of_arm(arm)

    def label(self, arm: str) -> str:
        return self.study.labels[arm]


@cache
def found(name: str, scale: str = "tiny") -> Found | None:
    path = FOLDER / f"{name}-{scale}.jsonl.gz"
    if not path.exists():
        return None
    study = Study.from_rows(read_rows(path))
    return Found(name, scale, study, compare(study, incomplete="omit"))


# --------------------------------------------------------------------------------------------------------------------
# Numbers and verdicts
# --------------------------------------------------------------------------------------------------------------------


def estimate(values: Sequence[float], quantity: str = "value") -> Difference:
    """Mean and Student interval of one value a seed."""
    return paired_difference([0.0] * len(values), list(values), quantity=quantity)


def shown(d: Difference, digits: int = 3, *, sign: bool = True) -> str:
    return f"{number(d.mean, digits, sign=sign)} {interval(d.interval, digits)}, n = {d.n}"


def judge(d: Difference, expected: Literal["below", "above"]) -> Verdict:
    if d.interval is None or d.interval[0] <= 0 <= d.interval[1]:
        return "inconclusive"
    return "agrees" if (d.interval[1] < 0) == (expected == "below") else "disagrees"


def joint(verdicts: Sequence[Verdict]) -> Verdict:
    """One verdict of several parts: all of them, or none that could tell, or the worst."""
    if not verdicts:
        return "not run"
    if "disagrees" in verdicts:
        return "disagrees"
    return "agrees" if all(verdict == "agrees" for verdict in verdicts) else "inconclusive"


def blocks(cell: Cell) -> float:
    profile = cell.final_profile()
    assert profile is not None
    return float(np.mean(profile["mean_cosine"][1:]))


def last(cell: Cell) -> float:
    profile = cell.final_profile()
    assert profile is not None
    return float(profile["mean_cosine"][-1])


def deep_half(cell: Cell, step: int | None = None) -> float:
    """Mean cosine of the last L/2 layers: the paper's alternative metric."""
    profile = cell.final_profile() if step is None else cell.profiles[step]
    assert profile is not None
    cosine = profile["mean_cosine"]
    return float(np.mean(cosine[-((len(cosine) - 1) // 2) :]))


def depth(cell: Cell) -> float:
    profile = cell.final_profile()
    assert profile is not None
    return float(profile["spearman"])


def paired(f: Found, arm: str, baseline: str, of: Callable[[Cell], float], quantity: str = "value") -> Difference:
    theirs, mine = f.cells(baseline), f.cells(arm)
    seeds = [cell.seed for cell in mine if cell.seed in {other.seed for other in theirs}]
    take = {(cell.arm, cell.seed): of(cell) for cell in [*theirs, *mine]}
    return paired_difference(
        [take[baseline, seed] for seed in seeds], [take[arm, seed] for seed in seeds], quantity=quantity, arm=arm
    )


def loss_difference(f: Found, arm: str, baseline: str | None = None) -> Difference:
    compared = f.comparison if baseline is None else f.against(baseline)
    assert compared.validation is not None
    d = compared.validation.difference(arm)
    assert d is not None
    return d


def size_correlation(f: Found, arms: Sequence[str], of: Callable[[Cell], float]) -> tuple[Difference | None, int]:
    """Spearman's correlation of size and condensation over the arms, seed by seed.

    Returns:
        The estimate over the seeds in which condensation varies at all (None below two), and the number of the others.
    """
    values, flat = [], 0
    for seed in f.study.seeds:
        cells = [f.study.cells[arm, seed] for arm in arms]
        if not all(cell.status == "finished" for cell in cells):
            continue
        found_ = [of(cell) for cell in cells]
        if len(set(found_)) == 1:
            flat += 1
        else:
            values.append(float(stats.spearmanr([cell.run["parameters"] for cell in cells], found_).statistic))
    return (estimate(values) if len(values) > 1 else None), flat


def table(header: Sequence[str], lines: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    rule = ["---:" if column in right else ":---" for column in range(len(header))]
    return "\n".join("| " + " | ".join(line) + " |" for line in [list(header), rule, *map(list, lines)])


def machine(f: Found) -> str:
    cell = next(cell for cell in f.study.cells.values() if cell.status == "finished")
    where = cell.run["provenance"]
    device = where.get("device") or "cpu"
    name = where["cpu"] if device == "cpu" else device
    return f"{name}, torch {where['versions']['torch']}"


def base(f: Found) -> str:
    config = f.study.config
    train, seeds = config["train"], len(f.study.seeds)
    tokens = train["steps"] * train["batch_sequences"] * train["sequence_tokens"]
    text = "the embedded text" if config["corpus"]["source"] == "python_docs" else config["corpus"]["source"]
    return (
        f"{seeds} seeds, {train['steps']} steps of {train['batch_sequences']} x {train['sequence_tokens']} tokens "
        f"({tokens / 1e6:.2f} M) of {text}; {machine(f)}; `decondense study {f.name} --scale {f.scale}`, rows: "
        f"`benchmarks/results/studies/{f.name}-{f.scale}.jsonl.gz`"
    )


def losses(f: Found, arms: Sequence[str] | None = None) -> str:
    """Held-out loss and condensation of every arm, and its difference to the baseline."""
    compared = f.comparison
    assert compared.validation is not None
    lines = []
    for arm in arms or compared.arms:
        values, d = compared.validation.of(arm), compared.validation.difference(arm)
        assert values is not None
        cosine = [blocks(cell) for cell in f.cells(arm)]
        lines.append(
            [
                f.label(arm),
                f"{number(values.mean)} ± {number(values.sd)}",
                "" if d is None else number(d.mean, sign=True),
                "" if d is None else interval(d.interval),
                "" if d is None else probability(d.p_holm),
                "baseline" if d is None else d.judgement if d.detected else d.verdict,
                number(float(np.mean(cosine))),
                number(float(np.mean([last(cell) for cell in f.cells(arm)]))),
            ]
        )
    header = (
        "arm",
        "held-out loss",
        "difference",
        "95 % interval",
        "p (Holm)",
        "in words",
        "mean cosine, blocks",
        "last layer",
    )
    return table(header, lines, right=(1, 2, 3, 4, 6, 7))


# --------------------------------------------------------------------------------------------------------------------
# Claims
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """One published result and ours."""

    study: str
    published: str
    judge: Callable[[Found], tuple[str, Verdict]]

    def at(self, scale: str) -> tuple[str, Verdict]:
        f = found(self.study, scale)
        return (NOT_RUN, "not run") if f is None else self.judge(f)


def families(f: Found) -> dict[str, list[str]]:
    found_: dict[str, list[str]] = {}
    for arm in f.study.arms:
        found_.setdefault(arm.rsplit("-", 1)[0], []).append(arm)
    return found_


def by_size(what: str, of: Callable[[Cell], float]) -> Callable[[Found], tuple[str, Verdict]]:
    def judged(f: Found) -> tuple[str, Verdict]:
        parts, verdicts = [], []
        for family, arms in families(f).items():
            d, flat = size_correlation(f, arms, of)
            ends = [number(float(np.mean([of(cell) for cell in f.cells(arm)])), 2) for arm in (arms[0], arms[-1])]
            said = ""
            if d is not None and d.interval is not None:
                within = (max(-1.0, d.interval[0]), min(1.0, d.interval[1]))  # Student's knows no bounds
                said = f"rank correlation with size {number(d.mean, 2, sign=True)} {interval(within, 2)}, n = {d.n}"
            if flat:
                said += f"{'; ' if said else ''}the same at every size in {flat} of {len(f.study.seeds)} seeds"
            parts.append(f"{family}, {len(arms)} sizes: {what} {ends[0]} (smallest) and {ends[1]} (largest); {said}")
            verdicts.append("inconclusive" if d is None or flat else judge(d, "below"))
        return "; ".join(parts), joint(verdicts)

    return judged


def fig4_initial(f: Found) -> tuple[str, Verdict]:
    first = [cell.profiles[0] for cell in f.cells("cross-entropy")]
    d = estimate([float(profile["spearman"]) for profile in first])
    cosine = float(np.mean([profile["mean_cosine"][-1] for profile in first]))
    said = f"Spearman {shown(d, 2)}, though the mean cosine of the last layer is only {number(cosine, 2)}"
    return said, judge(d, "above")


def fig4_falls(f: Found) -> tuple[str, Verdict]:
    cells = f.cells("cross-entropy")
    d = estimate([depth(cell) - float(cell.profiles[0]["spearman"]) for cell in cells])
    end = float(np.mean([depth(cell) for cell in cells]))
    return f"Spearman at the end {number(end, 2)}; change {shown(d, 2)}", judge(d, "below")


def peak(cell: Cell) -> tuple[float, float]:
    """(mean cosine of the deep half at its peak, share of training at which it is)."""
    values = {step: deep_half(cell, step) for step in cell.profiles}
    best = max(values, key=values.__getitem__)
    return values[best], best / max(cell.profiles)


def fig4_peak(f: Found) -> tuple[str, Verdict]:
    cells = f.cells("cross-entropy")
    peaks = [peak(cell) for cell in cells]
    d = estimate([deep_half(cell) - value for cell, (value, _) in zip(cells, peaks, strict=True)])
    when = [100 * share for _, share in peaks]
    first, top, end = (
        number(float(np.mean(values)), 2)
        for values in (
            [deep_half(cell, 0) for cell in cells],
            [value for value, _ in peaks],
            [deep_half(cell) for cell in cells],
        )
    )
    said = (
        f"mean cosine of the deep half: {first} at the start, a peak of {top} at {min(when):.0f} to {max(when):.0f} % "
        f"of training, {end} at the end; end less peak {shown(d, 2)}"
    )
    return said, judge(d, "below")


def fig5_kept(f: Found) -> tuple[str, Verdict]:
    d = paired(f, "distillation", "cross-entropy", blocks)
    plain = float(np.mean(d.baseline_values))
    ends = f"{number(plain, 2)} without and {number(plain + d.mean, 2)} with distillation"
    said = f"mean cosine of the blocks {ends}, {shown(d)}"
    assert d.interval is not None
    if d.interval[0] > -0.25 * plain:
        return said, "agrees"
    return said, "disagrees" if d.interval[1] < -0.25 * plain else "inconclusive"


def fig5_both(f: Found) -> tuple[str, Verdict]:
    d = paired(f, "both", "distillation", blocks)
    loss = loss_difference(f, "both", "distillation")
    return (
        f"dispersion loss beside distillation: mean cosine {shown(d)}; held-out loss {shown(loss)}",
        judge(d, "below"),
    )


def fig7_left(f: Found) -> tuple[str, Verdict]:
    cells = f.cells("cross-entropy")
    d = estimate([last(cell) / float(cell.profiles[0]["mean_cosine"][-1]) - 1 for cell in cells])
    start = float(np.mean([cell.profiles[0]["mean_cosine"][-1] for cell in cells]))
    end = float(np.mean([last(cell) for cell in cells]))
    said = f"last layer {number(start, 2)} at the start, {number(end, 2)} after cross-entropy alone"
    assert d.interval is not None
    if d.interval[0] > -0.1:
        return said, "agrees"
    return said, "disagrees" if d.interval[1] < -0.1 else "inconclusive"


def fig7_spread(f: Found) -> tuple[str, Verdict]:
    parts, verdicts = [], []
    for arm in f.comparison.treated:
        d = paired(f, arm, "cross-entropy", last)
        parts.append(f"{f.label(arm)}: {number(float(np.mean(d.arm_values)), 2)}, difference {shown(d)}")
        verdicts.append(judge(d, "below"))
    return "; ".join(parts), joint(verdicts)


def better(arm: str, baseline: str | None = None) -> Callable[[Found], tuple[str, Verdict]]:
    def judged(f: Found) -> tuple[str, Verdict]:
        d = loss_difference(f, arm, baseline)
        name = f.label(arm)
        return f"held-out loss of {name} less that of {f.label(d.baseline)}: {shown(d)} nats/token", judge(d, "below")

    return judged


def table2_rank(f: Found) -> tuple[str, Verdict]:
    assert f.comparison.validation is not None
    means = {values.arm: values.mean for values in f.comparison.validation.values}
    order = sorted(means, key=means.__getitem__)
    rank = order.index("angular") + 1
    other = order[0] if rank > 1 else order[1]
    d = loss_difference(f, "angular", other)
    said = (
        f"rank {rank} of {len(order)} by held-out loss; against {f.label(other)}, the "
        f"{'best' if rank > 1 else 'next'}: {shown(d)}"
    )
    return said, judge(d, "below")


def table4_range(f: Found) -> tuple[str, Verdict]:
    assert f.comparison.validation is not None
    tested = f.comparison.validation.differences
    up = [d for d in tested if d.judgement == "better"]
    down = [d for d in tested if d.judgement == "worse"]
    always = sum(all(difference < 0 for difference in d.differences) for d in tested)
    base_line = f.comparison.validation.of("cross-entropy")
    assert base_line is not None
    said = (
        f"{len(up)} of {len(tested)} settings better than cross-entropy after Holm's correction, {len(down)} worse; "
        f"{always} lower in every seed. Cross-entropy itself varies between seeds by {number(base_line.sd, 2)}"
    )
    if down:
        return said, "disagrees"
    return said, "agrees" if 2 * len(up) > len(tested) else "inconclusive"


LAST_HALF = by_size("mean cosine of the last L/2 layers", deep_half)
WITH_DEPTH = by_size("Spearman with depth", depth)

CLAIMS = (
    Claim("fig2", "larger models of a family have a lower Spearman correlation of mean cosine with depth", WITH_DEPTH),
    Claim("figS2", "and a lower mean cosine in their last L/2 layers", LAST_HALF),
    Claim("fig3", "a wider MLP (64 to 4096) lowers the Spearman correlation: .97, .91, .69, .43", WITH_DEPTH),
    Claim("fig3", "(the same, by the mean cosine of the last L/2 layers)", LAST_HALF),
    Claim("fig4", "condensation is there at initialisation (Spearman 1.0)", fig4_initial),
    Claim("fig4", "and falls during pre-training (to about −.4)", fig4_falls),
    Claim("fig4", "(the same, by the mean cosine of the last L/2 layers)", fig4_peak),
    Claim("fig5", "distillation does not remove condensation", fig5_kept),
    Claim("fig5", "(dispersion loss beside distillation: not published)", fig5_both),
    Claim("fig7", "mid-training with cross-entropy alone leaves the last layers condensed (about .95)", fig7_left),
    Claim("fig7", "dispersion loss spreads them out", fig7_spread),
    Claim(
        "table2",
        "mid-training with angular dispersion loss beats cross-entropy alone (35.4 to 35.5 against 34.95 points)",
        better("angular"),
    ),
    Claim("table2", "angular dispersion has the best mean rank (2.2)", table2_rank),
    Claim("table3", "dispersing the deep half beats dispersing all layers", better("deep", "all")),
    Claim("table3", "and the shallow half", better("deep", "shallow")),
    Claim("table4", "better over a wide range of lambda and tau", table4_range),
    Claim(
        "table5",
        "pre-training with dispersion loss (0.1) ends better (+1.17 points on average)",
        better("dispersion-0.1"),
    ),
)


def overview() -> str:
    lines = []
    for claim in CLAIMS:
        tiny, verdict = claim.at("tiny")
        gpu, gpu_verdict = claim.at("gpu")
        settled = verdict if gpu_verdict == "not run" else gpu_verdict
        lines.append([f"`{claim.study}`", claim.published, tiny, gpu, NOT_RUN, f"**{settled}**"])
    counts = [line[-1].strip("*") for line in lines]
    tally = ", ".join(f"{counts.count(word)} {word}" for word in ("agrees", "disagrees", "inconclusive", "not run"))
    return (
        table(("study", "published", "ours, `tiny`", "ours, `gpu`", "ours, `paper`", "verdict"), lines)
        + f"\n\nVerdicts over {len(lines)} claims: {tally}."
    )


def section(name: str, *, scale: str = "tiny", arms: bool = True) -> Callable[[], str]:
    def made() -> str:
        f = found(name, scale)
        if f is None:
            return f"Not run yet: `decondense study {name} --scale {scale}`."
        parts = [] if not arms else [losses(f)]
        if f.comparison.omitted:
            parts.append("Left out: " + "; ".join(f.comparison.omitted) + ".")
        return "\n\n".join([*parts, f"Final checkpoints: {base(f)}."])

    return made


def sizes(name: str) -> Callable[[], str]:
    def made() -> str:
        f = found(name)
        if f is None:
            return f"Not run yet: `decondense study {name}`."
        lines = []
        for entry in f.comparison.condensation_by_arm:
            half = entry.last.get("L/2")
            score = f.comparison.validation.of(entry.arm) if f.comparison.validation else None
            lines.append(
                [
                    f.label(entry.arm),
                    f"{(entry.parameters or 0) / 1e6:.2f} M",
                    *(
                        "" if values is None else f"{number(values.mean, 2)} ± {number(values.sd, 2)}"
                        for values in (entry.spearman, entry.kendall, half, entry.last.get("1"))
                    ),
                    "" if score is None else f"{number(score.mean)} ± {number(score.sd)}",
                ]
            )
        header = ("model", "parameters", "Spearman", "Kendall", "mean cosine, last L/2", "last layer", "held-out loss")
        return table(header, lines, right=range(1, 7)) + f"\n\nFinal checkpoints, mean ± standard deviation: {base(f)}."

    return made


# --------------------------------------------------------------------------------------------------------------------
# The reader's questions
# --------------------------------------------------------------------------------------------------------------------


def table4_grid(scale: str) -> str:
    f = found("table4", scale)
    if f is None:
        return f"Not run yet: `decondense study table4 --scale {scale}`."
    weights = ("0.1", "0.3", "1", "3")
    taus = [tau for tau in ("0.1", "0.3", "1") if f"l{weights[0]}-t{tau}" in f.study.arms]
    lines = []
    for tau in taus:
        line = [f"τ = {tau}"]
        for weight in weights:
            d = loss_difference(f, f"l{weight}-t{tau}")
            star = {"better": " ✓", "worse": " ✗"}.get(d.judgement, "")
            line.append(f"{number(d.mean, sign=True)} {interval(d.interval, 2)}{star}")
        lines.append(line)
    width = f.study.config["model"]["overrides"]["n_embd"]
    return (
        table(("", *(f"λ = {weight}" for weight in weights)), lines, right=range(1, 5))
        + f"\n\nHeld-out loss less that of cross-entropy, width {width}; ✓ better and ✗ worse after Holm's correction "
        f"over the {len(f.comparison.treated)} settings. {base(f)}."
    )


def best_weight() -> str:
    lines = []
    for scale in ("quick", "tiny", "gpu"):
        f = found("table4", scale)
        if f is None:
            continue
        best: dict[int, tuple[float, str]] = {}
        for arm in [arm for arm in f.comparison.treated if arm.endswith("-t1")]:
            for cell in f.cells(arm):
                score = cell.final_score(VALIDATION)
                if score is not None and (cell.seed not in best or score < best[cell.seed][0]):
                    best[cell.seed] = (score, f.label(arm))
        means = {arm: loss_difference(f, arm).mean for arm in f.comparison.treated if arm.endswith("-t1")}
        top = min(means, key=means.__getitem__)
        width = f.study.config["model"]["overrides"]["n_embd"]
        seeds = "; ".join(f"seed {seed}: {arm}" for seed, (_, arm) in sorted(best.items()))
        edge = " (the largest tried: the best may lie beyond)" if top.startswith("l3-") else ""
        lines.append(f"- `{scale}`, width {width}: the least mean loss is at {f.label(top)}{edge}; by seed: {seeds}.")
    return "\n".join(lines) or "Not run yet."


def temperature() -> str:
    f = found("table4")
    if f is None:
        return "Not run yet."
    lines = []
    for weight in ("0.1", "0.3", "1", "3"):
        for tau in ("0.1", "0.3"):
            d = loss_difference(f, f"l{weight}-t{tau}", f"l{weight}-t1")
            lines.append([f"λ = {weight}", f"τ = {tau} less τ = 1", shown(d), "yes" if _excludes_zero(d) else "no"])
    return table(("weight", "temperatures", "difference in held-out loss", "interval excludes 0"), lines)


def _excludes_zero(d: Difference) -> bool:
    return d.interval is not None and not d.interval[0] <= 0 <= d.interval[1]


def rivals() -> str:
    f = found("rivals")
    if f is None:
        return "Not run yet."
    against = f.against("angular")
    assert f.comparison.validation is not None
    assert against.validation is not None
    costs = {cost.arm: cost for cost in f.comparison.cost}
    speeds = {speed.arm: speed for speed in f.comparison.speed}
    lines = []
    for arm in f.comparison.arms:
        values, d, e = (
            f.comparison.validation.of(arm),
            f.comparison.validation.difference(arm),
            against.validation.difference(arm),
        )
        assert values is not None
        ratio = costs[arm].cpu_ratio
        speed = speeds.get(arm)
        fewer = "" if speed is None else "not reached" if speed.median_token_ratio is None else ""
        if speed is not None and speed.median_token_ratio is not None:
            saved = speed.median_token_ratio / (ratio[0] if ratio else 1)
            fewer = f"{speed.median_token_ratio:.2f} / {saved:.2f}"
        lines.append(
            [
                f.label(arm),
                f"{number(values.mean)} ± {number(values.sd)}",
                "" if d is None else f"{number(d.mean, sign=True)} {interval(d.interval, 2)}",
                "" if e is None else f"{number(e.mean, sign=True)} {interval(e.interval, 2)}",
                "" if ratio is None else f"{ratio[0]:.2f}",
                fewer,
                number(float(np.mean([blocks(cell) for cell in f.cells(arm)])), 2),
            ]
        )
    header = (
        "arm",
        "held-out loss",
        "less cross-entropy",
        "less angular",
        "step time (CPU), ratio",
        "speed-up in tokens / CPU time",
        "mean cosine, blocks",
    )
    return (
        table(header, lines, right=range(1, 7))
        + "\n\nThe speed-up is that to the loss with which cross-entropy ended, the median over seeds, in tokens and "
        f"in CPU time (equal cost); *not reached*: at least one seed did not get there. {base(f)}."
    )


def horizon() -> str:
    """Difference to cross-entropy at every evaluated point of the schedule study, at each arm's own rate."""
    f = found("schedule")
    if f is None:
        return "Not run yet: `decondense study schedule`."
    steps = sorted({step for cell in f.cells("cross-entropy") for step in cell.scores[VALIDATION]})
    wanted = [step for step in steps if step]
    lines = []
    for step in wanted:
        line = [f"{100 * step / max(steps):.0f} %"]
        for arm in f.comparison.treated:

            def at(cell: Cell, step: int = step) -> float:
                return float(cell.scores[VALIDATION][step]["value"])

            d = paired(f, arm, "cross-entropy", at)
            line.append(f"{number(d.mean, 3, sign=True)} {interval(d.interval, 2)}")
        lines.append(line)
    header = ("of training", *(f.label(arm) for arm in f.comparison.treated))
    return (
        table(header, lines, right=range(1, len(header))) + f"\n\nHeld-out loss less that of cross-entropy. {base(f)}."
    )


def rates() -> str:
    f = found("schedule")
    if f is None:
        return "Not run yet."
    lines = []
    for sweep in f.comparison.trials:
        cells = [
            f"**{number(trial.value)}**"
            if trial.chosen
            else number(trial.value)
            if trial.value is not None
            else "failed"
            for trial in sweep.trials
        ]
        lines.append([f.label(sweep.arm), *cells, f"the {sweep.edge} tried" if sweep.edge else ""])
    header = ("arm", *(f"{trial.learning_rate:g}" for trial in f.comparison.trials[0].trials), "the choice is")
    return table(header, lines) + (
        f"\n\nLoss on the tuning documents after {f.comparison.trials[0].trials[0].steps} steps, seed "
        f"{f.comparison.trials[0].trials[0].seed}; the chosen rate is bold."
    )


def end_point() -> str:
    f = found("schedule")
    if f is None:
        return "Not run yet."
    said = []
    speeds = {speed.arm: speed for speed in f.comparison.speed}
    for arm in f.comparison.treated:
        early_step = min(
            (
                step
                for step in f.cells(arm)[0].scores[VALIDATION]
                if step >= 0.1 * max(f.cells(arm)[0].scores[VALIDATION])
            ),
        )

        def early(cell: Cell, step: int = early_step) -> float:
            return float(cell.scores[VALIDATION][step]["value"])

        before, end = paired(f, arm, "cross-entropy", early), loss_difference(f, arm)
        speed = speeds[arm]
        kept = 100 * end.mean / before.mean if before.mean < 0 else math.nan
        share = "" if math.isnan(kept) else f" ({kept:.0f} % of the early lead)"
        said.append(
            f"- {f.label(arm)}: {shown(before)} after 10 % of training, {shown(end)} at the end{share}: "
            f"{end.judgement if end.detected else end.verdict}; cross-entropy's final loss: {speed.words}."
        )
    return "\n".join(said)


def recommendation() -> str:
    """What the rows say about the defaults: a default changes only for what is detectably better."""
    said = []
    f = found("schedule")
    if f is not None:
        against = f.against("constant-1")
        assert against.validation is not None
        fades = [d for d in against.validation.differences if d.arm != "cross-entropy"]
        up = [d for d in fades if d.judgement == "better"]
        each = "; ".join(f"{f.label(d.arm)} {shown(d)}" for d in fades)
        if up:
            best = min(up, key=lambda d: d.mean)
            said.append(
                f"- **Schedule: {f.label(best.arm)}**, for pre-training; it is detectably better than a constant one. "
                f"Held-out loss less that of a constant weight: {each}. The code's default is constant all the same, "
                "because a loop that does not tell its length cannot fade."
            )
        else:
            said.append(
                "- **Schedule: constant**, which stays the default, because no fading weight is detectably better. "
                f"Held-out loss less that of a constant weight: {each}. A weight that is off after 30 % of training "
                "costs nothing for the other 70 %, and may be taken for that."
            )
    for scale in ("quick", "tiny"):
        f = found("table4", scale)
        if f is None:
            continue
        width = f.study.config["model"]["overrides"]["n_embd"]
        each = "; ".join(
            f"λ = {weight} {shown(loss_difference(f, f'l{weight}-t1', 'l0.1-t1'))}" for weight in ("0.3", "1", "3")
        )
        said.append(
            f"- **Weight, from scratch at width {width}.** Held-out loss less that of the paper's λ = 0.1: {each}."
        )
    return "\n".join(said) or "Not run yet."


def pretrained() -> str:
    f = found("mid-training-260k")
    if f is None:
        return "Not run yet."
    parts = [losses(f)]
    lines = []
    for mean in f.comparison.means:
        for arm in f.comparison.arms:
            values, d = mean.measure.of(arm), mean.measure.difference(arm)
            if values is None:
                continue
            rank = mean.mean_rank.get(arm)
            lines.append(
                [
                    f"{mean.metric}, {len(mean.tasks)} tasks",
                    f.label(arm),
                    f"{number(100 * values.mean, 2)}" if mean.metric.startswith("acc") else number(values.mean),
                    "" if d is None else f"{number(100 * d.mean, 2, sign=True)} {_percent(d)}",
                    "" if d is None else d.verdict,
                    number(rank, 2),
                ]
            )
    parts.append(
        table(("mean over benchmarks", "arm", "score", "difference, 95 % interval", "in words", "mean rank"), lines)
    )
    parts.append("\n".join(f"- {note}." for note in f.comparison.task_notes))
    config = f.study.config["evaluate"]
    parts.append(
        f"At most {config['limit']} items a task: a task's own standard error is about "
        f"{100 * math.sqrt(0.25 / config['limit']):.0f} points. {base(f)}.".replace(
            "decondense study mid-training-260k --scale tiny",
            "decondense study benchmarks/studies/mid-training-260k.yaml",
        )
    )
    return "\n\n".join(parts)


def _percent(d: Difference) -> str:
    return interval(None if d.interval is None else (100 * d.interval[0], 100 * d.interval[1]), 2)


TABLES: dict[str, Callable[[], str]] = {
    "results-overview": overview,
    **{f"results-{name}": sizes(name) for name in ("fig2", "fig3", "figS2")},
    **{
        f"results-{name}": section(name)
        for name in ("fig4", "fig5", "fig7", "table2", "table3", "table5", "pairs", "schedule")
    },
    "results-table4": lambda: table4_grid("tiny"),
    "results-table4-small": lambda: table4_grid("quick"),
    "results-best-weight": best_weight,
    "results-temperature": temperature,
    "results-rivals": rivals,
    "results-horizon": horizon,
    "results-rates": rates,
    "results-end-point": end_point,
    "results-recommendation": recommendation,
    "results-pretrained": pretrained,
}

FIGURES: dict[str, tuple[str, Callable[[Found], Figure]]] = {
    "fig2": ("fig2", lambda f: draw.size_trend(f.comparison)),
    "fig3": ("fig3", lambda f: draw.size_trend(f.comparison)),
    "fig4": ("fig4", lambda f: draw.profiles(f.study, _spread(f))),
    "fig7": ("fig7", lambda f: draw.heat_maps(f.study, f.study.arms, count=4)),
    "schedule": ("schedule", lambda f: draw.loss_curves(f.study, ("validation", "difference"))),
    "table2": ("table2", lambda f: _forest(f)),
    "rivals": ("rivals", lambda f: _forest(f)),
}
"""Name of a figure -> the study it shows, and how it is drawn."""


def _spread(f: Found) -> list[int]:
    """Start, peak and end of condensation, and what lies between."""
    cell = f.cells("cross-entropy")[0]
    steps = sorted(cell.profiles)
    top = max(steps, key=lambda step: deep_half(cell, step))
    later = [step for step in steps if step > top]
    return sorted({0, top, later[len(later) // 3], later[-1]})


def _forest(f: Found) -> Figure:
    assert f.comparison.validation is not None
    return draw.forest([f.comparison.validation], f.comparison, xlabel="Δ held-out loss, nats/token")


def figures(folder: Path) -> None:
    for name, (study, drawn) in FIGURES.items():
        f = found(study)
        if f is not None:
            export(drawn(f), folder / name, ("png",), dpi=160)
