"""Fields and labels of benchmark rows: checked before a model is loaded, converted where the convention is certain.

The lm-evaluation-harness expects rows in the hub's format. Other releases of the same benchmarks encode answers
differently: MedMCQA counts ``cop`` from 1, ANLI writes ``e``, ``n``, ``c``, MMLU writes letters. The harness scores
such rows as wrong with a warning in its log, or fails. Here a row is

- passed unchanged if it has the hub's format;
- converted if only one reading of the task's rows is possible; every table then has a note;
- refused otherwise, with the row, the value and the remedy.

Numbered answers of a task are read together: they count from 1 where some answer equals the number of choices and none
is 0, and from 0 where some answer is 0. A task whose rows do both is refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from decondense.config import suggest
from decondense.evaluate.catalogue import TASKS, EvaluationError, TaskInfo

BenchmarkRow = dict[str, Any]

_LETTERS = "ABCDEFGHIJ"
_CLASSES = {"e": 0, "n": 1, "c": 2, "entailment": 0, "neutral": 1, "contradiction": 2}
_INDEXED = {"piqa": ("label", 2), "medmcqa": ("cop", 4), "mmlu": ("answer", 4), "winogrande": ("answer", 2)}
"""Task -> the field that names the right choice by its position, and the number of choices."""
_TEXT_LISTS = ("choices", "choices.text", "choices.label", "mc2_targets.choices")
_ANSWERS = {"anli_r2": "label", "openbookqa": "answerKey", "arc_easy": "answerKey", "arc_challenge": "answerKey"} | {
    task: field for task, (field, _) in _INDEXED.items()
}


@dataclass(frozen=True)
class CheckedRows:
    """Rows of a task as the harness reads them."""

    parts: list[list[BenchmarkRow]]
    """The rows of each part, in the order in which they were given."""
    notes: tuple[str, ...]
    """Conversions and open questions, as sentences for the tables."""
    converted: bool
    """Whether any row was changed."""


def check_rows(task: str, parts: Sequence[tuple[str, Sequence[BenchmarkRow]]]) -> CheckedRows:
    """Check the rows of one task and convert them to the hub's format.

    Args:
        task: the harness's name. Rows of tasks that are not in :data:`TASKS` are returned as they are.
        parts: (file or split as messages name it, its rows). All parts follow one convention of labels.

    Raises:
        EvaluationError: a missing field, a value of another type, a label outside the choices, a hidden answer, labels
            that can be read in two ways; the message names the first such row.
    """
    if task not in TASKS:
        return CheckedRows([list(rows) for _, rows in parts], (), False)
    checker = _Checker(TASKS[task])
    rows = [[checker.row(f"{where}, row {k}", row) for k, row in enumerate(part, 1)] for where, part in parts]
    checker.settle()
    return CheckedRows(rows, checker.notes(), bool(checker.changes))


@dataclass
class _Counted:
    """A numbered answer, kept until all rows are read and show whether the numbers count from 0 or from 1."""

    place: str
    row: BenchmarkRow
    value: int
    choices: int
    given: Any


class _Checker:
    """Checks the rows of one task: first every :meth:`row`, then :meth:`settle`."""

    def __init__(self, info: TaskInfo) -> None:
        self.info, self.task, self.answer = info, info.name, _ANSWERS.get(info.name)
        self.labelled = "choices.label" in info.fields
        """ARC and OpenBookQA: the answer is the label of a choice."""
        self.first = None if self.labelled else 1 if self.task == "winogrande" else 0
        """What the hub's answers of this task count from; None: they are labels."""
        self.place = ""
        """The row that is checked, for messages."""
        self.changes: Counter[tuple[str, str]] = Counter()
        self.counted: list[_Counted] = []
        self.own_numbers: list[str] = []
        """Rows of ARC and OpenBookQA whose choices are numbered and whose answer is one of these numbers."""
        self.base: int | None = None
        self.open_base = False

    # ---- one row

    def row(self, place: str, given: BenchmarkRow) -> BenchmarkRow:
        self.place, row = place, dict(given)
        if self.labelled:
            self._pairs(row, "choices", "text", "label")
        elif self.task == "truthfulqa_mc2":
            self._pairs(row, "mc2_targets", "choices", "labels")
        for field in self.info.fields:
            if not _has(row, field):
                outer = field.partition(".")[0]
                if outer in row:
                    what = f"needs {field!r}; the row has {_kind(row[outer])} in the field {outer!r}"
                    self._refuse(what, row[outer])
                raise EvaluationError(
                    f"{place}: {self.task} needs the field {field!r}; there are {', '.join(map(str, given))}."
                    f"{suggest(field, map(str, given))}"
                )
        for field in self.info.fields:
            if field in _TEXT_LISTS:
                self._texts(row, field)
            elif field not in (self.answer, "mc2_targets.labels"):
                row[field] = self._text(field, row[field])
        if self.task == "winogrande" and "_" not in row["sentence"]:
            self._refuse("has no blank '_' in the field 'sentence'", row["sentence"])
        if self.task == "mmlu" and len(row["choices"]) != 4:
            self._refuse(f"has {len(row['choices'])} choices instead of 4", row["choices"])
        if self.task == "truthfulqa_mc2":
            self._truths(row["mc2_targets"])
        elif self.answer is not None:
            self._answer(row, row[self.answer])
        return row

    def _pairs(self, row: BenchmarkRow, field: str, first: str, second: str) -> None:
        """Turn choices given as a list of objects, or truths given as {text: label}, into two lists."""
        value = row.get(field)
        if (
            isinstance(value, list)
            and value
            and all(isinstance(v, dict) and {first, second} <= v.keys() for v in value)
        ):
            row[field] = {name: [entry[name] for entry in value] for name in (first, second)}
            self.changes[field, "one object per choice became two lists"] += 1
        elif field == "mc2_targets" and isinstance(value, dict) and value and not {first, second} & value.keys():
            row[field] = {first: list(value), second: list(value.values())}
            self.changes[field, "a mapping of answers became two lists"] += 1
        elif isinstance(value, dict):
            row[field] = dict(value)  # its values may be converted; the caller's rows stay as they are

    def _text(self, field: str, value: Any) -> str:
        if isinstance(value, str):
            return value
        if isinstance(value, int) and not isinstance(value, bool):
            self.changes[field, "integers became text"] += 1
            return str(value)
        self._refuse(f"has {_kind(value)} in the field {field!r}, which holds text", value)

    def _texts(self, row: BenchmarkRow, field: str) -> None:
        outer, _, inner = field.partition(".")
        holder, name = (row[outer], inner) if inner else (row, outer)
        values = holder[name]
        if not isinstance(values, (list, tuple)) or not values:
            self._refuse(f"has {_kind(values)} in the field {field!r}, which holds a list of texts", values)
        holder[name] = [self._text(field, value) for value in values]

    def _truths(self, target: dict[str, Any]) -> None:
        given = target["labels"]
        if not isinstance(given, (list, tuple)) or len(given) != len(target["choices"]):
            self._refuse(
                f"has no label for each of its {len(target['choices'])} answers in 'mc2_targets.labels'", given
            )
        labels = [int(value) if isinstance(value, bool) else _number(value) for value in given]
        for label, value in zip(labels, given, strict=True):
            if label not in (0, 1):
                self._refuse("has a label that is neither 0 (false) nor 1 (true)", value)
        if set(labels) != {0, 1}:
            self._refuse("needs a true and a false answer in 'mc2_targets.labels'", given)
        if any(type(value) is not int for value in given):
            self.changes["mc2_targets.labels", "labels became integers"] += 1
        target["labels"] = labels

    # ---- answers

    def _answer(self, row: BenchmarkRow, value: Any) -> None:
        number = _number(value)
        if (isinstance(value, str) and not value.strip()) or number == -1:
            self._refuse(
                f"has the answer {value!r} in the field {self.answer!r}, which stands for a hidden answer; score the "
                f"{self.info.split} split",
                value,
            )
        if self.labelled:
            self._key(row, value, number)
        elif self.task == "anli_r2":
            # classes have no order that could be counted in another way
            label = _CLASSES.get(value.strip().lower()) if isinstance(value, str) and number is None else number
            if label not in (0, 1, 2):
                self._refuse(
                    f"has the label {value!r}; labels are 0 (entailment), 1 (neutral), 2 (contradiction)", value
                )
            self._store(row, label, value)
        elif number is not None:
            self.counted.append(_Counted(self.place, row, number, _INDEXED[self.task][1], value))
        else:
            letters = _LETTERS[: _INDEXED[self.task][1]]
            letter = value.strip().upper() if isinstance(value, str) else ""
            if len(letter) != 1 or letter not in letters:
                self._refuse(
                    f"has the answer {value!r} in the field {self.answer!r}; answers are the numbers of the "
                    f"{len(letters)} choices or the letters {letters[0]} to {letters[-1]}",
                    value,
                )
            self._store(row, letters.index(letter), value)

    def _key(self, row: BenchmarkRow, value: Any, number: int | None) -> None:
        """ARC and OpenBookQA: the answer is the label of a choice, ``A`` to ``E`` or ``1`` to ``5``."""
        texts, labels = row["choices"]["text"], row["choices"]["label"]
        if len(texts) != len(labels):
            self._refuse(f"has {len(texts)} choices and {len(labels)} labels of choices", labels)
        if len(set(labels)) != len(labels) or len(labels) < 2:
            self._refuse("needs at least two choices with different labels", labels)
        text = value.strip() if isinstance(value, str) else str(number)
        if text in labels:
            if number is not None:
                self.own_numbers.append(self.place)
            self._store(row, labels.index(text), value)
        elif number is not None:
            self.counted.append(_Counted(self.place, row, number, len(labels), value))
        elif text.upper() in labels:
            self._store(row, labels.index(text.upper()), value)
        elif len(text) == 1 and text.upper() in _LETTERS[: len(labels)] and labels[0] == "1":
            self._store(row, _LETTERS.index(text.upper()), value)
        else:
            self._refuse(f"has the answer {value!r}, which is not one of its choices {', '.join(labels)}", value)

    def settle(self) -> None:
        """Decide whether the numbered answers count from 0 or from 1, and write all of them as the hub does."""
        if not self.counted:
            return
        zero = next((entry for entry in self.counted if entry.value == 0), None)
        last = next((entry for entry in self.counted if entry.value == entry.choices), None)
        for entry in self.counted:
            if not 0 <= entry.value <= entry.choices:
                self.place = entry.place
                self._refuse(f"has the answer {entry.given!r}, outside its {entry.choices} choices", entry.given)
        if zero and last:
            raise EvaluationError(
                f"{self.task}: {zero.place} has the answer 0 and {last.place} has the answer {last.value} of "
                f"{last.choices} choices: the answers count from 0 and from 1. Take all rows from one release."
            )
        self.base = 0 if zero else 1 if last else self.first
        if self.base is None or (self.base == 0 and self.own_numbers):
            self.place, given = self.counted[0].place, self.counted[0].given
            conflict = "" if self.base is None else f", and {self.own_numbers[0]} has one that is"
            self._refuse(
                f"has the answer {given!r}, which is not the label of a choice{conflict}; the rows do not show whether "
                "the answers count from 0 or from 1",
                given,
            )
        self.open_base = not zero and not last
        for entry in self.counted:
            self._store(entry.row, entry.value - self.base, entry.given, counted=True)

    def _store(self, row: BenchmarkRow, index: int, given: Any, *, counted: bool = False) -> None:
        assert self.answer is not None
        if self.labelled:
            stored = row["choices"]["label"][index]
        else:
            stored = str(index + 1) if self.task == "winogrande" else index
        row[self.answer] = stored
        if stored == given and type(stored) is type(given):
            return
        if counted and self.base != self.first:
            hub = "not named by the label of a choice" if self.first is None else f"the hub's count from {self.first}"
            change = f"answers counted from {self.base}, {hub}"
        elif isinstance(given, str) and _number(given) is None:
            change = "answers were written in another way"
        else:
            change = "integers became text" if isinstance(stored, str) else "answers became integers"
        self.changes[self.answer, change] += 1

    # ---- messages

    def _refuse(self, problem: str, value: Any) -> NoReturn:
        text = repr(value)
        got = "" if text in problem else f" (got {text if len(text) <= 80 else text[:77] + '...'})"
        raise EvaluationError(
            f"{self.place}: {self.task} {problem}{got}. Correct the rows or take them as {self.info.source} on the hub "
            "has them."
        )

    def notes(self) -> tuple[str, ...]:
        """One sentence per kind of conversion."""
        notes = [
            f"converted {count:,} values of {field!r} in {self.task}: {change}"
            for (field, change), count in self.changes.items()
        ]
        if self.open_base:
            notes.append(
                f"no answer of {self.task} shows whether the rows count from 0 or from 1: read as the hub's, from "
                f"{self.base}"
            )
        return tuple(notes)


def _number(value: Any) -> int | None:
    """An integer, an integral float (tables with gaps hold these) or text of digits; None: something else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return int(value)
    if isinstance(value, str) and len(value) < 10 and re.fullmatch(r"-?\d+", value.strip()):
        return int(value)
    return None


def _kind(value: Any) -> str:
    names: Mapping[type, str] = {
        bool: "a truth value",
        type(None): "null",
        int: "an integer",
        float: "a number",
        str: "text",
    }
    return names.get(type(value), "a list" if isinstance(value, (list, tuple)) else "an object")


def _has(row: Any, field: str) -> bool:
    for part in field.split("."):
        if not isinstance(row, dict) or row.get(part) is None:
            return False
        row = row[part]
    return True
