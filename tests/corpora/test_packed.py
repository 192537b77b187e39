from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable

import numpy as np
import pytest

from decondense.config import ConfigError, CorpusConfig
from decondense.corpora.embedded import Document
from decondense.corpora.packed import END, _content_hash, _install, _prepared_last, is_held_out, load, prepare


def words(seed: int, count: int) -> str:
    rng = np.random.default_rng(seed)
    return " ".join(f"w{number}" for number in rng.integers(0, 300, count))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for number in range(40):
        (folder / f"{number}.txt").write_text(words(number, 120))
    return folder


@pytest.fixture(scope="module")
def config(source) -> CorpusConfig:
    return CorpusConfig(source=str(source), vocab_size=400, held_out=0.3)


@pytest.fixture(scope="module")
def corpus(config, tmp_path_factory):
    return prepare(config, cache=tmp_path_factory.mktemp("cache"))


def test_tokens_are_the_documents_and_nothing_else(corpus, source) -> None:
    tokenizer = corpus.tokenizer()
    texts = {path.read_text() for path in source.iterdir()}
    found = set()
    for tokens in (corpus.train_tokens, corpus.held_out_tokens):
        found |= {part for part in tokenizer.decode(tokens.astype(int).tolist()).split(END) if part}
    assert found == texts
    assert tokenizer.vocab_size == corpus.vocabulary == 400


def test_the_split_is_by_content_and_disjoint(corpus, source, tmp_path_factory) -> None:
    held_out = [Document("", path.read_text()) for path in source.iterdir()]
    expected = {item.identity for item in held_out if is_held_out(item, 0.3)}
    assert set(corpus.held_out_names) == expected
    assert 0 < len(expected) < 40
    # a document stays on its side when others come
    other = tmp_path_factory.mktemp("more")
    for path in source.iterdir():
        (other / path.name).write_text(path.read_text())
    (other / "new.txt").write_text(words(999, 120))
    grown = prepare(CorpusConfig(source=str(other), vocab_size=400, held_out=0.3), cache=tmp_path_factory.mktemp("c"))
    assert expected <= set(grown.held_out_names)


def test_two_builds_agree_to_the_last_bit(corpus, config, tmp_path_factory) -> None:
    again = prepare(config, cache=tmp_path_factory.mktemp("again"))
    assert again.path != corpus.path
    assert again.content_hash == corpus.content_hash
    assert np.array_equal(again.train_tokens, corpus.train_tokens)


def test_the_cache_is_used_and_a_damaged_one_rebuilt(config, tmp_path) -> None:
    first = prepare(config, cache=tmp_path)
    stamp = (first.path / "manifest.json").stat().st_mtime_ns
    assert (prepare(config, cache=tmp_path).path / "manifest.json").stat().st_mtime_ns == stamp
    data = bytearray((first.path / "train.npy").read_bytes())
    data[-1] ^= 1
    (first.path / "train.npy").write_bytes(data)
    assert load(first.path) is None
    assert prepare(config, cache=tmp_path).content_hash == first.content_hash
    assert not [item for item in (tmp_path / "packed").iterdir() if item.name.startswith(".")]


DAMAGE = {
    **{f"a manifest {text!r}": text for text in ("", "[]", "null", '{"files": []}', '{"files": {"x": 1}}')},
    **{f"a manifest of {what}": text for what, text in (("lists", "[" * 100_000), ("objects", '{"files":' * 100_000))},
    "no manifest": None,
}


@pytest.mark.parametrize("what", DAMAGE)
def test_whatever_lies_in_the_corpus_place_is_replaced_or_named(what: str, corpus, tmp_path) -> None:
    (place := tmp_path / "corpus").mkdir()
    (place / "train.npy").write_bytes(b"x")
    if (text := DAMAGE[what]) is not None:
        (place / "manifest.json").write_text(text)
    assert load(place) is None
    shutil.copytree(corpus.path, tmp_path / "new")
    _install(tmp_path / "new", place)
    whole = load(place)
    assert whole is not None
    assert whole.content_hash == corpus.content_hash
    shutil.copytree(corpus.path, tmp_path / "new")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="DECONDENSE_CACHE"):
        _install(tmp_path / "new", tmp_path / "file")


def without(*keys: str) -> Callable[[dict], object]:
    def change(manifest: dict) -> None:
        for key in keys[:-1]:
            manifest = manifest[key]
        del manifest[keys[-1]]

    return change


CHANGES: dict[str, Callable[[dict], object]] = {
    **{f"no {name}": without(name) for name in ("content_hash", "vocabulary", "files", "revision")},
    **{f"no {name} among the files": without("files", name) for name in ("train.npy", "tokenizer/tokenizer.json")},
    "no files": lambda manifest: manifest.update(files={}),
    "no files, and their hash": lambda manifest: manifest.update(files={}, content_hash=_content_hash({})),
    "another hash": lambda manifest: manifest.update(content_hash="0" * 16),
    "a hash that is no text": lambda manifest: manifest.update(content_hash=None),
    "a vocabulary that is no number": lambda manifest: manifest.update(vocabulary="400"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_manifest_that_was_changed_is_prepared_again(what: str, config, corpus, tmp_path) -> None:
    place = tmp_path / "packed" / corpus.path.name
    shutil.copytree(corpus.path, place)
    manifest = json.loads((place / "manifest.json").read_text())
    CHANGES[what](manifest)
    (place / "manifest.json").write_text(json.dumps(manifest))
    assert load(place) is None
    again = prepare(config, cache=tmp_path)
    assert again.path == place
    assert (again.content_hash, again.vocabulary) == (corpus.content_hash, corpus.vocabulary)


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "", '{"request": "r"}'])
def test_a_damaged_manifest_is_not_the_last_one_that_was_prepared(text: str, tmp_path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "manifest.json").write_text(text)
    assert _prepared_last(tmp_path, "r") is None


def test_two_that_prepare_the_same_text_at_once_get_the_same_corpus(config, tmp_path) -> None:
    """The second begins and ends while the first is at work."""
    seconds = []

    def progress(what: str, done: int, total: int) -> None:
        if what == "learning the vocabulary" and not seconds:
            seconds.append(prepare(config, cache=tmp_path))

    first = prepare(config, cache=tmp_path, progress=progress)
    assert first == seconds[0]
    assert [path.name for path in (tmp_path / "packed").iterdir()] == [first.path.name]


def test_a_full_disk_names_the_cache(config, tmp_path) -> None:
    def progress(what: str, done: int, total: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left") as refusal:
        prepare(config, cache=tmp_path, progress=progress)
    assert str(tmp_path / "packed") in str(refusal.value.filename)
    assert not list((tmp_path / "packed").iterdir())


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_a_corpus_has_the_mode_that_the_umask_leaves(umask: int, config, tmp_path) -> None:
    before = os.umask(umask)
    try:
        path = prepare(config, cache=tmp_path).path
    finally:
        os.umask(before)
    for item in [path, *path.rglob("*")]:
        assert item.stat().st_mode & 0o777 == (0o777 if item.is_dir() else 0o666) & ~umask, item.name


def test_the_order_depends_on_the_seed_alone_and_covers_every_epoch(corpus) -> None:
    available = corpus.sequences(16)
    order = corpus.order(0, 2 * available + 3, 16)
    assert sorted(order[:available]) == list(range(available))
    assert sorted(order[available : 2 * available]) == list(range(available))
    assert np.array_equal(order, corpus.order(0, 2 * available + 3, 16))
    assert not np.array_equal(order, corpus.order(1, 2 * available + 3, 16))
    # a longer run reads the same sequences first
    assert np.array_equal(corpus.order(0, 5, 16), order[:5])
    assert corpus.order_hash(order, 16) != corpus.order_hash(order[::-1], 16)


def test_held_out_documents_are_whole_up_to_the_budget(corpus) -> None:
    budget = 700
    found = corpus.held_out_documents(budget)
    assert sum(len(ids) for _, ids in found) == budget
    starts = np.diff(corpus.held_out_starts)
    assert [len(ids) for _, ids in found[:-1]] == starts[: len(found) - 1].tolist()
    assert [name for name, _ in found] == corpus.held_out_names[: len(found)]


def test_passages_are_heads_of_documents_and_too_few_are_said(corpus) -> None:
    passages = corpus.passages(2, 50)
    assert passages.shape == (2, 50)
    for row in passages:
        assert any(
            np.array_equal(row, corpus.held_out_tokens[begin : begin + 50]) for begin in corpus.held_out_starts[:-1]
        )
    with pytest.raises(ValueError, match=r"held-out documents have 50 tokens, but 1000 are needed"):
        corpus.passages(1000, 50)
    with pytest.raises(ValueError, match="fewer than one sequence of 1000000"):
        corpus.order(0, 1, 1_000_000)


@pytest.mark.parametrize(
    ("content", "message"),
    [({}, "holds no text"), ({"a.txt": "  \n"}, "holds no text"), ({"a.txt": "one document"}, "too few to hold 5%")],
)
def test_too_little_text_is_said(tmp_path, content, message) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    for name, text in content.items():
        (folder / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        prepare(CorpusConfig(source=str(folder), vocab_size=300), cache=tmp_path / "cache")


def test_a_missing_source_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match="neither 'python_docs' nor an existing file"):
        prepare(CorpusConfig(source=str(tmp_path / "nothing")), cache=tmp_path)
