"""Removes folders of this machine and credentials from what is written or printed.

Two rules apply to everything that is written into rows and ``study.yaml``:

- An absolute folder becomes its last part (``/home/me/data/text`` becomes ``text``); a relative one is unchanged.
- A URL loses its user, password, query and fragment; the value of an argument whose option names a token, key,
  secret or password is removed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_URL = re.compile(r"\b(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<rest>[^\s\"'<>]+)")
_SECRET_NAME = re.compile(r"(?i)(token|secret|passw|pwd|credential|api[-_]?key|access[-_]?key|signature)")
_TOKEN = re.compile(r"\b(hf_[A-Za-z0-9]{8,}|gh[pousr]_[A-Za-z0-9]{8,}|AKIA[A-Z0-9]{12,})\b")
_TEXT_KEYS = frozenset({"title", "question", "label", "name"})
"""Configuration keys that hold sentences and names, never a folder."""


def without_credentials(text: str) -> str:
    """``text`` with the user, password, query and fragment of every URL removed, and known kinds of tokens masked."""

    def bare(match: re.Match[str]) -> str:
        rest = re.split(r"[?#]", match["rest"], maxsplit=1)[0]
        place, slash, path = rest.partition("/")
        return f"{match['scheme']}://{place.rpartition('@')[2]}{slash}{path}"

    return _TOKEN.sub("***", _URL.sub(bare, text))


def has_credentials(text: str) -> bool:
    """Whether a URL in ``text`` has a user, a password or a query, or ``text`` contains a known kind of token."""
    return without_credentials(text) != text


def without_folder(word: str) -> str:
    """The last part of an absolute folder (also ``~/...`` and ``file:///...``); anything else unchanged."""
    path = re.sub(r"^file://", "", word)
    if "\n" in path or not (path.startswith(("/", "~")) or re.match(r"[A-Za-z]:[\\/]", path)):
        return word
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1] or "/"


def strings(value: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """(place, text) of every string of a configuration that may name a folder or a URL."""
    if isinstance(value, str):
        if not (place and place[-1] in _TEXT_KEYS):
            yield place, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from strings(item, (*place, str(key)))
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from strings(item, (*place, str(number)))


def publishable(value: Any, key: str = "") -> Any:
    """A configuration as plain data without folders of this machine and without credentials."""
    if isinstance(value, str):
        return value if key in _TEXT_KEYS else without_credentials(without_folder(value))
    if isinstance(value, Mapping):
        return {str(name): publishable(item, str(name)) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [publishable(item, key) for item in value]
    return value


def publishable_words(words: Sequence[str]) -> list[str]:
    """The words of a command without folders of this machine and without secrets."""
    shown: list[str] = []
    hide = False
    for word in words:
        name, equals, value = word.partition("=")
        if hide:
            shown.append("***")
        elif equals and _SECRET_NAME.search(name) and "://" not in name:
            shown.append(f"{name}=***")
        elif equals and "://" not in name and not name.startswith("/"):
            shown.append(f"{name}={without_credentials(without_folder(value))}")
        else:
            shown.append(without_credentials(without_folder(word)))
        hide = not hide and not equals and word.startswith("-") and bool(_SECRET_NAME.search(word))
    return shown
