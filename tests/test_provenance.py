"""Nothing that is written names a folder of the machine or holds a secret."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from decondense.cli import main
from decondense.privacy import has_credentials, publishable, publishable_words, without_credentials, without_folder
from decondense.records import make_row
from decondense.studies import load_study
from decondense.studies.directory import open_directory, study_of

SECRETS = ["s3cret", "tok3n", "hf_abcdefgh12345678", "passw0rd"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://me:passw0rd@host.org/a/b.txt", "https://host.org/a/b.txt"),
        ("s3://key:s3cret@bucket/x?token=tok3n#part", "s3://bucket/x"),
        ("get https://h/x?sig=tok3n, then hf_abcdefgh12345678", "get https://h/x then ***"),
        ("https://user@host", "https://host"),
        ("hf://datasets/a/b@main/c.txt", "hf://datasets/a/b@main/c.txt"),
        ("no address: a@b, x?y", "no address: a@b, x?y"),
        ("https://me:s3'cret@host/x", "https://host/x"),
        ("s3://ID:s3cret/tok3n@bucket/x", "s3://bucket/x"),
        ("https://me:pass#w0rd@host", "https://host"),
        ("https:/me:passw0rd@host/x", "https:/host/x"),  # as pathlib shortens it
        ("['https://a/b','https://me:passw0rd@h/x']", "['https://a/b','https://h/x']"),
        ("https://me:passw0rd@h/x?token=tok3n@a", "https://***"),  # which @ ends the password cannot be known
        ("https://h/x?next=https://a/b&token=tok3n", "https://h/x"),
        ("https://host:8080/@user/b", "https://user/b"),  # a port, or a password
        ("https://host:8080/a https://host/@user/b@main", "https://host:8080/a https://host/@user/b@main"),
        ("C:/Users/me/a#b", "C:/Users/me/a#b"),
    ],
)
def test_credentials_leave_a_url(text: str, expected: str) -> None:
    shown = without_credentials(text)
    assert shown.split() == expected.split() or shown == expected
    assert not any(secret in shown for secret in SECRETS)
    assert has_credentials(text) == (shown != text)
    assert without_credentials(shown) == shown


PLACES = [
    *("me:{}@host/x", "me:{}@host:80/a@b", ":{}@host/x?y=1", "host/x?token={}", "host:80/x?token={}", "host?t={}"),
    *("host/#{}", "me:{}@h/x?t={}#{}"),
]
AROUND = [
    *("{}", "'{}'", "see {} now", "x={}", "1{}", '["https://a/b","{}"]', "https://a/x,{}", "https://a,{}"),
    *("{},https://a/b", "{},https://me:{}@h"),
]
SECRET = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S")), min_size=4, max_size=20)


@settings(max_examples=500, deadline=None)
@given(
    scheme=st.sampled_from(["https", "s3", "postgresql+psycopg2", "git+ssh"]),
    place=st.sampled_from(PLACES),
    around=st.sampled_from(AROUND),
    secret=SECRET,
)
@example(scheme="https", place="me:{}@host/x", around="{}", secret="a://b@c/d?e#f")
@example(scheme="https", place="host/x?token={}", around="https://a,{}", secret="0@0012")
def test_no_part_of_a_secret_survives(scheme: str, place: str, around: str, secret: str) -> None:
    url = f"{scheme}://{place}"
    text = around.replace("{}", url).replace("{}", secret)
    shown = without_credentials(text)
    others = around.replace("{}", url).replace("{}", "")
    parts = {secret[start : start + 4] for start in range(len(secret) - 3)}
    assert not [part for part in parts if part in shown and part not in others]
    assert has_credentials(text)
    assert without_credentials(shown) == shown


def test_long_texts_take_no_time_and_no_stack() -> None:
    many = ",".join(["https://me:passw0rd@h/x"] * 5000)
    assert "passw0rd" not in without_credentials(many)
    plain = "a.b" * 100_000 + ",".join(["https://a/b"] * 5000)
    assert without_credentials(plain) == plain


@pytest.mark.parametrize(
    "value",
    [
        *('"https://me:s3\'cret@host/x"', "s3://ID:s3cret/tok3n@bucket/x", "https://me:pa#ssw0rd@host"),
        *("https://host/x?token=tok3n", "https:/me:s3cret@host/x"),
    ],
)
@pytest.mark.parametrize("key", ["evaluate.data_dir", "corpus.tokenizer"])
def test_a_study_with_credentials_is_refused_and_not_written(
    key: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", "demo", "--set", f"{key}={value}", "--out", str(tmp_path / "out"), "--dry-run"]) == 2
    said = capsys.readouterr()
    assert "is given with a user, password, query or token" in " ".join(said.err.split())
    assert not any(secret in said.out + said.err for secret in ["s3'cret", "ssw0rd", *SECRETS])


@pytest.mark.parametrize("key", ["title", "question", "arms.cross-entropy.label"])
def test_credentials_in_a_sentence_are_refused_and_folders_in_it_are_kept(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "see https://me:s3cret@host/x?token=tok3n, /and /not a folder"
    assert publishable({key.rpartition(".")[2]: text}) == {key.rpartition(".")[2]: without_credentials(text)}
    assert main(["study", "demo", "--set", f"{key}={text}", "--out", str(tmp_path / "out"), "--dry-run"]) == 2
    said = capsys.readouterr()
    assert "is given with a user, password, query or token" in " ".join(said.err.split())
    assert not any(secret in said.out + said.err for secret in SECRETS)
    study = load_study("demo", title="/not a folder, but https://host/x", question="/a")
    open_directory(study, tmp_path / "out")
    assert study_of(tmp_path / "out") == study
    assert not (tmp_path / "out" / "local.json").exists()


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("/home/me/data/text", "text"),
        ("/home/me/data/", "data"),
        ("~/models/gpt", "gpt"),
        ("file:///srv/x.txt", "x.txt"),
        ("C:\\Users\\me\\text", "text"),
        ("data/text", "data/text"),
        ("owner/name", "owner/name"),
        ("prepared:base", "prepared:base"),
    ],
)
def test_an_absolute_folder_becomes_its_name(word: str, expected: str) -> None:
    assert without_folder(word) == expected


def test_a_command_keeps_neither_folders_nor_secrets() -> None:
    words = ["/usr/bin/decondense", "study", "--out=/home/me/runs/a", "--set", "model.pretrained=/srv/m", "--hf-token"]
    words += ["tok3n", "--text", "https://me:passw0rd@h/x?k=s3cret", "API_KEY=s3cret", "--seeds", "3"]
    assert publishable_words(words) == [
        *("decondense", "study", "--out=a", "--set", "model.pretrained=m", "--hf-token", "***"),
        *("--text", "https://h/x", "API_KEY=***", "--seeds", "3"),
    ]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("corpus={source: /home/me/x}", 'corpus={"source": "x"}'),
        ("--set=corpus={source: /home/me/x, vocab_size: 300}", '--set=corpus={"source": "x", "vocab_size": 300}'),
        ('evaluate.data_dir="/home/me/x"', 'evaluate.data_dir="x"'),
        ("corpus=\n  source: /home/me/a=b", 'corpus={"source": "a=b"}'),
        ("arms.a.model={pretrained: [~/x, 's3://me:s3cret@b/y']}", 'arms.a.model={"pretrained": ["x", "s3://b/y"]}'),
        ("title=/not/a folder", "title=a folder"),  # as a word of its own it may be one
        ('prepared."a.b".model.pretrained=/home/me/x', 'prepared."a.b".model.pretrained=x'),
        ("--text=/home/me/a=b", "--text=a=b"),
        ("train.learning_rate=1e-4", "train.learning_rate=1e-4"),
        ("arms.a.label=two words", "arms.a.label=two words"),
        ("corpus={source: /home", "corpus={source: /home"),  # not YAML: the command refuses it
        ("a/b=c", "a/b=c"),
    ],
)
def test_values_of_a_command_are_read_as_the_command_reads_them(word: str, expected: str) -> None:
    assert publishable_words([word]) == [expected]


def test_rows_hold_neither() -> None:
    config = {
        "title": "/not/a folder",
        "corpus": {"source": "/home/me/secret-project/text.txt"},
        "arms": [{"name": "a", "model": {"pretrained": "/home/me/secret-project/m"}}],
    }
    cell = {"study": "s", "study_fingerprint": "f", "arm": "a", "seed": 0}
    row = make_row("run", **cell, status="failed", config=config, error="https://me:passw0rd@h/x refused")
    assert "secret-project" not in json.dumps(row)
    assert "passw0rd" not in json.dumps(row)
    assert row["config"]["title"] == "/not/a folder"
    assert row["config"]["arms"][0] == {"name": "a", "model": {"pretrained": "m"}}
    assert publishable(row["config"]) == row["config"]
