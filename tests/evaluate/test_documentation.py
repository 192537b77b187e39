"""The page about benchmarks names what the catalogue has, and its Python runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from evaluate_helpers import harness_tasks, needs_harness

from decondense.cli import app
from decondense.evaluate import TASKS, evaluate

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "evaluating.md").read_text(encoding="utf-8")


def test_the_table_of_tasks_is_the_catalogue() -> None:
    rows = {
        cells[0].strip("` "): [cell.strip() for cell in cells[1:]]
        for line in PAGE.splitlines()
        if line.startswith("| `") and len(cells := line.strip("|").split("|")) == 4
    }
    assert rows.keys() == TASKS.keys()
    for name, (source, files, examples) in rows.items():
        info = TASKS[name]
        assert source.split(",")[0] == info.source
        assert files.startswith(f"`{name}/{info.split}`")
        named = re.findall(r"`(\w+)`", examples)
        assert named == [split for split in (info.few_shot_split, info.stand_in) if split]


@needs_harness
@pytest.mark.parametrize("name", list(TASKS))
def test_the_catalogue_is_the_harness(name: str) -> None:
    """Data set, splits, folder: what has to be known before the harness starts is what the harness says."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("!function", lambda loader, suffix, node: "FUNCTION")

    def config(path: Path) -> dict[str, object]:
        found = yaml.load(path.read_text(), Loader)
        base = config(path.parent / found.pop("include")) if "include" in found else {}
        return {**base, **found}

    info = TASKS[name]
    of = {"winogrande": "default", "mmlu": "mmlu_anatomy"}.get(name, name)
    found = config(harness_tasks() / info.harness_folder / f"{of}.yaml")
    assert found["dataset_path"] == info.source
    assert (found.get("test_split") or found["validation_split"]) == info.split
    assert {metric["metric"] for metric in found["metric_list"]} >= {info.metric}  # type: ignore[index]
    if info.few_shot_split:
        assert found.get("fewshot_split", found.get("training_split")) == info.few_shot_split
    # what is asked of local rows is what the definition's templates read; MMLU's are told apart by one column more
    templates = " ".join(str(found.get(key)) for key in ("doc_to_text", "doc_to_target", "doc_to_choice"))
    if "FUNCTION" not in templates:
        wanted = {field.split(".")[0] for field in info.fields} - {"subject"}
        assert wanted == {field for field in wanted if re.search(rf"\b{field}\b", templates)}


def test_options_on_the_page_exist() -> None:
    import typer.main

    command = typer.main.get_command(app).commands["evaluate"]  # type: ignore[attr-defined]
    options = {option for parameter in command.params for option in parameter.opts}
    for option in set(re.findall(r"`(--[a-z][a-z-]*)", PAGE)):
        assert option in options, option


@needs_harness
def test_the_python_on_the_page_runs(tiny: Path, data: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "benchmarks").symlink_to(data)
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    exec(compile(code.replace("path/to/model", str(tiny)), "evaluating.md", "exec"), {"evaluate": evaluate})
    assert "| piqa | acc |" in capsys.readouterr().out
