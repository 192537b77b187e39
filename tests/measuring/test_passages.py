"""Sources of text and the published protocol of passages."""

from __future__ import annotations

import gzip
import io
import json
import lzma
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from decondense.corpora import passages as source
from decondense.corpora.columns import TextWarning
from decondense.corpora.passages import PassageError, count_words, read_rows, sample_passages

ROWS = [f"Row {i} has seven words, in all." for i in range(200)]  # 9 with the marks


def test_words() -> None:
    assert count_words("") == 0
    assert count_words("Don't panic: it's well-known!") == 6
    assert count_words(ROWS[0]) == 9


def test_protocol() -> None:
    texts = sample_passages(ROWS, count=20, words=(50, 60), seed=0)
    assert all(50 <= count_words(text) <= 60 for text in texts)
    first = int(np.random.default_rng(3).integers(0, 190))
    assert texts[3].startswith(ROWS[first])
    assert texts[3].splitlines()[1] == ROWS[first + 1]
    assert sample_passages(ROWS, count=5, words=(50, 60)) == texts[:5]  # more passages do not change the first ones
    assert sample_passages(ROWS, count=5, words=(50, 60), seed=1) == texts[1:6]


def test_a_long_row_is_cut() -> None:
    text = sample_passages(["word " * 500], count=1, words=(10, 20))[0]
    assert count_words(text) == 20


def test_the_end_of_a_source_goes_on_at_its_start() -> None:
    assert count_words(sample_passages(ROWS[:7], count=1, words=(60, 70), seed=1)[0]) == 63


def test_too_little_text() -> None:
    with pytest.raises(PassageError, match=r"has 63 words, but a passage needs at least 1024.*--words"):
        sample_passages(ROWS[:7])
    with pytest.raises(PassageError, match="holds no text"):
        sample_passages([])
    with pytest.raises(PassageError, match="only strings"):
        sample_passages([1, 2])  # type: ignore[list-item]
    with pytest.raises(PassageError, match="fewest <= most"):
        sample_passages(ROWS, words=(20, 10))
    with pytest.raises(PassageError, match="at least 1, got 0"):
        sample_passages(ROWS, count=0)


def test_files(tmp_path: Path) -> None:
    body = "First paragraph,\nsecond line.\n\n\nSecond paragraph.\n"
    expected = ["First paragraph,\nsecond line.\n\n", "Second paragraph.\n\n"]
    (tmp_path / "a.txt").write_text(body)
    with gzip.open(tmp_path / "b.txt.gz", "wt") as stream:
        stream.write(body)
    with lzma.open(tmp_path / "c.md.xz", "wt") as stream:
        stream.write(body)
    records = [{"id": 1, "text": "one"}, {"id": 2, "text": "two"}]
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    (tmp_path / "e.json").write_text(json.dumps(records))
    pq.write_table(pa.table({"n": [1, 2], "body": ["drei", "vier"]}), tmp_path / "f.parquet")
    (tmp_path / "ignored.bin").write_bytes(b"\xff\xfe")
    for name in ("a.txt", "b.txt.gz", "c.md.xz"):
        assert read_rows(tmp_path / name) == expected
    assert read_rows(tmp_path / "d.jsonl") == read_rows(str(tmp_path / "e.json")) == ["one", "two"]
    assert read_rows(tmp_path / "f.parquet") == ["drei", "vier"]
    with pytest.warns(TextWarning, match=r"no reader for them: ignored\.bin"):
        everything = read_rows(tmp_path)
    assert everything == [*expected * 3, "one", "two", "one", "two", "drei", "vier"]


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "torn.jsonl").write_text('{"text": "one"}\n{"text": ')
    (tmp_path / "numbers.jsonl").write_text('{"n": 1}\n')
    (tmp_path / "named.jsonl").write_text('{"story": "x", "n": 1}\n')
    (tmp_path / "empty").mkdir()
    for name, match in (
        ("bytes.txt", "cannot be read as UTF-8"),
        ("torn.jsonl", "line 2: not valid JSON"),
        ("numbers.jsonl", "no field of strings; it has: n"),
        ("empty", "holds no text file"),
    ):
        with pytest.raises(PassageError, match=match):
            read_rows(tmp_path / name)
    with pytest.raises(PassageError, match=r"no field 'stroy'. Did you mean 'story'"):
        read_rows(tmp_path / "named.jsonl", field="stroy")
    with pytest.raises(PassageError, match=r"neither a file .* Did you mean 'wikitext'"):
        read_rows("wikitex")


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n\n".join(ROWS)))
    assert len(sample_passages("-", count=3, words=(50, 60))) == 3


def test_embedded() -> None:
    texts = sample_passages(count=2)
    assert all(1024 <= count_words(text) <= 1280 for text in texts)
    assert texts == sample_passages(count=2)


def test_an_unreachable_hub_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(PassageError, match=r"Salesforce/wikitext:wikitext-103-v1 .* cannot be loaded.*--text FILE"):
        sample_passages("wikitext", count=1)
    assert set(source.DATASETS) == {"wikitext", "pubmed_qa", "imdb", "squad"}


def test_a_data_set_of_the_hubs_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real data set loaded by the library, from files that stand where the hub's would be."""
    import datasets

    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"context": ROWS, "id": list(range(200))}), folder / "train.parquet")
    real = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *a, **k: real(str(tmp_path / name), *a, **k))
    rows = read_rows("owner/name")
    assert len(rows) == 200
    assert list(rows)[:2] == ROWS[:2]
    assert sample_passages("owner/name", count=4, words=(50, 60)) == sample_passages(ROWS, count=4, words=(50, 60))
