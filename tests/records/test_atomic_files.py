"""Files and locks where the file system refuses: what is said names the file and not a temporary one."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from decondense.locks import lock
from decondense.records import atomic_path, atomic_write
from decondense.training.claim import claim


@pytest.mark.parametrize("name", ["n" * 255, "ü" * 127, "n" * 250 + ".html"])
def test_the_longest_names_can_be_written(name: str, tmp_path: Path) -> None:
    atomic_write(tmp_path / name, "1")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_errors_name_the_file_that_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").mkdir()
    (tmp_path / "there").touch()

    def no_room(path: Path) -> None:
        with atomic_path(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def taken(path: Path) -> None:
        with atomic_path(path, exclusive=True) as temporary:
            temporary.write_text("x")

    for write, name in (
        (lambda path: atomic_write(path, "x"), "rows.jsonl"),
        (lambda path: atomic_write(path, "x"), "n" * 256),
        (no_room, "new"),
        (taken, "there"),
    ):
        with pytest.raises(OSError) as refusal:
            write(tmp_path / name)
        assert refusal.value.filename == str(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "there"]
    with pytest.raises(FileNotFoundError) as other, atomic_path(tmp_path / "new"):
        (tmp_path / "other").read_text()
    assert str(other.value.filename).endswith("other")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_said(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a file system cannot be had in a test; the kernel's answer can."""

    def refuse(handle: object, how: int) -> None:
        raise OSError(number, os.strerror(number))

    with claim(tmp_path), (tmp_path / "lock").open("a") as handle, pytest.raises(BlockingIOError):
        lock(handle, handle.name)
    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.raises(OSError, match=r"does not support locks \(flock\); choose a directory on another") as refusal,
        claim(tmp_path),
    ):
        pass
    assert (refusal.value.errno, refusal.value.filename) == (number, str(tmp_path / "lock"))
