"""Reads files of rows: whole, row by row, or only their new rows."""

from __future__ import annotations

import gzip
import io
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from pydantic_core import from_json

from decondense.records.schema import SCHEMA_VERSION, RecordError, Row, check_row
from decondense.records.writing import LONGEST_LINE, configuration_hash


class ItemRows(NamedTuple):
    """Consecutive rows of the items of one task, as columns: nearly all rows of a study with benchmarks."""

    common: Row
    """The first row; the others differ from it in the columns alone."""
    item: Sequence[str]
    value: Sequence[float]
    weight: Sequence[float]
    bits_per_byte: Sequence[float | None]
    margin_bits: Sequence[float | None]

    def rows(self) -> Iterator[Row]:
        """The rows one by one."""
        for entry in zip(*self[1:], strict=True):
            yield {**self.common, **dict(zip(_COLUMNS, entry, strict=True))}


_COLUMNS = ItemRows._fields[1:]
_KIND = b'{"kind":"eval_item",'
_NAME = b'"item":'
_NONE = b"\n\n"
"""No line begins so."""
_MOST = 4096
"""Lines that are parsed together, and bytes of such a line, at most."""

_SHARED_CONFIGURATIONS: dict[str, dict[str, Any]] = {}
_MOST_SHARED = 16


def _shared(name: str, config: dict[str, Any]) -> dict[str, Any] | None:
    """One object for a configuration that many files hold, as the cells of a study do; None: it is not of this hash."""
    if _SHARED_CONFIGURATIONS.get(name) == config:
        return _SHARED_CONFIGURATIONS[name]
    if configuration_hash(config) != name:
        return None
    while len(_SHARED_CONFIGURATIONS) >= _MOST_SHARED:
        del _SHARED_CONFIGURATIONS[next(iter(_SHARED_CONFIGURATIONS))]
    _SHARED_CONFIGURATIONS[name] = config
    return config


class _Parser:
    """Lines of one file to rows: holds the configurations that its run rows name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.line = 0
        self.configs: dict[str, dict[str, Any]] = {}
        self._inline: dict[str, Any] = {}

    def __str__(self) -> str:
        """The place of the line, for errors."""
        return f"{self.path}, line {self.line}"

    def pieces(self, lines: Iterable[bytes]) -> Iterator[Row | ItemRows]:
        """The rows of the next lines; those that begin alike up to the name of an item together."""
        held: list[bytes] = []
        start = _NONE
        for line in lines:
            if line.startswith(start) and len(held) < _MOST and len(line) < _MOST:
                held.append(line)
                continue
            yield from self._held(held, len(start))
            held = [line]
            cut = line.find(_NAME) if line.startswith(_KIND) else -1
            start = _NONE if cut < 0 else line[: cut + len(_NAME)]
        yield from self._held(held, len(start))

    def _held(self, lines: list[bytes], cut: int) -> Iterator[Row | ItemRows]:
        if len(lines) > 1 and (columns := _together([line[cut:] for line in lines])):
            common = self(lines[0])
            assert common is not None
            self.line += len(lines) - 1
            yield ItemRows(common, *columns)
            return
        for line in lines:
            if (row := self(line)) is not None:
                yield row

    def __call__(self, line: bytes) -> Row | None:
        """The row of the next line; None: the line holds no row, or what a kill left of one, without an end.

        Errors name the file and the line.
        """
        self.line += 1
        try:
            # the parser would look up every string that it has seen: slower than making them anew
            row = from_json(line, allow_inf_nan=False, cache_strings="keys")
            if not isinstance(row, dict):
                raise ValueError("a row is a JSON object")
        except ValueError as error:
            if not line.strip() or not line.endswith(b"\n"):
                return None
            raise RecordError(f"{self}: not a valid row ({error}).") from error
        kind = row.get("kind")
        if kind == "configuration":
            self._configuration(row)
            return None
        if kind == "run":
            config = row.get("config")
            if isinstance(config, str):
                if config not in self.configs:
                    raise RecordError(
                        f"{self}: refers to the configuration {config!r}, which no earlier line of the file holds; the "
                        "file was truncated or edited."
                    )
                config = self.configs[config]
            elif isinstance(config, dict):
                self._inline = config = self._inline if config == self._inline else config
            return {
                **check_row({**row, "config": {} if isinstance(config, dict) else config}, where=self),
                "config": config,
            }
        return check_row(row, where=self)

    def _configuration(self, row: dict[str, Any]) -> None:
        name, config, version = row.get("hash"), row.get("config"), row.get("schema_version")
        if not isinstance(name, str) or not isinstance(config, dict) or not isinstance(version, int):
            raise RecordError(f"{self}: a configuration line needs a hash, a mapping and a schema_version.")
        if version > SCHEMA_VERSION:
            raise RecordError(
                f"{self}: written by a newer decondense (schema {version}, this one reads up to {SCHEMA_VERSION}); "
                "update decondense."
            )
        if (shared := _shared(name, config)) is None:
            raise RecordError(
                f"{self}: the configuration does not have the hash {name!r}; the file was damaged or edited. Restore "
                "it, or run the study again."
            )
        self.configs[name] = shared


def _together(ends: list[bytes]) -> list[tuple[Any, ...]] | None:
    """The columns of items' rows, of which these are the texts behind ``"item":``; None: each is to be read alone.

    Each text holds one object's end and no other brace, so that together they mean what they mean alone.
    """
    text = b"[{" + _NAME + (b",{" + _NAME).join(ends) + b"]"
    if not text.count(b"{") == text.count(b"}") == text.count(b"}\n") == len(ends):
        return None
    try:
        entries = from_json(text, allow_inf_nan=False, cache_strings="keys")
    except ValueError:
        return None
    keys = {tuple(entry) for entry in entries}
    if len(keys) > 1 or keys - {_COLUMNS, _COLUMNS[:3]}:
        return None
    if len(entries[0]) < len(_COLUMNS):  # of an earlier release
        entries = [{**dict.fromkeys(_COLUMNS), **entry} for entry in entries]
    names, *numbers = columns = list(zip(*(entry.values() for entry in entries), strict=True))
    known = [[value for value in column if value is not None] for column in numbers]
    plain = (
        {*map(type, names)} == {str}
        and all({*map(type, column)} <= {float} and math.isfinite(sum(column)) for column in known)
        and len(known[0]) == len(known[1]) == len(names)
    )
    return columns if plain else None


def iter_pieces(path: str | Path) -> Iterator[Row | ItemRows]:
    """Like :func:`iter_rows`, but consecutive rows of the items of one task are grouped."""
    path = Path(path)
    parse = _Parser(path)

    def lines(handle: IO[bytes] | gzip.GzipFile) -> Iterator[bytes]:
        number = 0
        while line := handle.readline(LONGEST_LINE):
            number += 1
            if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
                raise RecordError(f"{path}, line {number}: longer than {LONGEST_LINE} bytes; not a row.")
            yield line

    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as handle:
            yield from parse.pieces(lines(handle))
    except (OSError, EOFError, zlib.error) as error:
        kind = "" if isinstance(error, OSError) and error.errno else "it is damaged: "
        raise RecordError(f"{path}: cannot be read ({kind}{getattr(error, 'strerror', None) or error}).") from error


def iter_rows(path: str | Path) -> Iterator[Row]:
    """The rows of a file, ``.gz`` or not, one by one. A partial last line (from a kill while writing) is dropped.

    Raises:
        RecordError: the file cannot be read, or a line is not a valid row; the message names file and line.
    """
    return one_by_one(iter_pieces(path))


def one_by_one(pieces: Iterable[Row | ItemRows]) -> Iterator[Row]:
    """Single rows from pieces of which some are groups."""
    for piece in pieces:
        if isinstance(piece, ItemRows):
            yield from piece.rows()
        else:
            yield piece


def read_rows(path: str | Path) -> list[Row]:
    """All rows of a file: see :func:`iter_rows`."""
    return list(iter_rows(path))


class RowReader:
    """Reads a growing file of rows piece by piece: each call returns only the rows that are new.

    ::

        reader = RowReader(path)
        restarted, rows = reader.read()

    An unfinished line is left for the next call. If the file was replaced, as by a resumed run, it is read from its
    start and ``restarted`` is true: results from earlier rows are then invalid.
    """

    _TAIL = 4096

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._forget()

    def _forget(self) -> None:
        self._offset = 0
        self._file: tuple[int, int] | None = None
        self._tail = b""
        self._parse = _Parser(self.path)

    def read(self) -> tuple[bool, list[Row]]:
        """(whether earlier rows are invalid, the new rows).

        Raises:
            RecordError: the file cannot be read, or a whole line is not a valid row.
        """
        restarted = False
        try:
            with self.path.open("rb") as handle:
                status = os.fstat(handle.fileno())
                if self._file is not None and not self._continues(handle, status):
                    self._forget()
                    restarted = True
                self._file = (status.st_dev, status.st_ino)
                if status.st_size == self._offset:
                    return restarted, []
                handle.seek(self._offset)
                data = handle.read()
        except FileNotFoundError:
            restarted = self._file is not None
            self._forget()
            return restarted, []
        except OSError as error:
            raise RecordError(f"{self.path}: cannot be read ({error.strerror or error}).") from error
        whole = data[: data.rfind(b"\n") + 1]
        rows = list(one_by_one(self._parse.pieces(io.BytesIO(whole))))
        self._offset += len(whole)
        self._tail = (self._tail + whole[-self._TAIL :])[-self._TAIL :]
        return restarted, rows

    def _continues(self, handle: IO[bytes], status: os.stat_result) -> bool:
        """Whether the file still begins with what was read: a new file may take the number of a deleted one."""
        if self._file != (status.st_dev, status.st_ino) or status.st_size < self._offset:
            return False
        handle.seek(self._offset - len(self._tail))
        return handle.read(len(self._tail)) == self._tail
