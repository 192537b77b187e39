"""Selects the files of one split of a local path, without metadata, and reports the files that are not read.

A directory is one of three things: a data set whose README.md declares ``configs`` (``datasets`` resolves the files of
a subset and a split); a directory written by ``save_to_disk``, which ``datasets`` reads itself; or a collection of
files whose split is in their names or folders, as on the hub.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from decondense.config import suggest
from decondense.corpora.columns import PassageError, TextWarning
from decondense.corpora.files import COMPRESSED, PARAGRAPHS, RECORDS, kind_of

_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_CANONICAL = {word: split for split, words in _SPLITS.items() for word in words}
_SPLIT_WORD = re.compile(rf"(?:^|[-._ 0-9/])({'|'.join(_CANONICAL)})(?=[-._ 0-9/]|$)")
# the hub's own name of a file; every word is a split there
_SHARD = re.compile(r"data/(\w+(?:[.-]\w+)*?)-\d{5}-of-\d{5}")
_METADATA = re.compile(
    r"((readme|licen[cs]e)([-._ ]\w{1,8})?|copying|notice|citation|contributing|changelog)"
    r"(\.(md|txt|rst|html|pdf|cff|bib))?"
    r"|(config|state|dataset_infos?|dataset_dict|croissant)\.json",
    re.IGNORECASE,
)
_NAMED = 5  # files in one message


@dataclass(frozen=True)
class LocalText:
    """The files of a local path that are read, in this order."""

    path: Path
    files: tuple[Path, ...]
    unreadable: tuple[Path, ...] = ()
    """Files of the directory in an unknown format."""
    unassigned: tuple[Path, ...] = ()
    """Files without a split in their names that are not read, because the requested split has files of its own."""
    other_splits: tuple[str, ...] = ()
    """Splits that are not read, because only files without a split in their names are."""

    @property
    def root(self) -> Path:
        """The directory below which the files are named."""
        return self.path if self.path.is_dir() else self.path.parent

    def warn(self) -> None:
        """Warn of files that are not read (:class:`~decondense.corpora.columns.TextWarning`)."""
        messages = [
            f"not read, {reason}: {named(files, self.root)}"
            for files, reason in ((self.unreadable, "no reader for them"), (self.unassigned, "they belong to no split"))
            if files
        ]
        if self.other_splits:
            messages.append(f"the files of its splits {', '.join(self.other_splits)} are not read")
        for message in messages:
            warnings.warn(f"{self.path}: {message}.", TextWarning, stacklevel=3)


def named(files: Sequence[Path], root: Path) -> str:
    """The names of the first files relative to a directory, and the number of further ones."""
    names = ", ".join(file.relative_to(root).as_posix() for file in files[:_NAMED])
    return names + (f" and {len(files) - _NAMED:,} more" if len(files) > _NAMED else "")


def data_files(path: Path) -> list[Path]:
    """The files below a directory without the hidden ones, sorted."""
    return sorted(
        file
        for file in path.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )


def is_saved(path: Path) -> bool:
    """Whether ``save_to_disk`` wrote a directory."""
    return (path / "dataset_dict.json").exists() or (path / "state.json").exists()


def find_text(path: Path, *, subset: str | None = None, split: str = "train") -> LocalText | None:
    """The files of one split of a local path; None where ``datasets`` itself must read the directory.

    Args:
        path: a file or a directory.
        subset: configuration of a data set whose README.md declares several.
        split: ``train`` includes files without a split in their names.

    Raises:
        PassageError: there is no such subset or split, or no file that can be read.
    """
    if not path.is_dir():
        for name, value, default in (("subset", subset, None), ("split", split, "train")):
            if value != default:
                raise PassageError(f"{name} {value!r} has no effect on {path}, which is a single file; omit it.")
        return LocalText(path, (path,))
    if is_saved(path):
        return None
    if "configs" in _card(path):
        return _declared(path, subset, split)
    if subset is not None:
        raise PassageError(f"{path} has no subset {subset!r}, because its README.md declares none; omit subset.")
    if not re.fullmatch(r"[\w.-]+", split):
        return None  # a slice: train[:10%]
    return _by_name(path, split)


def _card(path: Path) -> dict[str, Any]:
    """The YAML header of the data set's README.md."""
    try:
        text = (path / "README.md").read_text(encoding="utf-8-sig")
        front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
        header = yaml.safe_load(front.group(1)) if front else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError):
        return {}
    return header if isinstance(header, dict) else {}


def _declared(path: Path, subset: str | None, split: str) -> LocalText | None:
    """Files as the README.md declares them; None if ``datasets`` must read them or cannot resolve them."""
    import datasets

    # only releases that can run a script beside the data have this option
    known = inspect.signature(datasets.load_dataset_builder).parameters
    never: dict[str, Any] = {"trust_remote_code": False} if "trust_remote_code" in known else {}
    try:
        config = datasets.load_dataset_builder(str(path), subset, **never).config
        files = {str(name): [Path(file) for file in members] for name, members in config.data_files.items()}
    except Exception:  # the library raises a dozen unrelated types; opening the data set reports them
        return None
    if split not in files or _has_options(config) or not all(map(kind_of, files[split])):
        return None
    return LocalText(path, tuple(files[split]))


def _has_options(config: Any) -> bool:
    """Whether the configuration sets options of the reader (``sep``, ``field``, column names ...)."""
    never = {"name", "version", "data_dir", "data_files", "description", "features"}
    default = type(config)()
    return any(
        getattr(config, item.name) != getattr(default, item.name)
        for item in dataclasses.fields(config)
        if item.name not in never and (item.name, getattr(config, item.name)) != ("sep", "\t")
    )


def _by_name(path: Path, split: str) -> LocalText:
    everything = [file for file in data_files(path) if not _METADATA.fullmatch(file.name)]
    unreadable = tuple(file for file in everything if not kind_of(file))
    splits: dict[str, list[Path]] = {}
    unassigned: list[Path] = []
    for file in everything:
        if kind_of(file):
            name = split_of(file.relative_to(path))
            (unassigned if name is None else splits.setdefault(name, [])).append(file)
    if not splits and not unassigned:
        kinds = f"{', '.join((*PARAGRAPHS, *RECORDS))}, compressed ({', '.join(COMPRESSED)}) or not"
        beside = f" Its files cannot be read: {named(unreadable, path)}." if unreadable else ""
        raise PassageError(f"{path} holds no text file; expected {kinds}.{beside}")
    canonical = _CANONICAL.get(split, split)
    if canonical in splits:
        return LocalText(path, tuple(splits[canonical]), unreadable, tuple(unassigned))
    if canonical == "train" and unassigned:
        return LocalText(path, tuple(unassigned), unreadable, (), tuple(splits))
    if unassigned:
        splits.setdefault("train", unassigned)
    has = sorted(splits, key=lambda name: ([*_SPLITS, name].index(name), name))
    raise PassageError(
        f"{path} has no split {split!r}.{suggest(split, has)} It has: {', '.join(has)} (--split, corpus.split)."
    )


def split_of(file: Path) -> str | None:
    """The split in the name of a file or of one of its folders; None: there is none."""
    if shard := _SHARD.match(file.as_posix()):
        name = shard.group(1)
        if name in _CANONICAL or not _SPLIT_WORD.search(name):
            return _CANONICAL.get(name, name)
    words = _SPLIT_WORD.findall(file.as_posix())
    return _CANONICAL[words[-1]] if words else None  # the file's own word before that of a folder
