"""Who works on a cell: a lock on its folder that goes when its process goes."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path


class CellBusy(RuntimeError):
    """Another process is working on this cell."""


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Own the cell while the block runs. The lock is the operating system's: it goes when the process does."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CellBusy(f"{folder}: another process is training this cell.") from error
        except OSError as error:
            error.filename = error.filename or f"{folder / 'lock'} (a file system without locks? choose another one)"
            raise
        yield
