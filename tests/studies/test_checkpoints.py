"""A checkpoint that is not what its mark says is passed over, with the reason."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from decondense.records import append_rows, make_row
from decondense.training import checkpoints

CELL = {"study": "s", "study_fingerprint": "f", "arm": "a", "seed": 0}


@pytest.fixture
def cell(tmp_path: Path) -> Path:
    """A cell with two checkpoints, at steps 4 and 8, saved as a run saves them."""
    rows = tmp_path / "rows.jsonl"
    append_rows(rows, [make_row("run", **CELL, status="started", config={"a": 1})])
    for step in (2, 4, 6, 8):
        append_rows(rows, [make_row("step", **CELL, step=step, tokens=step, loss=1 / step, learning_rate=0.1)])
        if step in (4, 8):
            folder = tmp_path / f"checkpoint-{step}"
            (folder / "nested").mkdir(parents=True)
            for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "nested/0.distcp"):
                (folder / name).write_bytes(f"{name} of step {step} ".encode() * 50)
            checkpoints.mark(folder, step, rows)
    append_rows(rows, [make_row("step", **CELL, step=10, tokens=10, loss=0.1, learning_rate=0.1)])
    return tmp_path


def remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def marked(change: Callable[[dict], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        mark = json.loads((folder / "COMPLETE").read_text())
        change(mark)
        (folder / "COMPLETE").write_text(json.dumps(mark).replace("Infinity", "1e999"))

    return damage


def without_weights(mark: dict) -> None:
    mark["files"] = [entry for entry in mark["files"] if not entry["name"].endswith((".safetensors", ".distcp"))]


def flip(name: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(bytes(data))

    return change


DAMAGE = {
    **{
        f"no {name}": (remove(name), f"{name} is missing") for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")
    },
    "one bit of the weights": (flip("model.safetensors"), "model.safetensors has changed"),
    "one bit of a shard": (flip("nested/0.distcp"), "nested/0.distcp has changed"),
    "cut": (lambda folder: (folder / "optimizer.pt").write_bytes(b"half"), "optimizer.pt has 4 bytes instead of"),
    "an old mark": (lambda folder: (folder / "COMPLETE").write_text(""), "no inventory"),
    "a damaged mark": (lambda folder: (folder / "COMPLETE").write_text('{"step": 8'), "COMPLETE is damaged"),
    "another step's mark": (
        lambda folder: shutil.copy(folder.parent / "checkpoint-4" / "COMPLETE", folder),
        "belongs to step 4",
    ),
    "a mark nested too deeply": (lambda folder: (folder / "COMPLETE").write_text("[" * 100_000), "COMPLETE is damaged"),
    "a mark that is a list": (lambda folder: (folder / "COMPLETE").write_text("[]"), "COMPLETE is damaged"),
    "a mark that is not text": (lambda folder: (folder / "COMPLETE").write_bytes(b"\xff"), "COMPLETE is damaged"),
    "an infinite step": (marked(lambda mark: mark.update(step=math.inf)), "COMPLETE is damaged"),
    "an infinite size": (marked(lambda mark: mark["files"][0].update(size=math.inf)), "COMPLETE is damaged"),
    "infinitely many rows": (marked(lambda mark: mark["rows"].update(count=math.inf)), "COMPLETE is damaged"),
    "a name that no file can have": (
        marked(lambda mark: mark["files"].insert(0, {"name": "n" * 999, "size": 1, "sha256": ""})),
        "n" * 999,
    ),
    "no files": (marked(lambda mark: mark.update(files=[])), "lists no weights"),
    "files without weights": (marked(without_weights), "lists no weights"),
}


def test_an_untouched_checkpoint_is_used(cell: Path) -> None:
    assert checkpoints.newest(cell, cell / "rows.jsonl") == ((8, cell / "checkpoint-8"), [])


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_older_one(cell: Path, what: str) -> None:
    change, reason = DAMAGE[what]
    change(cell / "checkpoint-8")
    newest, ignored = checkpoints.newest(cell, cell / "rows.jsonl")
    assert newest == (4, cell / "checkpoint-4")
    assert [reason in text and "checkpoint-8" in text for text in ignored] == [True]
    checkpoints.discard(cell, keep=cell / "checkpoint-4")
    assert sorted(path.name for path in cell.glob("checkpoint-*")) == ["checkpoint-4"]


@pytest.mark.parametrize(
    "name",
    [
        "model-00001-of-00002.safetensors",
        "adapter_model.safetensors",
        "pytorch_model_fsdp.bin",
        "pytorch_model_fsdp_0/__0_0.distcp",
    ],
)
def test_weights_are_known_by_every_name_that_the_trainer_gives_them(cell: Path, name: str) -> None:
    for path in (cell / "checkpoint-8").rglob("*"):
        if path.is_file():
            path.unlink()
    (cell / "checkpoint-8" / name).parent.mkdir(exist_ok=True)
    (cell / "checkpoint-8" / name).write_bytes(b"weights")
    checkpoints.mark(cell / "checkpoint-8", 8, cell / "rows.jsonl")
    assert checkpoints.newest(cell, cell / "rows.jsonl") == ((8, cell / "checkpoint-8"), [])


def test_a_folder_whose_number_is_none_is_passed_over(cell: Path) -> None:
    (cell / "checkpoint-8").rename(cell / "checkpoint-\u00b2")
    assert checkpoints.newest(cell, cell / "rows.jsonl") == ((4, cell / "checkpoint-4"), [])


@pytest.mark.parametrize("mark", [True, False])
def test_what_a_kill_left_of_a_checkpoint_is_passed_over_without_a_word(cell: Path, mark: bool) -> None:
    shutil.rmtree(cell / "checkpoint-8")
    (cell / "checkpoint-8").mkdir()
    if mark:  # an empty folder with a mark is no ordinary kill
        (cell / "checkpoint-8" / "COMPLETE").touch()
    newest, ignored = checkpoints.newest(cell, cell / "rows.jsonl")
    assert newest == (4, cell / "checkpoint-4")
    assert len(ignored) == int(mark)


@pytest.mark.parametrize(("lost", "used"), [(2, None), (4, None), (6, 4), (8, 4), (10, 8)])
def test_rows_that_were_cut_or_changed_are_seen(cell: Path, lost: int, used: int | None) -> None:
    path = cell / "rows.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    for changed in (None, '"loss":9.0'):
        kept = []
        for line in lines:
            if json.loads(line).get("step") == lost:
                if changed is None:
                    continue
                line = line.replace(f'"loss":{json.loads(line)["loss"]}', changed)
            kept.append(line)
        path.write_text("".join(kept))
        newest, ignored = checkpoints.newest(cell, path)
        assert (None if newest is None else newest.step) == used
        assert len(ignored) == {None: 2, 4: 1, 8: 0}[used]
        assert all("rows" in reason for reason in ignored)


def test_a_cut_file_of_rows_is_seen(cell: Path) -> None:
    path = cell / "rows.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 3])
    assert checkpoints.newest(cell, path)[0] is None
    path.unlink()
    assert checkpoints.newest(cell, path)[0] is None
