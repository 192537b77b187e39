from __future__ import annotations

import re
from pathlib import Path

import pytest

from decondense.cli import main
from decondense.config import ConfigError, StudyConfig
from decondense.studies import load_study
from decondense.studies.catalogue import assigned

ANSI = re.compile(r"\x1b\[[0-9;]*m")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, ANSI.sub("", captured.out), ANSI.sub("", captured.err)


# ---- changes from the command line -----------------------------------------------------------------------------------


def test_assignments_are_laid_over_the_file_and_leave_the_rest() -> None:
    given = [
        "train.learning_rate=1e-4",
        "arms.dispersion.dispersion.weight=0.3",
        "seeds=[4, 5]",
        'prepared."a.b".seed=3',
    ]
    changed, plain = load_study("demo", "quick", laid_over=assigned(given)), load_study("demo", "quick")
    assert changed.train.learning_rate == 1e-4
    assert changed.train == plain.train.model_copy(update={"learning_rate": 1e-4})
    assert changed.arm("dispersion").dispersion == plain.arm("dispersion").dispersion.model_copy(update={"weight": 0.3})
    assert changed.arm("cross-entropy") == plain.arm("cross-entropy")
    assert changed.seeds == (4, 5)
    assert changed.prepared["a.b"].seed == 3


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("train.stepz=3", r"train: unknown key 'stepz'.*Did you mean 'steps'"),
        ("trane.steps=3", r"unknown key 'trane'.*Did you mean 'train'"),
        ("train.steps=many", r"train\.steps: .*valid integer.*'many'"),
        ("train=3", r"train: .*got 3"),
        ("train.steps", r"'train\.steps': expected KEY\.PATH=VALUE"),
        ("train..steps=3", r"expected KEY\.PATH=VALUE"),
        ("train.steps=[1", r"value of train\.steps is no valid YAML"),
        ("arms.disperson.learning_rate=1", r"unknown arm 'disperson'.*Did you mean 'dispersion'"),
        ("arms.dispersion=1", r"arms\.dispersion: expected a mapping"),
        ("arms.dispersion.dispersion.wait=1", r"unknown key 'wait'.*Did you mean 'weight'"),
    ],
)
def test_a_wrong_assignment_names_the_key(entry: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_study("demo", "quick", laid_over=assigned([entry]))


STARTS = {
    "name": "starts",
    "title": "Mid-training",
    "question": "Does it help?",
    "baseline": "plain",
    "arms": [{"name": "plain"}, {"name": "spread", "dispersion": {}}],
    "model": {"start": "own/model", "revision": "main", "parameters": 1e8},
    "corpus": {"tokenizer": "own/model"},
    "train": {"steps": 20, "checkpoint_every": 10},
}


def resolved(capsys: pytest.CaptureFixture[str], *arguments: object) -> StudyConfig:
    import yaml

    status, said, err = run(capsys, "study", *arguments, "--dry-run", "--yaml")
    assert status == 0, err
    return StudyConfig.parse(yaml.safe_load(said), where="printed")


@pytest.fixture
def starts(tmp_path: Path) -> Path:
    import yaml

    path = tmp_path / "starts.yaml"
    path.write_text(yaml.safe_dump(STARTS))
    return path


def test_options_change_what_they_name(capsys, starts: Path) -> None:
    plain = resolved(capsys, starts)
    options = ["--text", "some.txt", "--tasks", "piqa, arc_easy", "--data-dir", "data", "--limit", 5, "--seeds", 2]
    changed = resolved(capsys, starts, *options, "--set", "train.steps=30")
    assert changed.corpus == plain.corpus.model_copy(update={"source": "some.txt"})
    assert changed.evaluate == plain.evaluate.model_copy(
        update={"tasks": ("piqa", "arc_easy"), "data_dir": "data", "limit": 5}
    )
    assert changed.seeds == (0, 1)
    assert changed.train == plain.train.model_copy(update={"steps": 30})
    assert changed.model == plain.model


def test_another_start_brings_its_own_tokenizer_unless_one_is_named(capsys, starts: Path) -> None:
    changed = resolved(capsys, starts, "--start", "other/model")
    assert (changed.model.start, changed.model.revision, changed.model.parameters) == ("other/model", None, None)
    assert changed.corpus.tokenizer == "other/model"
    assert resolved(capsys, starts, "--start", "a/b", "--tokenizer", "c/d").corpus.tokenizer == "c/d"
    status, _, err = run(capsys, "study", "demo", "--start", "a/b", "--dry-run")
    assert status == 2
    assert "starts from scratch" in " ".join(err.split())


def test_a_start_in_the_place_of_a_prepared_model_needs_no_preparing(capsys, tmp_path: Path) -> None:
    import yaml

    data = {**STARTS, "model": {"start": "prepared:base"}, "corpus": {}, "prepared": {"base": {}, "teacher": {}}}
    data["arms"] = [{"name": "plain"}, {"name": "taught", "distillation": {"teacher": "prepared:teacher"}}]
    path = tmp_path / "prepared.yaml"
    path.write_text(yaml.safe_dump(data))
    assert set(resolved(capsys, path).prepared) == {"base", "teacher"}
    changed = resolved(capsys, path, "--start", "a/b")
    assert set(changed.prepared) == {"teacher"}
    assert changed.corpus.tokenizer == "a/b"


def test_studies_are_listed(capsys) -> None:
    status, said, _ = run(capsys, "study", "--list")
    assert status == 0
    assert "demo" in said
    assert "tiny, quick" in said
    status, said, err = run(capsys, "study")
    assert status == 2
    assert "demo" in said
    assert "--dry-run" in err
