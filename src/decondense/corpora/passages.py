"""Passages of text to measure on: hub data sets, local files, standard input, lists, or the embedded corpus.

The published protocol (Liu et al. 2026, arXiv:2602.00217): 100 passages of 1024 to 1280 words, each starting at a
random row of the data set and extended by the rows that follow, then truncated to 512 tokens. Passage r draws its first
row from its own generator, ``numpy.random.default_rng(seed + r)``, among the first 95 % of the rows: passage r does not
depend on the number of passages.
"""

from __future__ import annotations

import io
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from decondense.config import MeasureConfig, suggest
from decondense.corpora import hub
from decondense.corpora.columns import PassageError as PassageError
from decondense.corpora.columns import TextWarning
from decondense.corpora.directories import find_text
from decondense.corpora.files import decoded, iterate_paragraphs, kind_of, read_texts
from decondense.privacy import without_credentials

_D = MeasureConfig()

EMBEDDED = "embedded"
# name -> (hub id, configuration, field); the four text sources of the authors
DATASETS: dict[str, tuple[str, str | None, str]] = {
    "wikitext": ("Salesforce/wikitext", "wikitext-103-v1", "text"),
    "pubmed_qa": ("qiaojin/PubMedQA", "pqa_labeled", "long_answer"),
    "imdb": ("stanfordnlp/imdb", None, "text"),
    "squad": ("rajpurkar/squad", None, "context"),
}
# approximately the words of NLTK's tokenizer: punctuation marks count
_WORD = re.compile(r"\w+(?:[-'’]\w+)*|[^\w\s]+")


class Rows(list[str]):
    """Rows that hold text, and the number of those that do not."""

    skipped: int = 0
    """Records that are null, empty or white space only."""

    def take(self, text: str) -> None:
        """Add a row if it holds text, else count it."""
        if text.strip():
            self.append(text)
        else:
            self.skipped += 1

    def warn(self, source: object) -> None:
        """Warn of the rows that were skipped (:class:`~decondense.corpora.columns.TextWarning`)."""
        if self.skipped:
            total = self.skipped + len(self)
            message = f"{source}: {self.skipped:,} of {total:,} records hold no text and are skipped."
            warnings.warn(message, TextWarning, stacklevel=4)


def count_words(text: str) -> int:
    """Number of words of a text, including punctuation marks; needs no tokenizer."""
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
            ``OWNER/NAME:CONFIGURATION``; the path of a file of text, JSON, JSON lines, CSV or parquet (``.gz``,
            ``.bz2``, ``.xz`` and ``.zst`` too), of a directory of them, or of a data set in the hub's format
            (``PATH:CONFIGURATION`` where it has several) or written by ``save_to_disk``;
            ``"-"`` for standard input; or the rows themselves.
        count: Number of passages.
        words: Minimum and maximum number of words of a passage.
        seed: Passage r is drawn with ``seed + r``.
        split: Split of a data set.
        field: Column that holds the text; None: the published field, else the rule of
            :func:`~decondense.corpora.columns.choose_column`.

    Returns:
        ``count`` passages. They may overlap when the source is small.

    Raises:
        ValueError: the source does not exist, cannot be reached, or has fewer words than one passage.
    """
    low, high = words
    if count < 1:
        raise PassageError(f"the number of passages must be at least 1, got {count}.")
    if not 2 <= low <= high:
        raise PassageError(f"words must be (fewest, most) with 2 <= fewest <= most, got {words}.")
    rows = read_rows(source, split=split, field=field)
    if not len(rows):
        raise PassageError(f"{_named(source)} holds no text.")
    return [_grow(rows, np.random.default_rng(seed + number), low, high, source) for number in range(count)]


def _grow(rows: Sequence[str], rng: np.random.Generator, low: int, high: int, source: Any) -> str:
    first = int(rng.integers(0, max(1, int(len(rows) * 0.95))))
    parts: list[str] = []
    total = 0
    for step in range(len(rows)):
        row = rows[(first + step) % len(rows)]
        # a row that ends in white space needs no line end
        parts.append(row if not row or row[-1].isspace() else row + "\n")
        total += count_words(row)
        if total >= low:
            break
    else:
        raise PassageError(
            f"{_named(source)} has {total} words, but a passage needs at least {low}. Give more text, or use shorter "
            f"passages (words=({max(2, total // 2)}, {max(2, total)}), --words)."
        )
    text = "".join(parts)
    if total > high:
        text = text[: next(m for n, m in enumerate(_WORD.finditer(text), 1) if n == high).end()]
    return text


def read_rows(source: str | Path | Sequence[str], *, split: str = "train", field: str | None = None) -> Sequence[str]:
    """The rows (paragraphs, records) of a source; see :func:`sample_passages` for what a source may be."""
    if not isinstance(source, (str, Path)):
        rows = list(source)
        if any(not isinstance(row, str) for row in rows):
            raise PassageError("a list of texts must contain only strings.")
        return rows
    name = str(source)
    if name == EMBEDDED:
        return _embedded()
    if name == "-":
        return _standard_input()
    if name in DATASETS:
        hub_id, configuration, published = DATASETS[name]
        return _hub(hub_id, configuration, split, field or published)
    path = Path(name)
    if path.exists():
        return _local(path, None, split, field)
    base, _, subset = name.rpartition(":")
    if subset and Path(base or name).is_dir():
        return _local(Path(base), subset, split, field)
    if "://" in name:
        raise PassageError(f"{_named(name)} is a URL, and only local files are read; download it and give its path.")
    if re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", name) and not kind_of(path):
        hub_id, _, configuration = name.partition(":")
        return _hub(hub_id, configuration or None, split, field)
    raise PassageError(
        f"no text source {name!r}: it is neither a file or directory, nor one of "
        f"{', '.join([EMBEDDED, *DATASETS])}, nor a hub id OWNER/NAME.{suggest(name, [EMBEDDED, *DATASETS])}"
    )


def read_each(
    source: str | Path | Sequence[str], *, split: str = "train", field: str | None = None, most: int | None = None
) -> Rows:
    """At most ``most`` records of a source, each as a passage; those without text are skipped and counted.

    Raises:
        PassageError: the source cannot be used, or no record holds text.
    """
    rows = Rows()
    for row in read_rows(source, split=split, field=field):
        if len(rows) == most:
            break
        rows.take(row)
    if not rows:
        raise PassageError(f"{_named(source)} holds no text.")
    rows.warn(source)
    return rows


def paragraphs(stream: TextIO | str) -> list[str]:
    """Paragraphs (separated by blank lines) of a text, each with a blank line at its end."""
    return list(iterate_paragraphs(io.StringIO(stream) if isinstance(stream, str) else stream))


def read_file(path: str | Path, *, field: str | None = None) -> Rows:
    """Rows of one local file that hold text: paragraphs of a text, records of a table or of JSON."""
    return _of_files((Path(path),), field)


def _of_files(files: Sequence[Path], field: str | None) -> Rows:
    rows = Rows()
    for file in files:
        for text in read_texts(file, field=field):
            rows.take(text)
    return rows


def _local(path: Path, subset: str | None, split: str, field: str | None) -> Sequence[str]:
    text = find_text(path, subset=subset, split=split)
    if text is None:
        return _hub(str(path), subset, split, field)
    text.warn()
    rows = _of_files(text.files, field)
    rows.warn(path)
    return rows


def _standard_input() -> list[str]:
    raw = getattr(sys.stdin, "buffer", None)
    try:
        return paragraphs(sys.stdin if raw is None else decoded(io.BytesIO(raw.read()), "standard input"))
    except UnicodeDecodeError as error:
        raise PassageError(
            f"standard input cannot be read as UTF-8 text ({error}). Convert it, for example: iconv -f LATIN1 -t UTF-8."
        ) from error


def _embedded() -> list[str]:
    from decondense.corpora.embedded import python_docs

    # the standard library only: two seconds, and the same text for every installation of a Python version
    return [row for document in python_docs("standard_library") for row in paragraphs(document.text)]


def _hub(hub_id: str, configuration: str | None, split: str, field: str | None) -> Sequence[str]:
    remedy = (
        f"Without network access, use a local file (--text FILE), use the embedded corpus (--dataset {EMBEDDED}), or "
        "set HF_HOME to a cache that contains the data set."
    )
    return hub.Column(hub.open_rows(hub.find(hub_id, configuration, split, remedy=remedy), field))


def _named(source: Any) -> str:
    if isinstance(source, (str, Path)):
        return f"the source {without_credentials(str(source))!r}"
    return "the list of texts"
