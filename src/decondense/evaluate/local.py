"""Benchmarks from local files: one folder per task, one file per split, rows with the hub's field names.

    DIR/arc_easy/train.jsonl     DIR/arc_easy/test.jsonl     DIR/mmlu/test.parquet ...

A split is ``SPLIT.jsonl`` or ``SPLIT.json`` (compressed or not), ``SPLIT.parquet``, or the hub's own
``SPLIT-00000-of-00002.parquet``; ``all_SPLIT`` is the same (MMLU's subjects in one file with a column ``subject``).
Files are checked before any model is loaded, and one message lists all that are missing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decondense.config import suggest
from decondense.corpora.columns import PassageError
from decondense.corpora.files import COMPRESSED, read_records
from decondense.evaluate.catalogue import TASKS, EvaluationError, TaskInfo
from decondense.evaluate.fields import BenchmarkRow, check_rows

# not CSV: there every value is a string, and a label need not be one
_SUFFIXES = (
    ".jsonl",
    ".json",
    ".parquet",
    *(f"{kind}{suffix}" for kind in (".jsonl", ".json") for suffix in COMPRESSED),
)


@dataclass(frozen=True)
class LocalTask:
    """The files of one task that will be read."""

    task: str
    splits: dict[str, list[str]]
    """Split -> files."""
    rows: dict[str, int]
    """Split -> rows."""
    hash: str
    """Hash of the content of all files, in the order of reading."""
    few_shot_split: str | None = None
    """The split that replaces the official one for examples; None: the official one exists, or none is needed."""


def find_tasks(
    directory: str | Path, tasks: Mapping[str, int | None], optional: Iterable[str] = ()
) -> tuple[dict[str, LocalTask], list[str]]:
    """The files of every task, checked; and the optional tasks that the directory does not have.

    Args:
        directory: directory with a folder per task.
        tasks: task -> number of examples in its prompts.
        optional: tasks that may be absent as a whole.

    Raises:
        EvaluationError: no such directory, missing files (all of them listed), rows without a needed field.
    """
    root = Path(directory).expanduser()
    if not root.is_dir():
        raise EvaluationError(f"{root} is not a directory; --data-dir needs a directory with one folder per task.")
    local: dict[str, LocalTask] = {}
    missing: list[str] = []
    absent: list[str] = []
    for name, shots in tasks.items():
        info = TASKS.get(name)
        candidates = (root / folder for folder in (name, *(info.folders if info else ())))
        folder = next((candidate for candidate in candidates if candidate.is_dir()), None)
        if folder is None and name in optional and info is not None and info.optional:
            absent.append(name)
            continue
        splits, lacking, stand_in = _splits(root, folder, name, info, shots or 0)
        missing += lacking
        if not lacking:
            local[name] = _checked(name, splits, stand_in)
    if missing:
        folders = ", ".join(sorted(path.name for path in root.iterdir() if path.is_dir())) or "none"
        raise EvaluationError(
            f"{root} lacks {len(missing)} of the files that the tasks need:\n"
            + "\n".join(f"  {line}" for line in missing)
            + f"\nFolders there: {folders}. Put the files there (.jsonl or .parquet, the hub's field names), or name "
            "only the tasks that are there with --tasks."
        )
    return local, absent


def split_files(folder: Path, split: str) -> list[Path]:
    """The files of a split in the order of reading; empty when there are none."""
    for stem in (split, f"all_{split}"):
        for suffix in _SUFFIXES:
            if (folder / f"{stem}{suffix}").is_file():
                return [folder / f"{stem}{suffix}"]
        for suffix in _SUFFIXES:
            if parts := sorted(folder.glob(f"{stem}-*-of-*{suffix}")):
                return parts
    return []


def _splits(
    root: Path, folder: Path | None, name: str, info: TaskInfo | None, shots: int
) -> tuple[dict[str, list[Path]], list[str], str | None]:
    """Split -> files, the missing files, and the split that replaces the official one for examples."""
    place = folder or root / name
    if info is None:
        if folder is None:
            return {}, [f"{place}/ (a folder for the task{suggest(name, TASKS)})"], None
        stems = {path.name.split(".")[0].split("-")[0] for path in folder.iterdir() if path.name.endswith(_SUFFIXES)}
        files = {split: split_files(folder, split) for split in sorted(stems)}
        return files, [] if files else [f"{place}/SPLIT.jsonl"], None
    splits = {info.split: split_files(place, info.split)}
    missing = [] if splits[info.split] else [f"{place / info.split}.jsonl (scored)"]
    stand_in = None
    if shots and info.few_shot_split:
        examples = split_files(place, info.few_shot_split)
        if not examples and info.stand_in:
            examples, stand_in = split_files(place, info.stand_in), info.stand_in
        if examples:
            splits[stand_in or info.few_shot_split] = examples
        else:
            missing.append(f"{place / info.few_shot_split}.jsonl (examples in the prompt)")
    return splits, missing, stand_in


def _checked(name: str, splits: dict[str, list[Path]], stand_in: str | None) -> LocalTask:
    digest = hashlib.sha256()
    rows: dict[str, int] = {}
    parts = []
    for split, files in splits.items():
        rows[split] = 0
        for path in files:
            digest.update(split.encode())
            digest.update(path.read_bytes())
            parts.append((str(path), read_rows(path)))
            rows[split] += len(parts[-1][1])
        if not rows[split]:
            raise EvaluationError(
                f"{', '.join(map(str, files))}: no rows, so {name} cannot be scored; add rows, or omit it with --tasks."
            )
    if check_rows(name, parts).converted:
        digest.update(b"converted")  # older results of the unconverted rows are not reused
    return LocalTask(
        task=name,
        splits={split: [str(path.resolve()) for path in files] for split, files in splits.items()},
        rows=rows,
        hash=digest.hexdigest()[:16],
        few_shot_split=stand_in,
    )


def local_rows(task: str, splits: Mapping[str, Iterable[str]]) -> tuple[dict[str, list[BenchmarkRow]], tuple[str, ...]]:
    """Split -> rows as the harness reads them, and the notes of :func:`check_rows`."""
    files = [(split, path) for split, paths in splits.items() for path in paths]
    checked = check_rows(task, [(path, read_rows(Path(path))) for _, path in files])
    rows_of: dict[str, list[BenchmarkRow]] = {split: [] for split in splits}
    for (split, _), rows in zip(files, checked.parts, strict=True):
        rows_of[split] += rows
    return rows_of, checked.notes


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of one file; an error names the line."""
    try:
        records = list(read_records(path))
    except PassageError as error:
        raise EvaluationError(str(error)) from error
    for number, row in records:
        if not isinstance(row, dict):
            raise EvaluationError(f"{path}, line {number}: expected an object with named fields.")
    return [row for _, row in records]
