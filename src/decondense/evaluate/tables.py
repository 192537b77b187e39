"""Writers of an evaluation's tables: Markdown with notes, and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

Table = tuple[list[str], list[list[str]], list[str]]
"""Head, lines and notes, as text. The first two columns are words, the others numbers."""


def number(value: float) -> str:
    """Four decimals, fewer for large values."""
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.1f}" if abs(value) < 1e5 else f"{value:.3e}"


def to_markdown(head: Sequence[str], lines: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    """The table in Markdown with its notes."""
    rule = ["---" if column < 2 else "---:" for column in range(len(head))]
    text = "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *lines])
    return text + "\n" + ("\n" + "\n".join(f"- {note}" for note in notes) + "\n" if notes else "")


def to_csv(head: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """The lines as CSV."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(lines)
    return buffer.getvalue()
