"""The README and the docs cannot rot: their code runs, their links lead somewhere, their numbers come from rows."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from decondense.cli import main

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = BLOCK.findall(README)
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def run_python(text: str, folder: Path) -> None:
    """Run a block as a script of its own would run: in an empty namespace, in ``folder``."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.filterwarnings("error", category=DeprecationWarning, module="__main__")
            exec(compile(text, "block", "exec"), {"__name__": "__main__"})
    finally:
        os.chdir(before)


def run_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if words[0] == "make":
        # resolving the target proves that it exists; the demo and the tests have tests of their own
        subprocess.run(["make", "-n", "-C", str(ROOT), *words[1:]], check=True, capture_output=True)
    elif words[0] == "decondense":
        assert main(words[1:]) == 0, capsys.readouterr().err
    else:
        assert words[:2] == ["pip", "install"], f"nobody tests the command {shlex.join(words)!r}"


@pytest.mark.parametrize("number", [n for n, (language, _) in enumerate(BLOCKS) if language == "python"])
def test_python_blocks_of_the_readme_run(number: int, tmp_path: Path) -> None:
    run_python(BLOCKS[number][1], tmp_path)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as the README's commands expect it: its study file, a text, a model."""
    folder = tmp_path_factory.mktemp("readme")
    (study,) = [text for language, text in BLOCKS if language == "yaml"]
    (folder / "mine.yaml").write_text(study)
    (folder / "my-text").mkdir()
    for number in range(40):
        words = " ".join(f"sentence {number} has the word {number * k % 97}." for k in range(120))
        (folder / "my-text" / f"{number}.txt").write_text(words)
    return folder


def test_every_command_of_the_readme_works(workplace: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("DECONDENSE_CACHE", str(workplace / "cache"))
    lines = [line for language, text in BLOCKS if language == "bash" for line in text.splitlines() if line.strip()]
    seen = []
    # the study's own commands first: they train the model that `measure MODEL` needs
    for line in sorted(lines, key=lambda line: "MODEL" in line):
        words = shlex.split(line, comments=True)
        seen.append(words[0])
        if words[:2] == ["decondense", "measure"]:
            model = workplace / "mine" / "cells" / "dispersion" / "seed-0" / "final"
            words = [str(model) if word == "MODEL" else word for word in words]
            words += ["--tokens", "32", "--passages", "4"]
        if words[:2] == ["decondense", "study"] and "--out" in words:
            words += ["--workers", "0"]  # loads torch once
        run_command(words, capsys)
    assert {"make", "decondense", "pip"} <= set(seen)
    assert (workplace / "mine" / "report.html").exists()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_numbers_come_from_committed_rows() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": "0"},
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_documentation_speaks_of_the_project_alone() -> None:
    for path in DOCUMENTS:
        assert not re.search(r"(?<![\w.])/(work|tmp|root|home)/", path.read_text(encoding="utf-8")), path


def test_study_files_of_the_docs_are_valid() -> None:
    import yaml

    from decondense.config import StudyConfig

    texts = [text for language, text in BLOCK.findall((ROOT / "docs" / "studies.md").read_text()) if language == "yaml"]
    found = [yaml.safe_load(text) for text in texts]
    whole = [data for data in found if "name" in data]
    parts = [data for data in found if "name" not in data]
    assert len(whole) == 3
    assert [set(part) for part in parts] == [{"corpus"}, {"corpus"}, {"evaluate"}]
    for data in (*whole, *({**study, **part} for part in parts for study in whole)):
        StudyConfig.parse(data, where="docs/studies.md")


def test_the_docs_name_every_shipped_study_and_say_which_were_not_run() -> None:
    from decondense.studies import shipped_studies

    text = (ROOT / "docs" / "studies.md").read_text(encoding="utf-8")
    section = text.split("## The shipped studies")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`[^|]*) \|(.*)\|$", section, re.MULTILINE)
    described = {name: "(not run yet)" in what for names, what in rows for name in re.findall(r"`(\w+)`", names)}
    assert set(described) == set(shipped_studies())
    rows_of = ROOT / "benchmarks" / "results" / "studies"
    for name, not_run in described.items():
        assert not_run != (name == "demo" or any(rows_of.glob(f"{name}-*.jsonl.gz"))), name
