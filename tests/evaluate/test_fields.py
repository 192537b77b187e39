"""Rows of benchmarks as other releases write them: converted where one reading is possible, else refused."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
from evaluate_helpers import make_data, read, write

from decondense.evaluate import TASKS, EvaluationError
from decondense.evaluate.fields import check_rows
from decondense.evaluate.local import find_tasks, local_rows

Row = dict[str, Any]
FOLDER = {"truthfulqa_mc2": "truthfulqa_mc", "mmlu": "mmlu"}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Row]]:
    """Rows of every task as the hub has them, with every label of their range."""
    root = make_data(tmp_path_factory.mktemp("fields"))
    rows = {}
    for name, info in TASKS.items():
        folder = root / FOLDER.get(name, name)
        file = folder / (f"all_{info.split}.jsonl" if name == "mmlu" else f"{info.split}.jsonl")
        rows[name] = read(file)
    for name, field, labels in (
        ("anli_r2", "label", (0, 1, 2)),
        ("piqa", "label", (0, 1)),
        ("medmcqa", "cop", (0, 1, 2, 3)),
        ("mmlu", "answer", (0, 1, 2, 3)),
        ("winogrande", "answer", ("1", "2")),
        ("openbookqa", "answerKey", "ABCD"),
        ("arc_easy", "answerKey", "ABCD"),
        ("arc_challenge", "answerKey", "ABCD"),
    ):
        for k, row in enumerate(rows[name]):
            row[field] = labels[k % len(labels)]
    return rows


def changed(rows: list[Row], field: str, how: Any) -> list[Row]:
    found = copy.deepcopy(rows)
    for row in found:
        holder, *rest = [row, *field.split(".")]
        for part in rest[:-1]:
            holder = holder[part]
        holder[rest[-1]] = how(holder[rest[-1]])
    return found


@pytest.mark.parametrize("task", TASKS)
def test_the_hubs_rows_pass_as_they_are(hub: dict[str, list[Row]], task: str) -> None:
    given = copy.deepcopy(hub[task])
    checked = check_rows(task, [("x", given)])
    assert checked.parts == [hub[task]]
    assert not checked.converted
    assert checked.notes == ()
    assert given == hub[task]


def to_objects(choices: Row) -> list[Row]:
    return [{"text": text, "label": label} for text, label in zip(choices["text"], choices["label"], strict=True)]


CONVERTED = [
    ("anli_r2", "label", "enc".__getitem__),
    ("anli_r2", "label", ["Entailment", "neutral", "contradiction"].__getitem__),
    ("anli_r2", "label", str),
    ("anli_r2", "label", float),
    ("piqa", "label", lambda k: k + 1),
    ("piqa", "label", "AB".__getitem__),
    ("piqa", "label", lambda k: f" {k} "),
    ("medmcqa", "cop", lambda k: k + 1),
    ("medmcqa", "cop", lambda k: float(k + 1)),
    ("medmcqa", "cop", lambda k: str(k + 1)),
    ("medmcqa", "cop", "abcd".__getitem__),
    ("mmlu", "answer", "ABCD".__getitem__),
    ("mmlu", "answer", lambda k: k + 1),
    ("winogrande", "answer", int),
    ("winogrande", "answer", lambda k: int(k) - 1),
    ("winogrande", "answer", lambda k: "AB"[int(k) - 1]),
    *[
        (task, "answerKey", how)
        for task in ("openbookqa", "arc_easy", "arc_challenge")
        for how in (str.lower, "ABCD".index, lambda k: "ABCD".index(k) + 1, lambda k: f"{k} ")
    ],
    ("arc_easy", "choices", to_objects),
    ("openbookqa", "choices", to_objects),
    ("truthfulqa_mc2", "mc2_targets", lambda t: dict(zip(t["choices"], t["labels"], strict=True))),
    ("truthfulqa_mc2", "mc2_targets.labels", lambda labels: [bool(k) for k in labels]),
    ("truthfulqa_mc2", "mc2_targets.labels", lambda labels: [str(k) for k in labels]),
]


@pytest.mark.parametrize(("task", "field", "how"), CONVERTED)
def test_other_releases_become_the_hubs(hub: dict[str, list[Row]], task: str, field: str, how: Any) -> None:
    given = changed(hub[task], field, how)
    before = copy.deepcopy(given)
    checked = check_rows(task, [("x", given)])
    assert checked.parts == [hub[task]]
    assert [type(row[field]) for row in checked.parts[0] if "." not in field] == [
        type(row[field]) for row in hub[task] if "." not in field
    ]
    assert checked.converted
    assert len(checked.notes) == 1
    assert field.split(".")[0] in checked.notes[0]
    assert given == before, "the caller's rows stay as they are"


@pytest.mark.parametrize(
    ("task", "field"),
    [
        (name, field)
        for name, info in TASKS.items()
        for field in info.fields
        if field not in ("label", "cop", "answer", "answerKey", "choices.label", "mc2_targets.labels")
    ],
)
def test_text_is_text(hub: dict[str, list[Row]], task: str, field: str) -> None:
    """Integers are written as text; what is neither is refused, as is a missing field."""
    a_list = field in ("choices", "choices.text", "mc2_targets.choices")
    if (task, field) not in (("winogrande", "sentence"), ("mmlu", "subject")):
        checked = check_rows(task, [("x", changed(hub[task], field, lambda v: [7] * len(v) if a_list else 7))])
        value: Any = checked.parts[0][0]
        for part in field.split("."):
            value = value[part]
        assert set(value if a_list else [value]) == {"7"}
        assert "integers became text" in checked.notes[0]
    for wrong in (0.5, True, {"a": 1}, [], [None]):
        with pytest.raises(EvaluationError, match=r"x, row 1: ") as refused:
            check_rows(task, [("x", changed(hub[task], field, lambda _, wrong=wrong: wrong))])
        assert field.split(".")[0] in str(refused.value)
    missing = copy.deepcopy(hub[task])
    del missing[1][field.split(".")[0]]
    with pytest.raises(EvaluationError, match=rf"x, row 2: {task} needs the field '{field.split('.')[0]}"):
        check_rows(task, [("x", missing)])


@pytest.mark.parametrize(
    ("task", "field", "value", "message"),
    [
        ("piqa", "goal", None, "row 1: piqa needs 'goal'; the row has null in the field 'goal'"),
        ("arc_easy", "choices", ["a", "b"], r"needs 'choices\.text'; the row has a list in the field 'choices'"),
    ],
)
def test_fields_of_another_form_are_named(hub, task, field, value, message):
    with pytest.raises(EvaluationError, match=message):
        check_rows(task, [("x", [{**hub[task][0], field: value}])])


REFUSED = [
    *[(task, field, -1) for task, field in (("piqa", "label"), ("anli_r2", "label"), ("medmcqa", "cop"))],
    *[("winogrande", "answer", wrong) for wrong in ("", -1, 3, "3", "C", None, [1])],
    *[("piqa", "label", wrong) for wrong in (3, -2, "C", "yes", 0.5, True, None, "")],
    *[("medmcqa", "cop", wrong) for wrong in (5, "E", "opa", 1.5)],
    *[("mmlu", "answer", wrong) for wrong in (7, "F", "ABCD", "")],
    *[("anli_r2", "label", wrong) for wrong in (3, "x", "not entailed", 1.5, True)],
    *[("arc_challenge", "answerKey", wrong) for wrong in ("F", "", 9, None, ["A"])],
    *[("openbookqa", "answerKey", wrong) for wrong in ("E", "none", -1)],
    ("arc_easy", "choices", {"text": ["a", "b"], "label": ["A"]}),
    ("arc_easy", "choices", {"text": ["a", "b"], "label": ["A", "A"]}),
    ("mmlu", "choices", ["a", "b", "c"]),
    ("winogrande", "sentence", "no gap here"),
    ("truthfulqa_mc2", "mc2_targets", {"choices": ["a", "b"], "labels": [1]}),
    ("truthfulqa_mc2", "mc2_targets", {"choices": ["a", "b"], "labels": [1, 2]}),
    ("truthfulqa_mc2", "mc2_targets", {"choices": ["a", "b"], "labels": [0, 0]}),
]


@pytest.mark.parametrize(("task", "field", "value"), REFUSED)
def test_what_has_no_reading_is_refused(hub: dict[str, list[Row]], task: str, field: str, value: Any) -> None:
    rows = copy.deepcopy(hub[task])
    rows[4][field] = value
    with pytest.raises(EvaluationError, match="row 5") as refused:
        check_rows(task, [("train", hub[task]), ("file", rows)])
    assert task in str(refused.value)
    assert "file, row 5" in str(refused.value)


def test_from_where_answers_count_is_decided_by_all_rows(hub: dict[str, list[Row]]) -> None:
    rows = hub["medmcqa"]
    low = [{**rows[0], "cop": value} for value in (1, 2, 3)]
    high = [{**rows[0], "cop": value} for value in (4, 1)]
    zero = [{**rows[0], "cop": value} for value in (0, 3)]
    assert [row["cop"] for row in check_rows("medmcqa", [("a", low), ("b", high)]).parts[0]] == [0, 1, 2]
    assert [row["cop"] for row in check_rows("medmcqa", [("a", low), ("b", zero)]).parts[0]] == [1, 2, 3]
    with pytest.raises(EvaluationError, match=r"b, row 1 has the answer 0 and c, row 1 has the answer 4"):
        check_rows("medmcqa", [("a", low), ("b", zero), ("c", high)])
    open_case = check_rows("medmcqa", [("a", low)])
    assert open_case.parts[0] == low
    assert not open_case.converted
    assert "from 0 or from 1: read as the hub's, from 0" in open_case.notes[0]


def test_numbered_choices_of_arc(hub: dict[str, list[Row]]) -> None:
    """ARC itself numbers some choices; an answer is then the number of a choice, whatever the others do."""
    lettered = changed(hub["arc_easy"], "answerKey", lambda key: "ABCD".index(key) + 1)
    numbered = {**hub["arc_easy"][0], "choices": {"text": list("wxyz"), "label": list("1234")}, "answerKey": 3}
    checked = check_rows("arc_easy", [("x", [*lettered, numbered])])
    assert [row["answerKey"] for row in checked.parts[0]] == [row["answerKey"] for row in hub["arc_easy"]] + ["3"]
    assert check_rows("arc_easy", [("x", [{**numbered, "answerKey": "B"}])]).parts[0][0]["answerKey"] == "2"
    from_zero = changed(hub["arc_easy"], "answerKey", "ABCD".index)
    with pytest.raises(EvaluationError, match="do not show whether the answers count from 0 or from 1"):
        check_rows("arc_easy", [("x", [*from_zero, numbered])])
    with pytest.raises(EvaluationError, match="do not show whether the answers count from 0 or from 1"):
        check_rows("arc_easy", [("x", [row for row in lettered if row["answerKey"] in (2, 3)])])


def test_files_are_converted_and_kept_results_of_them_are_not_taken(hub: dict[str, list[Row]], tmp_path: Path) -> None:
    write(tmp_path / "as_hub" / "piqa" / "validation.jsonl", hub["piqa"])
    write(tmp_path / "other" / "piqa" / "validation.jsonl", changed(hub["piqa"], "label", "AB".__getitem__))
    tasks = {name: find_tasks(tmp_path / name, {"piqa": 0})[0]["piqa"] for name in ("as_hub", "other")}
    rows = {name: local_rows("piqa", task.splits) for name, task in tasks.items()}
    assert rows["other"][0] == rows["as_hub"][0] == {"validation": hub["piqa"]}
    assert (rows["as_hub"][1], len(rows["other"][1])) == ((), 1)
    assert tasks["as_hub"].hash != tasks["other"].hash


@pytest.mark.parametrize("task", TASKS)
def test_damaged_rows_never_raise_anything_else(hub: dict[str, list[Row]], task: str) -> None:
    draw = random.Random(task)
    values: list[Any] = [None, -1, 0, 9, 2**70, 0.5, float("nan"), float("inf"), True, "", "²", "-", "A", [], [[]], {}]
    for _ in range(60):
        rows = copy.deepcopy(hub[task])
        row = draw.choice(rows)
        field = draw.choice(TASKS[task].fields).split(".")
        holder = row[field[0]] if len(field) > 1 and draw.random() < 0.7 else row
        holder[field[-1] if holder is not row else field[0]] = draw.choice(values)
        said = ["row"]
        try:
            check_rows(task, [("x", rows)])
        except EvaluationError as error:
            said.append(str(error))
        assert "row" in said[-1]
