"""Tables and answers of the studies that go beyond the paper, ``target`` and ``cause``; collected by tables.py.

The contrasts are those that the files of the studies name in advance. Every arm against cross-entropy is one family
(the table of losses); the contrasts below are another, corrected together (Holm).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pipes import pipe_table

import numpy as np

from decondense.compare import Difference, Study
from decondense.compare.statistics import holm_over_arms
from decondense.formatting import NONE
from decondense.records import read_rows
from decondense.report import interval, number, probability, words
from sections import section, trial_cells
from study_rows import CONTROLS, Committed, blocks, committed, loss_difference, paired, shown


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
    return dict(zip(pairs, holm_over_arms([loss_difference(f, *pair) for pair in pairs]), strict=True))


def answered(f: Committed) -> list[str]:
    """Each question of the study and its answer, with the contrasts."""
    questions = QUESTIONS[f.name]
    found, sentences = contrasts(f, questions), []
    for question in questions:
        said = []
        for arm, other in question.contrasts:
            d = found[arm, other]
            what = f"{f.label(arm)} less {f.label(other)} {shown(d)}"
            said.append(f"{question.answers.get(d.outcome, words.outcome(d))} ({what}, p {probability(d.p_holm)})")
        text = "; ".join(said)
        sentences.append(f"**{question.asked}** {text[0].upper() + text[1:]}.")
    return sentences


def answers(f: Committed) -> str:
    """One sentence a question."""
    count = sum(len(question.contrasts) for question in QUESTIONS[f.name])
    return "\n".join(f"- {sentence}" for sentence in answered(f)) + (
        f"\n\nHeld-out loss, {len(f.study.seeds)} seeds, 95 % intervals; p after Holm's correction over these "
        f"{count} contrasts, which the study names in advance."
    )


def settings(f: Committed) -> str:
    """What the trials of each arm gave, by rate and warm-up."""
    tried = f.comparison.trials
    lines = [[f.label(sweep.arm), *trial_cells(sweep)] for sweep in tried]
    grid = tried[0].trials
    swept = any(trial.warmup is not None for trial in grid)
    names = [
        f"{trial.learning_rate:g}" + ("" if trial.warmup is None else f", {100 * trial.warmup:.0f} %") for trial in grid
    ]
    return pipe_table(("arm", *names), lines, right=range(1, len(names) + 1)) + (
        f"\n\nLoss on the tuning documents by learning rate{' and warm-up' if swept else ''}, after {grid[0].steps} "
        f"steps, seed {grid[0].seed}, which no comparison uses; the setting that the arm's runs take is bold."
    )


def mediation(f: Committed) -> str:
    """The share of each arm's gain that goes with the cosine."""
    points = sorted({entry.at for entry in f.comparison.mediation})
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
                shares.append(f"{number(100 * entry.share, 0)} % {interval((low, high), 0)}")
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
    for path in sorted(CONTROLS.glob("target-smollm2*.jsonl.gz")):
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


def when_run(name: str, table: Callable[[Committed], str]) -> Callable[[], str]:
    """The table of a study, or that it has not been run."""

    def made() -> str:
        f = committed(name)
        return f"Not run yet: `decondense study {name}`." if f is None else table(f)

    return made


TABLES: dict[str, Callable[[], str]] = {
    "target-smollm2": held,
    **{f"results-{name}": section(name) for name in QUESTIONS},
    **{f"results-{name}-answers": when_run(name, answers) for name in QUESTIONS},
    **{f"results-{name}-settings": when_run(name, settings) for name in QUESTIONS},
    "results-cause-mediation": when_run("cause", mediation),
}
