"""Rows are committed whole, in an order that a reader understands."""

from __future__ import annotations

import gzip
import json
import random
import sys
from pathlib import Path

import pytest

from decondense.records import read_rows

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import commit_rows  # noqa: E402

COMMITTED = sorted((ROOT / "benchmarks" / "results").glob("*/*.jsonl.gz"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.name)
def test_committed_files_are_in_their_order(path: Path) -> None:
    lines = gzip.decompress(path.read_bytes()).splitlines(keepends=True)
    assert commit_rows.ordered(lines) == lines


def test_all_rows_stay_and_those_of_one_place_in_their_order(tmp_path: Path) -> None:
    path = next(path for path in COMMITTED if path.name == "fig5-tiny.jsonl.gz")
    lines = gzip.decompress(path.read_bytes()).splitlines(keepends=True)
    (configuration, *others) = lines
    assert json.loads(configuration)["kind"] == "configuration"
    random.Random(0).shuffle(others)
    mixed = tmp_path / "rows.jsonl"
    mixed.write_bytes(b"".join([configuration, *others]))
    commit_rows.write(mixed, tmp_path / "kept.jsonl.gz")
    kept = gzip.decompress((tmp_path / "kept.jsonl.gz").read_bytes()).splitlines(keepends=True)
    assert sorted(kept) == sorted(lines)
    places: dict[tuple[str, int, int], list[bytes]] = {}
    for line in others:
        row = json.loads(line)
        places.setdefault((row["kind"], row.get("step") or 0, row.get("seed") or 0), []).append(line)
    assert all([line for line in kept if line in set(there)] == there for there in places.values())
    assert len(read_rows(tmp_path / "kept.jsonl.gz")) == len(others)
    commit_rows.write(tmp_path / "kept.jsonl.gz", tmp_path / "again.jsonl.gz")
    assert (tmp_path / "again.jsonl.gz").read_bytes() == (tmp_path / "kept.jsonl.gz").read_bytes()
