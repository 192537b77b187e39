"""The table of what measuring costs, from the rows of bench_measure.py; collected by tables.py."""

from __future__ import annotations

from pathlib import Path
from pipes import pipe_table

from decondense.records import Row, read_rows

RESULTS = Path(__file__).resolve().parent / "results"


def measure() -> str:
    """Time and memory of each variant for each width; the newest row of a variant counts."""
    path = RESULTS / "measure.jsonl"
    rows = [row for row in read_rows(path) if row["name"] == "measure"] if path.exists() else []
    newest: dict[tuple[int, str], Row] = {(row["params"]["width"], row["variant"]): row for row in rows}
    if not newest:
        return ""
    head = ["width", "variant", "time / forward", "peak memory above forward, MB", "growth for 4 x the passages, MB"]
    lines = []
    watches = []
    for (width, variant), row in sorted(newest.items(), key=lambda item: item[0][0]):
        metrics = row["metrics"]
        if variant == "watch":
            watches.append(f"{100 * metrics['share_of_step']:.2f} % (width {width})")
            continue
        above, growth = (
            f"{metrics[key] / 1e6:+.0f}" if key in metrics else "" for key in ("above_forward_bytes", "growth_bytes")
        )
        lines.append([str(width), variant, f"{metrics['ratio_to_forward']:.2f}", above, growth])
    timed = next(row for row in rows if row["variant"] == "forward")
    params, made = timed["params"], timed["provenance"]
    passages = ", ".join(
        f"{row['params']['passages']} passages (width {width})"
        for (width, variant), row in sorted(newest.items())
        if variant == "forward"
    )
    note = (
        f"12 layers, {params['tokens']} tokens, {passages}, {params['threads']} threads; medians "
        f"over {params['rounds']} rounds of one run; {made['cpu']}; torch {made['versions']['torch']}."
    )
    if watches:
        note += f" Watching every training step (`CondensationWatch`) takes {', '.join(watches)} of it."
    return pipe_table(head, lines, (0, 2, 3, 4)) + f"\n\n{note} Rows: `benchmarks/results/measure.jsonl`.\n"


TABLES = {"measure": measure}
