"""Every number and figure of the README and the docs, made from the committed rows of ``benchmarks/results/``.

    python benchmarks/tables.py           # write
    python benchmarks/tables.py --check   # say what is out of date, and exit with 1

A table stands between ``<!-- rows:NAME -->`` and ``<!-- /rows -->``; NAME is a key of ``TABLES`` below.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from attach_tables import TABLES as ATTACH_TABLES
from beyond import TABLES as BEYOND_TABLES
from decondense.compare import Study, compare
from decondense.figures.comparison import overview
from decondense.records import Row, read_rows
from decondense.report import sentences
from front import TABLES as FRONT_TABLES
from geometry import TABLES as GEOMETRY_TABLES
from geometry_field import TABLES as FIELD_TABLES
from geometry_figure import dose_figure
from horizon import TABLES as HORIZON_TABLES
from kernel_tables import TABLES as KERNEL_TABLES
from loss_tables import TABLES as LOSS_TABLES
from measure_tables import TABLES as MEASURE_TABLES
from mid_training import TABLES as MID_TRAINING_TABLES
from pictures import picture
from sections import TABLES as RESULT_TABLES
from sections import figures as result_figures
from trial_tables import TABLES as TRIAL_TABLES

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PLACE = re.compile(r"(<!-- rows:([\w-]+) -->\n).*?(<!-- /rows -->)", re.DOTALL)


def rows_of(name: str) -> list[Row]:
    path = RESULTS / f"{name}.jsonl"
    return read_rows(path) if path.exists() else []


def machine(row: Row) -> str:
    found = row["provenance"]
    threads = f", {found['threads']} thread a run" if found.get("threads") == 1 else ""
    return f"{found['cpu']}, {found['cores']} cores{threads}; torch {found['versions']['torch']}"


def demo() -> str:
    rows = rows_of("demo")
    found = compare(rows)
    ended = next(row for row in rows if row["kind"] == "run" and row["status"] == "finished")
    body = "\n".join(f"- {sentence}" for sentence in sentences(found))
    return (
        f"{body}\n\n"
        f"One run of `decondense demo` on {machine(ended)}; rows: `benchmarks/results/demo.jsonl`. The embedded text "
        "depends on the installed versions, so other machines get other numbers.\n"
    )


TABLES: dict[str, Callable[[], str]] = {
    "demo": demo,
    **LOSS_TABLES,
    **KERNEL_TABLES,
    **ATTACH_TABLES,
    **MEASURE_TABLES,
    **FRONT_TABLES,
    **RESULT_TABLES,
    **HORIZON_TABLES,
    **MID_TRAINING_TABLES,
    **BEYOND_TABLES,
    **GEOMETRY_TABLES,
    **FIELD_TABLES,
    **TRIAL_TABLES,
}


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def filled(text: str) -> str:
    """The text with every table made anew; a name that nothing makes raises."""

    def fill(match: re.Match[str]) -> str:
        name = match.group(2)
        if name not in TABLES:
            raise ValueError(f"no table is called {name!r}; known: {', '.join(TABLES)}.")
        return f"{match.group(1)}{TABLES[name]().rstrip()}\n{match.group(3)}"

    return PLACE.sub(fill, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit with 1 when something is out of date"
    )
    check = parser.parse_args().check
    stale = []
    for path in documents():
        text = path.read_text(encoding="utf-8")
        made = filled(text)
        if made != text:
            stale.append(path.relative_to(ROOT))
            if not check:
                path.write_text(made, encoding="utf-8")
    if not check and (rows := rows_of("demo")):
        picture(overview(Study.from_rows(rows)), ROOT / "docs" / "images" / "demo.png", dpi=200)
    if not check:
        (ROOT / "docs" / "images" / "results").mkdir(exist_ok=True)
        result_figures(ROOT / "docs" / "images" / "results")
        picture(dose_figure(), ROOT / "docs" / "images" / "results" / "geometry.png")
    for path in stale:
        print(f"{'out of date' if check else 'written'}: {path}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
