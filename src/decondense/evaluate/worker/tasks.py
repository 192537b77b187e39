"""The harness's tasks on the hub's rows or on local ones, checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import lm_eval.tasks
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask

from decondense.config import suggest
from decondense.evaluate.catalogue import TASKS, EvaluationError, spread
from decondense.evaluate.fields import check_rows
from decondense.evaluate.local import local_rows

_download = ConfigurableTask.download


def _download_without_code(task: Any, dataset_kwargs: dict[str, Any] | None = None, **more: Any) -> None:
    """The harness's download for every task; some of its definitions allow their data set to run a script."""
    options = dict(dataset_kwargs or {})
    if "trust_remote_code" in options or not callable(task.config.custom_dataset):
        options["trust_remote_code"] = False
    task.config.dataset_kwargs = options
    _download(task, options, **more)


ConfigurableTask.download = _download_without_code
# for tasks that load their data in their own way; only older releases of datasets know the name
datasets.config.HF_DATASETS_TRUST_REMOTE_CODE = False

Loader = Callable[..., Mapping[str, Any]]
"""What the harness calls for a data set: split -> rows."""


@dataclass(frozen=True)
class LoadedTask:
    """A benchmark that is ready to be scored."""

    name: str
    parts: list[Any]
    """The harness's task objects: one, or those of a group."""
    grouped: bool
    counts: list[int]
    """Items to score of each part."""
    notes: tuple[str, ...]
    """Conversions of its rows."""

    @property
    def sizes(self) -> list[int]:
        """Items of each part, scored or not."""
        return [len(task.eval_docs) for task in self.parts]


class Tasks:
    """The harness's tasks by name, on the hub's data or on local files."""

    def __init__(self, names: Sequence[str]) -> None:
        base = Path(lm_eval.tasks.__file__).parent
        folders = sorted({base / TASKS[name].harness_folder for name in names if name in TASKS})
        # reading every definition of the harness takes seconds; the paper's are in a few folders
        narrow = all(name in TASKS for name in names) and all(folder.is_dir() for folder in folders)
        self.manager = (
            lm_eval.tasks.TaskManager(include_defaults=False, include_path=[str(folder) for folder in folders])
            if narrow
            else lm_eval.tasks.TaskManager()
        )
        for name in names:
            if name not in self.manager.task_index:
                raise EvaluationError(
                    f"the harness {lm_eval.__version__} has no task {name!r}.{suggest(name, self.manager.all_tasks)}"
                )

    def kind(self, name: str) -> str:
        """``TASK``, ``GROUP`` or ``TAG``, ... of a name."""
        return str(self.manager.task_index[name].kind.name)

    def leaves(self, name: str) -> list[str]:
        """The tasks that a name stands for, in the harness's order."""
        entry = self.manager.task_index[name]
        if self.kind(name) == "TAG":
            return sorted(entry.tags)
        if self.kind(name) != "GROUP":
            return [name]
        members = entry.cfg["task"] if isinstance(entry.cfg["task"], list) else [entry.cfg["task"]]
        if not all(isinstance(member, str) for member in members):
            raise EvaluationError(f"{name} is a group with its own definitions; name its tasks one by one.")
        return [leaf for member in members for leaf in self.leaves(member)]

    def group(self, name: str) -> Any:
        """A new group that aggregates the parts of a name; None for a single task."""
        if self.kind(name) != "GROUP":
            return None
        config = self.manager.task_index[name].cfg
        return Group.from_config(
            {"group": name, **{key: config.get(key) for key in ("aggregate_metric_list", "metadata")}}
        )

    def load(self, name: str, local: dict[str, Any] | None, shots: int | None, limit: int | None) -> LoadedTask:
        """The task objects of a name, with checked rows.

        Raises:
            EvaluationError: rows that the harness cannot score; the message names the row, the value and the remedy.
        """
        leaves, kind = self.leaves(name), self.kind(name)
        if kind == "TAG":
            raise EvaluationError(f"{name} is a label of several tasks; name them: {', '.join(leaves)}.")
        definition: Any = name
        notes: tuple[str, ...] = ()
        if local is not None:
            overrides, notes = self._local(name, leaves, local, shots)
            definition = {"group": "local", "task": overrides}
        elif name in TASKS:
            overrides, notes = self._hub(name, leaves, shots)
            definition = {"group": "hub", "task": overrides}
        tasks = self._built(name, definition)
        sizes = [len(task.eval_docs) for task in tasks]
        if limit is None:
            counts = sizes
        else:
            counts = spread(limit, sizes) if kind == "GROUP" else [min(limit, size) for size in sizes]
        if name not in TASKS:
            for task, count in zip(tasks, counts, strict=True):
                _check_documents(task, count)
        return LoadedTask(name, tasks, kind == "GROUP", counts, notes)

    def _built(self, name: str, definition: Any) -> list[Any]:
        try:
            return list(self.manager.load([definition])["tasks"].values())
        except Exception as error:
            if is_about_data(error):
                raise
            # the harness renders the first row when it makes a task; its template or function may raise anything
            raise EvaluationError(
                f"the harness cannot read the rows of {name} ({type(error).__name__}: {error}). Give them with the "
                "fields that the task's definition names."
            ) from error

    def _local(
        self, name: str, leaves: list[str], local: dict[str, Any], shots: int | None
    ) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
        rows, notes = local_rows(name, local["splits"])
        if name not in TASKS or "subject" not in TASKS[name].fields:
            return [self._override(leaf, _loader(rows), local, shots) for leaf in leaves], notes
        subject_of = {leaf: self.manager.task_index[leaf].cfg.get("dataset_name") for leaf in leaves}
        subjects = {row["subject"] for part in rows.values() for row in part}
        unknown = sorted(subjects - set(subject_of.values()))
        if unknown:  # their rows would be dropped silently
            raise EvaluationError(
                f"rows of subjects that the harness does not know: {', '.join(map(repr, unknown[:5]))}."
                f"{suggest(str(unknown[0]), map(str, subject_of.values()))}"
            )
        overrides = []
        for leaf, subject in subject_of.items():
            if subject in subjects:
                own = {split: [row for row in part if row["subject"] == subject] for split, part in rows.items()}
                overrides.append(self._override(leaf, _loader(own), local, shots))
        return overrides, notes

    def _override(self, leaf: str, loader: Loader, local: dict[str, Any], shots: int | None) -> dict[str, Any]:
        config = self.manager.task_index[leaf].cfg
        splits = set(local["splits"])
        scored = config.get("test_split") or config.get("validation_split")
        override: dict[str, Any] = {"task": leaf, "custom_dataset": loader}
        if scored not in splits:
            raise EvaluationError(
                f"{leaf} is scored on the split {scored!r}, but the data have only {', '.join(sorted(splits))}."
            )
        for key in ("training_split", "validation_split", "fewshot_split"):
            if config.get(key) not in splits and (key != "fewshot_split" or config.get(key) is not None):
                override[key] = None
        examples = (config.get("fewshot_split") or config.get("training_split")) if shots else None
        if local["few_shot_split"]:
            # named, so that the harness never takes the question itself as its example
            override["fewshot_split"] = local["few_shot_split"]
        elif examples and examples not in splits:
            raise EvaluationError(
                f"{leaf} takes its examples from {examples!r}, but the data have only {', '.join(sorted(splits))}."
            )
        return override

    def _hub(self, name: str, leaves: list[str], shots: int | None) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
        """The hub's rows, converted if necessary: a mirror of a data set may be another release."""
        info = TASKS[name]
        splits = [info.split, *([info.few_shot_split] if shots and info.few_shot_split else [])]
        columns = {field.partition(".")[0] for field in info.fields}
        loaded: dict[str, Any] = {}
        parts: list[tuple[str, list[dict[str, Any]]]] = []
        for leaf in leaves:
            config = self.manager.task_index[leaf].cfg
            path, subset = config["dataset_path"], config.get("dataset_name")
            # some definitions of the harness allow their data set to run a script
            options = {**(config.get("dataset_kwargs") or {}), "trust_remote_code": False}
            loaded[leaf] = datasets.load_dataset(path, name=subset, **options)
            for split in splits:
                where = f"{path}{f' ({subset})' if subset else ''}, split {split}"
                if split not in loaded[leaf]:
                    raise EvaluationError(f"{where}: there is no such split; there are {', '.join(loaded[leaf])}.")
                rows = loaded[leaf][split]
                parts.append((where, rows.select_columns([c for c in rows.column_names if c in columns]).to_list()))
        checked = check_rows(name, parts)
        if checked.converted:
            converted = iter(checked.parts)
            for leaf, data in loaded.items():
                loaded[leaf] = {**data, **{split: datasets.Dataset.from_list(next(converted)) for split in splits}}
        return [{"task": leaf, "custom_dataset": lambda data=data, **_: data} for leaf, data in loaded.items()], (
            checked.notes
        )


def _loader(rows: Mapping[str, list[dict[str, Any]]]) -> Loader:
    return lambda **_: {split: datasets.Dataset.from_list(part) for split, part in rows.items()}


_HUB_ERRORS = ("datasets", "huggingface_hub", "requests", "httpx", "urllib3", "fsspec")


def is_about_data(error: Exception) -> bool:
    """Whether an error comes from loading a data set, not from its content."""
    return isinstance(error, (EvaluationError, OSError)) or type(error).__module__.split(".")[0] in _HUB_ERRORS


def _check_documents(task: Any, count: int) -> None:
    """Refuse items that the harness would fail on, or score as wrong whatever the model answers."""
    for number, doc in enumerate(islice(task.eval_docs, count), 1):
        place = f"{task.task_name}, item {number}"
        try:
            text, target = task.doc_to_text(doc), task.doc_to_target(doc)
            choices = task.doc_to_choice(doc) if task.OUTPUT_TYPE == "multiple_choice" else None
        except Exception as error:
            raise EvaluationError(
                f"{place}: the harness cannot read its fields {', '.join(map(str, doc))} ({type(error).__name__}: "
                f"{error}). Give them as in the task's data set on the hub."
            ) from error
        if choices is None or callable(task.config.process_results):
            continue
        given = text if task.multiple_input else target
        for gold in given if isinstance(given, (list, tuple)) else [given]:
            known = 0 <= gold < len(choices) if isinstance(gold, int) else gold in choices
            if not known:
                raise EvaluationError(
                    f"{place}: the answer {gold!r} is not one of its {len(choices)} choices. Answers of hidden test "
                    "splits cannot be scored; other labels must be written as in the task's data set on the hub."
                )


def scores_text_alone(loaded: LoadedTask, shots: int | None) -> bool:
    """Whether some item has no prompt, so that its first token is scored after the tokenizer's prefix token."""
    for task, count in zip(loaded.parts, loaded.counts, strict=True):
        if task.OUTPUT_TYPE == "loglikelihood_rolling":
            return True
        if shots or task.OUTPUT_TYPE not in ("loglikelihood", "multiple_choice"):
            continue
        for doc in islice(task.eval_docs, count):
            contexts = task.doc_to_choice(doc) if task.multiple_input else [task.doc_to_text(doc)]
            if "" in contexts:
                return True
    return False
