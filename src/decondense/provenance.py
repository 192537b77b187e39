"""What made a row: versions, commit, machine, command. Rows may be published, so none of it names a folder or a secret.

Two rules hold for everything that is written into rows and into ``study.yaml``:

- An absolute folder becomes its last part (``/home/me/data/text`` is written ``text``); a relative one stays as given.
- A URL loses its user, password, query and fragment; an argument whose option is called after a token, key, secret or
  password loses its value.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("decondense", "torch", "transformers", "accelerate", "tokenizers", "numpy", "scipy")

COMMAND = "DECONDENSE_COMMAND"
"""Environment variable in which a process that starts workers tells them the command that the user gave."""

_URL = re.compile(r"\b(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<rest>[^\s\"'<>]+)")
_SECRET_NAME = re.compile(r"(?i)(token|secret|passw|pwd|credential|api[-_]?key|access[-_]?key|signature)")
_TOKEN = re.compile(r"\b(hf_[A-Za-z0-9]{8,}|gh[pousr]_[A-Za-z0-9]{8,}|AKIA[A-Z0-9]{12,})\b")
_TEXT_KEYS = frozenset({"title", "question", "label", "name"})
"""Keys of a configuration that hold sentences and names, never a folder."""


def without_credentials(text: str) -> str:
    """``text`` with the user, password, query and fragment of every URL removed, and known kinds of tokens masked."""

    def bare(match: re.Match[str]) -> str:
        rest = re.split(r"[?#]", match["rest"], maxsplit=1)[0]
        place, slash, path = rest.partition("/")
        return f"{match['scheme']}://{place.rpartition('@')[2]}{slash}{path}"

    return _TOKEN.sub("***", _URL.sub(bare, text))


def has_credentials(text: str) -> bool:
    """Whether a URL in ``text`` carries a user, a password or a query, or ``text`` a known kind of token."""
    return without_credentials(text) != text


def without_folder(word: str) -> str:
    """The last part of an absolute folder (also ``~/...`` and ``file:///...``); anything else as it is."""
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


def command_line() -> str | None:
    """The command that this process was started with, without the folders of this machine and without secrets."""
    words = publishable_words(sys.argv)
    if words and words[0] == "__main__.py":  # python -m decondense
        words[0] = "decondense"
    return " ".join(words) or None


@cache
def _git_commit() -> str | None:
    """Commit of the source tree that the package runs from, with ``+`` when files differ; None when installed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=10
        )
        dirty = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain", "--", "src"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if commit.returncode:
        return None
    return commit.stdout.strip() + ("+" if dirty.stdout.strip() else "")


@cache
def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def provenance(**extra: Any) -> dict[str, Any]:
    """What made a row: versions, commit, processor, time (UTC). ``extra`` adds, for example, the device."""
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "versions": versions,
        "commit": _git_commit(),
        "command": os.environ.get(COMMAND) or command_line(),
        **extra,
    }
