"""JSON files that hold anything but what was written: the file is named, whoever reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from decondense.checkpoints import adapter_of
from decondense.records import RecordError, read_json

DAMAGE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not valid JSON"),
    "cut": (b'{"a": 1', "not valid JSON"),
    "not UTF-8": (b"\xff\xfe", "not valid JSON"),
    "lists in lists": (b"[" * 100_000, "nested too deeply"),
    "objects in objects": (b'{"a":' * 100_000, "nested too deeply"),
    "a list": (b"[]", "not a JSON object"),
    "null": (b"null", "not a JSON object"),
}


@pytest.mark.parametrize("read", [read_json, lambda path: adapter_of(path.parent)], ids=["alone", "adapter"])
@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named_with_its_file(what: str, read, tmp_path: Path) -> None:
    data, reason = DAMAGE[what]
    path = tmp_path / "adapter_config.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=reason) as refused:
        read(path)
    assert str(path) in str(refused.value)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": [1.5, null]}')
    assert read_json(tmp_path / "a.json") == {"a": [1.5, None]}
    for path in (tmp_path / "missing.json", tmp_path):
        with pytest.raises(RecordError, match=f"{path} cannot be read"):
            read_json(path)
