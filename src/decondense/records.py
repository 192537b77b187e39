"""Result rows: plain dictionaries with a schema, in append-only JSON lines, written so that a kill loses nothing.

Everything that a table, a figure or a report shows is computed from these rows; nothing is ever parsed from a folder
name. What differs between two runs of the same thing (clock readings, versions, devices) lives under the two keys
``timing`` and ``provenance``, so that :func:`stable` can compare the rest. No torch here.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timezone
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

SCHEMA_VERSION = 1
VOLATILE = ("timing", "provenance")

Row = dict[str, Any]


class RecordError(ValueError):
    """A row or a file of rows that cannot be used; the message names the file and the line."""


class _Base(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kind: str
    schema_version: int = SCHEMA_VERSION

    @field_validator("schema_version")
    @classmethod
    def _readable(cls, version: int) -> int:
        if version > SCHEMA_VERSION:
            raise ValueError(f"written by a newer decondense (schema {version}, this one reads up to {SCHEMA_VERSION})")
        return version


class _CellRow(_Base):
    study: str
    study_fingerprint: str
    arm: str
    seed: int


class RunRow(_CellRow):
    """The life of one cell (arm x seed). Only a row with a terminal status makes a cell done."""

    kind: Literal["run"]
    status: Literal["started", "resumed", "finished", "failed"]
    config: dict[str, Any]
    """The full study configuration of this cell (arm resolved)."""
    init_hash: str | None = None
    """Hash of the weights that training started from."""
    order_hash: str | None = None
    """Hash of the token sequences in the order in which training reads them."""
    corpus_hash: str | None = None
    parameters: int | None = None
    steps: int | None = None
    tokens: int | None = None
    final_hash: str | None = None
    """Hash of the trained weights."""
    learning_rate: float | None = None
    """Peak learning rate of the run: the study's, the arm's, or the one that the sweep chose."""
    error: str | None = None
    timing: dict[str, Any] = {}
    provenance: dict[str, Any] = {}


class TrialRow(_CellRow):
    """One learning rate tried for an arm, with a seed of its own, before anything is compared."""

    kind: Literal["trial"]
    status: Literal["finished", "failed"]
    learning_rate: float
    steps: int
    value: float | None = None
    """Loss on the held-out documents that are set aside for this choice, in nats a token."""
    chosen: bool = False
    """Whether the arm's runs take this rate."""
    error: str | None = None
    timing: dict[str, Any] = {}
    provenance: dict[str, Any] = {}


class StepRow(_CellRow):
    """Training metrics at an optimizer step, averaged since the previous such row."""

    kind: Literal["step"]
    step: int
    tokens: int
    loss: float
    """Cross-entropy in nats a token, without the auxiliary term."""
    learning_rate: float
    gradient_norm: float | None = None
    dispersion: float | None = None
    """Value of the dispersion loss (before its weight), mean over layers."""
    dispersion_weight: float | None = None
    distillation: float | None = None
    """Value of the distillation loss (before its weight)."""
    timing: dict[str, Any] = {}


class ProfileRow(_CellRow):
    """Condensation of a checkpoint: see ``decondense.Profile``."""

    kind: Literal["profile"]
    step: int
    tokens: int
    layers: list[str]
    mean_cosine: list[float]
    spearman: float | None
    kendall: float | None
    passages: int
    passage_tokens: int
    norms: list[float] | None = None
    histogram: list[list[int]] | None = None
    """Pooled pair counts, one list a layer, equal bins on [-1, 1]."""
    timing: dict[str, Any] = {}

    @model_validator(mode="after")
    def _one_value_a_layer(self) -> ProfileRow:
        if not self.layers:
            raise ValueError("a profile has at least one layer")
        for name in ("mean_cosine", "norms", "histogram"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.layers):
                raise ValueError(f"{name} has {len(values)} values for {len(self.layers)} layers")
        return self


class EvalRow(_CellRow):
    """One score of a checkpoint."""

    kind: Literal["eval"]
    step: int
    tokens: int
    task: str
    metric: str
    value: float
    higher_is_better: bool
    items: int
    stderr: float | None = None
    """Standard error over the items."""
    official_items: int | None = None
    """Items that the benchmark has officially; None: no benchmark, or not known."""
    limit: int | None = None
    """Items at most that were asked for; None: all."""
    shots: int | None = None
    """Examples in the prompt."""
    notes: list[str] = []
    """What qualifies the value, in words; every table shows them."""
    timing: dict[str, Any] = {}


class EvalItemRow(_CellRow):
    """One item's score of the final checkpoint, so that arms can be paired item by item."""

    kind: Literal["eval_item"]
    step: int
    task: str
    metric: str
    item: str
    """Hash of the item's content: equal items have equal names in every run."""
    value: float
    weight: float = 1.0
    """What the item counts for in the task's mean (tokens of a document, 1 for a question)."""
    bits_per_byte: float | None = None
    """Minus log2 of the right answer's probability over its bytes; None: not known, or not the task's first metric."""
    margin_bits: float | None = None
    """log2 of the right answer's probability less that of the best wrong one; positive where the item is right."""


class BenchmarkRow(_Base):
    """One measurement of a benchmark program."""

    kind: Literal["benchmark"]
    name: str
    variant: str
    params: dict[str, Any]
    metrics: dict[str, Any]
    provenance: dict[str, Any]


_KINDS: dict[str, type[_Base]] = {
    "run": RunRow,
    "trial": TrialRow,
    "step": StepRow,
    "profile": ProfileRow,
    "eval": EvalRow,
    "eval_item": EvalItemRow,
    "benchmark": BenchmarkRow,
}


def _plain(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null, so that any reader can open a file of rows."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def make_row(kind: str, **fields: Any) -> Row:
    """A validated row as a plain dictionary; a wrong field raises :class:`RecordError` naming it."""
    if kind not in _KINDS:
        raise RecordError(f"unknown row kind {kind!r}; known: {', '.join(_KINDS)}.")
    try:
        # floats that JSON cannot hold are only allowed where the schema allows null
        return _KINDS[kind].model_validate({"kind": kind, **_plain(fields)}).model_dump(mode="json")
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"{part}: " for part in first["loc"])
        # our own messages say what they need of the value, which may be the whole row
        got = "" if first["type"] == "value_error" else f" (got {first['input']!r})"
        raise RecordError(f"{kind} row: {place}{first['msg'].removeprefix('Value error, ')}{got}.") from error


def check_row(row: Mapping[str, Any], *, where: str = "row") -> Row:
    """Validate a row that was read; the message names ``where``."""
    fields = dict(row)
    try:
        return make_row(str(fields.pop("kind", None)), **fields)
    except RecordError as error:
        raise RecordError(f"{where}: {error}") from error


def stable(row: Mapping[str, Any]) -> Row:
    """The row without what differs between two runs of the same thing (clock readings, machine)."""
    return {key: value for key, value in row.items() if key not in VOLATILE}


def terminal_row(rows: Iterable[Row]) -> Row | None:
    """The row that ends a cell (finished or failed), or None while there is work left."""
    ended = [row for row in rows if row["kind"] == "run" and row["status"] in ("finished", "failed")]
    return ended[-1] if ended else None


# --------------------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------------------


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that replaces it when the block ends well, and vanishes when it does not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files private; an output file is not
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def atomic_write(path: str | Path, data: str | bytes) -> None:
    """Write a whole file or leave what was there."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def append_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows durably. A torn line left by a kill is cut off first; a full disk leaves the earlier rows valid."""
    text = memoryview("".join(_line(row) for row in rows).encode())
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # no buffer of Python's between us and the file: what a full disk refused must not be written again on closing
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        end = _whole_length(path)
        os.ftruncate(descriptor, end)
        try:
            while text:
                text = text[os.write(descriptor, text) :]
            os.fsync(descriptor)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, end)
            error.filename = error.filename or str(path)
            raise
    finally:
        os.close(descriptor)


def _whole_length(path: Path) -> int:
    """Bytes up to and including the last line end."""
    size = path.stat().st_size
    with path.open("rb") as handle:
        position = size
        while position > 0:
            start = max(0, position - 65536)
            handle.seek(start)
            found = handle.read(position - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            position = start
    return 0


def write_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a whole file of rows atomically; compressed when it is called ``.gz``."""
    text = "".join(_line(row) for row in rows).encode()
    # without a time stamp, so that equal rows are equal files
    atomic_write(path, gzip.compress(text, mtime=0) if Path(path).suffix == ".gz" else text)


def read_rows(path: str | Path, *, check: bool = True) -> list[Row]:
    """All rows of a file, ``.gz`` or not. A torn last line (a kill while writing) is dropped; any other raises."""
    path = Path(path)
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
    except (OSError, EOFError) as error:
        raise RecordError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}).") from error
    lines = data.split(b"\n")
    rows: list[Row] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("a row is a JSON object")
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break
            raise RecordError(f"{path}, line {number}: is no row ({error}).") from error
        rows.append(check_row(row, where=f"{path}, line {number}") if check else row)
    return rows


# --------------------------------------------------------------------------------------------------------------------
# Provenance
# --------------------------------------------------------------------------------------------------------------------

_PACKAGES = ("decondense", "torch", "transformers", "accelerate", "tokenizers", "numpy", "scipy")


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


def _without_folders(word: str) -> str:
    """An argument as it goes into a row: a row may be published, and folders of a machine are nobody's business."""
    return Path(word).name if Path(word).is_absolute() else word


COMMAND = "DECONDENSE_COMMAND"
"""Environment variable in which a process that starts workers tells them what was asked for."""


def command_line() -> str | None:
    """The command that this process was started with, without the folders of this machine."""
    words = [_without_folders(word) for word in sys.argv]
    if words and words[0] == "__main__.py":  # python -m decondense
        words[0] = "decondense"
    return " ".join(words) or None


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
