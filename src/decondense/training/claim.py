"""Who works on a cell: a lock on its folder that goes when its process goes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from decondense.locks import lock, open_lock


class CellBusy(RuntimeError):
    """Another process is working on this cell."""


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Own the cell while the block runs. The lock is the operating system's: it goes when the process does.

    Raises:
        CellBusy: another process owns it.
        ValueError: a directory is where its lock should be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open_lock(folder / "lock") as handle:
        try:
            lock(handle, handle.name)
        except BlockingIOError as error:
            raise CellBusy(f"{folder}: another process is training this cell; wait for it, or stop it.") from error
        yield
