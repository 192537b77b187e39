"""Files that a kill leaves whole: replaced in one move, or appended to line by line."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from decondense.records.schema import SCHEMA_VERSION

LONGEST_LINE = 1 << 26
"""Maximum bytes of a line. A longer one is not a row; a small compressed file could unpack to any length."""

_ERRORS = "replace"
"""Replace bytes of a file name that are not UTF-8 by question marks: no text file can hold them."""


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"


def configuration_hash(config: Mapping[str, Any]) -> str:
    """The name of a configuration in a file of rows: a hash of its content as the file holds it."""
    held = json.loads(_line(config).encode(errors=_ERRORS))
    text = json.dumps(held, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _stated(rows: Iterable[Mapping[str, Any]], known: set[str]) -> Iterator[str]:
    """The lines of rows; a configuration that is not ``known`` to the file yet comes once, before its first row."""
    names: dict[int, tuple[Any, str]] = {}  # the object is kept, so that its id stays its own
    for row in rows:
        config = row.get("config")
        if row.get("kind") == "run" and isinstance(config, dict) and config:
            if id(config) not in names:
                names[id(config)] = (config, configuration_hash(config))
            name = names[id(config)][1]
            if name not in known:
                known.add(name)
                yield _line({"kind": "configuration", "schema_version": SCHEMA_VERSION, "hash": name, "config": config})
            row = {**row, "config": name}
        yield _line(row)


@contextlib.contextmanager
def atomic_path(path: str | Path, *, exclusive: bool = False) -> Iterator[Path]:
    """A temporary path beside ``path`` that replaces it when the block succeeds, and is removed when it fails.

    With ``exclusive`` it replaces nothing, and raises :class:`FileExistsError` if ``path`` exists, even if another
    process creates it at the same moment.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name[:40]}."  # a name may have 255 bytes, with what is added as well
    temporary = None
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=prefix, suffix=path.suffix)
        os.close(descriptor)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files private; an output file is not
        if not (exclusive and _linked(temporary, path)):
            temporary.replace(path)
    except BaseException as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and Path(error.filename or prefix).name.startswith(prefix):
            error.filename = str(path)  # the temporary name says nothing to anyone
        raise


def _linked(temporary: Path, path: Path) -> bool:
    """Give the file an unused name; False: the name is reserved, but the file must still be moved there."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        return False
    temporary.unlink()
    return True


def atomic_write(path: str | Path, data: str | bytes) -> None:
    """Write a whole file, or leave the old one unchanged."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode(errors=_ERRORS) if isinstance(data, str) else data)


def append_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows durably. A partial line left by a kill is removed first; a full disk leaves earlier rows valid."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = list(rows)
    known = _first_configuration(path) if any(row.get("kind") == "run" for row in rows) else set()
    text = memoryview("".join(_stated(rows, known)).encode(errors=_ERRORS))
    # no buffer of Python's between us and the file: what a full disk refused must not be written again on closing
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        end = _whole_length(path)
        os.ftruncate(descriptor, end)
        try:
            while text:
                text = text[os.write(descriptor, text) :]
            os.fsync(descriptor)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, end)
            error.filename = error.filename or str(path)
            raise
    finally:
        os.close(descriptor)


def _first_configuration(path: Path) -> set[str]:
    """The hash of the configuration that a file begins with, if it does: a cell's rows all have that one."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError), path.open("rb") as handle:
        row = json.loads(handle.readline(LONGEST_LINE))
        if row["kind"] == "configuration":
            return {row["hash"]}
    return set()


def _whole_length(path: Path) -> int:
    """Bytes up to and including the last line end."""
    size = path.stat().st_size
    with path.open("rb") as handle:
        position = size
        while position > 0:
            start = max(0, position - 65536)
            handle.seek(start)
            found = handle.read(position - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            position = start
    return 0


def write_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a whole file of rows atomically; compressed if its name ends in ``.gz``."""
    packed = Path(path).suffix == ".gz"
    with atomic_path(path) as temporary, temporary.open("wb") as plain:
        if not packed:
            plain.writelines(line.encode(errors=_ERRORS) for line in _stated(rows, set()))
            return
        # without name and time stamp, so that equal rows are equal files
        with gzip.GzipFile(filename="", mode="wb", fileobj=plain, mtime=0) as handle:
            handle.writelines(line.encode(errors=_ERRORS) for line in _stated(rows, set()))
