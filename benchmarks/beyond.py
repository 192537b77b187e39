"""Tables and answers of the studies that go beyond the paper, ``target`` and ``cause``; collected by tables.py.

The contrasts are those that the files of the studies name in advance. Every arm against cross-entropy is one family
(the table of losses); the contrasts below are another, corrected together (Holm).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pipes import pipe_table

import numpy as np

from decondense.compare import Difference, Study, holm
from decondense.compare.mediation import FEWEST_SEEDS
from decondense.formatting import NONE
from decondense.records import read_rows
from decondense.report import interval, number, probability, words
from sections import base, losses
from study_rows import FOLDER, Committed, blocks, committed, loss_difference, paired, shown


@dataclass(frozen=True)
class Question:
    """What is asked, the contrasts that answer it, and what the answer is by their outcomes."""

    asked: str
    contrasts: tuple[tuple[str, str], ...]
    """(arm, the arm that it is compared with)."""
    answers: Mapping[str, str]
    """Outcome (``better``, ``worse``, ``equivalent``, ``undecided``) -> the answer."""


QUESTIONS: dict[str, tuple[Question, ...]] = {
    "target": (
        Question(
            "Does a target end at a lower loss than a fixed weight of 1?",
            (("target-0.1", "weight-1"), ("target-teacher", "weight-1")),
            {"better": "lower", "worse": "higher", "equivalent": "equal", "undecided": "not decided"},
        ),
        Question(
            "Does the pattern of a larger trained model do better than a placebo?",
            (("profile-teacher", "profile-random"), ("profile-teacher", "profile-condensed")),
            {"better": "yes", "worse": "no, worse", "equivalent": "no difference", "undecided": "not decided"},
        ),
        Question(
            "Is a target from a larger model better than one number?",
            (("target-teacher", "target-0.1"),),
            {"better": "yes", "worse": "no, worse", "equivalent": "no difference", "undecided": "not decided"},
        ),
        Question(
            "Does a term on the geometry add to distillation?",
            (("distillation-profile", "distillation"), ("distillation-gram", "distillation")),
            {"better": "yes", "worse": "no, it costs", "equivalent": "nothing", "undecided": "not decided"},
        ),
    ),
    "cause": (
        Question(
            "Does the direction of the gradient matter, or only its size?",
            (("dispersion", "noise"),),
            {
                "better": "the direction matters",
                "worse": "noise does better",
                "equivalent": "noise does as well",
                "undecided": "not decided",
            },
        ),
        Question(
            "Does it take repulsion, or is it enough to remove the common direction?",
            (("dispersion", "centring"),),
            {
                "better": "repulsion does better",
                "worse": "centring does better",
                "equivalent": "centring does as well",
                "undecided": "not decided",
            },
        ),
        Question(
            "Does a longer warm-up do as much?",
            (("dispersion", "warm-up"),),
            {
                "better": "no, less",
                "worse": "it does more",
                "equivalent": "as much",
                "undecided": "not decided",
            },
        ),
        Question(
            "Is there a gain under another optimizer?",
            (("muon-dispersion", "muon"),),
            {"better": "yes", "worse": "no, a loss", "equivalent": "no", "undecided": "not decided"},
        ),
        Question(
            "Is there a gain with untied embeddings?",
            (("untied-dispersion", "untied"),),
            {"better": "yes", "worse": "no, a loss", "equivalent": "no", "undecided": "not decided"},
        ),
    ),
}


def contrasts(f: Committed, questions: Sequence[Question]) -> dict[tuple[str, str], Difference]:
    """Every contrast in the held-out loss, p-values corrected over all of them."""
    pairs = [pair for question in questions for pair in question.contrasts]
    found = {pair: loss_difference(f, *pair) for pair in pairs}
    tested = [pair for pair in pairs if found[pair].p is not None]
    corrected = holm([p for pair in tested if (p := found[pair].p) is not None])
    p_of = dict(zip(tested, corrected, strict=True))
    return {pair: dataclasses.replace(d, p_holm=p_of.get(pair)) for pair, d in found.items()}


def answer(name: str, place: int) -> str | None:
    """The question at a place of a study's list and its answer, with the contrasts; None: not run."""
    f = committed(name)
    if f is None:
        return None
    found, question = contrasts(f, QUESTIONS[name]), QUESTIONS[name][place]
    said = []
    for arm, other in question.contrasts:
        d = found[arm, other]
        what = f"{f.label(arm)} less {f.label(other)} {shown(d)}"
        said.append(f"{question.answers.get(d.outcome, words.outcome(d))} ({what}, p {probability(d.p_holm)})")
    text = "; ".join(said)
    return f"**{question.asked}** {text[0].upper() + text[1:]}."


def answers(name: str) -> Callable[[], str]:
    """One sentence a question."""

    def made() -> str:
        f = committed(name)
        if f is None:
            return f"Not run yet: `decondense study {name}`."
        lines = [f"- {answer(name, place)}" for place in range(len(QUESTIONS[name]))]
        count = sum(len(question.contrasts) for question in QUESTIONS[name])
        return "\n".join(lines) + (
            f"\n\nHeld-out loss, {f.seeds_run}, 95 % intervals; p after Holm's correction over these "
            f"{count} contrasts, which the study names in advance."
        )

    return made


def arms(name: str) -> Callable[[], str]:
    """Losses of every arm, and the rate and the warm-up that its trials chose."""

    def made() -> str:
        f = committed(name)
        if f is None:
            return f"Not run yet: `decondense study {name}`."
        parts = [losses(f)]
        if f.comparison.omitted:
            parts.append("Left out: " + "; ".join(map(str, f.comparison.omitted)) + ".")
        parts.append(f"Final checkpoints: {base(f)}.")
        return "\n\n".join(parts)

    return made


def settings(name: str) -> Callable[[], str]:
    """What the trials of each arm gave, by rate and warm-up."""

    def made() -> str:
        f = committed(name)
        if f is None:
            return f"Not run yet: `decondense study {name}`."
        tried = f.comparison.trials
        keys = sorted({(trial.learning_rate, trial.warmup or 0.0) for sweep in tried for trial in sweep.trials})
        lines = []
        for sweep in tried:
            by_key = {(trial.learning_rate, trial.warmup or 0.0): trial for trial in sweep.trials}
            cells = []
            for key in keys:
                trial = by_key.get(key)
                value = NONE if trial is None or trial.value is None else number(trial.value)
                cells.append(f"**{value}**" if trial is not None and trial.chosen else value)
            lines.append([f.label(sweep.arm), *cells])
        swept = any(trial.warmup is not None for sweep in tried for trial in sweep.trials)
        header = ("arm", *(f"{rate:g}, {100 * warmup:.0f} %" if swept else f"{rate:g}" for rate, warmup in keys))
        trial = tried[0].trials[0]
        return pipe_table(header, lines, right=range(1, len(header))) + (
            f"\n\nLoss on the tuning documents by learning rate{' and warm-up' if swept else ''}, after {trial.steps} "
            f"steps, seed {trial.seed}, which no comparison uses; the setting that the arm's runs take is bold."
        )

    return made


def mediation() -> str:
    """The share of each arm's gain that goes with the cosine."""
    f = committed("cause")
    if f is None:
        return "Not run yet: `decondense study cause`."
    points = sorted({entry.at for entry in f.comparison.mediation})
    if not points:
        return f"A share needs {FEWEST_SEEDS} seeds; {f.seeds_run} have finished."
    lines = []
    for arm in f.comparison.treated:
        entries = {entry.at: entry for entry in f.comparison.mediation if entry.arm == arm}
        if not entries:
            continue
        cosine = paired(f, arm, f.comparison.baseline, blocks)
        shares = []
        for at in points:
            entry = entries.get(at)
            if entry is None or entry.share is None or entry.interval is None:
                shares.append(NONE)
            else:
                low, high = (100 * bound for bound in entry.interval)
                shares.append(f"{100 * entry.share:.0f} % {interval((low, high), 0)}")
        gain = loss_difference(f, arm)
        lines.append([f.label(arm), shown(cosine, 3), shown(gain, 3), *shares])
    header = ("arm", "Δ mean cosine, end", "Δ held-out loss", *(f"share, cosine at {100 * at:.0f} %" for at in points))
    return pipe_table(header, lines, right=range(1, len(header))) + (
        f"\n\nA share needs a gain that is told from 0; {NONE}: there is none to share, or the cosines do not vary. "
        "Not corrected over arms and points."
    )


def held() -> str:
    """The runs of a controller on a pretrained model: how near its target each of them brought the layers."""
    lines = []
    for path in sorted((FOLDER.parent / "controls").glob("target-smollm2*.jsonl.gz")):
        study = Study.from_rows(read_rows(path))
        assert study.config is not None
        train, (arm,) = study.config.train, study.config.arms
        assert arm.dispersion is not None
        assert isinstance(arm.dispersion.target, float)
        goal = arm.dispersion.target
        (cell,) = study.cells.values()
        logged = sorted(cell.steps)
        cosine = np.array([list(cell.steps[step]["dispersion_cosines"].values()) for step in logged])
        late = cosine[2 * len(logged) // 3 :]
        over = late.mean(axis=0) / goal - 1
        weights = list(cell.steps[logged[-1]]["dispersion_weights"].values())
        lines.append(
            [
                f"{arm.dispersion.weight:g}",
                f"{train.learning_rate:g}, {train.lr_scheduler_type}",
                f"{number(float(cosine[0].mean()), 2)} ({cosine[0].min():.2f} to {cosine[0].max():.2f})",
                f"{number(float(late.mean()), 3)} ({late.mean(axis=0).min():.2f} to {late.mean(axis=0).max():.2f})",
                f"{int((over <= 0.05).sum())}, {int((over <= 0.1).sum())} of {len(over)}",
                f"{min(weights):.2g} to {max(weights):.2g}",
            ]
        )
        steps, tokens = train.steps, train.steps * train.batch_size * train.max_seq_length
    if not lines:
        return "Not run yet: `decondense study benchmarks/studies/target-smollm2.yaml`."
    header = (
        "weight at the start", "learning rate", "mean cosine, first 10 steps (layers)", "last third (layers)",
        "layers at most 5 %, 10 % above", "weights at the end",
    )  # fmt: skip
    return pipe_table(header, lines, right=range(2, 6)) + (
        f"\n\nTarget {goal:g}, {steps} steps of 256 tokens ({tokens / 1e3:.0f} K) of WikiText-2, one seed each. "
        "Rows: `benchmarks/results/controls/`, study: `benchmarks/studies/target-smollm2.yaml`."
    )


TABLES: dict[str, Callable[[], str]] = {
    "target-smollm2": held,
    **{f"results-{name}": arms(name) for name in QUESTIONS},
    **{f"results-{name}-answers": answers(name) for name in QUESTIONS},
    **{f"results-{name}-settings": settings(name) for name in QUESTIONS},
    "results-cause-mediation": mediation,
}
