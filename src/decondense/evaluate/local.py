"""Benchmarks from local files: a folder a task, a file a split, the rows with the hub's field names.

    DIR/arc_easy/train.jsonl     DIR/arc_easy/test.jsonl     DIR/mmlu/test.parquet ...

A split is ``SPLIT.jsonl`` or ``SPLIT.json`` (compressed or not), ``SPLIT.parquet``, or the hub's own
``SPLIT-00000-of-00002.parquet``; ``all_SPLIT`` is the same (MMLU's subjects in one file, told apart by the column
``subject``). Files are looked for and checked before any model is loaded, and everything that is missing is listed at
once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
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
    """Of the content of all files, in the order of reading."""
    few_shot_split: str | None = None
    """The split that stands in for the official one; None: the official one is there, or none is needed."""

    def to_json(self) -> dict[str, Any]:
        """Plain data for the process that reads the files."""
        return asdict(self)


def find_tasks(
    directory: str | Path, tasks: Mapping[str, int | None], optional: Iterable[str] = ()
) -> tuple[dict[str, LocalTask], list[str]]:
    """The files of every task, checked; and the optional tasks that the directory does not have.

    Args:
        directory: the folder of folders.
        tasks: task -> number of examples in its prompts.
        optional: tasks that may be absent as a whole.

    Raises:
        EvaluationError: no such directory, missing files (all of them listed), rows without a needed field.
    """
    root = Path(directory).expanduser()
    if not root.is_dir():
        raise EvaluationError(f"{root} is not a directory; --data-dir names one with a folder for each task.")
    found: dict[str, LocalTask] = {}
    missing: list[str] = []
    absent: list[str] = []
    for name, shots in tasks.items():
        info = TASKS.get(name)
        folder = _folder(root, name, info)
        if folder is None and name in optional and info is not None and info.optional:
            absent.append(name)
            continue
        splits, lacking, stand_in = _splits(root, folder, name, info, shots or 0)
        missing += lacking
        if not lacking:
            found[name] = _checked(name, info, splits, stand_in)
    if missing:
        there = ", ".join(sorted(path.name for path in root.iterdir() if path.is_dir())) or "none"
        raise EvaluationError(
            f"{root} lacks {len(missing)} of the files that the tasks need:\n"
            + "\n".join(f"  {line}" for line in missing)
            + f"\nFolders there: {there}. Put the files there (.jsonl or .parquet, the hub's field names), or name "
            "only the tasks that are there with --tasks."
        )
    return found, absent


def _folder(root: Path, name: str, info: TaskInfo | None) -> Path | None:
    for candidate in (name, *(info.folders if info else ())):
        if (root / candidate).is_dir():
            return root / candidate
    return None


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
    """Split -> files, what is missing, and the split that stands in for the official examples."""
    shown = folder or root / name
    if info is None:
        if folder is None:
            hint = suggest(name, TASKS)
            return {}, [f"{shown}/ (a folder for the task{hint})"], None
        stems = {path.name.split(".")[0].split("-")[0] for path in folder.iterdir() if path.name.endswith(_SUFFIXES)}
        files = {split: split_files(folder, split) for split in sorted(stems)}
        return files, [] if files else [f"{shown}/SPLIT.jsonl"], None
    splits: dict[str, list[Path]] = {}
    missing: list[str] = []
    splits[info.split] = split_files(shown, info.split)
    if not splits[info.split]:
        missing.append(f"{shown / info.split}.jsonl (scored)")
    stand_in = None
    if shots and info.few_shot_split:
        examples = split_files(shown, info.few_shot_split)
        if not examples and info.stand_in:
            examples, stand_in = split_files(shown, info.stand_in), info.stand_in
        if examples:
            splits[stand_in or info.few_shot_split] = examples
        else:
            missing.append(f"{shown / info.few_shot_split}.jsonl (examples in the prompt)")
    return splits, missing, stand_in


def _checked(name: str, info: TaskInfo | None, splits: dict[str, list[Path]], stand_in: str | None) -> LocalTask:
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
            raise EvaluationError(f"{', '.join(map(str, files))}: no rows; {name} has nothing to read.")
    if check_rows(name, parts).converted:
        digest.update(b"converted")  # what was scored before the conversion was known is not kept
    return LocalTask(
        task=name,
        splits={split: [str(path.resolve()) for path in files] for split, files in splits.items()},
        rows=rows,
        hash=digest.hexdigest()[:16],
        few_shot_split=stand_in,
    )


def local_rows(task: str, splits: Mapping[str, Iterable[str]]) -> tuple[dict[str, list[BenchmarkRow]], tuple[str, ...]]:
    """Split -> rows as the harness reads them, and what was converted in them (:func:`check_rows`)."""
    files = [(split, path) for split, paths in splits.items() for path in paths]
    checked = check_rows(task, [(path, read_rows(Path(path))) for _, path in files])
    found: dict[str, list[BenchmarkRow]] = {split: [] for split in splits}
    for (split, _), rows in zip(files, checked.parts, strict=True):
        found[split] += rows
    return found, checked.notes


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of one file; a broken one is named with its line."""
    rows = []
    try:
        for number, row in read_records(path):
            if not isinstance(row, dict):
                raise EvaluationError(f"{path}, line {number}: expected an object with named fields.")
            rows.append(row)
    except PassageError as error:
        raise EvaluationError(str(error)) from error
    return rows
