"""Rows of a study, as they are committed: ``python benchmarks/commit_rows.py STUDY/rows.jsonl NAME-SCALE``.

They are the same rows in another order, so that those that are alike stand together: the file is a quarter smaller.
Rows of one kind, step and seed keep their order, and configurations come before the runs that name them.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterable
from pathlib import Path

STUDIES = Path(__file__).resolve().parent / "results" / "studies"


def ordered(lines: Iterable[bytes]) -> list[bytes]:
    """The lines by kind, step and seed."""

    def place(line: bytes) -> tuple[bool, str, int, int]:
        row = json.loads(line)
        return row["kind"] != "configuration", row["kind"], row.get("step") or 0, row.get("seed") or 0

    return sorted(lines, key=place)


def write(source: Path, target: Path) -> None:
    """Write the rows of ``source``, compressed or not, to ``target``; the same rows give the same bytes."""
    whole = source.read_bytes()
    text = gzip.decompress(whole) if source.suffix == ".gz" else whole
    target.write_bytes(gzip.compress(b"".join(ordered(text.splitlines(keepends=True))), 9, mtime=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path, help="rows.jsonl of the directory of a study that has ended")
    parser.add_argument("name", help="name and scale, as target-tiny")
    asked = parser.parse_args()
    write(asked.rows, STUDIES / f"{asked.name}.jsonl.gz")


if __name__ == "__main__":
    main()
