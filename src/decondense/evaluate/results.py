"""The results of an evaluation: scores of tasks, their items, rows and table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from pydantic import TypeAdapter

from decondense.evaluate.catalogue import TEN
from decondense.formatting import score as score_text
from decondense.records import Row, make_row
from decondense.table import Entry, Table

HEAD = ("task", "metric", "value", "stderr", "items", "shots")
CSV_HEAD = ("model", "task", "metric", "value", "stderr", "items", "official_items", "limit", "shots", "notes")


@dataclass(frozen=True)
class Score:
    """One metric of a task."""

    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool
    headline: bool
    """Whether the paper reports it (for other tasks: whether it is the first that the harness reports)."""


@dataclass(frozen=True)
class TaskResult:
    """Scores of one task, how they were measured, and their items."""

    task: str
    scores: tuple[Score, ...]
    shots: int
    items: int
    """Items scored."""
    official: int | None
    """Official rows of the scored split; None: unknown."""
    limit: int | None
    """Requested maximum number of items; None: all items."""
    notes: tuple[str, ...]
    """Qualifications of the scores, which every table shows."""
    per_item: dict[str, dict[str, tuple[float, float]]] = field(repr=False)
    """Metric -> item (hash of its content) -> (value, weight); the weighted mean is the score."""
    parts: dict[str, dict[str, Any]] = field(repr=False)
    """Scores of the parts of a group (MMLU's subjects)."""
    timing: dict[str, Any] = field(repr=False)
    provenance: dict[str, Any] = field(repr=False)
    gold: dict[str, tuple[float, float | None]] = field(repr=False, default_factory=dict)
    """Item -> (bits per byte of the right answer, its margin over the best other one in bits), where known."""

    def score(self, metric: str | None = None) -> float:
        """The value of a metric; None: the headline metric."""
        for score in self.scores:
            if score.metric == metric or (metric is None and score.headline):
                return score.value
        raise KeyError(metric)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TaskResult:
        """Read a task's file; a ``ValueError`` says what is missing or of another type."""
        found: TaskResult = TypeAdapter(cls).validate_python(data)
        return found


@dataclass(frozen=True)
class Evaluation:
    """The scores of one model."""

    model: str
    results: tuple[TaskResult, ...]
    notes: tuple[str, ...]
    """Requested tasks that were omitted, and why."""
    identity: dict[str, Any] = field(repr=False)
    """The study, run, step and tokens that the rows belong to."""

    def __getitem__(self, task: str) -> TaskResult:
        for result in self.results:
            if result.task == task:
                return result
        raise KeyError(task)

    @property
    def mean(self) -> tuple[float, float | None] | None:
        """Mean ``acc`` of the paper's ten and its standard error over items; None unless all ten were scored."""
        by_name = {result.task: result for result in self.results}
        if not all(name in by_name for name in TEN):
            return None
        scores = [next(s for s in by_name[name].scores if s.metric == "acc") for name in TEN]
        errors = [score.stderr for score in scores if score.stderr is not None]
        return fmean(score.value for score in scores), math.hypot(*errors) / len(TEN) if len(errors) == len(
            TEN
        ) else None

    def rows(self, metrics: str = "all") -> list[Row]:
        """``eval`` and ``eval_item`` rows. ``metrics``: ``all``, or ``headline`` for those that the paper reports."""
        rows: list[Row] = []
        run = {key: value for key, value in self.identity.items() if key != "tokens"}
        for result in self.results:
            for score in result.scores:
                if metrics == "headline" and not score.headline:
                    continue
                key = {**run, "task": result.task, "metric": score.metric}
                rows.append(
                    make_row(
                        "eval",
                        **key,
                        tokens=self.identity["tokens"],
                        value=score.value,
                        higher_is_better=score.higher_is_better,
                        items=result.items,
                        stderr=score.stderr,
                        official_items=result.official,
                        limit=result.limit,
                        shots=result.shots,
                        notes=list(result.notes),
                        timing=result.timing,
                    )
                )
                for item, (value, weight) in result.per_item.get(score.metric, {}).items():
                    bits, margin = result.gold.get(item, (None, None)) if score.headline else (None, None)
                    measured = {"value": value, "weight": weight, "bits_per_byte": bits, "margin_bits": margin}
                    rows.append(make_row("eval_item", **key, item=item, **measured))
        return rows

    def table(self) -> Table:
        """One line per score; a line refers to its notes by number."""
        notes: list[str] = []
        rows: list[tuple[Entry, ...]] = []
        for result in self.results:
            notes += [note for note in result.notes if note not in notes]
            marks = [str(notes.index(note) + 1) for note in result.notes]
            items = f"{result.items:,} of {result.official:,}" if result.official else f"{result.items:,}"
            items += f" [{','.join(marks)}]" if marks else ""
            for place, score in enumerate(result.scores):
                task, *last = (result.task, items, str(result.shots)) if place == 0 else ("", "", "")
                rows.append((task, score.metric, _number(score.value), _number(score.stderr), *last))
        mean = self.mean
        if mean is not None:
            ten = [result for result in self.results if result.task in TEN]
            items = f"{sum(r.items for r in ten):,} of {sum(r.official or 0 for r in ten):,}"
            rows.append(("mean of the ten", "acc", _number(mean[0]), _number(mean[1]), items, ""))
        numbered = [f"[{place}] {note}" for place, note in enumerate(notes, 1)]
        return Table("benchmarks", "", HEAD, tuple(rows), 2, (*numbered, *self.notes))

    def to_markdown(self) -> str:
        """The table in Markdown with its notes."""
        return self.table().to_markdown()

    def to_csv(self) -> str:
        """One line per score in full precision; every line of a task repeats the task's notes."""
        rows: tuple[tuple[Entry, ...], ...] = tuple(
            (
                self.model,
                result.task,
                score.metric,
                *(("", value) for value in (score.value, score.stderr, result.items, result.official, result.limit)),
                ("", result.shots),
                "; ".join(result.notes),
            )
            for result in self.results
            for score in result.scores
        )
        return Table("benchmarks", "", CSV_HEAD, rows, 3).to_csv()

    def __str__(self) -> str:
        return f"{self.model}\n\n{self.to_markdown()}"


def _number(value: float | None) -> Entry:
    return "" if value is None else (score_text(value), value)
