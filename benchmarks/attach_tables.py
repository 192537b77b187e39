"""The table of what attaching costs, from the rows of ``bench_attach.py``."""

from __future__ import annotations

from pathlib import Path
from pipes import pipe_table

from decondense.records import read_rows

RESULTS = Path(__file__).resolve().parent / "results" / "attach.jsonl"


def attach() -> str:
    rows = read_rows(RESULTS) if RESULTS.exists() else []
    if not rows:
        return "Not measured yet: `python benchmarks/bench_attach.py --out benchmarks/results/attach.jsonl`."
    newest = {}
    for row in rows:
        params = row["params"]
        place = row["provenance"].get("gpu") or f"{row['provenance']['cpu']}, {params['threads']} threads"
        precision = "bf16" if params["bf16"] else "fp32"
        compiled = ", compiled" if params["compile"] else ""
        model = f"{params['layers']} x {params['width']}, {params['batch']} x {params['tokens']} tokens"
        newest[model, f"{precision}{compiled}, {params['impl']}", place, row["variant"]] = row["metrics"]
    lines = []
    for (model, how, place, variant), metrics in newest.items():
        over = "" if variant == "none" else f"{metrics['overhead_percent']:+.1f} %"
        lines.append([model, how, place, variant, f"{metrics['step_ms']:.1f} ms", over])
    return (
        pipe_table(["model, step", "precision, impl", "machine", "loss", "step", "overhead"], lines, (4, 5))
        + "\n\nMedians over rounds in which every variant takes one step; rows: `benchmarks/results/attach.jsonl`."
    )


TABLES = {"attach": attach}
