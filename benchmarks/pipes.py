"""Pipe tables of cells that are Markdown already (links, code, formulas), which :mod:`decondense.table` escapes."""

from __future__ import annotations

from collections.abc import Sequence


def pipe_table(header: Sequence[str], lines: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """A table in Markdown; ``right``: places of the columns that hold numbers."""
    rule = ["---:" if column in right else ":---" for column in range(len(header))]
    return "\n".join("| " + " | ".join(line) + " |" for line in [list(header), rule, *map(list, lines)])
