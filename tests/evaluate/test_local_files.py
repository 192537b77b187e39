"""Benchmark files are read by the reader of text: the same formats, compressions and refusals."""

from __future__ import annotations

import bz2
import gzip
import json
from pathlib import Path

import pytest

from decondense.evaluate.catalogue import EvaluationError
from decondense.evaluate.local import find_tasks, read_rows

ROWS = [{"goal": f"g{n}", "sol1": "a", "sol2": "b", "label": n % 2, "extra": None} for n in range(3)]


@pytest.mark.parametrize("name", ["validation.jsonl", "validation.json", "validation.jsonl.gz", "validation.json.bz2"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("array", [True, False])
def test_formats(name: str, mark: str, array: bool, tmp_path: Path) -> None:
    (tmp_path / "piqa").mkdir()
    text = mark + (json.dumps(ROWS) if array else "".join(json.dumps(row) + "\n" for row in ROWS))
    compress = {".gz": gzip.compress, ".bz2": bz2.compress}.get(Path(name).suffix, bytes)
    (tmp_path / "piqa" / name).write_bytes(compress(text.encode()))
    found, _ = find_tasks(tmp_path, {"piqa": 0})
    assert found["piqa"].rows == {"validation": 3}
    assert [row for file in found["piqa"].splits["validation"] for row in read_rows(Path(file))] == ROWS


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[1, 2]", "line 1: expected an object"),
        (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
        ("{}".encode("utf-16"), "UTF-16"),
        (b'{"goal": "g"}\n{"goal"', "line 2: not valid JSON"),
    ],
)
def test_what_is_no_rows_is_refused_with_the_file(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "validation.jsonl").write_bytes(content)
    with pytest.raises(EvaluationError, match=said) as refused:
        read_rows(tmp_path / "piqa" / "validation.jsonl")
    assert "validation.jsonl" in str(refused.value)
