"""Passages of text to measure on: hub data sets, local files, standard input, lists, or the embedded corpus.

The published protocol (Liu et al. 2026, arXiv:2602.00217): 100 passages of 1024 to 1280 words, each grown from a
random row of the data set by the rows that follow, then truncated to 512 tokens. Passage r draws its first row from a
generator of its own, ``numpy.random.default_rng(seed + r)``, among the first 95 % of the rows: passage r is the same
whatever the number of passages.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TextIO

import numpy as np

from decondense.config import MeasureConfig, suggest

_D = MeasureConfig()

EMBEDDED = "embedded"
# name -> (hub id, configuration, field); the four text sources of the authors
DATASETS: dict[str, tuple[str, str | None, str]] = {
    "wikitext": ("Salesforce/wikitext", "wikitext-103-v1", "text"),
    "pubmed_qa": ("qiaojin/PubMedQA", "pqa_labeled", "long_answer"),
    "imdb": ("stanfordnlp/imdb", None, "text"),
    "squad": ("rajpurkar/squad", None, "context"),
}
# a word is what NLTK's tokenizer would about take for one: punctuation marks count
_WORD = re.compile(r"\w+(?:[-'’]\w+)*|[^\w\s]+")
_OPENERS: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}
_KINDS = (".txt", ".md", ".rst", ".jsonl", ".json", ".parquet")


class PassageError(ValueError):
    """A source of text that cannot be used; the message names it and the remedy."""


def count_words(text: str) -> int:
    """Number of words of a text, punctuation marks counted as words; no download of a tokenizer."""
    return sum(1 for _ in _WORD.finditer(text))


def sample_passages(
    source: str | Path | Sequence[str] = _D.dataset,
    *,
    count: int = _D.passages,
    words: tuple[int, int] = _D.passage_words,
    seed: int = _D.passage_seed,
    split: str = "train",
    field: str | None = None,
) -> list[str]:
    """Passages by the published protocol.

    Args:
        source: ``"embedded"``; ``"wikitext"``, ``"pubmed_qa"``, ``"imdb"`` or ``"squad"``; a hub id ``OWNER/NAME`` or
            ``OWNER/NAME:CONFIGURATION``; the path of a text, JSON-lines or parquet file (``.xz``, ``.gz`` and ``.bz2``
            too) or of a directory of them; ``"-"`` for standard input; or the rows themselves.
        count: Number of passages.
        words: Fewest and most words of a passage.
        seed: Passage r is drawn with ``seed + r``.
        split: Split of a hub data set.
        field: Column that holds the text; None: the published one, else ``text``, else the first column of strings.

    Returns:
        ``count`` passages. They may overlap when the source is small.

    Raises:
        ValueError: the source does not exist, cannot be reached, or has fewer words than one passage.
    """
    low, high = words
    if count < 1:
        raise PassageError(f"the number of passages must be at least 1, got {count}.")
    if not 2 <= low <= high:
        raise PassageError(f"words are (fewest, most) with 2 <= fewest <= most, got {words}.")
    rows = read_rows(source, split=split, field=field)
    if not len(rows):
        raise PassageError(f"{_named(source)} holds no text.")
    return [_grow(rows, np.random.default_rng(seed + number), low, high, source) for number in range(count)]


def _grow(rows: Sequence[str], rng: np.random.Generator, low: int, high: int, source: Any) -> str:
    first = int(rng.integers(0, max(1, int(len(rows) * 0.95))))
    parts: list[str] = []
    found = 0
    for step in range(len(rows)):
        row = rows[(first + step) % len(rows)]
        # rows that carry their own line end are joined as they are
        parts.append(row if not row or row[-1].isspace() else row + "\n")
        found += count_words(row)
        if found >= low:
            break
    else:
        raise PassageError(
            f"{_named(source)} has {found} words, a passage needs at least {low}. Give more text, or shorter passages "
            f"(words=({max(2, found // 2)}, {max(2, found)}), --words)."
        )
    text = "".join(parts)
    if found > high:
        text = text[: next(m for n, m in enumerate(_WORD.finditer(text), 1) if n == high).end()]
    return text


def read_rows(source: str | Path | Sequence[str], *, split: str = "train", field: str | None = None) -> Sequence[str]:
    """The rows (paragraphs, records) of a source; see :func:`sample_passages` for what a source may be."""
    if not isinstance(source, (str, Path)):
        rows = list(source)
        if any(not isinstance(row, str) for row in rows):
            raise PassageError("a list of texts must hold strings only.")
        return rows
    name = str(source)
    if name == EMBEDDED:
        return _embedded()
    if name == "-":
        return paragraphs(sys.stdin)
    if name in DATASETS:
        hub_id, configuration, published = DATASETS[name]
        return _hub(hub_id, configuration, split, field or published)
    path = Path(name)
    if path.exists():
        return [row for file in text_files(path) for row in read_file(file, field=field)]
    if re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", name) and not _kind(path):
        hub_id, _, configuration = name.partition(":")
        return _hub(hub_id, configuration or None, split, field)
    raise PassageError(
        f"no text source {name!r}: it is neither a file or directory, nor one of "
        f"{', '.join([EMBEDDED, *DATASETS])}, nor a hub id OWNER/NAME.{suggest(name, [EMBEDDED, *DATASETS])}"
    )


def paragraphs(stream: TextIO | str) -> list[str]:
    """Paragraphs (separated by blank lines) of a text, each ending in a blank line of its own."""
    return list(iterate_paragraphs(io.StringIO(stream) if isinstance(stream, str) else stream))


def iterate_paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """The same, one after the other; never more than one paragraph is held."""
    found: list[str] = []
    for number, line in enumerate(lines):
        # a blank line separates only when there is a line end on both sides of it
        if not number or line.strip() or not line.endswith("\n"):
            found.append(line)
            continue
        if (text := "".join(found)).strip():
            yield text.strip("\n") + "\n\n"
        found = []
    if (text := "".join(found)).strip():
        yield text.strip("\n") + "\n\n"


@dataclass
class Position:
    """How far a reader has come in a source."""

    done: int = 0
    total: int = 0


def read_file(path: str | Path, *, field: str | None = None) -> list[str]:
    """Rows of one local file: paragraphs of a text file, records of a ``.jsonl``, ``.json`` or ``.parquet`` file."""
    return list(iterate_file(path, field=field))


def iterate_file(
    path: str | Path, *, field: str | None = None, only_field: bool = False, position: Position | None = None
) -> Iterator[str]:
    """The same rows, one after the other, in bounded memory (but for ``.json``, which is one value).

    Args:
        path: the file.
        field: field that holds the text; None: see :func:`choose_column`.
        only_field: without ``field`` and a field ``text``, refuse to choose among several fields of strings.
        position: its ``done`` is moved on by the bytes of the file that were read.
    """
    path = Path(path)
    kind = _kind(path) or ".txt"
    position = position or Position()
    begin = position.done
    try:
        if kind == ".parquet":
            import pyarrow.parquet as parquet

            with parquet.ParquetFile(path) as file:
                schema = file.schema_arrow
                column = choose_column(schema.names, lambda c: str(schema.field(c).type), field, path, only=only_field)
                rows = 0
                for batch in file.iter_batches(batch_size=1024, columns=[column]):
                    rows += batch.num_rows
                    position.done = begin + path.stat().st_size * rows // file.metadata.num_rows
                    yield from (str(value) for value in batch.column(0).to_pylist() if value)
            return
        with path.open("rb") as raw, _OPENERS.get(path.suffix, _plain)(raw) as opened:
            stream = io.TextIOWrapper(opened, encoding="utf-8")
            if kind not in (".jsonl", ".json"):
                rows_of_file = iterate_paragraphs(stream)
            else:
                rows_of_file = _records(stream, kind, field, path, only_field)
            for row in rows_of_file:
                position.done = begin + raw.tell()
                yield row
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError) as error:
        raise PassageError(f"{path} cannot be read as UTF-8 text ({error}).") from error


@contextmanager
def _plain(raw: IO[bytes]) -> Iterator[IO[bytes]]:
    yield raw


def _records(stream: TextIO, kind: str, field: str | None, path: Path, only: bool) -> Iterator[str]:
    for value in _values(stream, kind, path):
        if isinstance(value, dict):
            kinds = {name: type(entry).__name__ for name, entry in value.items()}
            column = choose_column(list(value), kinds.__getitem__, field, path, only=only)
            value = value[column]
        if not isinstance(value, str):
            raise PassageError(
                f"{path}: expected records with a text, got a {type(value).__name__}; name it: field=..."
            )
        if value:
            yield value


def _values(stream: TextIO, kind: str, path: Path) -> Iterator[Any]:
    place = str(path)
    try:
        if kind == ".json":
            loaded = json.load(stream)
            yield from loaded if isinstance(loaded, list) else [loaded]
        else:
            for number, line in enumerate(stream, 1):
                place = f"{path}, line {number}"
                if line.strip():
                    yield json.loads(line)
    except json.JSONDecodeError as error:
        raise PassageError(f"{place}: no valid JSON ({error}).") from error


def choose_column(
    names: Sequence[str], kind_of: Callable[[str], str], field: str | None, where: object, *, only: bool = False
) -> str:
    """The field that holds the text: the one named, else ``text``, else the first (``only``: the only) of strings."""
    if field is not None:
        if field not in names:
            raise PassageError(f"{where} has no field {field!r}.{suggest(field, names)} It has: {', '.join(names)}.")
        return field
    if "text" in names:
        return "text"
    found = [name for name in names if kind_of(name) in ("str", "string", "large_string")]
    if not found:
        raise PassageError(f"{where} has no field of strings; it has: {', '.join(names)}.")
    if only and len(found) > 1:
        raise PassageError(f"{where} has several fields of strings; say which one holds the text: {', '.join(found)}.")
    return found[0]


def _kind(path: Path) -> str:
    suffixes = [s for s in path.suffixes[-2:] if s not in _OPENERS]
    return suffixes[-1] if suffixes and suffixes[-1] in _KINDS else ""


def text_files(path: Path) -> list[Path]:
    """The file itself, or every file of a known kind below a directory, sorted."""
    if path.is_file():
        return [path]
    found = sorted(file for file in path.rglob("*") if file.is_file() and _kind(file))
    if not found:
        raise PassageError(f"{path} holds no text file; expected {', '.join(_KINDS)}, compressed or not.")
    return found


def _embedded() -> list[str]:
    from decondense.corpora.embedded import python_docs

    # the standard library alone: two seconds, and the same text for everybody with the same Python
    return [row for document in python_docs("standard_library") for row in paragraphs(document.text)]


def _hub(hub_id: str, configuration: str | None, split: str, field: str | None) -> Sequence[str]:
    from decondense.corpora import hub

    remedy = (
        f"Without network, use a local file (--text FILE), the embedded corpus (--dataset {EMBEDDED}), or a filled "
        "cache (HF_HOME)."
    )
    return hub.Column(hub.open_rows(hub.find(hub_id, configuration, split, remedy=remedy), field))


def _named(source: Any) -> str:
    return f"the source {str(source)!r}" if isinstance(source, (str, Path)) else "the list of texts"
