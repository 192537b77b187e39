from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from decondense.config import ConfigError, StudyConfig
from decondense.records import Row, append_rows, read_rows, write_rows
from decondense.stopping import Stopped, stop_on_signals
from decondense.studies import CellState, StudyFailed, run_study
from decondense.studies.runner import (
    cell_folder,
    default_workers,
    open_directory,
    opened_corpus,
    plan,
    states,
    study_corpus,
)
from decondense.training.checkpoints import mark
from studies.conftest import SMALL, Interrupted, small_study, stable_rows, stop_after


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, cache_base: Path) -> tuple[Path, list[Row]]:
    os.environ.setdefault("DECONDENSE_CACHE", str(cache_base))
    out = tmp_path_factory.mktemp("whole") / "study"
    return out, run_study(small_study(), out, workers=0)


def test_every_cell_has_its_rows(uninterrupted) -> None:
    out, rows = uninterrupted
    assert read_rows(out / "rows.jsonl") == rows
    for arm in ("cross-entropy", "dispersion"):
        mine = [row for row in rows if row["arm"] == arm]
        assert [row["status"] for row in mine if row["kind"] == "run"] == ["started", "finished"]
        assert [row["step"] for row in mine if row["kind"] == "step"] == [2, 4, 6, 8]
        assert [row["step"] for row in mine if row["kind"] == "profile"] == [0, 4, 8]
        assert [row["step"] for row in mine if row["kind"] == "eval"] == [0, 4, 8]
        items = [row for row in mine if row["kind"] == "eval_item"]
        final = [row for row in mine if row["kind"] == "eval"][-1]
        mean = sum(row["value"] * row["weight"] for row in items) / sum(row["weight"] for row in items)
        assert mean == pytest.approx(final["value"], rel=1e-12)
        logged = [row["dispersion"] for row in mine if row["kind"] == "step"]
        assert all((value is None) == (arm == "cross-entropy") for value in logged)
        assert (cell_folder(out, arm, 0) / "final" / "model.safetensors").exists()
        assert not list(cell_folder(out, arm, 0).glob("checkpoint-*"))


def test_arms_start_equal_and_read_the_same(uninterrupted) -> None:
    _, rows = uninterrupted
    ends = [row for row in rows if row["kind"] == "run" and row["status"] == "finished"]
    assert len({row["init_hash"] for row in ends}) == 1
    assert len({row["order_hash"] for row in ends}) == 1
    assert len({row["final_hash"] for row in ends}) == 2
    first = {row["arm"]: row["value"] for row in rows if row["kind"] == "eval" and row["step"] == 0}
    assert first["cross-entropy"] == first["dispersion"]


def test_the_logged_loss_is_the_plain_cross_entropy(tmp_path) -> None:
    # with weight 0 the dispersion arm trains as the baseline does, so its logged loss must be the baseline's
    study = small_study(arms=[{"name": "cross-entropy"}, {"name": "zero", "dispersion": {"weight": 0.0}}])
    rows = run_study(study, tmp_path / "s", workers=0)
    logged = {
        arm: [row["loss"] for row in rows if row["kind"] == "step" and row["arm"] == arm]
        for arm in ("cross-entropy", "zero")
    }
    assert logged["zero"] == logged["cross-entropy"]
    hashes = {row["arm"]: row["final_hash"] for row in rows if row["kind"] == "run" and row["status"] == "finished"}
    assert hashes["zero"] == hashes["cross-entropy"]


def test_micro_batches_give_the_same_training(tmp_path, uninterrupted) -> None:
    base = small_study().train
    study = small_study(train=base.model_copy(update={"micro_batch_size": 1}).model_dump())
    study = study.model_copy(
        update={"model": study.model.model_copy(update={"overrides": {**study.model.overrides, **NO_DROPOUT}})}
    )
    whole = small_study()
    whole = whole.model_copy(
        update={"model": whole.model.model_copy(update={"overrides": {**whole.model.overrides, **NO_DROPOUT}})}
    )
    rows = run_study(study, tmp_path / "micro", workers=0)
    expected = run_study(whole, tmp_path / "whole", workers=0)
    for kind, key, tolerance in (("step", "loss", 1e-5), ("step", "dispersion", 1e-4), ("eval", "value", 1e-4)):
        a = [row[key] for row in rows if row["kind"] == kind and row[key] is not None]
        b = [row[key] for row in expected if row["kind"] == kind and row[key] is not None]
        assert a == pytest.approx(b, rel=tolerance)


NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


# a cell writes eight times: evaluation 0, steps 2, evaluation and steps 4, steps 6, evaluation and steps 8, the end
@pytest.mark.parametrize(("after", "resumed_from"), [(2, []), (4, [4]), (5, [4]), (7, [8])])
def test_interrupted_and_resumed_is_uninterrupted(tmp_path, uninterrupted, after: int, resumed_from: list[int]) -> None:
    """Stop the second cell after a number of written rows, before and after its checkpoint; go on; compare all rows."""
    from decondense.training.hf import run_cell

    study, out = small_study(), tmp_path / "study"
    shutil.copytree(uninterrupted[0], out)
    folder = cell_folder(out, "dispersion", 0)
    shutil.rmtree(folder)
    with pytest.raises(Interrupted):
        run_cell(study, study.arm("dispersion"), 0, opened_corpus(out), folder, watch=stop_after(after))
    rows = run_study(study, out, workers=0)
    assert stable_rows(rows) == stable_rows(uninterrupted[1])
    (end,) = [
        row for row in rows if row["kind"] == "run" and row["arm"] == "dispersion" and row["status"] == "finished"
    ]
    assert end["timing"]["resumed_from_steps"] == resumed_from


def damaged_weights(folder: Path) -> None:
    data = bytearray((folder / "checkpoint-8" / "model.safetensors").read_bytes())
    data[-9] ^= 4
    (folder / "checkpoint-8" / "model.safetensors").write_bytes(bytes(data))


def without_row(step: int) -> Callable[[Path], object]:
    def cut(folder: Path) -> None:
        path = folder / "rows.jsonl"
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if json.loads(line).get("step") != step))

    return cut


DAMAGE: dict[str, tuple[Callable[[Path], object], list[int], str]] = {
    "no optimizer": (lambda folder: (folder / "checkpoint-8" / "optimizer.pt").unlink(), [4], "optimizer.pt"),
    "a bit of the weights": (damaged_weights, [4], "model.safetensors"),
    "rows cut between": (without_row(2), [], "rows.jsonl has"),
    "rows not readable": (
        lambda folder: (folder / "rows.jsonl").write_bytes(b"\xff\n" + (folder / "rows.jsonl").read_bytes()),
        [],
        "line 1",
    ),
}


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, uninterrupted) -> Path:
    """A study whose second cell stopped after its checkpoint at step 8, with the one at step 4 beside it."""
    from decondense.training.hf import run_cell

    study, out = small_study(), tmp_path_factory.mktemp("interrupted") / "study"
    shutil.copytree(uninterrupted[0], out)
    folder = cell_folder(out, "dispersion", 0)
    shutil.rmtree(folder)
    with pytest.raises(Interrupted):
        run_cell(study, study.arm("dispersion"), 0, opened_corpus(out), folder, watch=stop_after(7))
    return out


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_falls_back_and_is_told(tmp_path, uninterrupted, interrupted, what: str) -> None:
    change, resumed_from, reason = DAMAGE[what]
    out = tmp_path / "study"
    shutil.copytree(interrupted, out)
    change(cell_folder(out, "dispersion", 0))
    with pytest.warns(UserWarning, match="dispersion seed 0: ") as told:
        rows = run_study(small_study(), out, workers=0)
    assert any(re.search(f"dispersion seed 0: .*{reason}", str(warning.message)) for warning in told)
    assert stable_rows(rows) == stable_rows(uninterrupted[1])
    (end,) = [row for row in rows if row["arm"] == "dispersion" and row.get("status") == "finished"]
    assert end["timing"]["resumed_from_steps"] == resumed_from


def without_kind(kind: str) -> Callable[[list[Row]], list[Row]]:
    return lambda rows: [row for row in rows if row["kind"] != kind]


def another_loss(rows: list[Row]) -> list[Row]:
    return [{**row, "loss": row["loss"] + 1.0} if row["kind"] == "step" and row["step"] == 4 else row for row in rows]


FINISHED: dict[str, Callable[[list[Row]], list[Row]]] = {
    **{f"no {kind}": without_kind(kind) for kind in ("step", "profile", "eval", "eval_item")},
    "another loss": another_loss,
}


@pytest.mark.parametrize("what", FINISHED)
def test_a_finished_cell_whose_rows_changed_is_trained_again(tmp_path, uninterrupted, what: str) -> None:
    out = tmp_path / "study"
    shutil.copytree(uninterrupted[0], out)
    path = cell_folder(out, "dispersion", 0) / "rows.jsonl"
    write_rows(path, FINISHED[what](read_rows(path)))
    changed = path.read_bytes()
    assert [state.status for state in states(small_study(), out)] == ["finished", "waiting"]
    with pytest.warns(UserWarning, match=r"dispersion seed 0: rows\.jsonl: its rows have changed .*rows\.damaged"):
        rows = run_study(small_study(), out, workers=0)
    assert stable_rows(rows) == stable_rows(uninterrupted[1])
    assert path.with_suffix(".damaged").read_bytes() == changed
    assert str(tmp_path) not in path.read_text(), "rows name no folder of this machine"


@pytest.mark.slow
def test_workers_train_a_changed_cell_again_too(tmp_path, uninterrupted) -> None:
    out = tmp_path / "study"
    shutil.copytree(uninterrupted[0], out)
    path = cell_folder(out, "dispersion", 0) / "rows.jsonl"
    write_rows(path, another_loss(read_rows(path)))
    with pytest.warns(UserWarning, match="its rows have changed"):
        rows = run_study(small_study(), out, workers=2)
    assert stable_rows(rows) == stable_rows(uninterrupted[1])
    assert "its rows have changed" in "".join(log.read_text() for log in (out / "logs").iterdir())


def test_rows_that_an_earlier_release_wrote_are_a_result(tmp_path, uninterrupted) -> None:
    out = tmp_path / "study"
    shutil.copytree(uninterrupted[0], out)
    for path in out.glob("cells/*/*/rows.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            row.pop("rows_hash", None)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = run_study(small_study(), out, workers=0)
    assert [{**row, "rows_hash": None} if row["kind"] == "run" else row for row in uninterrupted[1]] == rows


def test_an_untrained_cell_whose_rows_changed_is_evaluated_again(tmp_path) -> None:
    study, out = small_study(arms=[{"name": "start", "untrained": True}], baseline="start"), tmp_path / "study"
    rows = run_study(study, out, workers=0)
    path = cell_folder(out, "start", 0) / "rows.jsonl"
    write_rows(path, without_kind("profile")(read_rows(path)))
    with pytest.warns(UserWarning, match="its rows have changed"):
        assert stable_rows(run_study(study, out, workers=0)) == stable_rows(rows)


def test_an_unexpected_error_of_one_task_is_told_and_the_others_are_run(tmp_path, uninterrupted, capsys) -> None:
    """Here an optimizer's state that is whole as a file and none for the Trainer."""
    from decondense.training.hf import run_cell

    study, out = small_study(), tmp_path / "study"
    shutil.copytree(uninterrupted[0], out)
    shutil.rmtree(out / "cells")
    folder = cell_folder(out, "cross-entropy", 0)
    with pytest.raises(Interrupted):
        run_cell(study, study.arm("cross-entropy"), 0, opened_corpus(out), folder, watch=stop_after(7))
    torch.save({}, folder / "checkpoint-8" / "optimizer.pt")
    mark(folder / "checkpoint-8", 8, folder / "rows.jsonl")
    with pytest.raises(StudyFailed, match="cross-entropy seed 0: unexpected KeyError"):
        run_study(study, out, workers=0)
    assert [state.status for state in states(study, out)] == ["running", "finished"]
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert "param_groups" in said


def test_an_error_of_whoever_watches_is_no_error_of_the_task(tmp_path, uninterrupted) -> None:
    class Watching:
        def __init__(self) -> None:
            self.raised = False

        def corpus(self, what: str, done: int, total: int) -> None: ...

        def cells(self, states: list[CellState]) -> None:
            if any(state.step >= 2 for state in states) and not self.raised:
                self.raised = True
                raise Interrupted

    out = tmp_path / "study"
    shutil.copytree(uninterrupted[0], out)
    shutil.rmtree(out / "cells")
    with pytest.raises(Interrupted):
        run_study(
            small_study(train={**small_study().train.model_dump(), "steps": 8}), out, workers=0, watcher=Watching()
        )


def test_the_warning_signal_saves_at_the_next_logged_step(tmp_path, uninterrupted) -> None:
    from decondense.training.hf import run_cell

    study, out = small_study(), tmp_path / "study"
    open_directory(study, out)
    study_corpus(study, out)
    folder = cell_folder(out, "dispersion", 0)
    written = 0

    def watch() -> None:
        nonlocal written
        written += 1
        if written == 1:  # the evaluation before the first step
            os.kill(os.getpid(), signal.SIGUSR1)

    with stop_on_signals(), pytest.raises(Stopped) as stopped:
        run_cell(study, study.arm("dispersion"), 0, opened_corpus(out), folder, watch=watch)
    assert stopped.value.code == 128 + signal.SIGUSR1
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"], "the study saves at 4 and 8"
    rows = run_study(study, out, workers=0)
    assert stable_rows(rows) == stable_rows(uninterrupted[1])
    (end,) = [row for row in rows if row["arm"] == "dispersion" and row.get("status") == "finished"]
    assert end["timing"]["resumed_from_steps"] == [2]


def processes_of(out: Path) -> list[int]:
    """Processes, other than the runner, that work in ``out``."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = place.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"decondense.studies.worker" in words and str(out).encode() in words:
            found.append(int(place.parent.name))
    return found


def gone(out: Path, seconds: float) -> bool:
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        if not processes_of(out):
            return True
        time.sleep(0.02)
    return False


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    "name",
    ["SIGKILL", "SIGTERM", *(pytest.param(name, marks=pytest.mark.slow) for name in ("SIGHUP", "SIGINT", "SIGUSR1"))],
)
def test_no_worker_outlives_a_runner_that_is_stopped_while_they_start(tmp_path, name: str) -> None:
    (tmp_path / "study.yaml").write_text(small_study().to_yaml())
    out = tmp_path / "study"
    command = [sys.executable, "-m", "decondense", "study", str(tmp_path / "study.yaml"), "--out", str(out)]
    process = subprocess.Popen(
        [*command, "--workers", "2"], stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # whoever started the tests may ignore it
    )  # fmt: skip
    limit = time.monotonic() + 120
    while not processes_of(out) and time.monotonic() < limit:
        time.sleep(0.005)
    number = getattr(signal, name)
    process.send_signal(number)
    if name == "SIGKILL":
        process.wait()
        assert gone(out, 5.0)
        shutil.rmtree(out)
        time.sleep(0.5)
        assert not out.exists()
        return
    _, err = process.communicate(timeout=60)
    assert gone(out, 5.0)
    assert process.returncode == 128 + number
    assert "checkpoints" in err
    assert "Traceback" not in err


def test_one_bad_arm_does_not_keep_the_others_from_being_trained(tmp_path) -> None:
    arms = [{"name": "bad", "model": {"overrides": {"n_head": 5}}}, {"name": "cross-entropy"}]
    out = tmp_path / "s"
    with pytest.raises(ConfigError, match="n_head"):
        run_study(small_study(arms=arms), out, workers=0)
    assert states(small_study(arms=arms), out)[1].status == "finished"


@pytest.mark.parametrize("overrides", [{"n_embd": -32}, {"n_layer": "two"}, {"n_layer": -1}, {"vocab_size": 2.5}])
def test_impossible_sizes_are_a_message_not_a_traceback(tmp_path, overrides: dict[str, object]) -> None:
    from decondense.training.hf import build_model

    config = small_study(
        model={"architecture": "gpt2", "overrides": {**SMALL["model"]["overrides"], **overrides}}
    ).model
    with pytest.raises(ConfigError, match=r"gpt2 with .* cannot be built"):
        build_model(config, 512, 32, 0)


def test_a_removed_directory_is_not_made_again(tmp_path) -> None:
    from decondense.training.hf import run_cell

    study, out = small_study(), tmp_path / "study"
    open_directory(study, out)
    study_corpus(study, out)
    corpus, folder = opened_corpus(out), cell_folder(out, "dispersion", 0)
    written = 0

    def watch() -> None:
        nonlocal written
        written += 1
        if written == 2:
            shutil.rmtree(out)

    with pytest.raises(RuntimeError, match="was removed while"):
        run_cell(study, study.arm("dispersion"), 0, corpus, folder, watch=watch)
    assert not out.exists()


def test_a_half_written_checkpoint_is_not_used(tmp_path, uninterrupted) -> None:
    from decondense.training.checkpoints import COMPLETE
    from decondense.training.hf import run_cell

    study, out = small_study(), tmp_path / "study"
    open_directory(study, out)
    study_corpus(study, out)
    folder = cell_folder(out, "cross-entropy", 0)
    count = 0

    def stop() -> None:
        nonlocal count
        count += 1
        if count > 7:
            raise Interrupted

    with pytest.raises(Interrupted):
        run_cell(study, study.arm("cross-entropy"), 0, opened_corpus(out), folder, watch=stop)
    newest = folder / "checkpoint-8"
    (newest / COMPLETE).unlink()
    (newest / "model.safetensors").write_bytes(b"half")
    assert stable_rows(run_study(study, out, workers=0)) == stable_rows(uninterrupted[1])


def test_kill_9_loses_nothing(tmp_path) -> None:
    """Kill runner and worker in the middle of training, twice, and start the same command again."""
    study = small_study(train={**small_study().train.model_dump(), "steps": 60, "checkpoint_every": 10})
    (tmp_path / "study.yaml").write_text(study.to_yaml())
    out = tmp_path / "study"
    command = [sys.executable, "-m", "decondense", "study", str(tmp_path / "study.yaml"), "--out", str(out)]
    for wanted in (8, 40):
        process = subprocess.Popen([*command, "--workers", "1"], stdout=subprocess.PIPE, start_new_session=True)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            rows = sum(path.read_bytes().count(b'"kind":"step"') for path in out.glob("cells/*/*/rows.jsonl"))
            if rows >= wanted:
                break
            time.sleep(0.01)
        assert process.poll() is None, "the study ended before it was killed"
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        for path in out.glob("cells/*/*/rows.jsonl"):
            read_rows(path)  # every row written so far is valid
    rows = run_study(study, out, workers=0)
    assert [row["timing"]["resumed_from_steps"] for row in rows if row.get("status") == "finished"] != [[], []]
    assert stable_rows(rows) == stable_rows(run_study(study, tmp_path / "whole", workers=0))


@pytest.mark.slow
@pytest.mark.parametrize("room", [3_000, 60_000])
def test_a_full_disk_is_said_and_nothing_is_lost(tmp_path, uninterrupted, room: int) -> None:
    """A file size limit refuses writes as a full disk does: first to the rows, or else to a checkpoint."""
    (tmp_path / "study.yaml").write_text(small_study().to_yaml())
    out = tmp_path / "study"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "decondense",
            "study",
            str(tmp_path / "study.yaml"),
            "--out",
            str(out),
            "--workers",
            "1",
        ],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)),
    )
    assert done.returncode in (1, 2)
    said = " ".join(done.stderr.split())
    assert "File too large" in said
    assert "Nothing is lost" in said or "Rows written so far are valid" in said
    for path in out.glob("cells/*/*/rows.jsonl"):
        read_rows(path)
    assert stable_rows(run_study(small_study(), out, workers=0)) == stable_rows(uninterrupted[1])


@pytest.mark.slow
def test_a_worker_whose_runner_dies_stops_and_the_next_runner_takes_over(tmp_path) -> None:
    study = small_study(train={**small_study().train.model_dump(), "steps": 60, "checkpoint_every": 10})
    (tmp_path / "study.yaml").write_text(study.to_yaml())
    out = tmp_path / "study"
    command = [sys.executable, "-m", "decondense", "study", str(tmp_path / "study.yaml"), "--out", str(out)]
    process = subprocess.Popen([*command, "--workers", "1"], stdout=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list(out.glob("cells/*/*/checkpoint-*")):
        time.sleep(0.01)
    process.kill()  # the runner alone: its worker is left without a parent
    process.communicate()
    rows = run_study(study, out, workers=1)
    assert stable_rows(rows) == stable_rows(run_study(study, tmp_path / "whole", workers=0))


@pytest.mark.slow
def test_workers_side_by_side_give_the_same_rows(tmp_path, uninterrupted) -> None:
    class Watching:
        def __init__(self) -> None:
            self.seen: list[list[CellState]] = []

        def corpus(self, what: str, done: int, total: int) -> None: ...

        def cells(self, states: list[CellState]) -> None:
            self.seen.append(states)

    watching = Watching()
    rows = run_study(small_study(), tmp_path / "study", workers=2, watcher=watching)
    assert stable_rows(rows) == stable_rows(uninterrupted[1])
    assert {state.status for state in watching.seen[-1]} == {"finished"}
    assert [state.step for state in watching.seen[-1]] == [8, 8]


def test_a_finished_study_is_not_run_again(uninterrupted) -> None:
    out, rows = uninterrupted
    before = (cell_folder(out, "dispersion", 0) / "rows.jsonl").stat().st_mtime_ns
    assert run_study(small_study(), out, workers=1) == rows
    assert (cell_folder(out, "dispersion", 0) / "rows.jsonl").stat().st_mtime_ns == before


def test_a_directory_that_holds_another_study_is_refused(uninterrupted) -> None:
    out, rows = uninterrupted
    other = small_study(seeds=[0, 1])
    with pytest.raises(ConfigError, match=r"holds another study.*seeds \[0\].*--out.*--resume"):
        run_study(other, out, workers=0)
    # --resume goes on with what lies there
    assert run_study(other, out, workers=0, resume=True) == rows


def test_other_peoples_directories_are_left_alone(tmp_path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="not empty and holds no study"):
        run_study(small_study(), tmp_path, workers=0)
    with pytest.raises(ConfigError, match="is a file"):
        run_study(small_study(), tmp_path / "thesis.tex", workers=0)
    with pytest.raises(ConfigError, match="no study to resume"):
        run_study(small_study(), tmp_path / "new", workers=0, resume=True)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_changed_text_is_noticed(tmp_path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for number in range(30):
        (text / f"{number}.txt").write_text(f"document {number}: " + " ".join(str(n * number) for n in range(200)))
    study = small_study(
        corpus={"source": str(text), "vocab_size": 300, "held_out": 0.4},
        arms=[{"name": "cross-entropy"}],
        train={**SHORT, "steps": 2},
        evaluate={"points": [1], "validation_tokens": 200, "passages": 2, "passage_tokens": 16},
    )
    run_study(study, tmp_path / "out", workers=0)
    (text / "new.txt").write_text("something else " * 50)
    with pytest.raises(ConfigError, match="was started on the text"):
        run_study(study, tmp_path / "out", workers=0)


SHORT = {"batch_size": 2, "max_seq_length": 16, "log_every": 1, "checkpoint_every": 2}


def test_divergence_is_a_row_that_names_step_and_layer(tmp_path) -> None:
    study = small_study(
        arms=[{"name": "cross-entropy"}, {"name": "wild", "learning_rate": 1e30}], baseline="cross-entropy"
    )
    rows = run_study(study, tmp_path / "s", workers=0)
    (end,) = [row for row in rows if row["arm"] == "wild" and row["kind"] == "run" and row["status"] == "failed"]
    assert "step 2" in end["error"] or "step 4" in end["error"]
    assert "layer" in end["error"] or "block" in end["error"] or "embedding" in end["error"]
    assert [row["status"] for row in rows if row["arm"] == "cross-entropy" and row["kind"] == "run"][-1] == "finished"
    # a failed cell is a result: it is not tried again unless asked
    again = run_study(study, tmp_path / "s", workers=0)
    assert again == rows
    retried = run_study(study, tmp_path / "s", workers=0, retry_failed=True)
    assert stable_rows(retried) == stable_rows(rows)


def test_a_worker_that_dies_is_reported_with_its_words(tmp_path) -> None:
    impossible = {"architecture": "gpt2", "overrides": {"n_layer": 2, "n_embd": 32, "n_head": 5}}
    study = small_study(model=impossible, arms=[{"name": "cross-entropy"}])
    with pytest.raises(
        StudyFailed, match=r"(?s)not finished: cross-entropy seed 0.*worker-0\.log: ConfigError: model: gpt2"
    ):
        run_study(study, tmp_path / "s", workers=1)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"architecture": "gpt22"}, r"is not a Hugging Face model type.*Did you mean 'gpt2'"),
        ({"architecture": "gpt2", "overrides": {"n_layers": 2}}, r"no field 'n_layers'.*Did you mean 'n_layer'"),
    ],
)
def test_an_impossible_model_is_explained(tmp_path, model, message) -> None:
    with pytest.raises(ConfigError, match=message):
        run_study(small_study(model=model), tmp_path / "s", workers=0)


def test_two_processes_never_share_a_cell(tmp_path) -> None:
    from decondense.training.claim import claim as _claim
    from decondense.training.hf import CellBusy, run_cell

    study, out = small_study(), tmp_path / "s"
    open_directory(study, out)
    study_corpus(study, out)
    folder = cell_folder(out, "dispersion", 0)
    with _claim(folder), pytest.raises(CellBusy):
        run_cell(study, study.arm("dispersion"), 0, opened_corpus(out), folder)


def test_training_leaves_the_states_of_unfinished_cells_readable(tmp_path) -> None:
    study, out = small_study(), tmp_path / "s"
    open_directory(study, out)
    assert {state.status for state in states(study, out)} == {"waiting"}
    folder = cell_folder(out, "dispersion", 0)
    append_rows(folder / "rows.jsonl", [])
    assert {state.status for state in states(study, out)} == {"waiting"}


def test_the_plan_completes_pairs_first() -> None:
    study = small_study(seeds=[0, 1])
    assert plan(study) == [("cross-entropy", 0), ("dispersion", 0), ("cross-entropy", 1), ("dispersion", 1)]
    assert 1 <= default_workers(study) <= 4


def test_shipped_studies_load_at_every_scale() -> None:
    from importlib import resources

    import yaml

    from decondense.studies import load_study, shipped_studies

    for name in shipped_studies():
        data = yaml.safe_load((resources.files("decondense.studies") / "shipped" / f"{name}.yaml").read_text())
        for scale in data["scales"]:
            study = load_study(name, scale)
            assert isinstance(study, StudyConfig)
            assert json.loads(study.model_dump_json())["scale"] == scale
    with pytest.raises(ConfigError, match=r"unknown study 'dmeo'.*Did you mean 'demo'"):
        load_study("dmeo")
    with pytest.raises(ConfigError, match=r"unknown scale 'tinny'.*Did you mean 'tiny'"):
        load_study("demo", "tinny")
    with pytest.raises(ConfigError, match="no such study file"):
        load_study("nothing/here.yaml")


def test_mid_training_goes_on_from_a_checkpoint_with_its_tokenizer(tmp_path, uninterrupted) -> None:
    out, rows = uninterrupted
    start = cell_folder(out, "cross-entropy", 0) / "final"
    corpus = {**SMALL["corpus"], "tokenizer": str(start)}
    study = small_study(model={"pretrained": str(start)}, corpus=corpus)
    later = run_study(study, tmp_path / "mid", workers=0)
    ended = next(row for row in rows if row["arm"] == "cross-entropy" and row.get("status") == "finished")
    assert {row["init_hash"] for row in later if row.get("status") == "finished"} == {ended["final_hash"]}
    # the same tokens under the same tokenizer: the first evaluation is the last one of the run before
    before = [row["value"] for row in rows if row["kind"] == "eval" and row["arm"] == "cross-entropy"][-1]
    after = [row["value"] for row in later if row["kind"] == "eval" and row["step"] == 0]
    assert after == [before, before]


def test_a_start_needs_its_tokenizer_its_positions_and_to_exist(tmp_path, uninterrupted) -> None:
    out, _ = uninterrupted
    start = str(cell_folder(out, "cross-entropy", 0) / "final")
    with pytest.raises(ConfigError, match=r"name it in corpus\.tokenizer"):
        small_study(model={"pretrained": start})
    corpus = {**SMALL["corpus"], "tokenizer": start}
    longer = {**small_study().train.model_dump(), "max_seq_length": 64}
    with pytest.raises(ConfigError, match=r"has 32 positions, fewer than train\.max_seq_length 64"):
        run_study(small_study(model={"pretrained": start}, corpus=corpus, train=longer), tmp_path / "a", workers=0)
    missing = str(tmp_path / "nobody")
    with pytest.raises(ConfigError, match=r"model\.pretrained .*nobody.*cannot be loaded"):
        run_study(small_study(model={"pretrained": missing}, corpus=corpus), tmp_path / "b", workers=0)
    with pytest.raises(ConfigError, match=r"corpus\.tokenizer .*nobody.*cannot be loaded"):
        run_study(small_study(corpus={**corpus, "tokenizer": missing}), tmp_path / "c", workers=0)
