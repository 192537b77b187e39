from __future__ import annotations

import gzip
import json
import os
import resource
import subprocess
import sys
from typing import Any

import pytest

from decondense.records import (
    ItemRows,
    RecordError,
    RowReader,
    append_rows,
    atomic_path,
    atomic_write,
    check_row,
    iter_pieces,
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


@pytest.mark.parametrize("known", [{}, {"bits_per_byte": 1.5}, {"bits_per_byte": 1.5, "margin_bits": -0.5}])
def test_rows_of_items_may_lack_the_fields_of_later_releases(tmp_path, known) -> None:
    whole = make_row("eval_item", **CELL, step=2, task="t", metric="m", item="i", value=1.0, **known)
    early = {key: value for key, value in whole.items() if key in known or value is not None}
    (tmp_path / "r.jsonl").write_text(json.dumps(early) + "\n")
    assert read_rows(tmp_path / "r.jsonl") == [whole]
    (tmp_path / "r.jsonl").write_text(json.dumps({**early, "margin_bits": "much"}) + "\n")
    with pytest.raises(RecordError, match="margin_bits"):
        read_rows(tmp_path / "r.jsonl")


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


@pytest.mark.parametrize("change", [("0.3", "0.4"), ("rate", "rat")])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_configuration_that_was_changed_is_named(tmp_path, change: tuple[str, str], suffix: str) -> None:
    """A flipped bit in a value would compare other settings than those that ran, and say nothing."""
    path = tmp_path / f"r.jsonl{suffix}"
    write_rows(path, [make_row("run", **CELL, status="started", config={"rate": 0.3, "name": "ü"}), step(1)])
    assert len(read_rows(path)) == 2
    opened = gzip.open if suffix else open
    with opened(path, "rt", encoding="utf-8") as handle:
        text = handle.read()
    with opened(path, "wt", encoding="utf-8") as handle:
        handle.write(text.replace(*change, 1))
    with pytest.raises(RecordError, match=rf"r\.jsonl{suffix}, line 1: the configuration does not have the hash"):
        read_rows(path)


def test_text_with_line_separators_stays_one_row(tmp_path) -> None:
    row = make_row("run", **CELL, status="failed", config={}, error="a\u2028b\x85c\nd")
    append_rows(tmp_path / "r.jsonl", [row])
    assert read_rows(tmp_path / "r.jsonl") == [row]


def test_a_name_that_is_not_utf8_can_be_written(tmp_path) -> None:
    name = os.fsdecode(b"bad\xff")
    row = make_row("run", **CELL, status="started", config={"a": name}, provenance={"command": name})
    append_rows(tmp_path / "a.jsonl", [row])
    write_rows(tmp_path / "b.jsonl", [row])
    write_rows(tmp_path / "c.jsonl.gz", [row])
    for path in tmp_path.iterdir():
        (read,) = read_rows(path)
        assert (read["config"]["a"], read["provenance"]["command"]) == ("bad?", "bad?")
    atomic_write(tmp_path / "page.html", name)


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
    assert len(read_rows(path)) == 3
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


def run(status: str, config: dict, **more):
    return make_row("run", **{**CELL, "status": status, "config": config, **more})


CONFIG = {"name": "s", "arms": [{"name": f"arm-{number}", "weight": number / 7} for number in range(30)]}


@pytest.mark.parametrize("name", ["r.jsonl", "r.jsonl.gz"])
def test_a_configuration_is_written_once_and_read_whole(tmp_path, name: str) -> None:
    rows = []
    for seed in range(20):
        rows += [run("started", CONFIG, seed=seed), step(1, seed=seed), run("finished", CONFIG, seed=seed)]
    rows.append(run("finished", {**CONFIG, "name": "other"}, seed=20))
    write_rows(tmp_path / name, rows)
    read = read_rows(tmp_path / name)
    assert read == rows
    configs = {id(row["config"]) for row in read if row["kind"] == "run"}
    assert len(configs) == 2, "equal configurations are one object"
    if not name.endswith(".gz"):
        text = (tmp_path / name).read_text()
        assert text.count('"arm-29"') == 2
        # the same rows with the configuration inside, as earlier releases wrote them
        old = tmp_path / "old.jsonl"
        old.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert read_rows(old) == rows
        assert len(text) < old.stat().st_size / 3


def test_appended_run_rows_name_the_configuration_of_their_file(tmp_path) -> None:
    path = tmp_path / "r.jsonl"
    rows = [run("started", CONFIG), step(1), run("resumed", CONFIG), step(2), run("finished", CONFIG)]
    write_rows(path, rows[:1])
    for row in rows[1:]:
        append_rows(path, [row])
    assert read_rows(path) == rows
    assert path.read_text().count('"arm-29"') == 1
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[1:]))
    with pytest.raises(RecordError, match=r"line 1: refers to the configuration"):
        read_rows(path)


DAMAGE = {
    "renamed key": lambda row: {("arn" if key == "arm" else key): value for key, value in row.items()},
    "no kind": lambda row: {key: value for key, value in row.items() if key != "kind"},
    "kind a list": lambda row: {**row, "kind": ["step"]},
    "no step": lambda row: {key: value for key, value in row.items() if key != "step"},
    "step a text": lambda row: {**row, "step": "later"},
    "loss a mapping": lambda row: {**row, "loss": {}},
    "newer schema": lambda row: {**row, "schema_version": 99},
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_row_is_named_with_its_file_and_line(tmp_path, what: str) -> None:
    path = tmp_path / "r.jsonl"
    for good in (step(2), make_row("eval_item", **CELL, step=2, task="t", metric="m", item="i", value=1.0)):
        if what in ("loss a mapping",) and good["kind"] != "step":
            continue
        bad = DAMAGE[what](good)
        path.write_text("".join(json.dumps(row) + "\n" for row in (step(1), bad, step(3))))
        with pytest.raises(RecordError, match=r"r\.jsonl, line 2"):
            read_rows(path)


@pytest.mark.parametrize(
    "line", ["[" * 100_000, '{"kind":' * 5_000, '{"kind": NaN}', '{"kind":"eval","value":1e999}', "\udcff"]
)
def test_nested_or_foreign_lines_are_refused_without_a_traceback(tmp_path, line: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(line.encode("utf-8", "surrogateescape") + b"\n" + json.dumps(step(1)).encode() + b"\n")
    with pytest.raises(RecordError, match=r"r\.jsonl, line 1"):
        read_rows(path)


def test_every_flipped_byte_of_a_compressed_file_is_rows_or_one_error(tmp_path) -> None:
    path = tmp_path / "r.jsonl.gz"
    write_rows(path, [step(number) for number in range(5)])
    whole = path.read_bytes()
    refused = 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x40]) + whole[place + 1 :])
        try:
            read_rows(path)
        except RecordError as error:
            refused += str(path) in str(error)
    assert refused > len(whole) * 0.8, "the checksum sees what the lines do not"


def item(name: str, value: float = 1.0, **more):
    return make_row("eval_item", **CELL, step=2, task="t", metric="m", item=name, value=value, **more)


def compact(row: Any) -> bytes:
    return json.dumps(row, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


ODD = [None, True, 3, -1, 2.5, "x", "}", [], {}, [{}], float("inf"), float("nan"), 10**400]
ABSENT = object()


@pytest.mark.parametrize("key", item("i"))
def test_rows_that_are_read_together_are_what_they_are_alone(tmp_path, key: str) -> None:
    path = tmp_path / "r.jsonl"
    good = [item(name, place / 7, bits_per_byte=place / 3) for place, name in enumerate("abc")]
    for value in (*ODD, ABSENT):
        odd = {**item("o"), key: value}
        if value is ABSENT:
            del odd[key]
        for place in range(4):
            rows = [*good[:place], odd, *good[place:]]
            path.write_bytes(b"".join(map(compact, rows)))
            try:
                expected = [check_row(json.loads(compact(row), parse_constant=lambda word: {}[word])) for row in rows]
            except (RecordError, KeyError):
                with pytest.raises(RecordError, match=rf"r\.jsonl, line {place + 1}:"):
                    read_rows(path)
            else:
                assert read_rows(path) == expected


@pytest.mark.parametrize(
    "ends",
    [
        ['"a","value":1.0,"weight":1.0}', '"b","value":1.0', '"weight":1.0}'],
        ['"a","value":1.0,"weight":1.0}', "[1", '"b"}],"item":"c","value":1.0,"weight":1.0},{"item":"d"}'],
        ['"a","value":1.0,"weight":1.0}', '"b","value":1.0,"weight":1.0},{"item":"c","value":1.0,"weight":1.0}'],
        ['"a","value":1.0,"weight":1.0}', '"b}', '"c","value":1.0,"weight":1.0}'],
    ],
)
def test_lines_that_are_rows_only_together_are_refused(tmp_path, ends: list[str]) -> None:
    whole = compact(item("a"))
    start = whole[: whole.index(b'"item":') + 7]
    (tmp_path / "r.jsonl").write_bytes(b"".join(start + end.encode() + b"\n" for end in ends))
    with pytest.raises(RecordError, match=r"r\.jsonl, line 2: not a valid row"):
        read_rows(tmp_path / "r.jsonl")


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ["r.jsonl", "r.jsonl.gz"])
def test_rows_of_items_come_back_in_their_order_and_a_torn_one_is_dropped(tmp_path, name: str, ends: str) -> None:
    rows = [step(1), *(item(f"{n}\u2028{{", n / 7) for n in range(3)), *(item(str(n), n / 7) for n in range(5000)),
            {**item("x"), "arm": "b"}, step(3), item("y", weight=3.5), item("z")]  # fmt: skip
    data = b"".join(map(compact, rows)).replace(b"\n", ends.encode())
    for torn in (b"", compact(rows[-1])[:-20]):
        whole = data + torn
        (tmp_path / name).write_bytes(gzip.compress(whole, 1) if name.endswith("gz") else whole)
        assert read_rows(tmp_path / name) == rows
    together = sum(isinstance(piece, ItemRows) for piece in iter_pieces(tmp_path / name))
    # 5003 items of one place, cut once; before the cut a name has a brace, and the last two have a torn row behind them
    assert together == (1 if ends == "\n" else 0)
    if not name.endswith("gz"):
        assert RowReader(tmp_path / name).read() == (False, rows)


def test_a_reader_returns_only_what_is_new(tmp_path) -> None:
    path = tmp_path / "r.jsonl"
    reader = RowReader(path)
    assert reader.read() == (False, [])
    append_rows(path, [run("started", CONFIG), step(1)])
    assert reader.read() == (False, [run("started", CONFIG), step(1)])
    assert reader.read() == (False, [])
    with path.open("ab") as handle:
        handle.write(b'{"kind":"st')
    assert reader.read() == (False, []), "a row that is being written is left for later"
    append_rows(path, [step(2)])
    assert reader.read() == (False, [step(2)])
    append_rows(path, [run("finished", CONFIG)])
    assert reader.read() == (False, [run("finished", CONFIG)]), "the configuration was read before"


@pytest.mark.parametrize("length", ["shorter", "equal", "longer"])
def test_a_reader_starts_again_when_the_file_was_replaced(tmp_path, length: str) -> None:
    path = tmp_path / "r.jsonl"
    append_rows(path, [step(1), step(2)])
    reader = RowReader(path)
    reader.read()
    rows = {"shorter": [step(1)], "equal": [step(1), step(3)], "longer": [step(1), step(3), step(4)]}[length]
    for _ in range(2):  # twice, so that the second file may take the first one's number
        write_rows(path, rows)
    assert reader.read() == (True, rows)
    path.unlink()
    assert reader.read() == (True, [])


def test_two_writers_of_one_new_file_do_not_both_win(tmp_path) -> None:
    path = tmp_path / "x.txt"
    with atomic_path(path, exclusive=True) as mine:
        mine.write_text("mine")
        with atomic_path(path, exclusive=True) as other:
            other.write_text("other")
        with pytest.raises(FileExistsError), atomic_path(path, exclusive=True) as third:
            third.write_text("third")
        path.unlink()
    assert path.read_text() == "mine"
    assert os.listdir(tmp_path) == ["x.txt"]


def test_a_field_is_read_under_its_former_name() -> None:
    row = make_row("run", **CELL, status="started", config={}, steps=5)
    former = {key: value for key, value in row.items() if key != "max_grad_norm"} | {"gradient_clip": 0.5}
    assert check_row(former) == row | {"max_grad_norm": 0.5}
