"""Profiles as tables: plain cells, Markdown and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from typing import Any

from decondense.measuring.profile import Profile

Table = tuple[list[str], list[list[Any]]]


def layer_table(profile: Profile) -> Table:
    """One line for every measured state: means with intervals, norms, quantiles and side metrics, as numbers."""
    head = ["layer", "mean cosine", "low", "high", "mean cosine i!=j", "norm"]
    if profile.pooled is not None:
        head += ["5 %", "50 %", "95 %"]
    head += list(profile.metrics)
    whole = profile.with_all_layers()
    low, high = whole.interval("mean_cosine")
    quantiles = whole.quantiles((0.05, 0.5, 0.95)) if profile.pooled is not None else None
    lines = []
    for i, name in enumerate(profile.all_layers):
        line: list[Any] = [
            name,
            whole.mean_cosine[i],
            low[i],
            high[i],
            whole.mean_cosine_others[i],
            whole.norms[i],
        ]
        if quantiles is not None:
            line += quantiles[i].tolist()
        line += [float(values[i].mean()) for values in profile.metrics.values()]
        lines.append(line)
    return head, lines


def model_table(profiles: Sequence[tuple[str, Profile]]) -> Table:
    """One line a model: size, first, last and mean-of-the-last-half cosine, rank correlations with intervals."""
    head = ["model", "parameters", "layers", "passages", "embedding", "last layer", "last half"]
    head += ["Spearman", "low", "high", "Kendall", "low", "high"]
    lines = []
    for label, profile in profiles:
        line: list[Any] = [
            label,
            profile.info.get("parameters"),
            len(profile.layers) - 1,
            profile.n_passages,
            profile.mean_cosine[0],
            profile.mean_cosine[-1],
            profile.last(),
        ]
        for name in ("spearman", "kendall"):
            line += [getattr(profile, name), *profile.interval(name)]
        lines.append(line)
    return head, lines


def columns(table: Table, names: Sequence[str]) -> Table:
    """Only the named columns."""
    places = [table[0].index(name) for name in names]
    return list(names), [[line[i] for i in places] for line in table[1]]


def compact(table: Table) -> Table:
    """For a terminal: the interval of a mean as one column, norms and quantiles, no side metrics."""
    head, lines = table
    keep = head[: head.index("95 %") + 1] if "95 %" in head else head[: head.index("norm") + 1]
    places = [i for i, name in enumerate(keep) if name not in ("low", "high", "mean cosine i!=j")]
    intervals = {i - 1 for i, name in enumerate(keep) if name == "low"}
    shown: list[str] = []
    for i in places:
        shown += [keep[i], "95 % interval"] if i in intervals else [keep[i]]
    result = []
    for line in lines:
        cells: list[Any] = []
        for i in places:
            value = line[i]
            cells.append(f"{value:.3f}" if isinstance(value, float) and 0 < abs(value) < 10 else value)
            if i in intervals:
                low, high = float(line[i + 1]), float(line[i + 2])
                cells.append("-" if math.isnan(low) else f"{low:.3f}..{high:.3f}")
        result.append(cells)
    return shown, result


def format_cell(value: Any) -> str:
    """A cell for people: four significant digits, thousands separated, a dash for what is not known."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    value = float(value)
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.1f}"


def to_markdown(table: Table) -> str:
    """The table in Markdown, numbers to the right."""
    head, lines = table
    rule = ["---"] + ["---:"] * (len(head) - 1)
    rows = [head, rule, *([format_cell(cell) for cell in line] for line in lines)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows) + "\n"


def to_csv(table: Table) -> str:
    """The table as CSV, numbers in full precision."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(table[0])
    for line in table[1]:
        writer.writerow(
            ["" if cell is None else (repr(float(cell)) if isinstance(cell, float) else cell) for cell in line]
        )
    return buffer.getvalue()
