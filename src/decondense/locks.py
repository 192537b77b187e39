"""Locks of the operating system (flock), which are released when their process ends. Standard library only."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO


def open_lock(path: Path) -> IO[str]:
    """Open the file of a lock, which is made if it is missing.

    Raises:
        ValueError: there is a directory in its place.
    """
    try:
        return path.open("a")
    except IsADirectoryError as error:
        raise ValueError(
            f"{path} is a directory, but a lock needs a file there. Remove it and run the same command again."
        ) from error


def lock(handle: IO[str] | int, path: str | os.PathLike[str], *, wait: bool = False) -> None:
    """Lock an open file or directory until it is closed.

    Args:
        handle: the open file, or its descriptor.
        path: its name, for errors.
        wait: wait until the lock is free.

    Raises:
        BlockingIOError: another process has the lock.
        OSError: the file system does not support locks.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError as error:
        reason = f"{error.strerror}: this file system does not support locks (flock); choose a directory on another one"
        raise OSError(error.errno, reason, os.fspath(path)) from error
