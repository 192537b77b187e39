"""The table of what attaching costs, from the rows of ``bench_attach.py``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from pipes import pipe_table

from bench_attach import aim
from decondense.records import read_rows

RESULTS = Path(__file__).resolve().parent / "results"


def attach(name: str, command: str) -> str:
    """The newest row of each model, way of running and variant in the file ``name``."""
    path = RESULTS / f"{name}.jsonl"
    rows = read_rows(path) if path.exists() else []
    if not rows:
        return f"Not run: no row in `benchmarks/results/{name}.jsonl`; `{command}` makes them."
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
        peak = [f"{metrics['peak_bytes'] / 1e9:.2f}"] if "peak_bytes" in metrics else []
        # only a GPU's rows have a peak
        lines.append([model, how, place, variant, f"{metrics['step_ms']:.1f} ms", over, *peak])
        lines[-1] += [aim(variant, metrics["overhead_percent"])] if peak else []
    head = ["model, step", "precision, impl", "machine", "loss", "step", "overhead", "peak, GB", "aim"][: len(lines[0])]
    return (
        pipe_table(head, lines, (4, 5, 6))
        + f"\n\nMedians over rounds in which every variant takes one step; rows: `benchmarks/results/{name}.jsonl`."
    )


TABLES = {
    "attach": partial(attach, "attach", "python benchmarks/bench_attach.py --out benchmarks/results/attach.jsonl"),
    "attach-gpu": partial(attach, "attach-gpu", "make gpu"),
}
