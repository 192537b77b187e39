"""The file of rows of one run, checked against the hash that its terminal row carries."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from decondense.records.reading import read_rows
from decondense.records.schema import RecordError, Row, stable, terminal_row

_EMPTY: tuple[object, ...] = (None, [], {})
_STAMPED: dict[Path, tuple[tuple[int, ...], bool]] = {}
"""Of each file that was read here: its stamp then, and whether it held what it should."""


def rows_hash(rows: Iterable[Row]) -> str:
    """SHA-256 of what a run measured: its rows but for run rows, in their order, without clock readings and machine.

    Empty fields do not count, so that rows keep their hash when a later release adds a field that is empty in them.
    """
    found = hashlib.sha256()
    # as files of rows are written: what their text cannot hold must not count
    encoded = json.JSONEncoder(sort_keys=True, ensure_ascii=False, allow_nan=False).encode
    for row in rows:
        if row["kind"] != "run":
            kept = {key: value for key, value in stable(row).items() if value not in _EMPTY}
            found.update(encoded(kept).encode(errors="replace") + b"\n")
    return found.hexdigest()


def read_run(path: str | Path) -> list[Row]:
    """All rows of one run's file; once it has ended, they must be the rows that it ended with.

    The hash is computed once for each state of the file. Files of earlier releases have none.

    Raises:
        RecordError: the file cannot be read, or its rows are not those that the run ended with.
    """
    path = Path(path)
    stamp = _stamp(path)  # before reading: what is written meanwhile is checked the next time
    known = _STAMPED.get(path) == (stamp, True)
    _STAMPED[path] = (stamp, known)
    rows = read_rows(path)
    if not known:
        end = terminal_row(rows)
        expected = None if end is None else end["rows_hash"]
        if expected is not None and rows_hash(rows) != expected:
            raise RecordError(f"{path}: its rows have changed since the run ended.")
        _STAMPED[path] = (stamp, True)
    return rows


def set_aside(path: Path) -> str:
    """Move a damaged file of rows out of the way, for the run to start again; what became of it, as a sentence."""
    kept = path.with_suffix(".damaged")
    path.replace(kept)
    return f"The file is kept as {kept.name}"


def is_whole(path: str | Path) -> bool:
    """Whether :func:`read_run` accepts a file; a file is read again only when it has changed."""
    path = Path(path)
    stamp, whole = _STAMPED.get(path, ((), False))
    if stamp and stamp == _stamp(path):
        return whole
    try:
        read_run(path)
    except RecordError:
        return False
    return True


def _stamp(path: Path) -> tuple[int, ...]:
    """Changes with the file's content; empty: there is none."""
    try:
        status = path.stat()
    except OSError:
        return ()
    return (status.st_mtime_ns, status.st_size, status.st_ino)
