"""The table of the trial of kills, damaged files and hostile folders, from the rows of trial.py; for tables.py."""

from __future__ import annotations

from pathlib import Path

from decondense.records import read_rows

RESULTS = Path(__file__).resolve().parent / "results"
_WHAT = {
    "kills": "kills of runner, worker or group",
    "files": "damaged files",
    "folders": "hostile folders",
}


def trial() -> str:
    """One line for each part."""
    path = RESULTS / "trial.jsonl"
    rows = {row["variant"]: row for row in read_rows(path)} if path.exists() else {}
    if not rows:
        return "Not run yet: `make trial`."
    lines = [
        "| | tried | survived | tracebacks | silent | left running | code run |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for part, row in rows.items():
        counts = row["metrics"]
        cells = [counts[name] for name in ("tried", "survived", "tracebacks", "silent", "left_running")]
        cells.append(counts["code_run"] if part == "folders" else "")
        lines.append(f"| {_WHAT[part]} | " + " | ".join(map(str, cells)) + " |")
    made = next(iter(rows.values()))
    minutes = f"{sum(row['metrics']['seconds'] for row in rows.values()) / 60:.0f}"
    made_at = made["provenance"]
    note = f"Seed {made['params']['seed']}, {minutes} minutes on {made_at['cpu']}, commit `{made_at['commit']}`."
    if "kills" in rows:
        note += f" {rows['kills']['metrics']['resumed']} runs resumed from a checkpoint."
    return "\n".join(lines) + f"\n\n{note} Again: `make trial`. Rows: `benchmarks/results/trial.jsonl`.\n"


TABLES = {"trial": trial}
