"""The tables and figures of ``docs/results.md``, each from the committed rows of one study."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from pipes import pipe_table

import numpy as np
from matplotlib.figure import Figure

from claims import CLAIMS, judged
from decondense.compare import VALIDATION, Cell, Difference, NoteKind
from decondense.compare.results import Sweep
from decondense.figures import comparison as draw
from decondense.formatting import NONE
from decondense.report import interval, number, probability, words
from decondense.report.notes import in_words
from pictures import picture
from real_tables import real
from study_rows import (
    Committed,
    blocks,
    committed,
    deep_half,
    last,
    loss_difference,
    paired,
    shown,
    sweep_of,
    warm_up_control,
)

NOT_RUN = "not run"


def machine(f: Committed) -> str:
    cell = next(cell for cell in f.study.cells.values() if cell.status == "finished")
    where = cell.run["provenance"]
    device = where.get("device") or "cpu"
    name = where["cpu"] if device == "cpu" else device
    return f"{name}, torch {where['versions']['torch']}"


def command(f: Committed) -> str:
    """What runs the study: by its name if it is a shipped one, else by its file in ``benchmarks/studies/``."""
    file = f"studies/{f.name}.yaml"
    shipped = not (Path(__file__).resolve().parent / file).exists()
    return f"decondense study {f.name} --scale {f.scale}" if shipped else f"decondense study benchmarks/{file}"


def base(f: Committed) -> str:
    train, source = f.config.train, f.config.corpus.source
    text = "the embedded text" if source == "python_docs" else source
    return (
        f"{len(f.study.seeds)} seeds, {train.steps} steps of {train.batch_size} x {train.max_seq_length} tokens "
        f"({f.tokens / 1e6:.2f} M) of {text}; {machine(f)}; `{command(f)}`, rows: "
        f"`benchmarks/results/studies/{f.name}-{f.scale}.jsonl.gz`"
    )


def losses(f: Committed, arms: Sequence[str] | None = None) -> str:
    """Held-out loss of every arm, at equal tokens and at equal time, tokens to the same loss, and condensation."""
    compared = f.comparison
    assert compared.validation is not None
    speeds = {speed.arm: speed for speed in compared.speed}
    lines = []
    for arm in arms or compared.arms:
        values, d = compared.validation.of(arm), compared.validation.difference(arm)
        assert values is not None
        equal = compared.equal_time.difference(arm) if compared.equal_time else None
        speed = speeds.get(arm)
        cosine = [number(float(np.mean([of(cell) for cell in f.cells(arm)]))) for of in (blocks, last)]
        lines.append(
            [
                f.label(arm),
                f"{number(values.mean)} ± {number(values.sd)}",
                "" if d is None else f"{number(d.mean, sign=True)} {interval(d.interval)}",
                "baseline" if d is None else f"{words.outcome(d)}, p {probability(d.p_holm)}",
                "" if equal is None else f"{number(equal.mean, sign=True)} {interval(equal.interval)}",
                "" if speed is None else _share(speed.in_tokens),
                ", ".join(cosine),
            ]
        )
    clock = words.CLOCKS[compared.equal_time.clock] if compared.equal_time else "time"
    header = (
        "arm",
        "held-out loss",
        "less the baseline's",
        "in words",
        f"the same at equal {clock}",
        "same-loss tokens",
        "mean cosine: blocks, last layer",
    )
    # what the rows of a study do not give for any arm has no column
    kept = [place for place in range(len(header)) if any(line[place] for line in lines)]
    right = [new for new, place in enumerate(kept) if place in (1, 2, 4, 5, 6)]
    return pipe_table([header[place] for place in kept], [[line[p] for p in kept] for line in lines], right=right)


def overview() -> str:
    tiny, gpu = judged("tiny"), judged("gpu")
    lines, settled = [], []
    for claim in CLAIMS:
        (small, verdict), (large, gpu_verdict) = (entries[claim.study, claim.published] for entries in (tiny, gpu))
        settled.append(verdict if gpu_verdict == "not run" else gpu_verdict)
        lines.append([f"`{claim.study}`", claim.published, small, large, NOT_RUN, f"**{settled[-1]}**"])
    kinds = ("agrees", "disagrees", "equivalent", "undecided", "not tested", "not testable", "not run")
    tally = ", ".join(f"{settled.count(kind)} {kind}" for kind in kinds)
    return (
        pipe_table(("study", "published", "ours, `tiny`", "ours, `gpu`", "ours, `paper`", "verdict"), lines)
        + f"\n\nVerdicts over {len(lines)} claims: {tally}."
    )


def section(name: str, *, scale: str = "tiny", arms: bool = True) -> Callable[[], str]:
    def made() -> str:
        f = committed(name, scale)
        if f is None:
            return f"Not run yet: `decondense study {name} --scale {scale}`."
        parts = [] if not arms else [losses(f)]
        if f.comparison.omitted:
            parts.append("Left out: " + "; ".join(map(str, f.comparison.omitted)) + ".")
        return "\n\n".join([*parts, f"Final checkpoints: {base(f)}."])

    return made


def sizes(name: str) -> Callable[[], str]:
    def made() -> str:
        f = committed(name)
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
        return (
            pipe_table(header, lines, right=range(1, 7))
            + f"\n\nFinal checkpoints, mean ± standard deviation: {base(f)}."
        )

    return made


# --------------------------------------------------------------------------------------------------------------------
# The reader's questions
# --------------------------------------------------------------------------------------------------------------------


def table4_grid(scale: str) -> str:
    f = committed("table4", scale)
    if f is None:
        return f"Not run yet: `decondense study table4 --scale {scale}`."
    lines = []
    for tau in f.taus():
        line = [f"τ = {tau:g}"]
        for weight in f.weights():
            arm = f.with_setting(weight, tau)
            if arm is None:
                line.append("")
                continue
            d = loss_difference(f, arm)
            star = {"better": " ✓", "worse": " ✗"}.get(d.outcome, "")
            line.append(f"{number(d.mean, sign=True)} {interval(d.interval, 2)}{star}")
        lines.append(line)
    width = f.width
    return (
        pipe_table(("", *(f"λ = {weight:g}" for weight in f.weights())), lines, right=range(1, len(f.weights()) + 1))
        + f"\n\nHeld-out loss less that of cross-entropy, width {width}; ✓ better and ✗ worse after Holm's correction "
        f"over the {len(f.comparison.treated)} settings. {base(f)}."
    )


def best_weight() -> str:
    lines = []
    for scale in ("quick", "tiny", "gpu"):
        f = committed("table4", scale)
        if f is None:
            continue
        best: dict[int, tuple[float, str]] = {}
        arms = [arm for weight in f.weights() if (arm := f.with_setting(weight, 1.0))]
        for arm in arms:
            for cell in f.cells(arm):
                score = cell.final_score(VALIDATION)
                if score is not None and (cell.seed not in best or score < best[cell.seed][0]):
                    best[cell.seed] = (score, f.label(arm))
        means = {arm: loss_difference(f, arm).mean for arm in arms}
        top = min(means, key=means.__getitem__)
        width = f.width
        seeds = "; ".join(f"seed {seed}: {arm}" for seed, (_, arm) in sorted(best.items()))
        edge = " (the largest tried: the best may lie beyond)" if f.setting(top) == (max(f.weights()), 1.0) else ""
        lines.append(f"- `{scale}`, width {width}: the least mean loss is at {f.label(top)}{edge}; by seed: {seeds}.")
    return "\n".join(lines) or "Not run yet."


def temperature() -> str:
    f = committed("table4")
    if f is None:
        return "Not run yet."
    lines = []
    for weight in f.weights():
        for tau in (tau for tau in f.taus() if tau != 1):
            arm, plain = f.with_setting(weight, tau), f.with_setting(weight, 1.0)
            if arm is not None and plain is not None:
                d = loss_difference(f, arm, plain)
                answer = "yes" if _excludes_zero(d) else "no"
                lines.append([f"λ = {weight:g}", f"τ = {tau:g} less τ = 1", shown(d), answer])
    return pipe_table(("weight", "temperatures", "difference in held-out loss", "interval excludes 0"), lines)


def _excludes_zero(d: Difference) -> bool:
    return d.interval is not None and not d.interval[0] <= 0 <= d.interval[1]


def rivals() -> str:
    f = committed("rivals")
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
        equal = f.comparison.equal_time.difference(arm) if f.comparison.equal_time else None
        lines.append(
            [
                f.label(arm),
                f"{number(values.mean)} ± {number(values.sd)}",
                "" if d is None else f"{number(d.mean, sign=True)} {interval(d.interval, 2)}",
                "" if e is None else f"{number(e.mean, sign=True)} {interval(e.interval, 2)}",
                "" if ratio is None else f"{ratio[0]:.2f}",
                "" if equal is None else f"{number(equal.mean, sign=True)} {interval(equal.interval, 2)}",
                "" if speed is None else _share(speed.in_tokens),
                "" if speed is None else _share(speed.in_time),
                number(float(np.mean([blocks(cell) for cell in f.cells(arm)])), 2),
            ]
        )
    header = (
        "arm",
        "held-out loss",
        "less cross-entropy",
        "less angular",
        "step time (CPU), ratio",
        "less cross-entropy at equal CPU time",
        "same-loss tokens",
        "same-loss CPU time",
        "mean cosine, blocks",
    )
    return (
        pipe_table(header, lines, right=range(1, 9))
        + "\n\nSame-loss tokens and CPU time: those until a loss that both arms of a seed reach, over those of "
        f"cross-entropy (geometric mean over seeds, 95 % interval). {base(f)}."
    )


def _share(d: Difference | None) -> str:
    if d is None:
        return ""
    share, bounds = words.shares(d)
    return f"× {share:.2f}" + ("" if bounds is None else f" [{bounds[0]:.2f}, {bounds[1]:.2f}]")


def horizon() -> str:
    """Difference to cross-entropy at every evaluated point of the schedule study, at each arm's own rate."""
    f = committed("schedule")
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
        pipe_table(header, lines, right=range(1, len(header)))
        + f"\n\nHeld-out loss less that of cross-entropy. {base(f)}."
    )


def warm_up() -> str:
    """The control of the schedule study: a warm-up of 30 % for every arm, by rate; seeds as far as they have run."""
    config, ends = warm_up_control()
    lines = []
    for rate in sorted({rate for rate, _ in ends}):
        plain, dispersed = ends.get((rate, False), {}), ends.get((rate, True), {})
        both = sorted({*plain} & {*dispersed})
        lines.append(
            [
                f"{rate:g}",
                ", ".join(f"{plain[seed]:.3f} (seed {seed})" for seed in sorted(plain)),
                ", ".join(f"{dispersed[seed]:.3f} (seed {seed})" for seed in sorted(dispersed)),
                ", ".join(number(dispersed[seed] - plain[seed], 3, sign=True) for seed in both),
            ]
        )
    header = ("rate", "cross-entropy", "1 cosine to 0 at 30 %", "difference")
    train = config.train
    return (
        pipe_table(header, lines, right=(3,))
        + f"\n\nHeld-out loss after {train.steps} steps with {100 * train.warmup:.0f} % of warm-up, on more held-out "
        "documents than above; one seed has no interval. Rows: `benchmarks/results/controls/warm-up.jsonl.gz`, "
        "`decondense study benchmarks/studies/warm-up.yaml`."
    )


def sweep_table(control: str) -> str:
    """Learning rate x warm-up: the loss of every setting that a control tried, the least of each arm in bold."""
    tried = sweep_of(control)
    rates = sorted({rate for by_rate in tried.values() for rate in by_rate})
    means = {(key, rate): float(np.mean(v)) for key, by_rate in tried.items() for rate, v in by_rate.items()}
    lines = []
    for key in sorted(tried):
        arm, warmup = key
        least = min(value for ((other, _), _), value in means.items() if other == arm)
        values = [means.get((key, rate)) for rate in rates]
        cells = [NONE if v is None else f"**{number(v)}**" if v == least else number(v) for v in values]
        lines.append([arm, f"{100 * warmup:.0f} %", *cells])
    header = ("arm", "warm-up", *(f"rate {rate:g}" for rate in rates))
    return pipe_table(header, lines, right=range(2, len(header)))


def base_rates() -> str:
    """Learning rate and warm-up of the base, for cross-entropy and for the reference dispersion arm."""
    seeds = max(len(values) for by_rate in sweep_of("base").values() for values in by_rate.values())
    return sweep_table("base") + (
        f"\n\nLoss on the tuning documents after 300 steps, mean of {seeds} seeds that no comparison uses; the least "
        "of each arm is bold. Settings without a number were not run. Rows: "
        "`benchmarks/results/controls/base.jsonl.gz`, `decondense study benchmarks/studies/base.yaml`."
    )


def trial_cells(sweep: Sweep) -> list[str]:
    """The loss of each setting that was tried for an arm; the chosen one is bold."""
    values = ["failed" if trial.value is None else number(trial.value) for trial in sweep.trials]
    return [f"**{value}**" if trial.chosen else value for trial, value in zip(sweep.trials, values, strict=True)]


def rates() -> str:
    f = committed("schedule")
    if f is None:
        return "Not run yet."
    lines = []
    for sweep in f.comparison.trials:
        lines.append([f.label(sweep.arm), *trial_cells(sweep), f"the {sweep.edge} tried" if sweep.edge else ""])
    header = ("arm", *(f"{trial.learning_rate:g}" for trial in f.comparison.trials[0].trials), "the choice is")
    return pipe_table(header, lines) + (
        f"\n\nLoss on the tuning documents after {f.comparison.trials[0].trials[0].steps} steps, seed "
        f"{f.comparison.trials[0].trials[0].seed}; the chosen rate is bold.{noted(f, 'scaled-down trials')}"
    )


def noted(f: Committed, kind: NoteKind) -> str:
    return "".join(f" {in_words(note, f.comparison)}" for note in f.comparison.notes if note.kind == kind)


def end_point() -> str:
    f = committed("schedule")
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
            f"{words.outcome(end)}; {words.same_loss(speed)}."
        )
    return "\n".join(said)


def recommendation() -> str:
    """What the rows say about the defaults: a default changes only for what is detectably better."""
    said = []
    f = committed("schedule")
    if f is not None:
        against = f.against("constant-1")
        assert against.validation is not None
        fades = [d for d in against.validation.differences if d.arm != "cross-entropy"]
        up = [d for d in fades if d.outcome == "better"]
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
        f = committed("table4", scale)
        if f is None:
            continue
        width = f.width
        plain = f.with_setting(0.1, 1.0)
        assert plain is not None
        others = [(weight, arm) for weight in f.weights() if weight != 0.1 and (arm := f.with_setting(weight, 1.0))]
        each = "; ".join(f"λ = {weight:g} {shown(loss_difference(f, arm, plain))}" for weight, arm in others)
        said.append(
            f"- **Weight, from scratch at width {width}.** Held-out loss less that of the paper's λ = 0.1: {each}."
        )
    return "\n".join(said) or "Not run yet."


TABLES: dict[str, Callable[[], str]] = {
    "results-overview": overview,
    **{f"results-{name}": sizes(name) for name in ("fig2", "fig3", "figS2")},
    **{
        f"results-{name}": section(name)
        for name in ("fig4", "fig5", "fig7", "table2", "table3", "table5", "pairs", "schedule")
    },
    "results-real": real,
    "results-table4": lambda: table4_grid("tiny"),
    "results-table4-small": lambda: table4_grid("quick"),
    "results-best-weight": best_weight,
    "results-temperature": temperature,
    "results-rivals": rivals,
    "results-horizon": horizon,
    "results-rates": rates,
    "results-warm-up": warm_up,
    "results-base": base_rates,
    "results-end-point": end_point,
}

FIGURES: dict[str, tuple[str, Callable[[Committed], Figure]]] = {
    "fig2": ("fig2", lambda f: draw.size_trend(f.comparison)),
    "fig3": ("fig3", lambda f: draw.size_trend(f.comparison)),
    "fig4": ("fig4", lambda f: draw.profiles(f.study, _spread(f))),
    **{name: (name, lambda f: draw.heat_maps(f.study, f.study.arms, count=4)) for name in ("fig7", "fig7-smollm2")},
    **{
        name: (name, lambda f: draw.loss_curves(f.study, ("validation", "difference")))
        for name in ("schedule", "horizon", "horizon-english")
    },
    "table2": ("table2", lambda f: _forest(f)),
    "rivals": ("rivals", lambda f: _forest(f)),
    "target": ("target", lambda f: _forest(f)),
    "cause": ("cause", lambda f: _forest(f)),
}
"""Name of a figure -> the study it shows, and how it is drawn."""


def _spread(f: Committed) -> list[int]:
    """Start, peak and end of condensation, and what lies between."""
    cell = f.cells("cross-entropy")[0]
    steps = sorted(cell.profiles)
    top = max(steps, key=lambda step: deep_half(cell, step))
    later = [step for step in steps if step > top]
    return sorted({0, top, later[len(later) // 3], later[-1]})


def _forest(f: Committed) -> Figure:
    assert f.comparison.validation is not None
    return draw.forest([f.comparison.validation], f.comparison, xlabel="Δ held-out loss, nats/token")


def figures(folder: Path) -> None:
    for name, (study, drawn) in FIGURES.items():
        f = committed(study)
        if f is not None:
            picture(drawn(f), folder / f"{name}.png")
