"""Removes folders of this machine and credentials from what is written or printed.

Two rules apply to everything that is written into rows and ``study.yaml``:

- An absolute folder becomes its last part (``/home/me/data/text`` becomes ``text``); a relative one is unchanged.
- A URL loses its user, password, query and fragment; the value of an argument whose option names a token, key,
  secret or password is removed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_SCHEME = r"(?:(?:https?|ftp|s3|gs):/{1,3}|[A-Za-z][A-Za-z0-9+.-]{0,30}:/{2,3})"  # pathlib leaves one slash
# a URL ends where another begins, at a comma or quote or in its path; else its password may hold any character
_ENDED = rf"[^\s:@/?#]*(?:(?<![A-Za-z0-9+.-])|/(?:(?!{_SCHEME})[^\s?#])*)(?={_SCHEME})"
_URL = re.compile(rf"(?P<scheme>{_SCHEME})(?P<rest>{_ENDED}|\S+)")
_SECRET_NAME = re.compile(r"(?i)(token(?!s$|izer)|secret|passw|pwd|credential|api[-_]?key|access[-_]?key|signature)")
_TOKEN = re.compile(r"\b(hf_[A-Za-z0-9]{8,}|gh[pousr]_[A-Za-z0-9]{8,}|AKIA[A-Z0-9]{12,})\b")
_TEXT_KEYS = frozenset({"title", "question", "label", "name"})
"""Configuration keys that hold sentences and names, never a folder."""
_NAME = re.compile(r'-*(?:"[^"]*"|[\w.-])+')
"""An option, a configuration key or an environment variable before ``=``."""


def without_credentials(text: str) -> str:
    """``text`` with the user, password, query and fragment of every URL removed, and known kinds of tokens masked."""
    return _TOKEN.sub("***", _URL.sub(_bare, text))


def _bare(match: re.Match[str]) -> str:
    """A URL without user, password, query and fragment; ``***`` in place of what follows its scheme if these cannot be
    told apart."""
    scheme, rest = match["scheme"], match["rest"]
    shown = re.split(r"[?#]", rest, maxsplit=1)[0]
    host = shown.partition("/")[0]
    user = ":" in host or "@" in host  # or a port
    if "@" in rest[len(shown) :] and (user or shown == host):
        # it ends a password that holds ? or #, or is part of a query
        if rest.count("@") > 1 or ":" not in host or re.search(r"(:\d{1,5}|\])$", host):
            return f"{scheme}***"
        shown = re.split(r"[?#]", rest.rpartition("@")[2], maxsplit=1)[0]
    elif user:
        shown = shown.rpartition("@")[2]  # the last: a password may hold / and @
    return scheme + shown


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
    """(place, text) of every string of a configuration."""
    if isinstance(value, str):
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
        return without_credentials(value if key in _TEXT_KEYS else without_folder(value))
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
        shown.append("***" if hide else _shown(word))
        hide = not hide and "=" not in word and word.startswith("-") and bool(_SECRET_NAME.search(word))
    return shown


def _shown(word: str) -> str:
    name, equals, value = word.partition("=")
    if equals and "://" not in name and _SECRET_NAME.search(name):
        return f"{name}=***"
    if not equals or not _NAME.fullmatch(name):
        return without_credentials(without_folder(word))
    key, equals, _ = value.partition("=")
    if equals and _NAME.fullmatch(key):  # --set=KEY=VALUE
        return f"{name}={_shown(value)}"
    import yaml

    try:
        data = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError):
        data = value
    if isinstance(data, (dict, list)) or (isinstance(data, str) and data != value):  # JSON is YAML
        return f"{name}={json.dumps(publishable(data), ensure_ascii=False, default=str)}"
    return f"{name}={without_credentials(without_folder(value))}"
