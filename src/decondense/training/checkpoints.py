"""The folder of a cell: who works on it, and which of its checkpoints count."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path

from decondense.training.trainer import is_main_process

COMPLETE = "COMPLETE"
"""Name of the file that makes a checkpoint one to resume from."""


class CellBusy(RuntimeError):
    """Another process is working on this cell."""


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Own the cell while the block runs. The lock is the operating system's: it goes when the process does."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CellBusy(f"{folder}: another process is training this cell.") from error
        yield


def newest_checkpoint(folder: Path) -> tuple[int, Path] | None:
    """Step and folder of the newest checkpoint that counts."""
    complete = [
        (int(path.name.rsplit("-", 1)[1]), path)
        for path in folder.glob("checkpoint-*")
        if (path / COMPLETE).exists() and path.name.rsplit("-", 1)[1].isdigit()
    ]
    return max(complete, default=None)


def discard_checkpoints(folder: Path) -> None:
    """Remove all checkpoints of a cell; on the main process only."""
    if is_main_process():
        for path in folder.glob("checkpoint-*"):
            shutil.rmtree(path, ignore_errors=True)
