"""The notes of a comparison in sentences: one text for each kind."""

from __future__ import annotations

from typing import Any

from decondense.compare import Comparison, Note, NoteKind
from decondense.formatting import listed, shortened

TEXTS: dict[NoteKind, str] = {
    "not the mean of items": (
        "{arms} (seed {seed}): the {task} {metric} of {score} is not the weighted mean of its items ({mean}); the item "
        "part of its interval is approximate."
    ),
    "different layers": "The arms have different layers; the table by layer holds only the most frequent set.",
    "measured": (
        "Nothing was trained: the arms are different models, measured as they are; a seed is one choice of passages, "
        "so that the differences pair models by passages, and their intervals say how much other passages would change "
        "them, not how much other trainings would."
    ),
    "other start": (
        "Other initial weights than the baseline's by design: {arms}. The pairs share the order of the data only, so "
        "that what the seed's start adds to a difference does not cancel."
    ),
    "untrained": "Untrained, the start as it is, which reads no data: {arms}.",
    "rates by seed": "The seeds of {arms} have different learning rates: {rates}.",
    "rates without a sweep": "The arms have different learning rates without a sweep: {rates}.",
    "rates that no sweep chose": "Learning rates that no sweep chose: {rates}.",
    "not swept": (
        "Not swept: {knobs}. Another value may be better for the baseline or for an arm, so the differences hold at "
        "these settings only; a longer warm-up or another rate of the baseline can take a lead away."
    ),
    "no trials": "The study chooses its settings by a sweep, but the rows hold none of its trials.",
    "no choice": "No setting was chosen for {arms}: no trial is marked as chosen.",
    "no trial finished": "No setting was chosen for {arms}: every trial failed.",
    "edge of the grid": (
        "The {knob} chosen for {arms}, {value}, is the {side} tried: the best one may lie outside the grid."
    ),
    "not the least loss": (
        "The learning rate chosen for {arms}, {chosen}, is not the one with the least loss, {best}."
    ),
    "not as chosen": "{arms}: trained at a learning rate of {rates}, but the sweep chose {chosen}.",
    "plateaus in some arms": (
        "Mean cosine above 0.9 over part of training in runs of {arms}, and in none of {without}: such runs hardly "
        "learn until they escape, at a time of chance, so that a difference may be one of the time of escape, and no "
        "interval covers a plateau that is rare and in one arm only. Train longer, or change what causes it."
    ),
    "spreads differ": (
        "The seeds of {arms} spread very differently from the baseline's (standard deviation {arm_sd} against "
        "{baseline_sd}): some runs are of another kind, and the interval may be wrong."
    ),
    "few documents": (
        "The held-out loss rests on {items} documents, by their weights on as few as {effective} of equal length; "
        "other text may give another difference. Raise evaluate.validation_tokens."
    ),
    "seeds added": (
        "{seeds} seeds, of which {added} were added: the study adds seeds until the held-out loss of each arm is "
        "decided (margin {margin} nats/token). Intervals and p hold at every number of seeds and over all arms at once "
        "(a t-mixture confidence sequence), so looking after every seed does no harm."
    ),
    "not decided": "Not decided: {arms}. The study takes at most {most} seeds; it resumes with a larger --most-seeds.",
    "hardly decides": (
        "At this size the accuracy of {tasks} hardly decides which model is better (the share of pairs of training "
        "sets that models of 150 M parameters rank by it as models of 1 B do; 0.5 is a coin: arXiv:2508.13144). The "
        "bits per byte of the right answers say more, where the rows have them."
    ),
    "scaled-down trials": (
        "The trials of the sweep kept the warm-up as a share of their own steps: {trial} steps where the runs have "
        "{run}. A rate that is best after the short warm-up need not be the best one after the long one."
    ),
}
KNOBS = {"learning_rate": "learning rate", "warmup": "warm-up", "max_grad_norm": "largest gradient norm"}
"""Settings of training for people, by their name in the configuration."""


def _words(value: Any, labels: dict[str, str]) -> str:
    if isinstance(value, dict):
        return ", ".join(
            shortened([f"{KNOBS.get(key, labels.get(key, key))} {_words(v, labels)}" for key, v in value.items()])
        )
    if isinstance(value, (tuple, list)):
        return listed(shortened([_words(entry, labels) for entry in value]))
    return f"{value:.4g}" if isinstance(value, float) else KNOBS.get(value, labels.get(value, str(value)))


def in_words(note: Note, comparison: Comparison) -> str:
    """The sentence of one note."""
    labels = comparison.labels
    facts = {name: _words(value, labels) for name, value in note.facts.items()}
    return TEXTS[note.kind].format(arms=listed(shortened([labels[arm] for arm in note.arms])), **facts)


def notes_in_words(comparison: Comparison) -> list[str]:
    """A sentence for each note of the comparison, in its order."""
    return [in_words(note, comparison) for note in comparison.notes]
