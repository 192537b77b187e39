"""The table of real models beside the published points of figure 2, from the rows of ``real/measure.py``."""

from __future__ import annotations

import json
from pathlib import Path
from pipes import pipe_table

from decondense.records import Row, read_rows
from decondense.report import number

HERE = Path(__file__).resolve().parent


def _size(parameters: float) -> str:
    return f"{parameters / 1e9:.2g} B" if parameters >= 1e9 else f"{parameters / 1e6:,.3g} M"


def _bounds(value: float, bounds: list[float | None]) -> str:
    low, high = bounds
    shown = number(value, 2, sign=True)
    return shown if low is None or high is None else f"{shown} [{number(low, 2)}, {number(high, 2)}]"


def measured_rows() -> dict[str, Row]:
    """The newest row of each real model."""
    rows = [row for path in sorted((HERE / "results" / "real").glob("*.jsonl")) for row in read_rows(path)]
    return {row["variant"]: row for row in rows if row["name"] == "real"}


def real() -> str:
    """One line a model: published and measured rank correlations, and their difference where both are known."""
    published = json.loads((HERE / "real" / "published.json").read_text(encoding="utf-8"))
    rows = measured_rows()
    of = {row["params"]["model"]: row for row in rows.values()}
    lines, apart = [], []
    for row in rows.values():
        if row["params"]["model"] not in {entry["model"] for entry in published["models"]}:
            label = f"{row['variant']} ({row['params']['passages']} passages)"
            lines.append([label, _size(row["params"]["parameters"]), "", "", *_ours(row)])
    for entry in published["models"]:
        row = of.get(entry["model"])
        theirs = [number(entry[kind], 2, sign=True) for kind in ("spearman", "kendall")]
        ours = ["", "", "", ""] if row is None else _ours(row)
        if row is not None:
            apart.append(max(abs(row["metrics"][kind] - entry[kind]) for kind in ("spearman", "kendall")))
        lines.append([entry["model"].rpartition("/")[2], _size(entry["parameters"]), *theirs, *ours])
    head = ("model", "parameters", "Spearman, published", "Kendall, published", "Spearman, ours", "Kendall, ours",
            "deep half, ours", "without sinks")  # fmt: skip
    texts = {f"{row['params']['text']}, {row['params']['tokens']} tokens a passage" for row in rows.values()}
    agreement = (
        f"Of {len(apart)} models that both measured the largest difference is {number(max(apart), 2)}."
        if apart
        else "No published model is measured here: they need a hub (`python benchmarks/real/measure.py --published`)."
    )
    note = (
        f"Published: {published['source']}. Ours: {'; '.join(sorted(texts)) or 'not run yet'}; 95 % intervals over "
        f"passages; deep half: mean cosine of the last L/2 layers. {agreement} Rows: `benchmarks/results/real/`."
    )
    return pipe_table(head, lines, right=range(1, 8)) + f"\n\n{note}"


def _ours(row: Row) -> list[str]:
    found = row["metrics"]
    return [
        _bounds(found["spearman"], found["spearman_interval"]),
        _bounds(found["kendall"], found["kendall_interval"]),
        number(found["last"]["half"], 2),
        number(found["sinks"]["last_half_without"], 2) if found["sinks"]["layers"] else "",
    ]
