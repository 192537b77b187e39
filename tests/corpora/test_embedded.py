from __future__ import annotations

import json

import pytest

from decondense.corpora import embedded
from decondense.corpora.embedded import Document, cache_directory, python_docs


@pytest.fixture(scope="module")
def cache(tmp_path_factory, python_docs_cache):
    folder = tmp_path_factory.mktemp("cache")
    python_docs_cache(folder)
    return folder


@pytest.fixture(scope="module")
def documents(cache) -> list[Document]:
    return python_docs("standard_library", cache=cache)


def test_it_is_real_prose_of_the_standard_library(documents) -> None:
    text = "\n".join(item.text for item in documents)
    assert len(text) > 1_000_000
    assert len(documents) > 200
    # a docstring known to everyone, and one topic of the language reference
    assert "Return the largest item in an iterable" in text or "heap" in text
    assert any(item.name.startswith("python reference:") for item in documents)


def test_no_paragraph_occurs_twice(documents) -> None:
    seen = set()
    for item in documents:
        for paragraph in item.text.split("\n\n"):
            key = " ".join(paragraph.split())
            assert key not in seen or not key, f"{item.name}: {key[:80]!r}"
            seen.add(key)


def test_a_damaged_cache_is_read_anew(documents, cache, tmp_path) -> None:
    (path,) = (cache / "python_docs").iterdir()
    damaged = tmp_path / "python_docs" / path.name
    damaged.parent.mkdir()
    head, _, body = path.read_text().partition("\n")
    damaged.write_text(head + "\n" + body.replace("the", "teh"))
    assert python_docs("standard_library", cache=tmp_path) == documents
    assert json.loads(damaged.read_text().partition("\n")[0]) == json.loads(head)


def test_nothing_is_imported() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from decondense.corpora.embedded import _roots, _sources, _docstrings\n"
        "before = set(sys.modules)\n"
        "for name, root in _roots(('numpy', 'torch')):\n"
        "    for path in _sources(root)[:20]: _docstrings(path)\n"
        "new = {m.split('.')[0] for m in set(sys.modules) - before}\n"
        "assert not {'torch', 'numpy', 'antigravity', 'this'} & new, new"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_docstrings_come_in_source_order_and_survive_bad_files(tmp_path) -> None:
    long = "x" * embedded.MINIMUM_DOCSTRING
    source = (
        f'"""first {long}"""\nclass A:\n    """second {long}"""\n'
        f'    def f(self):\n        """third {long}"""\ndef g():\n    """short"""\n'
    )
    good = tmp_path / "good.py"
    good.write_text(source)
    assert [text.split()[0] for text in embedded._docstrings(good)] == ["first", "second", "third"]
    (tmp_path / "bad.py").write_text('"""x"""\ndef (:\n')
    assert embedded._docstrings(tmp_path / "bad.py") == []
    (tmp_path / "latin.py").write_bytes(b'"""caf\xe9"""')
    assert embedded._docstrings(tmp_path / "latin.py") == []
    (tmp_path / "nul.py").write_bytes(b'"""a"""\0')
    assert embedded._docstrings(tmp_path / "nul.py") == []


def test_cache_directory_follows_the_environment(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("DECONDENSE_CACHE", raising=False)
    assert cache_directory() == tmp_path / "xdg" / "decondense"
    monkeypatch.setenv("DECONDENSE_CACHE", str(tmp_path / "own"))
    assert cache_directory() == tmp_path / "own"


def test_an_unknown_extent_is_refused() -> None:
    with pytest.raises(ValueError, match="'standard_library', 'scientific', 'all'"):
        python_docs("stdlib")  # type: ignore[arg-type]
