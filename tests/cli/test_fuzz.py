"""Random files: a study is valid or refused with a ConfigError, and no command ends in a traceback."""

from __future__ import annotations

import re
import string
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from decondense.cli import main
from decondense.config import ConfigError, StudyConfig, parse_yaml
from decondense.studies import load_study

ANSI = re.compile(r"\x1b\[[0-9;]*m")
QUICK = settings(
    max_examples=100,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

WORDS = st.sampled_from(
    [
        *StudyConfig.model_fields,
        *(
            "steps",
            "weight",
            "layers",
            "loss",
            "schedule",
            "dispersion",
            "start",
            "tokenizer",
            "scales",
            "tiny",
            "quick",
        ),
        *("deep", "all", "nan", "1e400", "", " ", "a b", "[/x]", "é", "\x00", "~", "-1"),
    ]
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | WORDS
    | st.text(max_size=8)
    | st.dates()
    | st.binary(max_size=8)
)
DATA = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS | st.integers() | st.none(), inner, max_size=4),
    max_leaves=12,
)
VALID: dict[str, Any] = {
    "name": "fuzz",
    "title": "Fuzz",
    "question": "Does it hold?",
    "baseline": "a",
    "arms": [{"name": "a"}, {"name": "b", "dispersion": {"weight": 0.1, "schedule": {"kind": "linear"}}}],
    "seeds": [0, 1],
    "model": {"architecture": "gpt2", "overrides": {"n_layer": 2}},
    "corpus": {"vocab_size": 1000},
    "train": {"steps": 20},
    "evaluate": {"points": [0.5]},
}


def places(data: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where in nested data something can be replaced."""
    found = [here] if here else []
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        found += places(value, (*here, key))
    return found


def replaced(data: Any, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return value
    copy = dict(data) if isinstance(data, dict) else list(data)
    copy[place[0]] = replaced(copy[place[0]], place[1:], value)
    return copy


def is_valid_or_refused(parse: Any) -> None:
    try:
        study = parse()
    except ConfigError:
        return
    assert isinstance(study, StudyConfig)
    again = StudyConfig.parse(yaml.safe_load(study.to_yaml()), where="again")
    assert again.fingerprint() == study.fingerprint()


def test_what_is_changed_below_is_valid_to_begin_with() -> None:
    assert StudyConfig.parse(VALID, where="here").name == "fuzz"


@QUICK
@given(DATA)
def test_any_data_are_a_study_or_refused(data: Any) -> None:
    is_valid_or_refused(lambda: StudyConfig.parse(data, where="here"))


@QUICK
@given(st.sampled_from(places(VALID)), DATA)
def test_a_study_with_something_else_somewhere_is_valid_or_refused(place: tuple[Any, ...], value: Any) -> None:
    is_valid_or_refused(lambda: StudyConfig.parse(replaced(VALID, place, value), where="here"))


@QUICK
@given(st.sampled_from([(), *places(VALID)]), DATA)
def test_any_yaml_file_is_a_study_or_refused(tmp_path: Path, place: tuple[Any, ...], value: Any) -> None:
    path = tmp_path / "study.yaml"
    try:
        path.write_text(yaml.safe_dump(replaced(VALID, place, value)), encoding="utf-8")
    except (yaml.YAMLError, UnicodeEncodeError):  # nothing that a file could hold
        return
    is_valid_or_refused(lambda: load_study(path))


YAML_PIECES = st.lists(
    st.sampled_from(
        [
            *string.printable,
            "&a ",
            "*a",
            "<<: *a",
            "\t",
            "- ",
            ": ",
            "!!python/object:os.system ",
            "? ",
            "---\n",
        ]
        + [yaml.safe_dump({key: value}) for key, value in VALID.items()]
        + ["scales: {tiny: {train: {steps: 3}}}\n", "scales: {}\n", "scales: {tiny: 3}\n", "scales: {1: {}}\n"]
    ),
    max_size=16,
).map("".join)


@QUICK
@given(YAML_PIECES)
def test_any_text_is_a_study_or_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(text, encoding="utf-8")
    is_valid_or_refused(lambda: load_study(path))


NASTY_STUDIES = {
    "empty": b"",
    "tabs": b"name: x\n\tarms: 3\n",
    "list": b"- name: x\n",
    "number": b"7\n",
    "text": b"just words\n",
    "binary": bytes(range(256)),
    "utf-16": "name: x\n".encode("utf-16"),
    "alias of nothing": b"name: *a\n",
    "documents": b"name: x\n---\nname: y\n",
    "code": b"name: !!python/object/apply:os.getcwd []\n",
    "unhashable key": b"{[a, b]: 3}\n",
    "null byte": b"name: a\x00b\n",
    "date": b"name: 2001-01-01\n",
}
# what PyYAML reports as a plain ValueError or IndexError
NOT_CONSTRUCTED = {
    "huge number": b"name: x\nseeds: [" + b"9" * 5000 + b"]\n",
    "wrong date": b"name: 2001-99-99\n",
    "no number": b"name: !!int\n",
}


def complaint(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    err = ANSI.sub("", capsys.readouterr().err)
    assert status == 2, err
    return "".join(err.split())


@pytest.mark.parametrize("what", NASTY_STUDIES)
def test_a_file_that_is_no_study_is_named(what: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / "study.yaml"
    path.write_bytes(NASTY_STUDIES[what])
    for arguments in (["study", path, "--dry-run"], ["train", path, "--arm", "a"]):
        assert str(path) in complaint(capsys, *arguments)


@pytest.mark.parametrize("what", NOT_CONSTRUCTED)
def test_a_value_that_yaml_cannot_construct_is_named_with_its_file(what: str, tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_bytes(NOT_CONSTRUCTED[what])
    for read in (load_study, StudyConfig.from_yaml):
        with pytest.raises(ConfigError, match=re.escape(str(path))):
            read(path)


@settings(QUICK, max_examples=25)
@given(st.binary(max_size=300) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "replace")))
def test_bytes_are_no_rows_and_no_study(tmp_path: Path, capsys, data: bytes) -> None:
    for arguments, name in (
        (["compare"], "rows.jsonl"),
        (["report"], "rows.jsonl"),
        (["study", "--dry-run"], "study.yaml"),
    ):
        path = tmp_path / name
        path.write_bytes(data)
        assert str(path) in complaint(capsys, *arguments, path)
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "study.yaml"}


def test_directories_and_devices_in_the_place_of_files(tmp_path: Path, capsys) -> None:
    (tmp_path / "rows.jsonl").mkdir()
    assert str(tmp_path) in complaint(capsys, "compare", tmp_path)
    assert str(tmp_path) in complaint(capsys, "report", tmp_path)
    assert str(tmp_path) in complaint(capsys, "study", f"{tmp_path}/", "--dry-run")


def test_a_key_that_is_given_twice_is_named(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("name: a\ntrain: {steps: 1, steps: 2}\n")
    for read in (load_study, StudyConfig.from_yaml):
        with pytest.raises(ConfigError, match=r"the key 'steps' is given twice"):
            read(path)


@pytest.mark.parametrize(("first", "second"), [("x", "y"), ("steps", "seed")])
def test_merged_keys_may_be_given_again(first: str, second: str) -> None:
    """Also in a mapping that is merged itself."""
    text = f"a: &a {{{first}: 1, {second}: 2}}\nb: &b {{<<: *a, {second}: 3}}\nc: {{<<: *b, {first}: 4}}\n"
    assert parse_yaml(text, "here") == {
        "a": {first: 1, second: 2},
        "b": {first: 1, second: 3},
        "c": {first: 4, second: 3},
    }
    twice = f"a: {{b: &b {{{first}: 1, {first}: 2}}}}\nc: {{<<: *b, {second}: 3}}\n"
    with pytest.raises(ConfigError, match="is given twice"):
        parse_yaml(twice, "here")
