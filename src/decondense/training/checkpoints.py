"""Checkpoints that a run may resume from: one counts only with a mark, and only if it matches what the mark lists.

The mark is the file ``COMPLETE``, written after everything else. It holds the step, an inventory of the checkpoint's
files (name, size, SHA-256) and the number and hash of the rows that the run had written up to that step. Resuming from
a checkpoint with a missing or changed file, or with truncated rows, would silently give different results; so such a
checkpoint is skipped, with the reason, in favour of an older one or of the start.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

from decondense.hashing import hash_file
from decondense.records import RecordError, atomic_write, read_json

COMPLETE = "COMPLETE"
"""Name of the file that makes a checkpoint one that a run may resume from."""

_WEIGHTS, _SHARDS = (".safetensors", ".distcp"), "pytorch_model"
"""Ends of the names of weights, and the beginning of the names under which FSDP saves them."""


class Checkpoint(NamedTuple):
    """A checkpoint whose files and rows are those of its mark."""

    step: int
    path: Path


def mark(folder: Path, step: int, rows: Path) -> None:
    """Say that ``folder`` is complete: its files are on the disk, and ``rows`` holds the rows up to ``step``."""
    (folder / COMPLETE).unlink(missing_ok=True)  # of a run that saved here before
    files = [
        {"name": str(path.relative_to(folder)), "size": path.stat().st_size, "sha256": _hash(path, flush=True)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
    count, digest = _rows_up_to(rows, step)
    inventory = {"step": step, "files": files, "rows": {"count": count, "sha256": digest}}
    atomic_write(folder / COMPLETE, json.dumps(inventory, indent=1))


def newest(folder: Path, rows: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint below ``folder`` that can be resumed from, and why newer ones with a mark cannot."""
    there = sorted(
        (
            (int(path.name.rsplit("-", 1)[1]), path)
            for path in folder.glob("checkpoint-*")
            if path.name.rsplit("-", 1)[1].isdecimal()
        ),
        reverse=True,
    )
    ignored: list[str] = []
    for step, path in there:
        reason = fault(path, step, rows)
        if reason is None:
            return Checkpoint(step, path), ignored
        if (path / COMPLETE).exists():  # without it, a kill in the middle of saving left it, as kills do
            ignored.append(f"{path.name} was not used: {reason}")
    return None, ignored


def fault(folder: Path, step: int, rows: Path) -> str | None:
    """Why a run must not resume from ``folder``; None: it may."""
    path = folder / COMPLETE
    if not path.is_file():
        return f"it was not finished (no file {COMPLETE})"
    if not path.stat().st_size:
        return f"its {COMPLETE} has no inventory (an earlier release wrote it)"
    try:
        inventory = read_json(path)
        files = {str(entry["name"]): (int(entry["size"]), str(entry["sha256"])) for entry in inventory["files"]}
        marked, kept = int(inventory["step"]), (int(inventory["rows"]["count"]), str(inventory["rows"]["sha256"]))
    except RecordError as error:
        return f"its {str(error).removeprefix(f'{folder}/').rstrip('.')}"
    except (ValueError, KeyError, TypeError, OverflowError) as error:  # int() of the infinity in 1e999 overflows
        return f"its {COMPLETE} is damaged ({type(error).__name__}: {error})"
    if marked != step:
        return f"its {COMPLETE} belongs to step {marked}"
    if not any(name.endswith(_WEIGHTS) or name.startswith(_SHARDS) for name in files):
        return f"its {COMPLETE} is damaged (it lists no weights)"
    try:
        for name, (size, _) in files.items():
            file = folder / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes instead of {size}"
        for name, (_, digest) in files.items():
            if _hash(folder / name) != digest:
                return f"{name} has changed since it was written"
    except OSError as error:
        return f"{error.filename or folder.name} cannot be read ({error.strerror or error})"
    count, digest = _rows_up_to(rows, step)
    if count != kept[0]:
        return f"{rows.name} has {count} rows up to step {step}, but the checkpoint was saved with {kept[0]}"
    if digest != kept[1]:
        return f"rows of {rows.name} up to step {step} have changed since the checkpoint was saved"
    return None


def discard(folder: Path, *, keep: Path | None = None) -> None:
    """Remove the checkpoints below ``folder`` but for ``keep`` and older ones."""
    for path in folder.glob("checkpoint-*"):
        number = path.name.rsplit("-", 1)[1]
        if keep is None or not number.isdecimal() or int(number) > int(keep.name.rsplit("-", 1)[1]):
            shutil.rmtree(path, ignore_errors=True)


def _hash(path: Path, *, flush: bool = False) -> str:
    if flush:
        with path.open("rb") as handle:
            os.fsync(handle.fileno())  # the mark must not reach the disk before what it marks
    return hash_file(path)


def _rows_up_to(path: Path, step: int) -> tuple[int, str]:
    """Number and hash of the whole lines that belong to ``step`` or an earlier one; run rows belong to none."""
    count, digest = 0, hashlib.sha256()
    try:
        data = path.read_bytes()
    except OSError:
        return 0, ""
    for line in data[: data.rfind(b"\n") + 1].split(b"\n"):
        try:
            at = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if isinstance(at, int) and at <= step:
            count += 1
            digest.update(line + b"\n")
    return count, digest.hexdigest()
