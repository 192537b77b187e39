"""Reads one local file record by record; measuring, studies and benchmarks share this reader.

Text (``.txt``, ``.md``, ``.rst`` and any other suffix), JSON lines and JSON (distinguished by content), CSV and TSV
with a header, and parquet; all except parquet also compressed (``.gz``, ``.bz2``, ``.xz``, ``.zst``). No types are
inferred: a text ``NA`` or ``2024-01-01`` stays a string, which the readers of pandas, pyarrow and ``datasets`` do not
guarantee. Text is UTF-8, with or without a byte order mark.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, groupby, islice
from pathlib import Path
from typing import IO, Any

from decondense.checkpoints import first_line
from decondense.corpora.columns import NULL, NUMBER, TEXT, PassageError, choose_column, kind_of_value

PARAGRAPHS = (".txt", ".md", ".rst")
RECORDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_HEAD = 100
"""Records that are inspected to choose the column of the text."""
_ROWS = 1024  # of a parquet file at once
_BOM = "\ufeff"


def _zstandard(raw: IO[bytes]) -> Any:
    import pyarrow  # has the decompressor; the package zstandard is not needed

    return pyarrow.CompressedInputStream(raw, "zstd")


_OPENERS: dict[str, Callable[[IO[bytes]], Any]]
_OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _zstandard}
COMPRESSED = tuple(_OPENERS)


@dataclass
class Position:
    """The progress of a reader in a source."""

    done: int = 0
    total: int = 0


def kind_of(path: Path) -> str:
    """The suffix that determines the reader, without that of a compression; empty for an unknown one."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in _OPENERS:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in (*PARAGRAPHS, *RECORDS) else ""


def read_texts(path: Path, *, field: str | None = None, position: Position | None = None) -> Iterator[str]:
    """The paragraphs of a text file, or the text of each record, in bounded memory (except for a JSON array).

    Args:
        path: the file.
        field: column that holds the text; None: see :func:`~decondense.corpora.columns.choose_column`.
        position: its ``done`` advances by the bytes of the file that were read.

    Yields:
        Text; an empty string for a record without text (null, or no such column).

    Raises:
        PassageError: the file is damaged, of another encoding, or has no such column; with the line where there is one.
    """
    position = position or Position()
    kind = kind_of(path)
    if kind == ".parquet":
        yield from _column_of_parquet(path, field, position)
    elif kind in RECORDS:
        yield from _column_of_records(path, read_records(path, position=position), field)
    else:
        with _reading(path), _text(path, position) as lines:
            yield from iterate_paragraphs(lines)


def read_records(path: Path, *, position: Position | None = None) -> Iterator[tuple[int, Any]]:
    """The records of a file with their numbers from 1: that of the line, or of the record.

    Raises:
        PassageError: the file is damaged, or holds no records.
    """
    position = position or Position()
    kind = kind_of(path)
    with _reading(path):
        if kind == ".parquet":
            yield from enumerate((row for batch in _batches(path, None, position) for row in batch.to_pylist()), 1)
        elif kind in (".csv", ".tsv"):
            with _text(path, position, newline="") as lines:
                yield from _table(lines, path, "\t" if kind == ".tsv" else ",")
        elif kind in RECORDS:
            with _text(path, position) as lines:
                yield from _json(lines, path)
        else:
            raise PassageError(f"{path} holds no records; expected {', '.join(RECORDS)}.")


def iterate_paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """Paragraphs (separated by blank lines), each with a blank line at its end; only one is in memory at a time."""

    def separates(numbered: tuple[int, str]) -> bool:
        number, line = numbered  # a blank line separates only if there is a line end on both sides of it
        return number > 0 and not line.strip() and line.endswith("\n")

    for is_separator, group in groupby(enumerate(lines), separates):
        if not is_separator and (text := "".join(line for _, line in group)).strip():
            yield text.strip("\n") + "\n\n"


def decoded(raw: Any, name: object, *, newline: str | None = None) -> io.TextIOWrapper:
    """A stream of bytes as UTF-8 text without a byte order mark.

    Raises:
        PassageError: the stream begins like UTF-16, UTF-32 or a binary file.
    """
    buffered = io.BufferedReader(raw)
    head = buffered.peek(4096)[:4096]
    refused = ""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or (head.count(0) > len(head) // 4 and head.isascii()):
        refused = "it is UTF-16 or UTF-32. Convert it: iconv -f UTF-16 -t UTF-8."
    elif 0 in head:
        refused = "it is a binary file (it contains NUL bytes)."
    if refused:
        buffered.detach()  # whoever opened it closes it
        raise PassageError(f"{name} cannot be read as UTF-8: {refused}")
    return io.TextIOWrapper(buffered, encoding="utf-8-sig", newline=newline)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except PassageError:
        raise
    except UnicodeDecodeError as error:
        raise PassageError(
            f"{path} cannot be read as UTF-8 text ({error}). Convert it, for example: iconv -f LATIN1 -t UTF-8."
        ) from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error, pyarrow.ArrowException) as error:
        raise PassageError(
            f"{path} cannot be read: it is damaged, truncated or not in the format of its suffix ({first_line(error)})."
        ) from error


@contextmanager
def _text(path: Path, position: Position, newline: str | None = None) -> Iterator[Iterator[str]]:
    begin = position.done
    opener = _OPENERS.get(path.suffix.lower())
    with path.open("rb") as raw:
        stream = decoded(raw if opener is None else opener(raw), path, newline=newline)

        def lines() -> Iterator[str]:
            for line in stream:
                position.done = begin + raw.tell()
                yield line

        try:
            yield lines() if raw.seekable() else iter(stream)
        finally:
            stream.detach().detach()  # type: ignore[attr-defined]  # whoever opened the file closes it


# ---- records ---------------------------------------------------------------------------------------------------------


def _json(lines: Iterator[str], path: Path) -> Iterator[tuple[int, Any]]:
    numbered = ((number, line.lstrip(_BOM)) for number, line in enumerate(lines, 1))
    filled = ((number, line) for number, line in numbered if line.strip())
    number, first = next(filled, (0, ""))
    if not first:
        return
    if first.lstrip().startswith("["):
        loaded = _parsed(first + "".join(lines), str(path))
        yield from enumerate(loaded, 1)
        return
    try:
        record = _parsed(first, f"{path}, line {number}")
    except PassageError as error:
        # one record over several lines, or a damaged line
        whole = first + "".join(lines)
        try:
            yield 1, _parsed(whole, str(path))
        except PassageError as whole_error:
            raise (whole_error if kind_of(path) == ".json" and first.strip() == "{" else error) from None
        return
    yield number, record
    for number, line in filled:
        yield number, _parsed(line, f"{path}, line {number}")


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise PassageError(f"{place}: the JSON is nested too deeply.") from None
    except ValueError as error:  # also of integers with thousands of digits
        raise PassageError(f"{place}: not valid JSON ({error}).") from error


def _table(lines: Iterator[str], path: Path, delimiter: str) -> Iterator[tuple[int, dict[str, str]]]:
    with _cells_of_any_length():
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            names = next((row for row in rows if row), [])
            if len(names) == 1 and (other := next((sign for sign in ";\t|" if sign in names[0]), None)):
                raise PassageError(
                    f"{path}: its columns are separated by {other!r}; expected {delimiter!r} (.tsv: a tab)."
                )
            _check_unique(names, path)
            for row in rows:
                if row and len(row) != len(names):
                    raise PassageError(
                        f"{path}, line {rows.line_num}: {len(row)} values for {len(names)} columns "
                        f"({', '.join(names)}); quote values that contain {delimiter!r} or a line break."
                    )
                if row:
                    yield rows.line_num, dict(zip(names, row, strict=True))
        except csv.Error as error:
            raise PassageError(f"{path}, line {rows.line_num}: not valid CSV ({error}).") from error


def _check_unique(names: list[str], path: Path) -> None:
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise PassageError(f"{path}: the column {repeated!r} appears twice; rename one of them.")


@contextmanager
def _cells_of_any_length() -> Iterator[None]:
    before = csv.field_size_limit(sys.maxsize)  # a text may be longer than 128 KiB
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _batches(path: Path, columns: list[str] | None, position: Position) -> Iterator[Any]:
    import pyarrow.parquet as parquet

    begin, size = position.done, path.stat().st_size
    with parquet.ParquetFile(path) as file:
        _check_unique(file.schema_arrow.names, path)
        rows = 0
        for batch in file.iter_batches(batch_size=_ROWS, columns=columns):
            rows += batch.num_rows
            position.done = begin + size * rows // file.metadata.num_rows
            yield batch


# ---- the column of the text ------------------------------------------------------------------------------------------


def kind_of_arrow(kind: Any) -> str:
    """Kind of a column of an Arrow table, as :func:`~decondense.corpora.columns.choose_column` takes it."""
    from pyarrow import types

    if types.is_dictionary(kind):  # categories: the type of their values counts
        return kind_of_arrow(kind.value_type)
    view = getattr(types, "is_string_view", lambda _: False)  # pyarrow 16 and later
    if types.is_string(kind) or types.is_large_string(kind) or view(kind):
        return TEXT
    return NULL if types.is_null(kind) else str(kind)


def _column_of_parquet(path: Path, field: str | None, position: Position) -> Iterator[str]:
    import pyarrow.parquet as parquet

    with _reading(path):
        schema = parquet.read_schema(path)
        column = choose_column({item.name: kind_of_arrow(item.type) for item in schema}, field, path)
        for batch in _batches(path, [column], position):
            for value in batch.column(column).to_pylist():
                yield value or ""


def _column_of_records(path: Path, records: Iterator[tuple[int, Any]], field: str | None) -> Iterator[str]:
    head = list(islice(records, _HEAD))
    _refuse_nested(head, field, path)
    column = None
    if kinds := _kinds([record for _, record in head], path):
        column = choose_column(kinds, field, path)
    for number, record in chain(head, records):
        value = record
        if isinstance(record, dict):
            if column is None:
                column = choose_column({name: kind_of_value(value) for name, value in record.items()}, field, path)
            value = record.get(column)
        kind = kind_of_value(value)
        if kind not in (TEXT, NULL):
            place = "the record" if value is record else f"field {column!r}"
            raise PassageError(
                f"{path}, record {number}: {place} holds {kind}, not text; name the field that holds the text "
                "(--field, field=)."
            )
        yield value if kind == TEXT else ""


def _refuse_nested(head: list[tuple[int, Any]], field: str | None, path: Path) -> None:
    """A file that is one object around its records (SQuAD: ``{"version": ..., "data": [...]}``)."""
    record = head[0][1] if len(head) == 1 else None
    if not isinstance(record, dict) or field is not None or isinstance(record.get("text"), str):
        return
    for name, value in record.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            raise PassageError(
                f"{path} is one JSON object with its records in the field {name!r}; expected an array of records, or "
                f"one record per line. Convert it: jq -c '.{name}[]'."
            )


def _kinds(records: list[Any], path: Path) -> Mapping[str, str]:
    """Name -> kind over several records: text if any of them has text."""
    kinds: dict[str, str] = {}
    for record in records:
        for name, value in record.items() if isinstance(record, dict) else ():
            kind = kind_of_value(value)
            if kinds.get(name, NULL) == NULL or kind == TEXT:
                kinds[name] = kind
    if kind_of(path) in (".csv", ".tsv"):  # every value is a string
        for name in kinds:
            values = [record[name] for record in records if record[name].strip()]
            if values and all(map(_is_number, values)):
                kinds[name] = NUMBER
    return kinds


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
