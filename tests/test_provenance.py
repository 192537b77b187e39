"""Nothing that is written names a folder of the machine or holds a secret."""

from __future__ import annotations

import json

import pytest

from decondense.privacy import has_credentials, publishable, publishable_words, without_credentials, without_folder
from decondense.records import make_row

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
    ],
)
def test_credentials_leave_a_url(text: str, expected: str) -> None:
    shown = without_credentials(text)
    assert shown.split() == expected.split() or shown == expected
    assert not any(secret in shown for secret in SECRETS)
    assert has_credentials(text) == (shown != text)
    assert without_credentials(shown) == shown


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
