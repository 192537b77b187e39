"""What a study is refused for before anything is printed, written or trained; what its scripts never execute."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from decondense.cli import main
from decondense.config import ConfigError, EvaluateConfig, StudyConfig
from decondense.evaluate import EvaluationError, check_benchmarks
from decondense.studies import load_study
from decondense.studies.launch import slurm_script, torchtitan


@pytest.mark.parametrize("way", [["--dry-run"], ["--dry-run", "--yaml"], ["--slurm", "run.sh"], ["--out", "out"]])
@pytest.mark.parametrize(
    "change",
    [
        ["--text", "https://me:hunter2@host/text.jsonl"],
        ["--set", "model.pretrained=s3://key:hunter2@bucket/model"],
        ["--set", "corpus.tokenizer=https://host/t?sig=hunter2"],
    ],
)
def test_credentials_are_neither_printed_nor_written(
    way: list[str], change: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["study", "demo", *change, *way]) == 2
    said = "".join(capsys.readouterr())
    assert "error" in said
    assert "hunter2" not in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["arm", "prepared", "study"])
def test_names_that_become_folders_fit_a_file_system(place: str) -> None:
    def study(name: str) -> StudyConfig:
        prepared = {"model": {"architecture": "gpt2"}, "train": {"steps": 1}}
        changes: dict[str, Any] = {
            "arm": {"arms": [{"name": name}], "baseline": name},
            "prepared": {"prepared": {name: prepared}, "model": {"start": f"prepared:{name}"}},
            "study": {"name": name},
        }[place]
        plain = {"name": "s", "title": "s", "question": "?", "arms": [{"name": "a"}], "baseline": "a"}
        return StudyConfig.parse({**plain, **changes}, where="s")

    study("n" * 120)
    with pytest.raises(ConfigError, match="120"):
        study("n" * 121)


def test_a_task_that_the_harness_does_not_have_is_refused_before_training() -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(EvaluationError, match="no task 'hellaswagg'"):
        check_benchmarks(EvaluateConfig(tasks=("piqa", "hellaswagg", "blimp_adjunct_island")))


@pytest.mark.parametrize("text", ["a\ntouch ran", "a\rtouch ran", "$(touch ran)", "`touch ran`", "a'; touch ran; '"])
@pytest.mark.parametrize("script", ["slurm", "torchtitan"])
def test_no_name_becomes_a_command_of_a_script(text: str, script: str, tmp_path: Path) -> None:
    out = Path(text)
    if script == "slurm":
        lines = slurm_script(load_study("demo"), ["demo", "--text", text], out)
    else:
        lines = torchtitan(load_study("table2", "paper-qwen3", corpus={"source": text, "tokenizer": text}), out)
    quiet = "hf() { :; }; torchrun() { :; }; python() { :; }; decondense() { :; }; exec() { :; }\n"
    subprocess.run(["bash", "-c", quiet + "\n".join(lines)], cwd=tmp_path, check=False, capture_output=True)
    assert not (tmp_path / "ran").exists()
