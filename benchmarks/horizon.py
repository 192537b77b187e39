"""Tables of the study ``horizon``, 20 training tokens a parameter, on two corpora; collected by tables.py.

The contrast is fixed in advance: held-out loss at the end, cosine to 0 at 30 % less cross-entropy, at equal tokens
and at equal time. Intervals are those of the sequence that may be looked at after every seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pipes import pipe_table

from decondense.compare import VALIDATION, Cell, Difference
from decondense.formatting import NONE
from decondense.report import interval, number, probability, words
from sections import base, losses, recommendation, trial_cells
from study_rows import Committed, committed, loss_difference, paired, shown

CORPORA = {"horizon": "documentation", "horizon-english": "English prose"}
"""Study -> what it is trained on."""
NOT_RUN = "Not run yet: `decondense study horizon`."


def ran() -> dict[str, Committed]:
    """The corpora that have rows."""
    return {name: f for name in CORPORA if (f := committed(name)) is not None}


def end(f: Committed) -> Difference:
    """The contrast of the study."""
    (arm,) = f.comparison.treated
    return loss_difference(f, arm)


def at_equal_time(f: Committed) -> Difference | None:
    (arm,) = f.comparison.treated
    return f.comparison.equal_time.difference(arm) if f.comparison.equal_time else None


def points(f: Committed) -> dict[int, Difference]:
    """The difference at every evaluated step but the start."""
    (arm,) = f.comparison.treated
    steps = sorted({step for cell in f.cells(arm) for step in cell.scores[VALIDATION] if step})

    def at(step: int) -> Difference:
        def loss(cell: Cell) -> float:
            return float(cell.scores[VALIDATION][step]["value"])

        return paired(f, arm, f.comparison.baseline, loss)

    return {step: at(step) for step in steps}


@dataclass(frozen=True)
class Lead:
    """The largest lead on the way, and the share of training after which it is there."""

    after: float
    difference: Difference


def lead(f: Committed) -> Lead:
    found = points(f)
    step = min(found, key=lambda s: found[s].mean)
    return Lead(step / max(found), found[step])


VERDICTS = {
    "better": "a better end point",
    "worse": "a worse end point",
    "equivalent": "an equal end point",
    "undecided": "not decided",
}


def verdict(d: Difference) -> str:
    return VERDICTS.get(d.outcome, words.outcome(d))


ADVICE = {
    "better": "use it",
    "worse": "do not use it",
    "equivalent": "the final loss is no reason to use it",
    "undecided": "no gain is detected",
}


def advice() -> str:
    """What follows for pre-training of this length, where it has been run; corpora that differ are said to."""
    ends = {name: end(f) for name, f in ran().items()}
    each = "; ".join(
        f"{CORPORA[name]} {shown(d)}, p {probability(d.p_holm)} ({verdict(d)})" for name, d in ends.items()
    )
    outcomes = {d.outcome for d in ends.values()}
    said = ADVICE.get(outcomes.pop(), "not tested") if len(outcomes) == 1 else "it depends on the text"
    return f"{said}. Held-out loss less that of cross-entropy, each side at its own rate and warm-up: {each}"


def recommended() -> str:
    """Whether to use it, before what to use."""
    whether = [f"- **Whether, from scratch at 20 tokens a parameter:** {advice()}."] if ran() else []
    return "\n".join([*whether, recommendation()])


def sentence() -> str:
    """The answer for the head of the page."""
    found = ran()
    if not found:
        return (
            "**Accelerator or better end point?** Not answered: the study at 20 tokens a parameter (`decondense study "
            "horizon`, `--text` for another corpus) has not been run."
        )
    said = []
    for name, f in found.items():
        most, d = lead(f), end(f)
        said.append(
            f"on {CORPORA[name]} the lead is {number(most.difference.mean, 3, sign=True)} after "
            f"{100 * most.after:.0f} % of training and {shown(d)} at the end ({verdict(d)})"
        )
    return f"**Accelerator or better end point?** At 20 tokens a parameter, {'; '.join(said)}."


def answer() -> str:
    """One paragraph a corpus: on the way, at the end, at equal time, and the settings."""
    found = ran()
    if not found:
        return NOT_RUN
    lines = []
    for name, f in found.items():
        d, most, equal = end(f), lead(f), at_equal_time(f)
        (speed,) = f.comparison.speed
        same_loss = words.same_loss(speed)
        timed = "" if equal is None else f" At equal CPU time: {shown(equal)}, {words.outcome(equal)}."
        chosen = {sweep.arm: sweep.chosen for sweep in f.comparison.trials}
        takes = [
            f"{f.label(arm)} rate {trial.learning_rate:g}, warm-up {100 * (trial.warmup or 0):.0f} %"
            for arm, trial in chosen.items()
            if trial is not None
        ]
        lines.append(
            f"- **{CORPORA[name].capitalize()}:** {verdict(d)}. Held-out loss at the end {shown(d)}, p "
            f"{probability(d.p_holm)}; on the way the lead is at most {shown(most.difference)} (after "
            f"{100 * most.after:.0f} % of training).{timed} {same_loss[0].upper()}{same_loss[1:]}. Settings: "
            f"{'; '.join(takes)}."
        )
    return "\n".join(lines)


def table() -> str:
    parts = [f"{CORPORA[name].capitalize()}:\n\n{losses(f)}\n\n{base(f)}." for name, f in ran().items()]
    return "\n\n".join(parts) or NOT_RUN


def on_the_way() -> str:
    found = {name: points(f) for name, f in ran().items()}
    if not found:
        return NOT_RUN
    shares = sorted({round(100 * step / max(p)) for p in found.values() for step in p})
    lines = []
    for share in shares:
        cells = []
        for at in found.values():
            d = next((d for step, d in at.items() if round(100 * step / max(at)) == share), None)
            cells.append(NONE if d is None else f"{number(d.mean, 3, sign=True)} {interval(d.interval, 3)}")
        lines.append([f"{share} %", *cells])
    header = ("of training", *(CORPORA[name] for name in found))
    return pipe_table(header, lines, right=range(1, len(header))) + "\n\nHeld-out loss less that of cross-entropy."


def settings() -> str:
    """What the trials of each arm gave, a line for each rate and warm-up."""
    found = ran()
    if not found:
        return NOT_RUN
    columns, names = [], []
    for name, f in found.items():
        for sweep in f.comparison.trials:
            columns.append(trial_cells(sweep))
            names.append(f"{CORPORA[name]}: {f.label(sweep.arm)}")
    first = next(iter(found.values()))
    grid = first.comparison.trials[0].trials
    lines = [
        [f"{trial.learning_rate:g}", f"{100 * (trial.warmup or 0):.0f} %", *(column[place] for column in columns)]
        for place, trial in enumerate(grid)
    ]
    assert first.config.sweep is not None
    seeds = len(first.config.sweep.seeds)
    header = ("rate", "warm-up", *names)
    return pipe_table(header, lines, right=range(2, len(header))) + (
        f"\n\nLoss on the tuning documents after {grid[0].steps} steps, a tenth of a run, mean of {seeds} seeds "
        "that no comparison uses; warm-ups are shares of the steps. The setting that the arm's runs take is bold."
    )


TABLES = {
    "results-recommendation": recommended,
    "results-length": answer,
    "results-length-losses": table,
    "results-length-points": on_the_way,
    "results-length-settings": settings,
}
