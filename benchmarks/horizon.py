"""Tables of the study ``horizon``, 20 training tokens a parameter, on two corpora; collected by tables.py.

The contrast is fixed in advance: held-out loss at the end, cosine to 0 at 30 % less cross-entropy, at equal tokens
and at equal time. Intervals are those of the sequence that may be looked at after every seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pipes import pipe_table

import numpy as np

from decondense.compare import VALIDATION, Cell, Difference, Study
from decondense.formatting import NONE
from decondense.records import read_rows
from decondense.report import interval, number, probability, words
from sections import losses, machine, trial_cells
from study_rows import FOLDER, Committed, committed, loss_difference, mean, paired, shown

CORPORA = {"horizon": "documentation", "horizon-english": "English prose"}
"""Study -> what it is trained on."""
CONTROL = FOLDER.parent / "controls" / "horizon-settings.jsonl.gz"
HOW = {
    "horizon": "decondense study horizon",
    "horizon-english": "decondense study benchmarks/studies/horizon-english.yaml",
}
NOT_RUN = f"Not run yet: `{HOW['horizon']}`."


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


def verdict(f: Committed) -> str:
    return VERDICTS.get(end(f).outcome, words.outcome(end(f)))


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
            f"{100 * most.after:.0f} % of training and {shown(d)} at the end ({verdict(f)})"
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
            f"- **{CORPORA[name].capitalize()}:** {verdict(f)}. Held-out loss at the end {shown(d)}, p "
            f"{probability(d.p_holm)}; on the way the lead is at most {shown(most.difference)} (after "
            f"{100 * most.after:.0f} % of training).{timed} {same_loss[0].upper()}{same_loss[1:]}. Settings: "
            f"{'; '.join(takes)}."
        )
    return "\n".join(lines)


def table() -> str:
    parts = []
    for name, f in ran().items():
        train = f.config.train
        parts.append(
            f"{CORPORA[name].capitalize()}:\n\n{losses(f)}\n\n"
            f"{len(f.study.seeds)} seeds, {train.steps} steps of {train.batch_size} x {train.max_seq_length} tokens "
            f"({f.tokens / 1e6:.2f} M); {machine(f)}; `{HOW[name]}`, rows: "
            f"`benchmarks/results/studies/{name}-tiny.jsonl.gz`."
        )
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


def control() -> str:
    """Runs of the full length at other settings: how far another choice would have moved either arm."""
    f = committed("horizon")
    if f is None or not CONTROL.exists():
        return "Not run yet: `decondense study benchmarks/studies/horizon-settings.yaml`."
    study = Study.from_rows(read_rows(CONTROL))
    ends: dict[tuple[float, float], dict[str, float]] = {}
    for cell in study.cells.values():
        entry = study.arm_config(cell.arm)
        assert entry is not None
        assert entry.learning_rate is not None
        assert entry.warmup is not None
        if cell.status == "finished":
            at = ends.setdefault((entry.learning_rate, entry.warmup), {})
            at[f.comparison.baseline if entry.dispersion is None else f.comparison.treated[0]] = _last(cell)
    seeds = {seed for _, seed in study.cells}
    chosen = {}
    for sweep in f.comparison.trials:
        trial = sweep.chosen
        assert trial is not None
        assert trial.warmup is not None
        chosen[sweep.arm] = (trial.learning_rate, trial.warmup)
        own = mean([_last(cell) for cell in f.cells(sweep.arm) if cell.seed in seeds])
        ends.setdefault(chosen[sweep.arm], {})[sweep.arm] = own
    arms = (f.comparison.baseline, f.comparison.treated[0])
    best = {arm: min(values[arm] for values in ends.values() if arm in values) for arm in arms}
    lines = []
    for key in sorted(ends):
        cells = []
        for arm in arms:
            value = ends[key].get(arm)
            text = "" if value is None else number(value)
            cells.append((f"**{text}**" if value == best[arm] else text) + (" (chosen)" if chosen[arm] == key else ""))
        lines.append([f"{key[0]:g}", f"{100 * key[1]:.0f} %", *cells])
    gap = best[arms[1]] - best[arms[0]]
    header = ("rate", "warm-up", *(f.label(arm) for arm in arms))
    return pipe_table(header, lines, right=(2, 3)) + (
        f"\n\nHeld-out loss after {f.config.train.steps} steps, seed {', '.join(map(str, sorted(seeds)))}; the best of "
        f"each arm is bold. Best less best: {number(gap, 3, sign=True)}; one seed, chosen on the documents that are "
        "scored, so no interval and no verdict. Rows: `benchmarks/results/controls/horizon-settings.jsonl.gz`."
    )


def _last(cell: Cell) -> float:
    scores = cell.scores[VALIDATION]
    return float(np.float64(scores[max(scores)]["value"]))


TABLES = {
    "results-length": answer,
    "results-length-losses": table,
    "results-length-points": on_the_way,
    "results-length-settings": settings,
    "results-length-control": control,
}
