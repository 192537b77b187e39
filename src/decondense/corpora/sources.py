"""The documents of a corpus: the embedded corpus, local files, or a data set on the hub.

The revision of a source identifies its content without reading it as text, so that the cache lookup is fast. Documents
are iterated one by one: a source may be larger than memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, groupby
from pathlib import Path
from typing import TypeVar

from decondense.config import ConfigError, CorpusConfig
from decondense.corpora import hub
from decondense.corpora.columns import PassageError
from decondense.corpora.directories import LocalText, find_text
from decondense.corpora.embedded import Document, Progress, python_docs
from decondense.corpora.files import RECORDS, Position, kind_of, read_texts

T = TypeVar("T")
END = "<|endoftext|>"
_PIECE = 4_000
"""Characters after which an undivided text file is cut at the next paragraph."""
# raise one when the code below would read other documents from the same files or rows
_READER = {"files": 2, "hub": 1}
_PROGRESS_EVERY = 64  # documents between two calls of progress
_REMEDY = (
    "Without network access, set corpus.source to the path of a local copy, or set HF_HOME to a cache that contains it."
)


@dataclass(frozen=True)
class Source:
    """The source of the documents of a corpus."""

    name: str
    revision: str | None
    """Commit of a data set on the hub, hash of local files or documents; None: the hub cannot be reached."""
    key: tuple[str, ...]
    """Everything that determines the documents, except the revision."""
    read: Callable[[], tuple[Iterable[Document], Position, str]]
    """Opens the source: an iterator of documents, its progress, and the unit of the progress."""
    open: Callable[[], Source] | None = None
    """Set if the revision is unknown: opens the cached copy of the hub's library, whose revision is known."""
    unreachable: str | None = None
    """Why the hub cannot be reached."""


def find_source(config: CorpusConfig, *, cache: Path, progress: Progress | None = None) -> Source:
    """The source of a configuration with its revision.

    Raises:
        ConfigError: there is no such source, or an option does not apply to it.
    """
    path = Path(config.source)
    try:
        if config.source == "python_docs":
            _no_hub_options(config)
            return _embedded(config, cache, progress)
        if path.exists():
            text = find_text(path, subset=config.subset, split=config.split)
            return _hub(config) if text is None else _files(config, text)
        if hub.is_hub_id(config.source):
            return _hub(config)
    except PassageError as error:
        raise ConfigError(f"corpus.source: {error}") from error
    if "://" in config.source:
        raise ConfigError(
            f"corpus.source {config.source!r} is a URL, and only local files are read; download it and give its path."
        )
    raise ConfigError(
        f"corpus.source {config.source!r} is neither 'python_docs' nor an existing file or directory of text, nor the "
        "id of a data set on the hub (OWNER/NAME)."
    )


@dataclass
class Dropped:
    """Documents of a source that are not in the corpus."""

    empty: int = 0
    """Null, empty or white space only."""
    repeated: int = 0
    """Equal to an earlier one."""


def documents_of(
    source: Source, config: CorpusConfig, what: str, progress: Progress | None, dropped: Dropped | None = None
) -> Iterator[Document]:
    """The documents of a source in its order: without empty and repeated ones, ``max_characters`` in total.

    The document in which ``max_characters`` is reached is cut there and is the last. ``dropped`` counts the omitted
    documents.
    """
    dropped = dropped or Dropped()
    try:
        documents, position, unit = source.read()
        seen: set[int] = set()
        left = most = config.max_characters
        for number, document in enumerate(documents):
            if progress is not None and number % _PROGRESS_EVERY == 0:
                if most is not None and left is not None:
                    progress(f"{what} (characters)", most - left, most)
                else:
                    # a stream may have no known length; its total is then one more than its progress
                    total = max(position.total, position.done + 1)
                    progress(f"{what} ({unit})", position.done, total)
            document = _encodable(document)
            # 8 bytes of the hash, as in the identity: a set of numbers, because there may be millions of documents
            identity = int(document.identity, 16)
            if not document.text.strip():
                dropped.empty += 1
                continue
            if identity in seen:
                dropped.repeated += 1
                continue
            seen.add(identity)
            if left is not None and len(document.text) >= left:
                if (text := document.text[:left]).strip():
                    yield replace(document, text=text)
                left = 0
                break
            if left is not None:
                left -= len(document.text)
            yield document
        if progress is not None:
            if most is not None and left is not None:
                progress(f"{what} (characters)", most - left, most - left)
            else:
                progress(f"{what} ({unit})", max(position.done, position.total), max(position.done, position.total))
    except PassageError as error:
        raise ConfigError(f"corpus.source: {error}") from error
    if not seen:
        raise ConfigError(f"corpus.source {config.source!r} holds no text.")


def _encodable(document: Document) -> Document:
    """Replace halves of surrogate pairs, which JSON can hold and UTF-8 cannot, by question marks."""
    try:
        document.text.encode()
    except UnicodeEncodeError:
        return replace(document, text=document.text.encode("utf-8", "replace").decode())
    return document


def _no_hub_options(config: CorpusConfig) -> None:
    for name in ("subset", "split"):
        if (value := getattr(config, name)) != CorpusConfig.model_fields[name].default:
            raise ConfigError(
                f"corpus.{name} {value!r} has no effect on corpus.source {config.source!r}, which has neither subsets "
                "nor splits; omit it."
            )


def _request(config: CorpusConfig, kind: str, *names: str) -> tuple[str, ...]:
    chosen = {name: getattr(config, name) for name in ("text_field", "max_characters", *names)}
    return (json.dumps({"reader": _READER[kind], "kind": kind, **chosen}, sort_keys=True),)


def _embedded(config: CorpusConfig, cache: Path, progress: Progress | None) -> Source:
    documents = python_docs(config.documents, cache=cache, progress=progress)

    def read() -> tuple[Iterable[Document], Position, str]:
        position = Position(total=len(documents))
        return _counted(documents, position), position, "documents"

    # identified by the documents: they are in memory anyway
    identities = tuple(item.identity for item in documents_of(Source("python_docs", None, (), read), config, "", None))
    digest = hashlib.sha256("".join(identities).encode()).hexdigest()[:16]
    return Source("python_docs", f"documents:{digest}", identities, read)


def _counted(items: Iterable[T], position: Position) -> Iterator[T]:
    for item in items:
        position.done += 1
        yield item


def _files(config: CorpusConfig, text: LocalText) -> Source:
    def read() -> tuple[Iterable[Document], Position, str]:
        text.warn()
        position = Position(total=sum(file.stat().st_size for file in text.files))
        return _documents_of_files(text.files, config.text_field, position), position, "bytes"

    # the path of a copy is not part of the key
    return Source(config.source, hub.files_hash(text.files, text.root), _request(config, "files"), read)


def _documents_of_files(files: Sequence[Path], field: str | None, position: Position) -> Iterator[Document]:
    """Documents of local files: records (or articles, if the records are their lines), or parts of a text file.

    A text file is divided at ``<|endoftext|>``. Without this token it is one document, unless it is the only file: then
    it is cut between paragraphs, because a single document cannot be held out.
    """

    def read(file: Path) -> Iterator[str]:
        position.done = begins[file]
        return read_texts(file, field=field, position=position)

    sizes = [file.stat().st_size for file in files]
    begins = dict(zip(files, accumulate([0, *sizes]), strict=False))
    for of_records, group in groupby(files, key=lambda file: kind_of(file) in RECORDS):
        if of_records:  # an article may span several files
            texts = hub.join_articles(text for file in group for text in read(file))
            for number, text in enumerate(texts):
                yield Document(f"#{number}", text.strip())
            continue
        for file in group:
            cut = len(files) == 1 and not any(END in paragraph for paragraph in read(file))
            for number, text in enumerate((_cut if cut else _divided)(read(file))):
                if text.strip():
                    yield Document(f"{file.name}#{number}", text.strip())


def _divided(paragraphs: Iterable[str]) -> Iterator[str]:
    parts: list[str] = []
    for paragraph in paragraphs:
        first, *rest = paragraph.split(END)
        parts.append(first)
        for part in rest:
            yield "".join(parts)
            parts = [part]
    yield "".join(parts)


def _cut(paragraphs: Iterable[str]) -> Iterator[str]:
    parts, length = [""], 0
    for paragraph in paragraphs:
        if length >= _PIECE:
            yield "".join(parts)
            parts, length = [], 0
        parts.append(paragraph)
        length += len(paragraph)
    yield "".join(parts)


def _hub(config: CorpusConfig) -> Source:
    data = hub.find(config.source, config.subset, config.split, remedy=_REMEDY)
    open_rows = partial(hub.open_rows, data, config.text_field, streaming=config.streaming)
    # neither streaming, which gives the same documents, nor the path of a local copy is part of the key
    names = ("subset", "split") if data.local else ("source", "subset", "split")
    source = Source(
        config.source,
        data.revision,
        _request(config, "hub", *names),
        lambda: _documents_of_rows(open_rows()),
        unreachable=data.unreachable,
    )
    if data.revision is not None:
        return source

    def open_cached() -> Source:
        try:
            rows = open_rows()
        except PassageError as error:
            raise ConfigError(f"corpus.source: {error}") from error
        return replace(source, revision=rows.revision, read=lambda: _documents_of_rows(rows), open=None)

    return replace(source, open=open_cached)


def _documents_of_rows(rows: hub.HubRows) -> tuple[Iterable[Document], Position, str]:
    position = Position(total=rows.count or 0)
    texts = hub.join_articles(_counted(rows, position))
    return (Document(f"#{number}", text.strip()) for number, text in enumerate(texts)), position, "rows"
