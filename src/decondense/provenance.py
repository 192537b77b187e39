"""The origin of a row: versions, commit, machine, command. Rows may be published (:mod:`decondense.privacy`)."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from decondense.privacy import publishable_words

_PACKAGES = ("decondense", "torch", "transformers", "accelerate", "tokenizers", "numpy", "scipy")

COMMAND = "DECONDENSE_COMMAND"
"""Environment variable that passes the user's command from a process to the workers that it starts."""


def command_line() -> str | None:
    """The command that this process was started with, without the folders of this machine and without secrets."""
    words = publishable_words(sys.argv)
    if words and words[0] == "__main__.py":  # python -m decondense
        words[0] = "decondense"
    # a name that is not UTF-8 has bytes that no text file can hold
    return " ".join(words).encode("utf-8", "backslashreplace").decode() or None


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
    """The origin of a row: versions, commit, processor, time (UTC). ``extra`` adds, for example, the device."""
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
