"""The directory of an evaluation: what its files may say, damaged files, and what the harness's data sets may run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from evaluate_helpers import make_model, needs_harness

from decondense.cli import main
from decondense.evaluate import Evaluation, EvaluationError, evaluate
from decondense.records import read_rows

pytestmark = needs_harness


@pytest.fixture
def kept(tiny: Path, data: Path, whole: tuple[Evaluation, Path], tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A copy of a finished evaluation, and the arguments that resume it."""
    shutil.copytree(whole[1], tmp_path / "out")
    return tmp_path / "out", {"model": tiny, "tasks": "piqa,mmlu", "data_dir": data, "out": tmp_path / "out"}


# ---- what may be published -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["model", "--tokenizer", "--data-dir"])
@pytest.mark.parametrize("value", ["https://me:s3cret@host/x", "s3://ID:s3cret/a@bucket", "https://host/x?key=s3cret"])
def test_credentials_are_refused_before_anything_is_written(
    option: str, value: str, tiny: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"model": str(tiny), "--data-dir": str(data), option: value}
    words = ["evaluate", options.pop("model"), "--tasks", "piqa", "--out", str(tmp_path / "out")]
    assert main([*words, *(word for pair in options.items() for word in pair)]) == 2
    said = capsys.readouterr()
    assert "is given with a user, password, query or token" in " ".join(said.err.split())
    assert "s3cret" not in said.out + said.err
    assert not (tmp_path / "out").exists()


def test_no_file_names_a_folder_of_the_machine(tiny: Path, data: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret-project"
    for name in ("model", "words"):
        shutil.copytree(tiny, secret / name)
    out = tmp_path / "out"
    given: dict[str, Any] = {"tasks": "piqa", "limit": 1, "data_dir": data, "out": out, "tokenizer": secret / "words"}
    found = evaluate(secret / "model", **given)
    for path in [*out.glob("*.*"), *(out / "tasks").iterdir()]:
        if path.name != "evaluate.log":
            assert "secret-project" not in path.read_text(), path.name
    assert json.loads((out / "evaluation.json").read_text())["model"] == found.model == "model"
    assert {row["arm"] for row in read_rows(out / "rows.jsonl")} == {"model"}
    # known again, also from elsewhere
    seen: list[str] = []
    shutil.move(secret, tmp_path / "moved")
    given["tokenizer"] = tmp_path / "moved" / "words"
    evaluate(tmp_path / "moved" / "model", **given, progress=lambda task, what, *_: seen.append(what))
    assert seen == ["kept"]
    # another tokenizer of that name is another evaluation, and so is another model
    (tmp_path / "moved" / "words" / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(EvaluationError, match="holds the results of model"):
        evaluate(tmp_path / "moved" / "model", **given)
    del given["tokenizer"]
    with pytest.raises(EvaluationError, match="holds the results of model"):
        evaluate(make_model(tmp_path / "other" / "model", seed=1), **given)


def test_models_of_one_name_have_rows_of_their_own(tiny: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "a" / "model")
    make_model(tmp_path / "b" / "model", seed=1)
    found = [evaluate(tmp_path / name / "model", "piqa", data_dir=data, limit=2).rows() for name in "ab"]
    keys = [{(row["study"], row["study_fingerprint"], row["arm"]) for row in rows} for rows in found]
    assert len(keys[0]) == len(keys[1]) == 1
    assert not keys[0] & keys[1]


# ---- damaged files ---------------------------------------------------------------------------------------------------

DAMAGE: dict[str, Any] = {
    **{text: lambda _, text=text: text for text in ("[]", "null", "5", '"text"', "{}", '{"key": 5}', "", '{"key"')},
    "nested": lambda _: "[" * 100_000,
    "no text": lambda _: b"\xff\xfe{",
    **{f"without {name}": lambda data, name=name: {k: v for k, v in data.items() if k != name}
       for name in ("key", "scores", "items", "notes", "per_item", "timing")},
    **{f"{name} of another type": lambda data, name=name: {**data, name: 5.5}
       for name in ("key", "scores", "items", "notes", "per_item", "gold", "parts", "official")},
    "a score without a value": lambda data: {**data, "scores": [{"metric": "acc"}]},
    "a score that is no number": lambda data: {**data, "scores": [{**data["scores"][0], "value": "high"}]},
    "an item that is no number": lambda data: {**data, "per_item": {"acc": {"x": ["a", 1]}}},
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_task_counts_as_not_finished(kind: str, whole: tuple[Evaluation, Path], tmp_path: Path) -> None:
    from decondense.evaluate.harness import finished

    intact = json.loads((whole[1] / "tasks" / "piqa.json").read_text())
    seen: list[tuple[str, str]] = []

    def told(task: str, what: str, done: int, total: int | None) -> None:
        seen.append((task, what))

    assert finished(whole[1], "piqa", intact["key"], told) == whole[0]["piqa"]
    assert finished(whole[1], "piqa", {**intact["key"], "limit": 3}, told) is None
    assert finished(whole[1], "hellaswag", intact["key"], told) is None
    assert not seen, "an intact file of other settings, or none, is not damaged"
    damaged = DAMAGE[kind](intact)
    path = tmp_path / "tasks" / "piqa.json"
    path.parent.mkdir()
    text = damaged if isinstance(damaged, (str, bytes)) else json.dumps(damaged)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert finished(tmp_path, "piqa", intact["key"], told) is None
    assert seen == ([] if kind == '{"key": 5}' or kind == "key of another type" else [("piqa", "damaged")])


def test_a_damaged_task_is_scored_again_and_said(kept: tuple[Path, dict[str, Any]], whole: Any, capsys) -> None:
    out, given = kept
    before = json.loads((out / "tasks" / "piqa.json").read_text())
    (out / "tasks" / "piqa.json").write_text("[]")
    words = ["evaluate", str(given["model"]), "--tasks", given["tasks"], "--data-dir", str(given["data_dir"])]
    assert main([*words, "--out", str(out)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "piqa: its file of results is damaged or unreadable: scored again" in said
    assert "mmlu: kept from before" in said
    after = json.loads((out / "tasks" / "piqa.json").read_text())
    assert {name: after[name] for name in ("key", "scores", "per_item")} == {
        name: before[name] for name in ("key", "scores", "per_item")
    }


@pytest.mark.parametrize(
    "text",
    ["[]", "null", "5", "", '{"mod', "{}", '{"settings": {}}', '{"model": "m", "settings": 5}', '{"model": 5}'],
)
def test_a_damaged_evaluation_is_an_error_with_a_remedy(text: str, kept: tuple[Path, dict[str, Any]]) -> None:
    out, given = kept
    (out / "evaluation.json").write_text(text)
    with pytest.raises(EvaluationError, match=r"evaluation\.json is damaged.* choose another directory with --out"):
        evaluate(**given)


# ---- scripts of data sets --------------------------------------------------------------------------------------------

SCRIPTS = """
import json, datasets
datasets.__version__ = "3.6.0"  # for later releases, which run no scripts, the harness drops the option itself
seen = []
def load(path, name=None, **options):
    seen.append([path, options.get("trust_remote_code")])
    raise OSError("far enough")
datasets.load_dataset = load
from decondense.evaluate.worker.tasks import Tasks
tasks = Tasks(["hellaswag", "piqa"])  # hellaswag: all definitions of the harness are read
allowed = {}
for name, entry in tasks.manager.task_index.items():
    if entry.kind.name == "TASK" and (entry.cfg.get("dataset_kwargs") or {}).get("trust_remote_code"):
        allowed.setdefault(entry.cfg["dataset_path"], name)
reached = []
for name in [*allowed.values(), "hellaswag"]:
    before = len(seen)
    try:
        tasks.load(name, None, None, None)
    except Exception:
        reached += [name] * (len(seen) > before)
print(json.dumps({"seen": seen, "allowed": len(allowed), "reached": reached}))
print(datasets.config.HF_DATASETS_TRUST_REMOTE_CODE)
"""


def test_no_definition_of_the_harness_lets_a_data_set_run_a_script() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    *_, line, default = done.stdout.splitlines()
    found = json.loads(line)
    assert found["allowed"] > 3, "the harness no longer allows any: the test proves nothing"
    assert len(found["reached"]) > 3
    assert {option for _, option in found["seen"]} == {False}
    assert default == "False"
