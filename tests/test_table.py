"""Numbers as text, and one table for every edge."""

from __future__ import annotations

import csv
import io
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from decondense import formatting as words
from decondense.table import Table

TABLE = Table(
    "sizes",
    "Sizes <and> shares.",
    ("model", "size", "interval", "share"),
    (
        ("a|b", ("124M", 124e6), ("[1, 2]", (1.0, 2.0)), "–"),
        ("", ("2", 2), "–", ("−0.5", -0.5)),
        ("c & d_e", ("3", 3), ("[0, 1]", (0.0, 1.0)), ("nan", float("nan"))),
    ),
    notes=("of all * models",),
)


@pytest.mark.parametrize(
    ("value", "long", "short"),
    [(0, "0", "0"), (9_999, "9,999", "9,999"), (10_000, "10,000", "10K"), (614_400, "614,400", "614K"),
     (999_499, "999,499", "999K"), (999_950, "1M", "1M"), (1.5e9, "1.5B", "1.5B"), (156e9, "156B", "156B"),
     (2e12, "2T", "2T"), (None, "–", "–"), (float("nan"), "–", "–")],
)  # fmt: skip
def test_counts(value: float | None, long: str, short: str) -> None:
    assert words.count(value) == long
    assert words.count(value, short=True) == short


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (89, "89 s"), (90, "2 min"), (5399, "90 min"), (5400, "1.5 h"), (1e6, "12 days")],
)
def test_durations(seconds: float, text: str) -> None:
    assert words.duration(seconds) == text


def test_scores_and_lists() -> None:
    assert [words.score(v) for v in (0.12345, -2.0, 1234.56, 1e9, None)] == [
        "0.1235",
        "−2.0000",
        "1,234.6",
        "1.000e+09",
        "–",
    ]
    assert [words.listed(w) for w in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]
    assert words.storage(1.4e12) == "1.4 TB"
    assert words.storage(12_000) == "12 kB"


def test_csv_has_the_values_and_both_bounds() -> None:
    rows = list(csv.reader(io.StringIO(TABLE.to_csv())))
    assert rows == [
        ["model", "size", "interval, low", "interval, high", "share"],
        ["a|b", "124000000.0", "1.0", "2.0", ""],
        ["", "2", "", "", "-0.5"],
        ["c & d_e", "3", "0.0", "1.0", ""],
    ]


def test_markdown_escapes_what_markdown_reads() -> None:
    lines = TABLE.to_markdown().splitlines()
    assert lines[0] == r"Sizes \<and\> shares."
    assert lines[3] == "| :--- | ---: | ---: | ---: |"
    assert lines[4].startswith(r"| a\|b |")
    assert lines[-1] == r"- of all \* models"
    names = Table("names", "", ("a_b", "_c_", "__d__"), (("arc_easy", "x _y_ z", "e__f"),)).to_markdown().splitlines()
    assert names[0] == r"| a_b | \_c\_ | \_\_d\_\_ |"
    assert names[2] == r"| arc_easy | x \_y\_ z | e\_\_f |"


class _Cells(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.inside = False

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += data


def test_html_reads_back_to_the_same_cells() -> None:
    page = _Cells()
    page.feed(TABLE.to_html())
    assert page.rows == [list(TABLE.columns), *TABLE.text()]


def test_latex_has_one_line_per_row() -> None:
    body = TABLE.to_latex().split("\\midrule\n")[1].split("  \\bottomrule")[0]
    assert body.count(r"\\") == len(TABLE.rows)
    assert r"c \& d\_e" in body


def test_the_terminal_shows_every_cell() -> None:
    out = io.StringIO()
    Console(file=out, width=80).print(TABLE.to_rich(title="[not markup]"))
    text = out.getvalue()
    assert "[not markup]" in text
    for row in TABLE.text():
        assert all(cell in text for cell in row)


def test_selecting_columns_and_writing_files(tmp_path: Path) -> None:
    some = TABLE.select(["share", "model"])
    assert (some.columns, some.words) == (("share", "model"), 1)
    assert [path.name for path in some.write(tmp_path)] == ["sizes.csv", "sizes.md", "sizes.tex"]
