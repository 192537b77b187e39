"""One table for every output: terminal, Markdown, CSV, LaTeX and HTML from the same cells."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape as html_escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from decondense.formatting import MINUS, NONE, Interval
from decondense.records import atomic_write

if TYPE_CHECKING:
    from rich.table import Table as RichTable

Value = float | int | str | None
Entry = str | tuple[str, Value] | tuple[str, Interval]
"""The text that is shown, or that text with the value or the two bounds behind it (for CSV)."""

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    MINUS: "$-$", NONE: "--", "×": r"$\times$", "±": r"$\pm$", "Δ": r"$\Delta$", "[": "{[}", "]": "{]}",
}  # fmt: skip

_TALL = 60
"""A page shows a table with more rows in a scrolling window."""


@dataclass(frozen=True)
class Table:
    """Cells for people (text) and for programs (the values behind them)."""

    name: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Entry, ...], ...]
    words: int = 1
    """How many columns from the left hold words; the others hold numbers."""
    notes: tuple[str, ...] = ()
    """Lines below the table that qualify its numbers."""
    sortable: bool = False
    """Whether readers of a page may sort the rows."""

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows), self.name

    @property
    def repeats(self) -> list[bool]:
        """Whether a row begins like the one before it, so that a page need not repeat it."""
        heads = [row[0] for row in self.text()]
        return [n > 0 and head == heads[n - 1] for n, head in enumerate(heads)]

    def text(self) -> list[list[str]]:
        """The cells as shown."""
        return [[entry if isinstance(entry, str) else entry[0] for entry in row] for row in self.rows]

    def select(self, columns: Sequence[str]) -> Table:
        """A table with only the named columns, in the order of ``columns``."""
        places = [self.columns.index(name) for name in columns]
        rows = tuple(tuple(row[i] for i in places) for row in self.rows)
        return replace(self, columns=tuple(columns), rows=rows, words=sum(i < self.words for i in places))

    def to_csv(self) -> str:
        """Comma-separated, in full precision; a column of intervals becomes two, of the low and the high bound."""
        pairs = {
            i for row in self.rows for i, e in enumerate(row) if not isinstance(e, str) and isinstance(e[1], tuple)
        }
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        head: list[str] = []
        for i, column in enumerate(self.columns):
            head += [f"{column}, low", f"{column}, high"] if i in pairs else [column]
        writer.writerow(head)
        for row in self.rows:
            cells: list[str] = []
            for i, entry in enumerate(row):
                value: Any = entry if isinstance(entry, str) else entry[1]
                if i in pairs:
                    cells += [_plain(bound) for bound in value] if isinstance(value, tuple) else ["", ""]
                else:
                    cells.append(_plain(value))
            writer.writerow(cells)
        return buffer.getvalue()

    def to_markdown(self) -> str:
        """A pipe table with its caption above and its notes below."""
        mark = [":---" if i < self.words else "---:" for i in range(len(self.columns))]
        head = f"{markdown(self.caption)}\n\n" if self.caption else ""
        lines = [self.columns, mark, *self.text()]
        body = "".join(
            "| " + " | ".join(cell if line is mark else markdown(cell) for cell in line) + " |\n" for line in lines
        )
        notes = "".join(f"- {markdown(note)}\n" for note in self.notes)
        return head + body + (f"\n{notes}" if notes else "")

    def to_latex(self) -> str:
        """A booktabs table."""
        spec = "".join("l" if i < self.words else "r" for i in range(len(self.columns)))
        body = "".join("  " + " & ".join(map(_latex, row)) + r" \\" + "\n" for row in self.text())
        return (
            "\\begin{table}\n  \\centering\n"
            f"  \\caption{{{_latex(self.caption)}}}\n  \\label{{tab:{self.name}}}\n"
            f"  \\begin{{tabular}}{{{spec}}}\n  \\toprule\n"
            "  " + " & ".join(map(_latex, self.columns)) + " \\\\\n  \\midrule\n"
            f"{body}  \\bottomrule\n  \\end{{tabular}}\n\\end{{table}}\n"
        )

    def to_html(self) -> str:
        """A table element that scrolls sideways, with its caption; styled by the page that holds it.

        A ``sortable`` table repeats no words, and its numbers carry their values for the page's script.
        """
        name = html_escape(self.name)
        tall = " tall" if len(self.rows) > _TALL else ""
        kind = f"words{self.words} sortable" if self.sortable else f"words{self.words}"
        lines = [
            f'<p class="caption" id="caption-{name}">{html_escape(self.caption)}</p>',
            f'<div class="scroll{tall}" tabindex="0" role="region" aria-labelledby="caption-{name}">',
            f'<table class="{kind}" id="table-{name}" aria-describedby="caption-{name}">',
            "<thead><tr>" + "".join(f'<th scope="col">{html_escape(c)}</th>' for c in self.columns) + "</tr></thead>",
            "<tbody>",
        ]
        for row, entries, again in zip(self.text(), self.rows, self.repeats, strict=True):
            mark = ' class="again"' if again and not self.sortable else ""
            values = [f' data-value="{_plain(e[1])}"' if self.sortable and _is_value(e) else "" for e in entries]
            cells = "".join(f"<td{v}>{html_escape(c)}</td>" for c, v in zip(row[1:], values[1:], strict=True))
            lines.append(f'<tr><th scope="row"{mark}>{html_escape(row[0])}</th>{cells}</tr>')
        lines += ["</tbody>", "</table>", "</div>"]
        lines += [f'<p class="note">{html_escape(note)}</p>' for note in self.notes]
        return "\n".join(lines)

    def to_rich(self, *, title: str | None = None, fold: Iterable[int] = ()) -> RichTable:
        """A table for the terminal; ``fold``: indices of the columns whose words may break anywhere.

        A row whose first cell is empty belongs to the row above it; if there are such groups, a rule separates them.
        """
        from rich import box
        from rich.markup import escape
        from rich.table import Table as RichTable

        lines = self.text()
        shown = RichTable(
            title=None if title is None else escape(title),
            title_justify="left",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            show_edge=False,
        )
        broken = set(fold)
        for i, column in enumerate(self.columns):
            side: Any = "left" if i < self.words else "right"
            if i in broken:
                shown.add_column(escape(column), justify=side, overflow="fold")
                continue
            # a header may break between its words, a value may not
            parts = [part for line in lines for part in line[i].splitlines()]
            width = max(len(text) for text in [*column.split(), *parts] or [""])
            shown.add_column(escape(column), justify=side, width=width)
        grouped = any(line[0] == "" for line in lines)
        for place, line in enumerate(lines):
            ends = grouped and place + 1 < len(lines) and lines[place + 1][0] != ""
            shown.add_row(*map(escape, line), end_section=ends)
        return shown

    def write(self, folder: Path) -> list[Path]:
        """``NAME.csv``, ``NAME.md`` and ``NAME.tex`` in ``folder``."""
        written = []
        for kind, text in (("csv", self.to_csv()), ("md", self.to_markdown()), ("tex", self.to_latex())):
            path = folder / f"{self.name}.{kind}"
            atomic_write(path, text)
            written.append(path)
        return written


def _plain(value: Value) -> str:
    if value is None or value == NONE or (isinstance(value, float) and math.isnan(value)):
        return ""
    return value if isinstance(value, str) else repr(value)


def _is_value(entry: Entry) -> TypeGuard[tuple[str, float | int | None]]:
    return not isinstance(entry, str) and (entry[1] is None or isinstance(entry[1], (int, float)))


def markdown(text: str) -> str:
    """``text`` with the characters that mean something in Markdown escaped."""
    # an underscore between letters or digits means nothing in CommonMark: names stay readable
    return re.sub(r"([|<>*`\\]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", text)


def _latex(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in text)
