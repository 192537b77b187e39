"""Checks directories that results are written to. Standard library only."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path


class OutputError(ValueError):
    """A directory that results must not be written to; the message names it and the remedy."""


def check_output(folder: str | os.PathLike[str], *owned: str, models: bool = False) -> None:
    """Refuse a directory of results before anything is written.

    The directory itself may be a symbolic link, because the user named it. A link inside it would redirect writing and
    removing to another place. Files that are replaced atomically need no check: the rename replaces a link, not its
    target.

    Args:
        folder: the directory; it need not exist.
        owned: names in it that are appended to, written into or removed, each with everything below it.
        models: models are saved there. safetensors and tokenizers encode the path in UTF-8, so its name must be UTF-8
            and Python's file system encoding must write it as such.

    Raises:
        OutputError: it contains a link, or its name is not UTF-8, or the locale uses another encoding.
    """
    if models:
        _check_utf8(os.path.abspath(folder))
    for name in owned:
        for link in _links(Path(folder, name)):
            raise OutputError(
                f"{link} is a symbolic link to {os.readlink(link)}: nothing is written or removed outside {folder}. "
                "Remove the link, or choose another directory with --out (which may be a link itself)."
            )


def _check_utf8(path: str) -> None:
    name = os.fsencode(path)
    try:
        name.decode()
    except UnicodeDecodeError:
        raise OutputError(
            f"{path}: models cannot be saved in a directory whose name is not UTF-8; choose another --out."
        ) from None
    if path.encode("utf-8", "surrogatepass") != name:
        raise OutputError(
            f"{path}: models cannot be saved in a directory of this name with the locale's encoding "
            f"({sys.getfilesystemencoding()}). Set PYTHONUTF8=1 or a UTF-8 locale (LC_ALL=C.UTF-8), or choose another "
            "--out."
        )


def _links(path: Path) -> Iterator[Path]:
    """Links at and below a path; they are not followed."""
    if path.is_symlink():
        yield path
    elif path.is_dir():
        for item in path.iterdir():
            yield from _links(item)
