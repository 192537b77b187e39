from __future__ import annotations

import json
import os
import resource
import subprocess
import sys

import pytest

from decondense.records import (
    RecordError,
    append_rows,
    atomic_path,
    atomic_write,
    make_row,
    provenance,
    read_rows,
    stable,
    write_rows,
)

CELL = {"study": "s", "study_fingerprint": "f", "arm": "a", "seed": 0}


def step(number: int, **more):
    return make_row(
        "step", **{**CELL, "step": number, "tokens": 10 * number, "loss": 1.5, "learning_rate": 1e-3, **more}
    )


def test_rows_come_back_as_they_were(tmp_path) -> None:
    rows = [step(1), step(2, dispersion=-0.4, timing={"wall": 2.0})]
    append_rows(tmp_path / "r.jsonl", rows[:1])
    append_rows(tmp_path / "r.jsonl", rows[1:])
    assert read_rows(tmp_path / "r.jsonl") == rows


def test_a_wrong_row_is_refused_by_field() -> None:
    with pytest.raises(RecordError, match=r"step row: loss"):
        make_row("step", **CELL, step=1, tokens=1, learning_rate=1.0)
    with pytest.raises(RecordError, match=r"lossy"):
        step(1, lossy=3)
    with pytest.raises(RecordError, match=r"unknown row kind 'stepp'"):
        make_row("stepp")


def test_what_is_no_number_becomes_null_or_is_refused() -> None:
    assert step(1, gradient_norm=float("inf"))["gradient_norm"] is None
    with pytest.raises(RecordError, match="loss"):
        step(1, loss=float("nan"))


def test_a_torn_last_line_is_dropped_and_overwritten(tmp_path) -> None:
    path = tmp_path / "r.jsonl"
    append_rows(path, [step(1), step(2)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])  # a kill in the middle of the second row
    assert read_rows(path) == [step(1)]
    append_rows(path, [step(3)])
    assert read_rows(path) == [step(1), step(3)]


def test_a_file_that_is_one_torn_line(tmp_path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"kind": "st')
    assert read_rows(path) == []
    append_rows(path, [step(1)])
    assert read_rows(path) == [step(1)]


def test_a_bad_line_in_the_middle_is_named(tmp_path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(step(1)) + "\n[1]\n" + json.dumps(step(2)) + "\n")
    with pytest.raises(RecordError, match=r"r\.jsonl, line 2"):
        read_rows(path)
    with pytest.raises(RecordError, match="cannot be read"):
        read_rows(tmp_path / "missing.jsonl")


def test_text_with_line_separators_stays_one_row(tmp_path) -> None:
    row = make_row("run", **CELL, status="failed", config={}, error="a\u2028b\x85c\nd")
    append_rows(tmp_path / "r.jsonl", [row])
    assert read_rows(tmp_path / "r.jsonl") == [row]


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path) -> None:
    path = tmp_path / "x.txt"
    atomic_write(path, "old")

    def interrupted() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        interrupted()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x.txt"]
    assert path.stat().st_mode & 0o400


FULL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
from decondense.records import append_rows
row = {"kind": "step", "schema_version": 1, "study": "y" * 900, "study_fingerprint": "f", "arm": "a", "seed": 0,
       "step": 1, "tokens": 1, "loss": 1.0, "learning_rate": 0.1}
try:
    for _ in range(10):
        append_rows(sys.argv[1], [row])
except OSError as error:
    print("refused", error.errno)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs file size limits")
def test_a_disk_that_fills_up_leaves_whole_rows(tmp_path) -> None:
    # a file size limit makes the kernel refuse the write that crosses it, as a full disk does
    path = tmp_path / "r.jsonl"
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, check=True)
    assert "refused" in done.stdout
    assert 2 <= len(read_rows(path)) <= 4
    assert path.read_bytes().endswith(b"\n")


def test_stable_drops_only_what_may_differ() -> None:
    a = make_row("run", **CELL, status="finished", config={}, timing={"s": 1.0}, provenance=provenance())
    b = make_row("run", **CELL, status="finished", config={}, timing={"s": 2.0}, provenance={})
    assert stable(a) == stable(b)
    assert stable(a) != stable({**b, "seed": 1})


def test_provenance_names_the_versions() -> None:
    found = provenance(device="cpu")
    assert found["device"] == "cpu"
    assert found["versions"]["torch"]
    json.dumps(found)


def test_provenance_keeps_the_folders_of_the_machine_to_itself(monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/home/me/bin/decondense", "study", "/home/me/mine.yaml", "--out", "runs/a"])
    assert provenance()["command"] == "decondense study mine.yaml --out runs/a"


def test_write_rows_replaces(tmp_path) -> None:
    write_rows(tmp_path / "r.jsonl", [step(1)])
    write_rows(tmp_path / "r.jsonl", [step(2)])
    assert read_rows(tmp_path / "r.jsonl") == [step(2)]


def test_compressed_rows_are_the_same_rows(tmp_path) -> None:
    row = make_row(
        "trial",
        study="s",
        study_fingerprint="f",
        arm="a",
        seed=1000,
        status="finished",
        learning_rate=1e-3,
        steps=3,
        value=2.5,
    )
    write_rows(tmp_path / "rows.jsonl.gz", [row, row])
    assert read_rows(tmp_path / "rows.jsonl.gz") == [row, row]
    first = (tmp_path / "rows.jsonl.gz").read_bytes()
    write_rows(tmp_path / "rows.jsonl.gz", [row, row])
    assert (tmp_path / "rows.jsonl.gz").read_bytes() == first
    (tmp_path / "bad.jsonl.gz").write_bytes(first[:-9])
    with pytest.raises(RecordError, match="cannot be read"):
        read_rows(tmp_path / "bad.jsonl.gz")
