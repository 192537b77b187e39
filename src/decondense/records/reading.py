"""Files of rows, read whole, row by row, or only what is new in them."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from pydantic_core import from_json

from decondense.records.schema import SCHEMA_VERSION, RecordError, Row, check_row
from decondense.records.writing import LONGEST_LINE


class _NotJson(RecordError):
    """A line that is not JSON: at the end of a file, what a kill left of a row."""


_SHARED_CONFIGURATIONS: dict[str, dict[str, Any]] = {}
_MOST_SHARED = 16


def _shared(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """One object for a configuration that many files hold, as the cells of a study do."""
    if _SHARED_CONFIGURATIONS.get(name) == config:
        return _SHARED_CONFIGURATIONS[name]
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

    def __call__(self, line: bytes) -> Row | None:
        """The row of the next line; None: the line holds no row. Errors name the file and the line."""
        self.line += 1
        try:
            # the parser would look up every string that it has seen: slower than making them anew
            row = from_json(line, allow_inf_nan=False, cache_strings="keys")
        except ValueError as error:
            if not line.strip():
                return None
            raise _NotJson(f"{self}: not a valid row ({error}).") from error
        if not isinstance(row, dict):
            raise _NotJson(f"{self}: not a valid row (a row is a JSON object).")
        kind = row.get("kind")
        if kind == "configuration":
            self._configuration(row)
            return None
        if kind == "run":
            config = row.get("config")
            if isinstance(config, str):
                if config not in self.configs:
                    raise RecordError(
                        f"{self}: names the configuration {config!r}, which no earlier line of the file holds; the "
                        "file was cut or edited."
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
            raise RecordError(f"{self}: a configuration has a hash, a mapping and a schema_version.")
        if version > SCHEMA_VERSION:
            raise RecordError(
                f"{self}: written by a newer decondense (schema {version}, this one reads up to {SCHEMA_VERSION})."
            )
        self.configs[name] = _shared(name, config)


def iter_rows(path: str | Path) -> Iterator[Row]:
    """The rows of a file, ``.gz`` or not, one by one. A torn last line (a kill while writing) is dropped.

    Raises:
        RecordError: the file cannot be read, or a line is not a valid row; the message names file and line.
    """
    path = Path(path)
    parse = _Parser(path)
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as handle:
            while line := handle.readline(LONGEST_LINE):
                whole = line.endswith(b"\n")
                if not whole and len(line) == LONGEST_LINE:
                    raise RecordError(f"{path}, line {parse.line + 1}: longer than {LONGEST_LINE} bytes; not a row.")
                try:
                    row = parse(line)
                except _NotJson:
                    if whole:
                        raise
                    return
                if row is not None:
                    yield row
    except (OSError, EOFError, zlib.error) as error:
        kind = "" if isinstance(error, OSError) and error.errno else "it is damaged: "
        raise RecordError(f"{path}: cannot be read ({kind}{getattr(error, 'strerror', None) or error}).") from error


def read_rows(path: str | Path) -> list[Row]:
    """All rows of a file: see :func:`iter_rows`."""
    return list(iter_rows(path))


class RowReader:
    """Reads a growing file of rows piece by piece: each call returns only the rows that are new.

    ::

        reader = RowReader(path)
        restarted, rows = reader.read()

    A line that is not finished yet is left for the next call. When the file was replaced, as a resumed run does, it is
    read from its start and ``restarted`` is true: what was made of earlier rows no longer holds.
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
        """(whether earlier rows no longer hold, the new rows).

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
        rows = [row for line in whole.split(b"\n") if (row := self._parse(line)) is not None]
        self._offset += len(whole)
        self._tail = (self._tail + whole[-self._TAIL :])[-self._TAIL :]
        return restarted, rows

    def _continues(self, handle: IO[bytes], status: os.stat_result) -> bool:
        """Whether the file still begins with what was read: a new file may take the number of a deleted one."""
        if self._file != (status.st_dev, status.st_ino) or status.st_size < self._offset:
            return False
        handle.seek(self._offset - len(self._tail))
        return handle.read(len(self._tail)) == self._tail
