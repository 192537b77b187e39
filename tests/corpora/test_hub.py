"""Data sets of the hub's format: local directories read by the library itself, and a hub that is served from here."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from decondense.config import ConfigError, CorpusConfig
from decondense.corpora import hub
from decondense.corpora.embedded import Document
from decondense.corpora.files import read_texts
from decondense.corpora.packed import END, PackedCorpus, is_held_out, prepare
from decondense.corpora.passages import paragraphs
from decondense.corpora.sources import documents_of, find_source

HELPERS = Path(__file__).parents[1] / "helpers"
TEXTS = [
    f"Document {number} tells of {' and '.join(f'w{number * k % 89}' for k in range(40))}." for number in range(300)
]


def jsonl(path: Path, texts: list[str], field: str = "text") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"id": number, field: text} for number, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def parquet(path: Path, texts: list[str], **more: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": texts, **more}), path)


def with_subsets(folder: Path) -> Path:
    """What the hub has: parquet files and a README.md that says which belongs to what."""
    parquet(folder / "data" / "train-00000-of-00002.parquet", TEXTS[:170])
    parquet(folder / "data" / "train-00001-of-00002.parquet", TEXTS[170:])
    parquet(folder / "data" / "validation-00000-of-00001.parquet", TEXTS[:50])
    parquet(folder / "other" / "train-00000-of-00001.parquet", TEXTS[50:200])
    (folder / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: main\n  data_files:\n"
        "  - {split: train, path: data/train-*}\n  - {split: validation, path: data/validation-*}\n"
        "- config_name: other\n  data_files:\n  - {split: train, path: other/train-*}\n"
        "---\n# A data set\n\nThis prose is no part of its text.\n"
    )
    return folder


@pytest.fixture(scope="module", autouse=True)
def library_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    datasets.disable_progress_bars()
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(scope="module")
def subsets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_subsets(tmp_path_factory.mktemp("subsets"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text)
    corpus = prepare(CorpusConfig(source=str(folder), vocab_size=400), cache=folder / "cache")
    return str(corpus.path / "tokenizer")


def read_documents(config: CorpusConfig, cache: Path) -> Iterator[Document]:
    return documents_of(find_source(config, cache=cache), config, "reading", None)


def documents(tmp_path: Path, source: Path | str, **more: Any) -> list[str]:
    config = CorpusConfig(source=str(source), **more)
    return [item.text for item in read_documents(config, cache=tmp_path / "cache")]


def decoded(corpus: PackedCorpus) -> set[str]:
    tokens = [*corpus.train_tokens.tolist(), *corpus.held_out_tokens.tolist()]
    return {text for text in corpus.tokenizer().decode(tokens).split(END) if text}


# ---- what is read --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_splits_and_subsets_of_a_local_directory(subsets: Path, tmp_path: Path, streaming: bool) -> None:
    def read(**more: Any) -> list[str]:
        return documents(tmp_path, subsets, streaming=streaming, **more)

    assert read(subset="main") == TEXTS
    assert read(subset="main", split="validation") == TEXTS[:50]
    assert read(subset="other") == TEXTS[50:200]
    jsonl(tmp_path / "lines" / "train.jsonl", TEXTS[:20], "story")
    jsonl(tmp_path / "lines" / "test.jsonl", TEXTS[20:30], "story")
    (tmp_path / "lines" / "README.md").write_text("# Lines\n")
    assert documents(tmp_path, tmp_path / "lines", streaming=streaming) == TEXTS[:20]
    assert documents(tmp_path, tmp_path / "lines", streaming=streaming, split="test") == TEXTS[20:30]
    saved = datasets.Dataset.from_dict({"text": TEXTS[:30]})
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": saved, "test": saved.select(range(5))}).save_to_disk(tmp_path / "several")
    assert documents(tmp_path, tmp_path / "one", streaming=streaming) == TEXTS[:30]
    assert documents(tmp_path, tmp_path / "several", streaming=streaming, split="test") == TEXTS[:5]


def test_streaming_gives_the_same_corpus_token_for_token(subsets: Path, tokenizer: str, tmp_path: Path) -> None:
    for more in ({"tokenizer": tokenizer}, {"vocab_size": 400}):
        config = CorpusConfig(source=str(subsets), subset="main", held_out=0.1, **more)
        loaded = prepare(config, cache=tmp_path / f"loaded-{len(more)}")
        streamed = prepare(config.model_copy(update={"streaming": True}), cache=tmp_path / f"streamed-{len(more)}")
        assert streamed.path != loaded.path
        assert np.array_equal(streamed.train_tokens, loaded.train_tokens)
        assert streamed.content_hash == loaded.content_hash
        assert decoded(streamed) == set(TEXTS)
        assert loaded.manifest["documents"] == 300
        assert loaded.manifest["characters"] == sum(map(len, TEXTS))
        assert loaded.manifest["source"] == str(subsets)
        assert re.fullmatch("files:[0-9a-f]{16}", loaded.manifest["revision"])


def wiki(rows_end: str) -> tuple[list[str], list[str]]:
    """Articles as WikiText has them, and the same line by line, as its rows."""
    articles, rows = [], []
    for number in range(40):
        lines = [f" = Title {number} = ", "", f" A text about {number} = {number} . ", "", " = = Section = = ", ""]
        lines += [" It ends , = says the text , here . ", ""]
        articles.append("\n".join(lines).strip())
        rows += [line + rows_end if line else "" for line in ["", *lines[:-1]]]
    return articles, rows


@pytest.mark.parametrize("rows_end", ["\n", ""])
def test_rows_that_are_lines_are_joined_into_articles(tmp_path: Path, rows_end: str) -> None:
    articles, rows = wiki(rows_end)
    parquet(tmp_path / "wiki" / "train.parquet", rows)
    for streaming in (False, True):
        found = documents(tmp_path, tmp_path / "wiki", streaming=streaming)
        assert found == articles


def test_rows_that_are_documents_are_left_alone() -> None:
    code = [f"x = {number}\ny = 2\n" for number in range(50)]
    assert list(hub.join_articles(code)) == code
    sentences = [f"Sentence {number}.\n" for number in range(50)]
    assert list(hub.join_articles(sentences)) == sentences
    assert list(hub.join_articles([])) == []
    titled_documents = [" = Title = \nand its text\n", "", " = Title 2 = \nand more\n"]
    assert list(hub.join_articles(titled_documents)) == titled_documents


@given(st.text(alphabet=st.sampled_from("ab \n\t\x0c\u2028"), max_size=40))
def test_paragraphs_one_after_the_other_are_those_of_the_whole_text(text: str) -> None:
    whole = [part.strip("\n") + "\n\n" for part in re.split(r"\n\s*\n", text) if part.strip()]
    assert paragraphs(text) == whole


def test_documents_of_a_text_file_are_split_where_they_end(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(f"one\n\nparagraph{END}two\n\n{END}\nthree{END}{END}one\n\nparagraph")
    assert documents(tmp_path, path) == ["one\n\nparagraph", "two", "three"]
    path.write_text("\n\n".join(TEXTS))
    pieces = documents(tmp_path, path)
    assert "\n\n".join(pieces) == "\n\n".join(TEXTS)
    assert all(4_000 <= len(piece) < 4_400 for piece in pieces[:-1])


def test_half_a_surrogate_pair_does_not_stop_a_corpus(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "a \\ud83d b"}\n{"text": "plain"}\n')
    assert documents(tmp_path, tmp_path / "text.jsonl") == ["a ? b", "plain"]


# ---- max_characters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hub", "stream", "text", "jsonl", "python_docs"])
def test_most_characters_takes_documents_in_order_and_cuts_the_last(
    kind: str, subsets: Path, tmp_path: Path, python_docs_cache: Callable[[Path], None]
) -> None:
    source: Path | str = subsets
    more: dict[str, Any] = {}
    if kind in ("hub", "stream"):
        more = {"subset": "main", "streaming": kind == "stream"}
    elif kind == "text":
        source = tmp_path / "text.txt"
        source.write_text(END.join(TEXTS))
    elif kind == "jsonl":
        source = tmp_path / "rows.jsonl"
        jsonl(source, TEXTS)
    else:
        python_docs_cache(tmp_path / "cache")
        source, more = "python_docs", {"documents": "standard_library"}
    whole = documents(tmp_path, source, **more)
    most = sum(map(len, whole[:20])) + 10
    assert documents(tmp_path, source, max_characters=most, **more) == [*whole[:20], whole[20][:10]]
    assert documents(tmp_path, source, max_characters=10**9, **more) == whole


def counted_stream(monkeypatch: pytest.MonkeyPatch, texts: list[str]) -> list[int]:
    read: list[int] = []

    def rows() -> Iterator[dict[str, str]]:
        for number, text in enumerate(texts):
            read.append(number)
            yield {"text": text}

    stream = datasets.IterableDataset.from_generator(
        rows, features=datasets.Features({"text": datasets.Value("string")})
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
    monkeypatch.setattr(hub, "commit_of", lambda *_: ("c" * 40, None))
    return read


def test_a_stream_is_read_no_further_than_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    texts = [f"{text}\nwith a second line" for text in TEXTS] * 10
    read = counted_stream(monkeypatch, texts)
    found = documents(tmp_path, "owner/name", streaming=True, max_characters=2000)
    assert sum(map(len, found)) == 2000
    assert max(read) < 200


# ---- the cache -----------------------------------------------------------------------------------------------------


def test_a_prepared_corpus_is_found_without_reading(
    subsets: Path, tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CorpusConfig(source=str(subsets), subset="main", tokenizer=tokenizer, held_out=0.1)
    first = prepare(config, cache=tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("the data set is read again"))
        assert prepare(config, cache=tmp_path).path == first.path
        assert prepare(config.model_copy(update={"streaming": True}), cache=tmp_path).path == first.path
    for change in ({"subset": "other"}, {"max_characters": 20_000}, {"held_out": 0.2}):
        assert prepare(config.model_copy(update=change), cache=tmp_path).path != first.path
    copy = with_subsets(tmp_path / "copy")
    same = prepare(config.model_copy(update={"source": str(copy)}), cache=tmp_path)
    assert same.path == first.path  # by content: a copy is the same data set
    parquet(copy / "data" / "train-00001-of-00002.parquet", TEXTS[170:-1])
    assert prepare(config.model_copy(update={"source": str(copy)}), cache=tmp_path).manifest["documents"] == 299


def test_local_files_are_found_by_content(tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    jsonl(path, TEXTS)
    config = CorpusConfig(source=str(path), tokenizer=tokenizer, held_out=0.1)
    first = prepare(config, cache=tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("decondense.corpora.sources.read_texts", lambda *_, **__: pytest.fail("it is read again"))
        assert prepare(config, cache=tmp_path).path == first.path
    jsonl(path, TEXTS[:-1])
    assert prepare(config, cache=tmp_path).manifest["documents"] == 299


def test_the_files_are_what_numpy_and_json_write(subsets: Path, tokenizer: str, tmp_path: Path) -> None:
    corpus = prepare(
        CorpusConfig(source=str(subsets), subset="main", tokenizer=tokenizer, held_out=0.1), cache=tmp_path
    )
    ready = corpus.tokenizer()
    whole = list(read_documents(CorpusConfig(source=str(subsets), subset="main"), cache=tmp_path))
    sides = {
        "train": [item for item in whole if not is_held_out(item, 0.1)],
        "held_out": sorted((item for item in whole if is_held_out(item, 0.1)), key=lambda item: item.identity),
    }
    for name, items in sides.items():
        parts = [[*ready.encode(item.text), ready.eos_token_id] for item in items]
        expected = np.asarray([token for part in parts for token in part], np.uint16)
        np.save(tmp_path / "expected.npy", expected)
        assert (corpus.path / f"{name}.npy").read_bytes() == (tmp_path / "expected.npy").read_bytes()
        np.save(tmp_path / "expected.npy", np.cumsum([0, *map(len, parts)], dtype=np.int64))
        assert (corpus.path / f"{name}_starts.npy").read_bytes() == (tmp_path / "expected.npy").read_bytes()
        assert (corpus.path / f"{name}_names.json").read_text() == json.dumps([item.identity for item in items])
    assert sorted(path.name for path in corpus.path.iterdir()) == sorted(
        ["manifest.json", "tokenizer", *(f"{s}{e}" for s in sides for e in (".npy", "_starts.npy", "_names.json"))]
    )


ENDLESS = """
import resource, sys, time
from pathlib import Path
import datasets
from decondense.config import CorpusConfig
from decondense.corpora import hub
from decondense.corpora.packed import prepare

def rows():
    for number in range(int(sys.argv[3])):
        time.sleep(float(sys.argv[4]))
        yield {"text": f"Document {number}.\\n" + " ".join(f"w{number * k % 89}" for k in range(400))}

peaks = []
def progress(what, done, total):
    peaks.append((done, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))

features = datasets.Features({"text": datasets.Value("string")})
datasets.load_dataset = lambda *_, **__: datasets.IterableDataset.from_generator(rows, features=features)
hub.commit_of = lambda *_: ("c" * 40, None)
tokenizer = None if sys.argv[2] == "none" else sys.argv[2]
config = CorpusConfig(source="owner/name", streaming=True, tokenizer=tokenizer, vocab_size=300)
corpus = prepare(config, cache=Path(sys.argv[1]), progress=progress)
early = max(peak for done, peak in peaks if done < len(peaks) * 64 / 5)
print(corpus.content_hash, corpus.manifest["characters"] / 2**20, peaks[-1][1] - early)
"""


@pytest.mark.slow
def test_memory_stays_bounded(tokenizer: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENDLESS, str(tmp_path), tokenizer, "12000", "0"],
        check=True,
        capture_output=True,
        text=True,
    )
    _, megabytes, growth = done.stdout.split()
    assert float(megabytes) > 17
    # four fifths of the text would take 14 MB, and their tokens as Python objects ten times that
    assert float(growth) < 10


@pytest.mark.parametrize("learnt", [False, True])
def test_a_killed_preparation_leaves_a_usable_cache(
    tokenizer: str, tmp_path: Path, learnt: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "none" if learnt else tokenizer
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, str(tmp_path / "cache"), words, "100000", "0.01"],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    written = "text.jsonl" if learnt else "train.raw"
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size > 1000 for path in tmp_path.glob(f"cache/packed/.*/{written}")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (left,) = (tmp_path / "cache" / "packed").iterdir()
    os.utime(left, (0, 0))  # it has lain there for a while
    counted_stream(monkeypatch, TEXTS)
    config = CorpusConfig(
        source="owner/name", streaming=True, tokenizer=None if learnt else tokenizer, vocab_size=300, held_out=0.1
    )
    found = prepare(config, cache=tmp_path / "cache")
    assert found.content_hash == prepare(config, cache=tmp_path / "clean").content_hash
    assert list((tmp_path / "cache" / "packed").iterdir()) == [found.path]  # what the killed one left is gone


def test_a_folder_in_use_is_not_swept_away(tokenizer: str, tmp_path: Path, subsets: Path) -> None:
    import fcntl

    used = tmp_path / "packed" / ".0123456789abcdef.x"
    used.mkdir(parents=True)
    os.utime(used, (0, 0))
    handle = os.open(used, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    config = CorpusConfig(source=str(subsets), subset="main", tokenizer=tokenizer)
    prepare(config, cache=tmp_path)
    assert used.exists()
    os.close(handle)
    prepare(config.model_copy(update={"held_out": 0.2}), cache=tmp_path)
    assert not used.exists()


def test_an_interruption_leaves_nothing(tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counted_stream(monkeypatch, TEXTS * 2)

    def interrupted(what: str, done: int, total: int) -> None:
        if done > 100:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(CorpusConfig(source="owner/name", tokenizer=tokenizer), cache=tmp_path, progress=interrupted)
    assert list((tmp_path / "packed").iterdir()) == []


def test_progress_ends_at_its_total(subsets: Path, tokenizer: str, tmp_path: Path) -> None:
    for number, more in enumerate(({}, {"streaming": True}, {"max_characters": 20_000}, {"tokenizer": None})):
        told: dict[str, list[tuple[int, int]]] = {}
        config = {"source": str(subsets), "subset": "main", "tokenizer": tokenizer, "held_out": 0.2, **more}
        prepare(
            CorpusConfig(**config),
            cache=tmp_path / str(number),
            progress=lambda what, done, total, told=told: told.setdefault(what, []).append((done, total)),
        )
        assert told
        for what, steps in told.items():
            assert steps[-1][0] == steps[-1][1] > 0, what
            assert steps == sorted(steps, key=lambda step: step[0])
            assert all(done <= total for done, total in steps)


# ---- what is wrong is said -----------------------------------------------------------------------------------------


def test_what_does_not_exist_is_said_with_what_does(subsets: Path, tmp_path: Path) -> None:
    for streaming in (False, True):
        for more, message in (
            ({}, "several subsets.*:main, .*:other"),
            ({"subset": "mian"}, "no subset 'mian'. Did you mean 'main'.*It has: main, other"),
            ({"subset": "main", "split": "tran"}, "no split 'tran'. Did you mean 'train'.*It has: train, validation"),
            ({"subset": "main", "text_field": "txt"}, "no field 'txt'. Did you mean 'text'.*It has: text"),
        ):
            with pytest.raises(ConfigError, match=message):
                documents(tmp_path, subsets, streaming=streaming, **more)
    parquet(tmp_path / "wide" / "train.parquet", TEXTS[:3], id=[1, 2, 3])
    with pytest.raises(ConfigError, match=r"field 'id' .* holds int64, not text; fields of strings: text"):
        documents(tmp_path, tmp_path / "wide", text_field="id")
    pq.write_table(pa.table({"title": ["a"], "body": ["b"]}), tmp_path / "wide" / "train.parquet")
    with pytest.raises(ConfigError, match=r"several fields of strings.*title, body"):
        documents(tmp_path, tmp_path / "wide")
    assert documents(tmp_path, tmp_path / "wide", text_field="body") == ["b"]
    jsonl(tmp_path / "rows.jsonl", TEXTS[:2], "story")
    with pytest.raises(ConfigError, match=r"no field 'text'.*It has: id, story"):
        documents(tmp_path, tmp_path / "rows.jsonl", text_field="text")
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["a"]})}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ConfigError, match=r"no split 'test'. It has: train"):
        documents(tmp_path, tmp_path / "saved", split="test")


def test_options_without_effect_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("text")
    for source in (tmp_path / "text.txt", "python_docs"):
        for more in ({"subset": "x"}, {"split": "test"}):
            with pytest.raises(ConfigError, match=r"(subset|split) .* has no effect"):
                documents(tmp_path, source, **more)


def test_a_stream_that_breaks_says_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokenizer: str) -> None:
    def rows() -> Iterator[dict[str, str]]:
        yield from ({"text": text} for text in TEXTS)
        raise OSError("the line is dead")

    stream = datasets.IterableDataset.from_generator(
        rows, features=datasets.Features({"text": datasets.Value("string")})
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
    monkeypatch.setattr(hub, "commit_of", lambda *_: ("c" * 40, None))
    with pytest.raises(ConfigError, match=r"owner/name cannot be read after row 2\d\d: the line is dead"):
        prepare(CorpusConfig(source="owner/name", tokenizer=tokenizer), cache=tmp_path)
    assert list((tmp_path / "packed").iterdir()) == []


# ---- the hub itself ------------------------------------------------------------------------------------------------

ASK = """
import json, sys, time
from pathlib import Path
import datasets, transformers  # before the clock starts: what is timed is the waiting, not a busy machine's imports
from transformers import AutoTokenizer
from decondense.config import CorpusConfig
from decondense.corpora.packed import prepare
for request in json.loads(sys.argv[1]):
    begin, cache = time.monotonic(), Path(request.pop("cache"))
    try:
        config = CorpusConfig(**{"source": "owner/name", "vocab_size": 400, "held_out": 0.1, **request})
        corpus = prepare(config, cache=cache)
        said = {"path": corpus.path.name, "hash": corpus.content_hash, "revision": corpus.manifest["revision"]}
    except ValueError as error:
        said = {"error": str(error)}
    print(json.dumps({**said, "seconds": time.monotonic() - begin}))
"""


def ask(endpoint: str, home: Path, *requests: dict[str, Any]) -> list[dict[str, Any]]:
    """Prepare corpora in a process whose libraries take ``endpoint`` for the hub."""
    environment = {name: value for name, value in os.environ.items() if "OFFLINE" not in name}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps(requests)], env=environment, capture_output=True, text=True, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_a_hub_and_then_none(subsets: Path, tmp_path: Path) -> None:
    commit = "0123456789abcdef" * 2 + "01234567"
    server = subprocess.Popen(
        [sys.executable, str(HELPERS / "hub_server.py"), str(subsets), commit],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    main: dict[str, Any] = {"cache": str(tmp_path / "a"), "subset": "main"}
    streamed = {**main, "streaming": True}
    elsewhere = {**main, "cache": str(tmp_path / "b")}
    try:
        assert server.stdout is not None
        endpoint = f"http://127.0.0.1:{server.stdout.readline().strip()}"
        stream, loaded, again, subset, split, unknown = ask(
            endpoint,
            tmp_path / "home",
            streamed,
            elsewhere,
            main,
            {**main, "subset": "mian"},
            {**main, "split": "tran", "streaming": True},
            {**main, "source": "owner/nobody"},
        )
    finally:
        server.kill()
        server.wait()
    # streamed, loaded, and found in the cache of the one that was streamed
    assert {item["revision"] for item in (stream, loaded, again)} == {commit}
    assert stream["hash"] == loaded["hash"] == again["hash"]
    assert stream["path"] == loaded["path"]
    local = prepare(
        CorpusConfig(source=str(subsets), subset="main", vocab_size=400, held_out=0.1), cache=tmp_path / "l"
    )
    assert local.content_hash == stream["hash"]
    assert "no subset 'mian'. Did you mean 'main'? It has: main, other." in subset["error"]
    assert "no split 'tran'. Did you mean 'train'? It has: train, validation." in split["error"]
    assert "the hub has no data set 'owner/nobody'" in unknown["error"]
    # the hub has gone: the prepared corpus, then the library's cache, then neither
    kept, cached, neither = ask(
        endpoint,
        tmp_path / "home",
        streamed,
        {**main, "cache": str(tmp_path / "c")},
        {**main, "subset": "other"},
    )
    assert kept["path"] == stream["path"]
    assert (cached["hash"], cached["revision"], cached["path"]) == (stream["hash"], commit, stream["path"])
    assert re.search(
        r"owner/name:other .*hub cannot be reached .*no local file .*Without network access, set corpus\.source to "
        r"the path of a local copy, or set HF_HOME to a cache",
        neither["error"],
    )
    assert "\n" not in neither["error"]
    assert neither["seconds"] < 15


@pytest.mark.slow
def test_a_hub_that_does_not_answer_is_given_up_in_time(tmp_path: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as deaf:
        endpoint = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        (said,) = ask(endpoint, tmp_path, {"cache": str(tmp_path / "a")})
        assert "hub cannot be reached" in said["error"]
        assert said["seconds"] < 15
    tokenizer, text = ask(
        "http://127.0.0.1:9",
        tmp_path,
        {"cache": str(tmp_path / "a"), "source": str(HELPERS / "hub_server.py"), "tokenizer": "owner/name"},
        {"cache": str(tmp_path / "a"), "streaming": True},
    )
    assert "corpus.tokenizer 'owner/name' cannot be loaded: the hub cannot be reached" in tokenizer["error"]
    assert "corpus.source: the data set owner/name" in text["error"]
    assert max(tokenizer["seconds"], text["seconds"]) < 15


def test_names_of_the_hub() -> None:
    assert all(map(hub.is_hub_id, ("Salesforce/wikitext", "HuggingFaceFW/fineweb-edu", "a/b.c")))
    assert not any(map(hub.is_hub_id, ("wikitext", "/a/b", "a/b/c", "text/train.jsonl", "./text", "../text", "~/text")))


@pytest.mark.hub
@pytest.mark.skipif(bool(os.environ.get("HF_HUB_OFFLINE") == "1"), reason="needs HF_HUB_OFFLINE=0")
@pytest.mark.parametrize("streaming", [False, True])
def test_wikitext_from_the_hub(streaming: bool, tmp_path: Path) -> None:
    more = {"subset": "wikitext-2-raw-v1", "streaming": streaming, "max_characters": 200_000}
    found = documents(tmp_path, "Salesforce/wikitext", **more)
    assert found[0].startswith("= Valkyria Chronicles III =")
    assert sum(map(len, found)) == 200_000
    assert all(re.match("= [^=]", text) for text in found)
    corpus = prepare(CorpusConfig(source="Salesforce/wikitext", vocab_size=400, held_out=0.2, **more), cache=tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", corpus.manifest["revision"])


def test_a_file_is_read_as_it_was(tmp_path: Path) -> None:
    parquet(tmp_path / "rows.parquet", [*TEXTS, ""] * 5)
    assert list(read_texts(tmp_path / "rows.parquet")) == [*TEXTS, ""] * 5
