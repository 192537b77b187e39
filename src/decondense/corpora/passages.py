"""Passages of text to measure on: hub data sets, local files, standard input, lists, or the embedded corpus.

The published protocol (Liu et al. 2026, arXiv:2602.00217): 100 passages of 1024 to 1280 words, each grown from a
random row of the data set by the rows that follow, then truncated to 512 tokens. Passage r draws its first row from a
generator of its own, ``numpy.random.default_rng(seed + r)``, among the first 95 % of the rows: passage r is the same
whatever the number of passages.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeVar

import numpy as np

from decondense.config import MeasureConfig, suggest

_D = MeasureConfig()
T = TypeVar("T")

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
_BLANK = re.compile(r"\n\s*\n")
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
    text = stream if isinstance(stream, str) else stream.read()
    return [part.strip("\n") + "\n\n" for part in _BLANK.split(text) if part.strip()]


def read_file(path: str | Path, *, field: str | None = None) -> list[str]:
    """Rows of one local file: paragraphs of a text file, records of a ``.jsonl``, ``.json`` or ``.parquet`` file."""
    path = Path(path)
    kind = _kind(path) or ".txt"
    try:
        if kind == ".parquet":
            import pyarrow.parquet as parquet

            table = parquet.read_table(path)
            column = _column(table.column_names, lambda c: str(table.schema.field(c).type), field, path)
            return [str(value) for value in table.column(column).to_pylist() if value]
        opener = _OPENERS.get(path.suffix, open)
        with opener(path, "rt", encoding="utf-8") as stream:
            if kind not in (".jsonl", ".json"):
                return paragraphs(stream)
            text = stream.read()
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError) as error:
        raise PassageError(f"{path} cannot be read as UTF-8 text ({error}).") from error
    return _records(text, kind, field, path)


def _records(text: str, kind: str, field: str | None, path: Path) -> list[str]:
    values: list[Any] = []
    number = 0
    try:
        if kind == ".json":
            loaded = json.loads(text)
            values = loaded if isinstance(loaded, list) else [loaded]
        else:
            for line in text.split("\n"):
                number += 1
                if line.strip():
                    values.append(json.loads(line))
    except json.JSONDecodeError as error:
        place = f"{path}, line {number}" if kind == ".jsonl" else str(path)
        raise PassageError(f"{place}: no valid JSON ({error}).") from error
    rows = []
    for value in values:
        if isinstance(value, dict):
            kinds = {name: type(entry).__name__ for name, entry in value.items()}
            column = _column(list(value), kinds.__getitem__, field, path)
            value = value[column]
        if not isinstance(value, str):
            raise PassageError(
                f"{path}: expected records with a text, got a {type(value).__name__}; name it: field=..."
            )
        if value:
            rows.append(value)
    return rows


def _column(names: Sequence[str], kind_of: Callable[[str], str], field: str | None, where: object) -> str:
    if field is not None:
        if field not in names:
            raise PassageError(f"{where} has no field {field!r}.{suggest(field, names)} It has: {', '.join(names)}.")
        return field
    if "text" in names:
        return "text"
    for name in names:
        if kind_of(name) in ("str", "string", "large_string"):
            return name
    raise PassageError(f"{where} has no field of strings; it has: {', '.join(names)}.")


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
    import datasets

    label = hub_id + (f":{configuration}" if configuration else "")
    try:
        data = datasets.load_dataset(hub_id, configuration, split=split)
    except Exception as error:  # the hub client raises a dozen unrelated types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PassageError(
            f"the data set {label} (split {split}) cannot be loaded: {reason}. Without network, use a local file "
            f"(--text FILE), the embedded corpus (--dataset {EMBEDDED}), or a filled cache (HF_HOME)."
        ) from error
    column = _column(data.column_names, lambda c: str(getattr(data.features[c], "dtype", "")), field, label)
    return _Column(data, column)


class _Column(Sequence[str]):
    """One column of a data set, read row by row: wikitext-103 has 1.8 million rows."""

    def __init__(self, data: Any, column: str) -> None:
        self._data = data.select_columns([column])
        self._column = column

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: Any) -> Any:
        return self._data[index][self._column]

    def __iter__(self) -> Iterator[str]:
        return (str(row[self._column]) for row in self._data)


def _named(source: Any) -> str:
    return f"the source {str(source)!r}" if isinstance(source, (str, Path)) else "the list of texts"
