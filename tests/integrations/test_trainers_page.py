"""Every Python block of docs/trainers.md runs, in order, in one namespace; every YAML block is valid configuration."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

from decondense.config import ArmConfig, DispersionConfig

PAGE = Path(__file__).resolve().parents[2] / "docs" / "trainers.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings("ignore")
def test_python_blocks(tmp_path, monkeypatch):
    from accelerate.state import AcceleratorState, GradientState

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    namespace: dict[str, object] = {}
    ran = 0
    for language, code in BLOCKS:
        if language != "python":
            continue
        needed = re.search(r"^# needs: (\w+)", code)
        if needed and not importlib.util.find_spec(needed[1]):
            continue
        exec(compile(code, str(PAGE), "exec"), namespace)
        ran += 1
    assert ran >= 7


def test_yaml_blocks():
    documents = [yaml.safe_load(code) for language, code in BLOCKS if language == "yaml"]
    assert len(documents) == 2
    for document in documents:
        assert DispersionConfig.parse(document["dispersion"], where="docs").layers == "deep"


def test_text_blocks_name_things_that_exist():
    text = PAGE.read_text(encoding="utf-8")
    source = (PAGE.parents[1] / "src" / "decondense" / "training" / "titan.py").read_text(encoding="utf-8")
    for name in ("qwen3_0_6b_dispersion", "qwen3_0_6b_cross_entropy", "qwen3_debugmodel_dispersion", "to_huggingface"):
        assert name in text
        assert f"def {name}(" in source


def test_blocks_of_the_page_on_choosing():
    page = PAGE.with_name("choosing.md")
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    for language, code in blocks:
        if language == "python":
            exec(compile(code, str(page), "exec"), {})
        else:
            for arm in yaml.safe_load(code)["arms"]:
                ArmConfig.parse(arm, where=str(page))
    assert [language for language, _ in blocks] == ["python", "yaml", "yaml", "yaml"]
