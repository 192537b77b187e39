"""Tables of an evaluation: one line a score, and beneath them whatever qualifies the numbers."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING

from decondense.evaluate.catalogue import TEN

if TYPE_CHECKING:
    from decondense.evaluate.harness import Evaluation

HEAD = ("task", "metric", "value", "stderr", "items", "shots")
Table = tuple[list[str], list[list[str]], list[str]]


def table(evaluation: Evaluation) -> Table:
    """Head, lines and notes, as text; a line's notes are referred to by number."""
    notes: list[str] = []
    lines: list[list[str]] = []
    for result in evaluation.results:
        marks = []
        for note in result.notes:
            if note not in notes:
                notes.append(note)
            marks.append(str(notes.index(note) + 1))
        items = f"{result.items:,} of {result.official:,}" if result.official else f"{result.items:,}"
        items += f" [{','.join(marks)}]" if marks else ""
        for number, score in enumerate(result.scores):
            lines.append(
                [
                    result.task if number == 0 else "",
                    score.metric,
                    _number(score.value),
                    "" if score.stderr is None else _number(score.stderr),
                    items if number == 0 else "",
                    str(result.shots) if number == 0 else "",
                ]
            )
    mean = evaluation.mean
    if mean is not None:
        ten = [result for result in evaluation.results if result.task in TEN]
        items = f"{sum(r.items for r in ten):,} of {sum(r.official or 0 for r in ten):,}"
        error = "" if mean[1] is None else _number(mean[1])
        lines.append(["mean of the ten", "acc", _number(mean[0]), error, items, ""])
    numbered = [f"[{number}] {note}" for number, note in enumerate(notes, 1)]
    return list(HEAD), lines, numbered + list(evaluation.notes)


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.1f}" if abs(value) < 1e5 else f"{value:.3e}"


def to_markdown(evaluation: Evaluation) -> str:
    """The table in Markdown with its notes."""
    head, lines, notes = table(evaluation)
    rule = ["---", "---", "---:", "---:", "---:", "---:"]
    text = "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *lines])
    return text + "\n" + ("\n" + "\n".join(f"- {note}" for note in notes) + "\n" if notes else "")


def to_csv(evaluation: Evaluation) -> str:
    """One line a score in full precision; the notes stand in every line of their task."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        ["model", "task", "metric", "value", "stderr", "items", "official_items", "limit", "shots", "notes"]
    )
    for result in evaluation.results:
        for score in result.scores:
            writer.writerow(
                [
                    evaluation.model,
                    result.task,
                    score.metric,
                    repr(score.value),
                    "" if score.stderr is None else repr(score.stderr),
                    result.items,
                    "" if result.official is None else result.official,
                    "" if result.limit is None else result.limit,
                    result.shots,
                    "; ".join(result.notes),
                ]
            )
    return buffer.getvalue()
