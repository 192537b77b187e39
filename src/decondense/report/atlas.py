"""The page and the tables of an atlas, and the section of a model card; from entries and summaries, without torch."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from decondense import __version__
from decondense.atlas import SCALE, Atlas, Comparison, Entry, EntryError, judge, level, sentences
from decondense.figures.atlas import size_figure
from decondense.figures.condensation import heatmap_figure
from decondense.figures.style import ArmStyle, render
from decondense.formatting import NONE, count, listed, number, plural
from decondense.records import atomic_write
from decondense.report.page import render as page
from decondense.report.pictures import Picture, inline_svg
from decondense.table import Entry as Cell
from decondense.table import Table, markdown

_MARKS = (b'<meta name="generator" content="decondense ', b" from the entries alone.")
"""What every page of an atlas contains (``templates/atlas.html``), and no other page."""
_SHOWN = ("model", "parameters", "text", "deep half", "level", "last layer", "Spearman", "Kendall")


def entries_table(entries: Mapping[str, Entry]) -> Table:
    """One row for every entry."""
    columns = ("model", "family", "text", "level", "last state", "parameters", "passages", "tokens", "deep half",
               "last layer", "Spearman", "Kendall", "source")  # fmt: skip
    rows: list[tuple[Cell, ...]] = [
        (
            e.model,
            e.family or NONE,
            e.text,
            NONE if e.deep_half is None else level(e.deep_half),
            f"{e.final} norm",
            (count(e.parameters), e.parameters),
            (count(e.passages), e.passages),
            (count(e.tokens), e.tokens),
            _number(e.deep_half),
            _number(e.last),
            _number(e.spearman, sign=True),
            _number(e.kendall, sign=True),
            e.source + (", read off a figure" if e.approximate else ""),
        )
        for e in entries.values()
    ]
    caption = (
        "Mean cosines and their rank correlation with depth. Compare only models with the same text and the same last "
        "state."
    )
    return Table("atlas", caption, columns, tuple(rows), words=5, sortable=True)


def terminal_entries(entries: Mapping[str, Entry]) -> Table:
    """The columns of :func:`entries_table` that a terminal has room for."""
    return entries_table(entries).select(_SHOWN)


def comparison_table(own: Entry, c: Comparison) -> Table:
    """Two entries side by side."""
    names = {"deep_half": "mean cosine, deep half", "last": "mean cosine, last layer", "spearman": "Spearman",
             "kendall": "Kendall"}  # fmt: skip
    rows: list[tuple[Cell, ...]] = [
        (names[name], _number(here), _number(there), _number(here - there, sign=True), outcome)
        for name, (here, there, outcome) in c.values.items()
    ]
    return Table("compare", "", ("", own.model, c.reference.model, "difference", "outcome"), tuple(rows))


def page_path(atlas: Atlas) -> Path:
    """Where the page of an atlas is written.

    Raises:
        EntryError: another page is there, which this one would overwrite.
    """
    path = atlas.folder / "index.html"
    if path.is_file():
        held = path.read_bytes()
        if all(mark in held for mark in _MARKS):
            return path
    if path.exists():
        raise EntryError(
            f"{path} is not the page of an atlas and would be overwritten; move it, or choose another directory with "
            "--atlas."
        )
    return path


def write_page(atlas: Atlas, *, title: str = "Atlas of embedding condensation") -> Path:
    """Write ``index.html`` into the directory of an atlas: a figure for each text, and a table that can be sorted.

    Raises:
        EntryError: there are no entries, one is damaged, or another page is in the place of this one.
    """
    path = page_path(atlas)
    entries = atlas.entries()
    if not entries:
        raise EntryError(
            f"{atlas.folder} has no entries; add one: decondense atlas add PROFILE --atlas {atlas.folder}."
        )
    script = files("decondense.templates").joinpath("sort.js").read_text(encoding="utf-8")
    texts = sorted({entry.text for entry in entries.values()})
    html = page(
        "atlas.html",
        title=title,
        kicker=f"{plural(len(entries), 'measurement')} on {plural(len(texts), 'text')}",
        summary=[
            "How alike the token vectors of a passage become: the mean cosine of the deeper half of each model's "
            f"blocks. It is {listed([f'{name} below {bound:g}' for name, bound in SCALE[:-1]])}; more is "
            f"{SCALE[-1][0]}.",
            "Models on different texts, or with their last state on different sides of the final norm, cannot be "
            "compared.",
        ],
        pictures=_pictures(entries),
        entries=entries_table(entries),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        version=__version__,
    )
    atomic_write(path, html)
    return path


def _pictures(entries: Mapping[str, Entry]) -> list[Picture]:
    """A figure for every text and side of the norm: what stands in one can be compared."""
    groups: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = {}
    for entry in entries.values():
        if entry.parameters is not None and entry.deep_half is not None:
            families = groups.setdefault((entry.text, entry.final), {})
            families.setdefault(_family(entry), []).append((float(entry.parameters), entry.deep_half))
    looks = ArmStyle(sorted({family for families in groups.values() for family in families}), None)
    pictures = []
    for place, ((text, final), families) in enumerate(sorted(groups.items()), 1):
        where = f"Text: {text}; last state {final} the final norm."
        figure = size_figure(dict(sorted(families.items())), looks)
        svg = inline_svg(figure, f"size-{place}", where)
        pictures.append(Picture(f"size-{place}", where, svg, width=figure.get_figwidth()))
    return pictures


def _family(entry: Entry) -> str:
    return entry.family or entry.model_type or "other"


def card(summary: Mapping[str, Any], *, picture: str = "", reference: Entry | None = None) -> str:
    """A section of a model card in Markdown, of the summary of a profile; ``picture``: the path of the heat map."""
    own = Entry.from_summary(summary)
    verdict = judge(summary, reference)
    rows: list[tuple[Cell, ...]] = [
        ("mean cosine, deeper half of the blocks", _number(own.deep_half)),
        ("mean cosine, last layer", _number(own.last)),
        ("Spearman of mean cosine and depth", _number(own.spearman, sign=True)),
        ("Kendall of mean cosine and depth", _number(own.kendall, sign=True)),
        ("level", verdict.level),
    ]
    lines = [
        "## Embedding condensation",
        "",
        *(markdown(sentence) + "\n" for sentence in sentences(verdict)),
        Table("card", "", ("metric", "value"), tuple(rows)).to_markdown().strip(),
        "",
    ]
    if picture:
        lines += [f"![Cosines of all pairs of tokens by layer]({picture})", ""]
    lines.append(
        f"{markdown(own.model)}: {count(own.passages)} passages of up to {count(own.tokens)} tokens of "
        f"{markdown(own.text)}; last layer {own.final} the final norm; decondense {__version__}. Definitions: "
        "Liu et al. 2026, arXiv:2602.00217."
    )
    return "\n".join(lines) + "\n"


def heat_map(summary: Mapping[str, Any]) -> bytes | None:
    """The heat map of a summary as PNG: all pairs of tokens; None where no histogram was measured."""
    if not summary.get("histogram"):
        return None
    own = Entry.from_summary(summary)
    return render(heatmap_figure({**summary, "label": own.model}, kind="pooled"), "png")


def _number(value: float | None, *, sign: bool = False) -> Cell:
    return (number(value, 3, sign=sign), value)
