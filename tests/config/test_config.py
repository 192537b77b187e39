from __future__ import annotations

import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from decondense.config import (
    ArmConfig,
    ArmModelConfig,
    Config,
    ConfigError,
    CorpusConfig,
    DispersionConfig,
    EvaluateConfig,
    ModelConfig,
    StudyConfig,
    SweepConfig,
    TrainConfig,
    WeightSchedule,
    one_of,
    suggest,
)
from decondense.studies import load_study

MINIMAL = {
    "name": "s",
    "title": "t",
    "question": "q",
    "baseline": "ce",
    "arms": [{"name": "ce"}, {"name": "disp", "dispersion": {"weight": 0.5}}],
}


FORMER = {
    CorpusConfig: {"max_characters": ("most_characters", 9), "vocab_size": ("vocabulary", 512)},
    TrainConfig: {
        "batch_size": ("batch_sequences", 8),
        "micro_batch_size": ("micro_batch_sequences", 4),
        "max_seq_length": ("sequence_tokens", 64),
        "max_grad_norm": ("gradient_clip", 0.5),
        "lr_scheduler_type": ("decay", "linear"),
    },
    EvaluateConfig: {"num_fewshot": ("shots", 3)},
    ArmConfig: {"max_grad_norm": ("gradient_clip", 0.5)},
    SweepConfig: {"max_grad_norms": ("gradient_clips", (0.5,))},
    ModelConfig: {"pretrained": ("start", "a/b")},
    ArmModelConfig: {"pretrained": ("start", "a/b")},
}
REQUIRED = {ArmConfig: {"name": "a"}, SweepConfig: {"learning_rates": [0.1, 0.2]}}


@pytest.mark.parametrize("part", FORMER, ids=lambda part: part.__name__)
def test_former_names_are_read_and_keep_the_fingerprint(part: type[Config]) -> None:
    former = {name: field.serialization_alias for name, field in part.model_fields.items() if field.serialization_alias}
    assert former == {name: old for name, (old, _) in FORMER[part].items()}
    batch = {"batch_size": 8}
    for name, (old, value) in FORMER[part].items():
        known = {**REQUIRED.get(part, {}), **(batch if name == "micro_batch_size" else {})}
        new, before = (part.parse({**known, key: value}, where="test") for key in (name, old))
        assert new == before
        assert getattr(new, name) == value
        assert new.model_dump(by_alias=True)[old] == new.model_dump()[name], "rows of earlier releases keep their study"
        with pytest.raises(ConfigError, match=f"{old} is the former name of {name}"):
            part.parse({**known, name: value, old: value}, where="test")


def test_a_study_survives_yaml_and_keeps_its_fingerprint() -> None:
    study = StudyConfig.parse(MINIMAL, where="here")
    again = StudyConfig.parse(yaml.safe_load(study.to_yaml()), where="there")
    assert again == study
    assert again.fingerprint() == study.fingerprint()


def test_former_keys_are_read_and_keep_the_fingerprint() -> None:
    former = {
        "corpus": {"vocabulary": 500, "most_characters": 9000},
        "train": {
            "batch_sequences": 8, "micro_batch_sequences": 4, "sequence_tokens": 64, "gradient_clip": 0.5,
            "decay": "linear",
        },
        "evaluate": {"shots": 2, "passage_tokens": 64},
        "sweep": {"learning_rates": [0.1, 0.2], "gradient_clips": [1.0, 2.0]},
        "model": {"start": None},
    }  # fmt: skip
    names = {
        "vocabulary": "vocab_size", "most_characters": "max_characters", "batch_sequences": "batch_size",
        "micro_batch_sequences": "micro_batch_size", "sequence_tokens": "max_seq_length", "decay": "lr_scheduler_type",
        "gradient_clip": "max_grad_norm", "gradient_clips": "max_grad_norms", "shots": "num_fewshot",
        "start": "pretrained",
    }  # fmt: skip
    now = {part: {names.get(key, key): value for key, value in keys.items()} for part, keys in former.items()}
    old, new = (StudyConfig.parse(MINIMAL | keys, where="here") for keys in (former, now))
    assert old == new
    assert old.fingerprint() == new.fingerprint()
    assert set(names) & set(re.findall(r"\w+(?=:)", new.to_yaml())) == set()
    with pytest.raises(ConfigError, match=r"decay is the former name of lr_scheduler_type; give one"):
        StudyConfig.parse(MINIMAL | {"train": {"decay": "linear", "lr_scheduler_type": "linear"}}, where="here")


def test_the_fingerprint_is_that_of_rows_written_before_keys_were_renamed() -> None:
    assert TrainConfig().fingerprint() == "3585faca31ff6cc8"


def test_a_later_field_counts_in_the_fingerprint_when_it_is_set() -> None:
    assert EvaluateConfig().fingerprint() == "f8b5c91e96e0f9a7"
    assert EvaluateConfig(document_tokens=64).fingerprint() != EvaluateConfig().fingerprint()
    # as the demo was when the hash below was taken
    study = load_study("demo", "quick", laid_over={"train": {"learning_rate": 0.003, "warmup": 0.25}})
    other = study.model_copy(update={"evaluate": study.evaluate.model_copy(update={"document_tokens": 64})})
    assert study.fingerprint() == "f351bd5333178e8b"
    held = study.arms[-1].model_copy(update={"dispersion": DispersionConfig(target=0.1)})
    assert study.model_copy(update={"arms": (*study.arms[:-1], held)}).fingerprint() != study.fingerprint()
    assert other.fingerprint() != study.fingerprint()


def test_every_knob_changes_the_fingerprint() -> None:
    study = StudyConfig.parse(MINIMAL, where="here")
    other = study.model_copy(update={"train": TrainConfig(learning_rate=1e-3)})
    assert other.fingerprint() != study.fingerprint()


def test_configurations_are_frozen() -> None:
    with pytest.raises(ValueError, match=r"frozen"):
        TrainConfig().steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"titel": "x"}, r"file\.yaml: unknown key 'titel'.*Did you mean 'title'"),
        (
            {"arms": [{"name": "ce", "dispersion": {"wieght": 1}}]},
            r"arms\.0\.dispersion: unknown key 'wieght'.*'weight'",
        ),
        (
            {"arms": [{"name": "ce", "dispersion": {"loss": {"form": "angulr"}}}]},
            r"arms\.0\.dispersion\.loss\.form: unknown form 'angulr'.*Did you mean 'angular'",
        ),
        ({"arms": [{"name": "ce", "dispersion": {"layers": "dep"}}]}, r"unknown choice of layers 'dep'.*'deep'"),
        ({"baseline": "cee"}, r"unknown baseline arm 'cee'.*Did you mean 'ce'"),
        ({"seeds": [1, 1]}, r"seeds must be different"),
        ({"seeds": []}, r"seeds must be different"),
        ({"arms": [{"name": "ce"}, {"name": "ce"}]}, r"arm 'ce' appears twice"),
        ({"train": {"steps": "many"}}, r"train\.steps.*'many'"),
        ({"train": {"checkpoint_every": 15, "log_every": 10}}, r"multiple of log_every 10"),
        ({"train": {"batch_size": 6, "micro_batch_size": 4}}, r"multiple of micro_batch_size"),
        ({"evaluate": {"passage_tokens": 4096}}, r"passage_tokens 4096 exceeds train\.max_seq_length 128"),
        ({"arms": [{"name": "../up"}]}, r"arms\.0\.name"),
    ],
)
def test_a_bad_study_says_where_what_and_what_was_meant(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=r"(?s)" + message):
        StudyConfig.parse({**MINIMAL, **change}, where="file.yaml")


def test_unreadable_and_malformed_files_are_named(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml"):
        StudyConfig.from_yaml(tmp_path / "nothing.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        StudyConfig.from_yaml(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- a")
    with pytest.raises(ConfigError, match="expected a mapping"):
        StudyConfig.from_yaml(tmp_path / "list.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        StudyConfig.from_yaml(tmp_path / "binary.yaml")


def test_names() -> None:
    assert suggest("angulr", ["angular", "hinge"]) == " Did you mean 'angular'?"
    assert suggest("zzz", ["angular"]) == ""
    assert one_of("form", "hinge", ["hinge"]) == "hinge"
    with pytest.raises(ConfigError, match=r"unknown form 'hing'\. Did you mean 'hinge'\? Known: angular, hinge"):
        one_of("form", "hing", ["angular", "hinge"])


def test_unknown_arm_is_suggested() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean 'disp'"):
        StudyConfig.parse(MINIMAL, where="x").arm("dips")


def test_evaluation_points_always_hold_start_and_end() -> None:
    assert EvaluateConfig(points=(0.5,)).steps(10) == [0, 5, 10]
    assert EvaluateConfig(points=(0.001,)).steps(10) == [0, 10]
    with pytest.raises(ValueError, match="between 0 and 1"):
        EvaluateConfig(points=(2.0,))


def test_the_papers_defaults() -> None:
    assert DispersionConfig().weight == 0.1
    assert DispersionConfig().loss.tau == 1.0
    assert DispersionConfig().layers == "all"


@given(total=st.integers(1, 2000), kind=st.sampled_from(["constant", "linear", "cosine"]))
def test_schedules_stay_within_bounds_and_start_at_one(total: int, kind: str) -> None:
    schedule = WeightSchedule.model_validate({"kind": kind})
    assert schedule.factor(0, total) == pytest.approx(1.0)
    assert all(0 <= schedule.factor(step, total) <= 1 for step in range(0, total + 1, max(1, total // 50)))


def test_the_names_of_forms_are_those_that_exist() -> None:
    from decondense.config import COMPAT_NAMES, FORM_NAMES
    from decondense.losses import COMPAT, FORMS

    assert set(FORM_NAMES) == set(FORMS)
    assert set(COMPAT_NAMES) == set(COMPAT)
