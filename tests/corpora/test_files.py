"""What is text: every format, encoding and compression, the column, and which files of a directory are read."""

from __future__ import annotations

import bz2
import contextlib
import csv
import datetime
import gzip
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from decondense.config import ConfigError, CorpusConfig
from decondense.corpora.columns import PassageError, TextWarning, choose_column
from decondense.corpora.directories import find_text, split_of
from decondense.corpora.files import Position, read_records, read_texts
from decondense.corpora.packed import prepare
from decondense.corpora.passages import read_each, read_file, read_rows
from decondense.corpora.sources import Dropped, documents_of, find_source
from decondense.hashing import hash_file
from decondense.privacy import without_credentials

BOM = b"\xef\xbb\xbf"
TEXTS = [
    "plain",
    'with "quotes", commas; and\ta tab',
    "two\nlines\n\nand three",
    "NA",
    "2024-01-01",
    "1.5",
    "ünï\u2028cødé",
]


def zstandard(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue())


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard,
}


def encoded(kind: str, texts: list[Any], field: str = "text", folder: Path | None = None) -> bytes:
    rows = [{"id": f"r{number}", field: text} for number, text in enumerate(texts)]
    if kind == "lines":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if kind == "array":
        return json.dumps(rows).encode()
    if kind == "indented array":
        return json.dumps(rows, indent=2, ensure_ascii=False).encode()
    assert folder is not None
    with (folder / "made").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["id", field], delimiter="\t" if kind == "tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return (folder / "made").read_bytes()


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize(
    ("kind", "suffix"),
    [
        ("lines", ".jsonl"),
        ("lines", ".json"),
        ("lines", ".ndjson"),
        ("array", ".json"),
        ("array", ".jsonl"),
        ("indented array", ".json"),
        ("csv", ".csv"),
        ("tsv", ".tsv"),
    ],
)
def test_every_format_gives_the_same_texts(kind: str, suffix: str, compression: str, tmp_path: Path) -> None:
    data = encoded(kind, TEXTS, folder=tmp_path)
    for mark in (b"", BOM):
        path = tmp_path / f"shard.00000-of-00002{suffix}{compression}"
        path.write_bytes(COMPRESS[compression](mark + data))
        position = Position(done=7)
        assert list(read_texts(path, position=position)) == TEXTS
        assert 7 < position.done <= 7 + path.stat().st_size


@pytest.mark.parametrize("compression", COMPRESS)
def test_text_files(compression: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.txt{compression}"
    for mark in (b"", BOM):
        path.write_bytes(COMPRESS[compression](mark + b"one\r\ntwo\r\n\r\nthree"))
        assert list(read_texts(path)) == ["one\ntwo\n\n", "three\n\n"]
    # zstandard and gzip files are often several behind each other
    path.write_bytes(COMPRESS[compression](b"a\n\n") + COMPRESS[compression](b"b\n"))
    assert list(read_texts(path)) == ["a\n\n", "b\n\n"]


ARROW = {
    "string": pa.array(["a", None, "", "b"]),
    "large string": pa.array(["a", None, "", "b"], pa.large_string()),
    "string view": pa.array(["a", None, "", "b"], pa.string_view()),
    "dictionary": pa.array(["a", None, "", "b"]).dictionary_encode(),
    "large dictionary": pa.array(["a", None, "", "b"], pa.large_string()).dictionary_encode(),
}
NOT_TEXT = {
    "list<": pa.array([["a"], ["b", "c"]]),
    "large_list<": pa.array([["a"], None], pa.large_list(pa.string())),
    "struct<": pa.array([{"role": "user"}, None]),
    "binary": pa.array([b"a", b"b"]),
    "int64": pa.array([1, 2]),
    "timestamp": pa.array([datetime.datetime(2024, 1, 1), None]),
}


@pytest.mark.parametrize("kind", ARROW)
def test_parquet_columns_that_hold_text(kind: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": list(range(4)), "body": ARROW[kind]}), tmp_path / "a.parquet")
    assert list(read_texts(tmp_path / "a.parquet")) == ["a", "", "", "b"]
    rows = read_file(tmp_path / "a.parquet")
    assert (rows, rows.skipped) == (["a", "b"], 2)


@pytest.mark.parametrize("kind", NOT_TEXT)
def test_parquet_columns_that_hold_no_text(kind: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": NOT_TEXT[kind], "title": ["x", "y"]}), tmp_path / "a.parquet")
    with pytest.raises(PassageError, match=rf"field 'text' of .* holds {kind}.* fields of strings: title"):
        read_file(tmp_path / "a.parquet")
    assert read_file(tmp_path / "a.parquet", field="title") == ["x", "y"]


@pytest.mark.filterwarnings("ignore::decondense.corpora.columns.TextWarning")
def test_a_column_of_nulls_is_no_text_and_no_crash(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.nulls(3), "n": [1, 2, 3]}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": ""}\n{"text": " \\n"}\n')
    for name in ("a.parquet", "a.jsonl"):
        assert read_file(tmp_path / name).skipped == 3
        with pytest.raises(PassageError, match="holds no text"):
            read_each(tmp_path / name)


# ---- what is skipped -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv", ".saved"])
def test_records_without_text_are_skipped_and_counted(suffix: str, tmp_path: Path) -> None:
    texts = [None, "a", "", " \n", "b", None]
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table({"text": texts}), path)
    elif suffix == ".saved":
        datasets.Dataset.from_dict({"text": texts}).save_to_disk(path)
    else:
        path.write_bytes(encoded({".jsonl": "lines", ".json": "array", ".csv": "csv"}[suffix], texts, folder=tmp_path))
    with pytest.warns(TextWarning, match="4 of 6 records hold no text"):
        assert read_each(path) == ["a", "b"]
    dropped = Dropped()
    source = find_source(CorpusConfig(source=str(path)), cache=tmp_path)
    found = documents_of(source, CorpusConfig(source=str(path)), "reading", None, dropped)
    assert [document.text for document in found] == ["a", "b"]
    assert dropped == Dropped(empty=4)


def test_a_corpus_says_how_many_records_it_skipped(tmp_path: Path) -> None:
    rows = [{"text": None if number % 5 == 0 else f"Document {number} of all of them."} for number in range(50)]
    (tmp_path / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = CorpusConfig(source=str(tmp_path / "rows.json"), vocab_size=300, held_out=0.3)
    with pytest.warns(TextWarning, match="10 records hold no text"):
        corpus = prepare(config, cache=tmp_path / "cache")
    assert (corpus.manifest["documents"], corpus.manifest["empty_documents"]) == (40, 10)


def test_a_record_without_the_column_is_one_without_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"story": "a", "n": 1}\n{"n": 2}\n{"story": null}\n{"story": "b"}\n')
    rows = read_file(tmp_path / "a.jsonl")
    assert (rows, rows.skipped) == (["a", "b"], 2)
    (tmp_path / "b.jsonl").write_text('"a"\nnull\n"b"\n')
    assert read_file(tmp_path / "b.jsonl") == ["a", "b"]


# ---- what is refused -------------------------------------------------------------------------------------------------

LINE = b'{"text": "' + bytes(random.Random(0).choices(b"abcdefgh ", k=9_000)) + b'"}\n'
REFUSED = {
    "utf16.txt": ("text".encode("utf-16"), "it is UTF-16"),
    "utf16.jsonl": ('{"text": "a"}'.encode("utf-16-be"), "it is UTF-16"),
    "utf16.csv": ("id,text\n1,a\n".encode("utf-16-le"), "it is UTF-16"),
    "latin1.jsonl": ('{"text": "é"}'.encode("latin1"), "cannot be read as UTF-8 text"),
    "picture.txt": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "binary file"),
    "torn.jsonl": (b'{"text": "a"}\n{"tex', "line 2: not valid JSON"),
    "torn.json": (b'{\n "text": "a",\n', "torn.json: not valid JSON"),
    "torn array.json": (b'[{"text": "a"},', "not valid JSON"),
    "two.json": (b'[{"text": "a"}]\n[{"text": "b"}]', "not valid JSON"),
    "deep.jsonl": (b'{"text": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested too deeply"),
    "deep.json": (b"[" * 200_000 + b"]" * 200_000, "nested too deeply"),
    "digits.jsonl": (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "line 1: not valid JSON"),
    "number.jsonl": (b'{"text": 5}\n', "field 'text' .* holds int, not text"),
    "later number.jsonl": (b'{"text": "a"}\n{"text": 5}\n', "record 2: field 'text' holds int"),
    "later list.jsonl": (b'{"text": "a"}\n{"text": ["b"]}\n', "record 2: field 'text' holds list"),
    "bare.jsonl": (b"5\n", "record 1: the record holds int"),
    "columns.json": (b'{"text": ["a", "b"]}', "field 'text' .* holds list, not text"),
    "nested.json": (b'{"data": [{"text": "a"}]}', "records in the field 'data'.* jq -c '.data"),
    "squad.json": (b'{\n "version": "1.1", "data": [{"title": "a"}]\n}', "records in the field 'data'"),
    "one line.jsonl": (b'{"name": "x", "rows": [{"row": "a"}]}\n', "records in the field 'rows'"),
    "id.jsonl": (b'{"id": "a1"}\n{"id": "a2"}\n', "no field of strings; it has: id. Identifiers"),
    "ids.csv": (b"doc_id,url,createdDate\na,http://b,c\n", "Identifiers, addresses and dates"),
    "several.jsonl": (b'{"title": "a", "body": "b", "id": "c"}\n', "several fields of strings.*: title, body"),
    "several.csv": (b"title,body,year\na,b,1999\n", "several fields of strings.*: title, body"),
    "semicolons.csv": (b"id;text\n1;a\n", "separated by ';'"),
    "quotes.csv": (b'id,text\n1,"a\n', "line 2: not valid CSV"),
    "more.csv": (b"id,text\n1,a\n2,b, c\n", "line 3: 3 values for 2 columns"),
    "fewer.csv": (b"id,text\n1\n", "line 2: 1 values for 2 columns"),
    "twice.csv": (b"text,text\na,b\n", "'text' appears twice"),
    "a.jsonl.gz": (gzip.compress(LINE)[:-9], "damaged, truncated"),
    "a.jsonl.zst": (zstandard(LINE)[:-9], "damaged, truncated"),
    "a.jsonl.xz": (lzma.compress(LINE)[:-9], "damaged, truncated"),
    "a.jsonl.bz2": (bz2.compress(LINE)[:-9], "damaged, truncated"),
    "b.jsonl.gz": (LINE, "damaged, truncated"),
    "b.jsonl.zst": (LINE, "damaged, truncated"),
    "a.parquet": (b"PAR1 no more", "damaged, truncated"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_with_its_cause(name: str, tmp_path: Path) -> None:
    content, said = REFUSED[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(PassageError, match=said) as refused:
        read_rows(path)
    assert name in str(refused.value)
    config = CorpusConfig(source=str(path))
    source = find_source(config, cache=tmp_path)
    with pytest.raises(ConfigError, match=said):
        list(documents_of(source, config, "", None))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.txt.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("content", [b"", BOM, b"\n\n"])
def test_an_empty_file_holds_no_text(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(COMPRESS["." + name.split(".", 2)[2]](content) if name.count(".") == 2 else content)
    assert read_rows(tmp_path / name) == []
    with pytest.raises(PassageError, match="holds no text"):
        read_each(tmp_path / name)


def test_one_rule_for_the_column() -> None:
    def chosen(*strings: str, field: str | None = None, **others: str) -> str:
        return choose_column({**dict.fromkeys(strings, "text"), **others}, field, "it")

    assert chosen("title", "text") == "text"
    assert chosen("id", "docId", "page_url", "uuid", "sha256", "body") == "body"
    assert chosen("body", n="int64", tags="list<string>") == "body"
    assert chosen("title", "text", field="title") == "title"
    assert chosen("grid") == "grid"  # ends like an identifier, and is none
    with pytest.raises(PassageError, match=r"no field 'txt'. Did you mean 'text'"):
        chosen("text", field="txt")


def test_long_cells_and_records(tmp_path: Path) -> None:
    long = "x" * 300_000
    for kind, name in (("csv", "a.csv"), ("lines", "a.jsonl")):
        (tmp_path / name).write_bytes(encoded(kind, [long], folder=tmp_path))
        assert list(read_texts(tmp_path / name)) == [long]
    assert csv.field_size_limit() == 131_072


def test_records_keep_their_values_and_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(BOM + b'{"label": 1, "q": "a\\u2028b"}\n\n{"label": null}\n')
    assert list(read_records(tmp_path / "a.jsonl")) == [(1, {"label": 1, "q": "a\u2028b"}), (3, {"label": None})]
    with pytest.raises(PassageError, match="holds no records"):
        list(read_records(tmp_path / "a.txt"))


# ---- directories -----------------------------------------------------------------------------------------------------


def folder(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded("lines", [text]) if ".json" in path.name else text.encode())
    return root


def test_a_directory_of_mixed_and_nested_files(tmp_path: Path) -> None:
    root = folder(
        tmp_path / "with [brackets]",
        **{"b/deep/er/x.jsonl": "1", "a.txt": "2", "c.md": "3", ".hidden/x.txt": "4", "licence_plates.jsonl": "5"},
        **{"README.md": "no", "b/README_de.md": "no", "LICENSE": "no", "LICENSE-MIT.txt": "no", "state.bin": "no"},
        **{"dataset_info.json": "no", "CITATION.cff": "no", "b/picture.png": "no"},
    )
    (root / "c.csv").write_text("id,text\n1,6\n")
    with pytest.warns(TextWarning, match=r"no reader for them: b/picture\.png, state\.bin\."):
        assert [row.strip() for row in read_rows(root)] == ["2", "1", "6", "3", "5"]
    assert find_text(tmp_path / "with [brackets]" / "README.md") is not None  # asked for by name, it is text


def test_a_directory_that_cannot_be_read_names_its_files(tmp_path: Path) -> None:
    root = folder(tmp_path / "a", **{f"shard_{number}.bin": "x" for number in range(8)}, **{"README.md": "card"})
    with pytest.raises(PassageError, match=r"holds no text file.*cannot be read: shard_0\.bin.* and 3 more"):
        read_rows(root)


@pytest.mark.parametrize(
    "names",
    [
        ("train.txt", "test.txt", "valid.txt"),
        ("wiki.train.txt", "wiki.test.txt", "wiki.valid.txt"),
        ("train/0.jsonl", "test/0.jsonl", "validation/0.jsonl"),
        ("c4-train.00000.json", "c4-eval.00000.json", "c4-dev.00000.json"),
        ("data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl", "data/validation-00000-of-00001.jsonl"),
        ("one.txt", "testing/one.txt", "val/one.txt"),  # what names no split is train
    ],
)
@pytest.mark.filterwarnings("ignore::decondense.corpora.columns.TextWarning")
def test_splits_are_not_mixed(names: tuple[str, ...], tmp_path: Path) -> None:
    root = folder(tmp_path / "x", **dict(zip(names, ("train", "test", "validation"), strict=True)))
    for split in ("train", "test", "validation"):
        assert [row.strip() for row in read_rows(root, split=split)] == [split]
        config = CorpusConfig(source=str(root), split=split)
        found = documents_of(find_source(config, cache=tmp_path), config, "", None)
        assert [document.text for document in found] == [split]
    with pytest.raises(
        PassageError, match=r"no split 'tran'. Did you mean 'train'\? It has: (train, )?validation, test"
    ):
        read_rows(root, split="tran")


def test_what_belongs_to_no_split_is_named(tmp_path: Path) -> None:
    root = folder(tmp_path / "a", **{"train.jsonl": "1", "extra.jsonl": "2"})
    with pytest.warns(TextWarning, match=r"belong to no split: extra\.jsonl"):
        assert read_rows(root) == ["1"]
    root = folder(tmp_path / "b", **{"one.jsonl": "1", "test.jsonl": "2"})
    with pytest.warns(TextWarning, match="splits test are not read"):
        assert read_rows(root) == ["1"]
    root = folder(tmp_path / "c", **{"test.jsonl": "1", "dev.jsonl": "2"})
    with pytest.raises(PassageError, match=r"no split 'train'.* It has: validation, test"):
        read_rows(root)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train_sft-00000-of-00002.parquet", "train"),
        ("data/forget01-00000-of-00001.parquet", "forget01"),
        ("latest.txt", None),
        ("contest/1.txt", None),
        ("training.csv", "train"),
        ("test/train.csv", "train"),
        ("part-00000-of-00004.jsonl", None),
    ],
)
def test_the_split_of_a_name(name: str, split: str | None) -> None:
    assert split_of(Path(name)) == split


def card(root: Path, text: str) -> None:
    root.mkdir(parents=True, exist_ok=True)
    (root / "README.md").write_text(f"---\n{text}\n---\n# Card\n\nThis is no data.\n")


def test_a_subset_of_a_cloned_data_set_is_named_behind_its_path(tmp_path: Path) -> None:
    root = folder(tmp_path / "clone", **{"en/a.jsonl": "1", "fr/a.jsonl": "2"})
    card(root, "configs:\n- {config_name: en, data_files: en/*}\n- {config_name: fr, data_files: fr/*}")
    assert read_rows(f"{root}:fr") == ["2"]
    with pytest.raises(PassageError, match=r"several subsets.*clone:en, .*clone:fr"):
        read_rows(root)
    with pytest.raises(PassageError, match="no subset 'de'"):
        read_rows(f"{root}:de")


def test_a_cloned_data_set_is_read_as_its_card_says(tmp_path: Path) -> None:
    root = folder(tmp_path / "clone", **{"raw/a.jsonl": "1", "raw/b.jsonl": "2", "held/c.jsonl": "3"})
    card(
        root,
        "configs:\n- config_name: default\n  data_files:\n"
        "  - {split: train, path: raw/*}\n  - {split: hold, path: held/*}",
    )
    assert read_rows(root) == ["1", "2"]
    assert read_rows(root, split="hold") == ["3"]
    with pytest.raises(PassageError, match=r"no split 'test'.* It has: train, hold"):
        read_rows(root, split="test")
    # options of the card are those of the library's own reader
    semicolons = tmp_path / "semicolons"
    card(semicolons, 'configs:\n- config_name: default\n  data_files: "*.csv"\n  sep: ";"')
    (semicolons / "a.csv").write_text("id;text\n1;a\n")
    assert list(read_rows(semicolons)) == ["a"]


@pytest.mark.parametrize("text", ["configs: [", "configs: 5", "[" * 5000, "a: &a [*a]"])
def test_a_damaged_card_is_no_traceback(text: str, tmp_path: Path) -> None:
    root = folder(tmp_path / "x", **{"a.jsonl": "1"})
    card(root, text)
    found: object = None
    with contextlib.suppress(PassageError):  # a list of configurations that is none
        found = list(read_rows(root))
    assert found in (None, ["1"])


def test_saved_data_sets(tmp_path: Path) -> None:
    one = datasets.Dataset.from_dict({"id": ["x", "y"], "story": ["a", None]})
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=one, test=one.select([0])).save_to_disk(tmp_path / "splits")
    datasets.DatasetDict(valid=one, test=one).save_to_disk(tmp_path / "no train")
    assert list(read_rows(tmp_path / "one")) == list(read_rows(tmp_path / "splits")) == ["a", ""]
    assert read_rows(tmp_path / "one")[0:2] == ["a", ""]
    assert list(read_rows(tmp_path / "splits", split="test")) == ["a"]
    with pytest.raises(PassageError, match=r"no split 'train'.* It has: valid, test"):
        read_rows(tmp_path / "no train")
    lists = datasets.Dataset.from_dict({"text": [["a"]], "label": [1]})
    lists.save_to_disk(tmp_path / "lists")
    with pytest.raises(PassageError, match=r"field 'text' .* holds List, not text"):
        read_rows(tmp_path / "lists")
    next((tmp_path / "one").glob("*.arrow")).write_bytes(b"cut")
    with pytest.raises(PassageError, match="cannot be loaded as a data set"):
        read_rows(tmp_path / "one")


# ---- URLs and hashes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "kept"),
    [
        ("https://user:pass@host.org/a/b.jsonl", "https://host.org/a/b.jsonl"),
        ("s3://KEY:SE@CRET@bucket/x", "s3://bucket/x"),
        ("https://host/x?token=secret#secret", "https://host/x"),
        ("hf://datasets/owner/name", "hf://datasets/owner/name"),
        ("owner/name:subset", "owner/name:subset"),
        ("a@b/c?d", "a@b/c?d"),
    ],
)
def test_credentials_of_a_url_are_nowhere(url: str, kept: str, tmp_path: Path) -> None:
    assert without_credentials(url) == kept
    config = CorpusConfig(source=url)
    assert kept in config.to_yaml()
    if "://" in url:
        for refuse in (lambda: read_rows(url), lambda: find_source(config, cache=tmp_path)):
            with pytest.raises(ValueError, match=f"{kept}.* is a URL"):
                refuse()


def test_the_hash_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")  # FIPS 180-2, example B.1
    assert hash_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
