"""Fields and labels of benchmark rows: checked before a model is loaded, converted where the convention is certain.

The lm-evaluation-harness takes rows as the hub has them. Other releases of the same benchmarks write the same answers
in other ways: MedMCQA counts ``cop`` from 1, ANLI writes ``e``, ``n``, ``c``, MMLU writes letters. The harness scores
such rows as wrong with a warning in its log, or fails. Here a row is

- passed as it is where it is written as the hub writes it;
- converted where only one reading of the task's rows is possible; a note says so in every table;
- refused otherwise, with the row, the value and the remedy.

Numbers that count answers are read together: they count from 1 where some label equals the number of choices and none
is 0, and from 0 where some label is 0. Rows of one task that do both are refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from decondense.config import suggest
from decondense.evaluate.catalogue import TASKS, EvaluationError, TaskInfo

BenchmarkRow = dict[str, Any]

_LETTERS = "ABCDEFGHIJ"
_CLASSES = {"e": 0, "n": 1, "c": 2, "entailment": 0, "neutral": 1, "contradiction": 2}
_INDEXED = {"piqa": ("label", 2), "medmcqa": ("cop", 4), "mmlu": ("answer", 4), "winogrande": ("answer", 2)}
"""Task -> the field that names the right choice by its position, and the number of choices."""
_ANSWERS = {"anli_r2": "label", "openbookqa": "answerKey", "arc_easy": "answerKey", "arc_challenge": "answerKey"} | {
    task: field for task, (field, _) in _INDEXED.items()
}


@dataclass(frozen=True)
class CheckedRows:
    """Rows of a task as the harness reads them."""

    parts: list[list[BenchmarkRow]]
    """The rows of each part, in the order in which they were given."""
    notes: tuple[str, ...]
    """What was converted or cannot be told from the rows, in words for the tables."""
    converted: bool
    """Whether any row differs from what was given."""


def check_rows(task: str, parts: Sequence[tuple[str, Sequence[BenchmarkRow]]]) -> CheckedRows:
    """Check the rows of one task and convert what the hub writes in another way.

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
    """An answer given as a number, which waits until it is known from where the rows count."""

    place: str
    row: BenchmarkRow
    value: int
    choices: int
    given: Any


class _Checker:
    def __init__(self, info: TaskInfo) -> None:
        self.info, self.task = info, info.name
        self.changes: Counter[tuple[str, str]] = Counter()
        self.counted: list[_Counted] = []
        self.own_numbers: list[str] = []
        """Rows of ARC and OpenBookQA whose choices are numbered and whose answer is one of these numbers."""
        self.base: int | None = None
        self.open_base = False

    # ---- one row

    def row(self, place: str, given: BenchmarkRow) -> BenchmarkRow:
        row = dict(given)
        if "choices.text" in self.info.fields:
            self._pairs(row, "choices", "text", "label")
        elif self.task == "truthfulqa_mc2":
            self._pairs(row, "mc2_targets", "choices", "labels")
        for field in self.info.fields:
            if not _has(row, field):
                outer = field.partition(".")[0]
                if outer in row:
                    what = f"needs {field!r}; the row has {_kind(row[outer])} in the field {outer!r}"
                    raise self._refused(place, what, row[outer])
                raise EvaluationError(
                    f"{place}: {self.task} needs the field {field!r}; there are {', '.join(map(str, given))}."
                    f"{suggest(field, map(str, given))}"
                )
        answer = _ANSWERS.get(self.task)
        for field in self.info.fields:
            if field in ("choices.text", "choices.label", "mc2_targets.choices") or (self.task, field) == (
                "mmlu",
                "choices",
            ):
                self._texts(place, row, field)
            elif field not in (answer, "mc2_targets.labels"):
                row[field] = self._text(place, field, row[field])
        if self.task == "winogrande" and "_" not in row["sentence"]:
            raise self._refused(place, "has no blank '_' in the field 'sentence'", row["sentence"])
        if self.task == "mmlu" and len(row["choices"]) != 4:
            raise self._refused(place, f"has {len(row['choices'])} choices in place of 4", row["choices"])
        if self.task == "truthfulqa_mc2":
            self._truths(place, row)
        elif "choices.label" in self.info.fields:
            self._choices(place, row)
            self._key(place, row)
        elif answer is not None:
            self._answer(place, row, answer)
        return row

    def _pairs(self, row: BenchmarkRow, field: str, first: str, second: str) -> None:
        """Choices as a list of objects, or truths as {text: label}, become two lists."""
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
            row[field] = dict(value)  # what it holds may be converted; the caller's rows stay as they are

    def _text(self, place: str, field: str, value: Any) -> str:
        if isinstance(value, str):
            return value
        if isinstance(value, int) and not isinstance(value, bool):
            self.changes[field, "integers became text"] += 1
            return str(value)
        raise self._refused(place, f"has {_kind(value)} in the field {field!r}, which holds text", value)

    def _texts(self, place: str, row: BenchmarkRow, field: str) -> None:
        outer, _, inner = field.partition(".")
        holder, name = (row[outer], inner) if inner else (row, outer)
        values = holder[name]
        if not isinstance(values, (list, tuple)) or not values:
            raise self._refused(
                place, f"has {_kind(values)} in the field {field!r}, which holds a list of texts", values
            )
        holder[name] = [self._text(place, field, value) for value in values]

    def _truths(self, place: str, row: BenchmarkRow) -> None:
        target = row["mc2_targets"]
        given = target["labels"]
        if not isinstance(given, (list, tuple)) or len(given) != len(target["choices"]):
            raise self._refused(
                place, f"has no label for each of its {len(target['choices'])} answers in 'mc2_targets.labels'", given
            )
        labels = []
        for value in given:
            number = int(value) if isinstance(value, bool) else _number(value)
            if number not in (0, 1):
                raise self._refused(place, "has a label that is neither 0 (false) nor 1 (true)", value)
            labels.append(number)
        if set(labels) != {0, 1}:
            raise self._refused(place, "needs a true and a false answer in 'mc2_targets.labels'", given)
        if any(type(value) is not int for value in given):
            self.changes["mc2_targets.labels", "labels became integers"] += 1
        target["labels"] = labels

    # ---- answers

    def _choices(self, place: str, row: BenchmarkRow) -> None:
        texts, labels = row["choices"]["text"], row["choices"]["label"]
        if len(texts) != len(labels):
            raise self._refused(place, f"has {len(texts)} choices and {len(labels)} labels of choices", labels)
        if len(set(labels)) != len(labels) or len(labels) < 2:
            raise self._refused(place, "needs at least two choices with different labels", labels)

    def _key(self, place: str, row: BenchmarkRow) -> None:
        """ARC and OpenBookQA: the answer is the label of a choice, ``A`` to ``E`` or ``1`` to ``5``."""
        labels, value = row["choices"]["label"], row["answerKey"]
        self._not_hidden(place, "answerKey", value)
        number = _number(value)
        text = value.strip() if isinstance(value, str) else str(number)
        if text in labels:
            if number is not None:
                self.own_numbers.append(place)
            self._store(row, labels.index(text), value)
        elif number is not None:
            self.counted.append(_Counted(place, row, number, len(labels), value))
        elif text.upper() in labels:
            self._store(row, labels.index(text.upper()), value)
        elif len(text) == 1 and text.upper() in _LETTERS[: len(labels)] and labels[0] == "1":
            self._store(row, _LETTERS.index(text.upper()), value)
        else:
            raise self._refused(
                place, f"has the answer {value!r}, which is not one of its choices {', '.join(labels)}", value
            )

    def _answer(self, place: str, row: BenchmarkRow, field: str) -> None:
        value = row[field]
        self._not_hidden(place, field, value)
        number = _number(value)
        if self.task == "anli_r2":
            # classes have no order that could be counted in another way
            label = _CLASSES.get(value.strip().lower()) if isinstance(value, str) and number is None else number
            if label not in (0, 1, 2):
                raise self._refused(
                    place, f"has the label {value!r}; labels are 0 (entailment), 1 (neutral), 2 (contradiction)", value
                )
            self._store(row, label, value)
            return
        choices = _INDEXED[self.task][1]
        if number is not None:
            self.counted.append(_Counted(place, row, number, choices, value))
            return
        letters = _LETTERS[:choices]
        letter = value.strip().upper() if isinstance(value, str) else ""
        if len(letter) != 1 or letter not in letters:
            raise self._refused(
                place,
                f"has the answer {value!r} in the field {field!r}; answers are the numbers of the {choices} choices or "
                f"the letters {letters[0]} to {letters[-1]}",
                value,
            )
        self._store(row, letters.index(letter), value)

    def _not_hidden(self, place: str, field: str, value: Any) -> None:
        if (isinstance(value, str) and not value.strip()) or _number(value) == -1:
            raise self._refused(
                place,
                f"has the answer {value!r} in the field {field!r}, which stands for a hidden answer; score "
                f"the {self.info.split} split",
                value,
            )

    def _first(self) -> int | None:
        """What the hub's labels of this task count from; None: they do not count."""
        return None if "choices.label" in self.info.fields else 1 if self.task == "winogrande" else 0

    def settle(self) -> None:
        """Decide from where the numbers count, and write all of them as the hub does."""
        if not self.counted:
            return
        zero = next((entry for entry in self.counted if entry.value == 0), None)
        last = next((entry for entry in self.counted if entry.value == entry.choices), None)
        for entry in self.counted:
            if not 0 <= entry.value <= entry.choices:
                raise self._refused(
                    entry.place, f"has the answer {entry.given!r}, outside its {entry.choices} choices", entry.given
                )
        if zero and last:
            raise EvaluationError(
                f"{self.task}: {zero.place} has the answer 0 and {last.place} has the answer {last.value} of "
                f"{last.choices} choices: the answers count from 0 and from 1. Take all rows from one release."
            )
        self.base = 0 if zero else 1 if last else self._first()
        if self.base is None or (self.base == 0 and self.own_numbers):
            raise self._refused(
                self.counted[0].place,
                f"has the answer {self.counted[0].given!r}, which is not the label of a choice"
                + ("" if self.base is None else f", and {self.own_numbers[0]} has one that is")
                + "; the rows do not show whether the answers count from 0 or from 1",
                self.counted[0].given,
            )
        self.open_base = not zero and not last
        for entry in self.counted:
            self._store(entry.row, entry.value - self.base, entry.given, counted=True)

    def _store(self, row: BenchmarkRow, index: int, given: Any, *, counted: bool = False) -> None:
        field = _ANSWERS[self.task]
        row[field] = (
            row["choices"]["label"][index]
            if "choices.label" in self.info.fields
            else str(index + 1)
            if self.task == "winogrande"
            else index
        )
        if row[field] == given and type(row[field]) is type(given):
            return
        first = self._first()
        if counted and self.base != first:
            change = f"answers counted from {self.base}, " + (
                "not named by the label of a choice" if first is None else f"the hub's count from {first}"
            )
        elif isinstance(given, str) and _number(given) is None:
            change = "answers were written in another way"
        elif isinstance(row[field], str):
            change = "integers became text"
        else:
            change = "answers became integers"
        self.changes[field, change] += 1

    # ---- messages

    def _refused(self, place: str, what: str, value: Any) -> EvaluationError:
        shown = repr(value)
        shown = "" if shown in what else f" (got {shown if len(shown) <= 80 else shown[:77] + '...'})"
        return EvaluationError(
            f"{place}: {self.task} {what}{shown}. Correct the rows or take them as {self.info.source} on the hub has "
            "them."
        )

    def notes(self) -> tuple[str, ...]:
        """One sentence per kind of conversion."""
        found = [
            f"converted {count:,} values of {field!r} in {self.task}: {change}"
            for (field, change), count in self.changes.items()
        ]
        if self.open_base:
            found.append(
                f"no answer of {self.task} shows whether the rows count from 0 or from 1: read as the hub's, from "
                f"{self.base}"
            )
        return tuple(found)


def _number(value: Any) -> int | None:
    """An integer, an integral float (tables with gaps hold these) or text of digits; None: something else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value.strip().lstrip("-").isdecimal() and len(value) < 10:
        try:
            return int(value)
        except ValueError:
            return None
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
