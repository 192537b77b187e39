"""A study on a Ray cluster: killed and resumed, its rows are those of a plain run. The rest needs no Ray."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from decondense.cli import main
from decondense.config import ConfigError
from decondense.records import RecordError, read_rows, rows_hash, write_rows
from decondense.studies import run_study
from decondense.studies.cluster import MARK, Cluster, _order, carry_out, keep
from decondense.studies.runner import open_directory, study_corpus, tasks
from studies.conftest import small_study, stable_rows

needs_ray = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed"),
]


# ---- without Ray -----------------------------------------------------------------------------------------------------


def test_a_client_and_a_missing_package_are_refused() -> None:
    for address in ("ray://host:10001", "local"):
        with pytest.raises(ConfigError, match="on a machine of a cluster"):
            Cluster(address)
    if importlib.util.find_spec("ray") is None:
        with pytest.raises(ConfigError, match=r"decondense\[ray\]"):
            Cluster("auto")


def test_the_command_line(tmp_path: Path, capsys) -> None:
    for words in (["--workers", "0"], ["--dry-run"], ["--slurm", str(tmp_path / "job")]):
        assert main(["study", "demo", "--ray", "auto", *words]) == 2
        assert "--ray" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_a_machine_that_does_not_share_the_directory(tmp_path: Path) -> None:
    """It is played by another directory: the order's path is changed, as if the same path led to another disk."""
    study, out, there = small_study(), tmp_path / "out", tmp_path / "there"
    open_directory(study, out)
    study_corpus(study, out)
    listed = tasks(study, out)
    task = listed[0]
    (out / MARK).write_text("1")
    order = _order(study, out, task, listed)
    answer = carry_out(type(order)(**{**vars(order), "out": str(there)}))
    assert answer.status == 0, answer.words
    assert not task.rows.exists()
    keep(task, out, answer)
    rows = read_rows(task.rows)
    assert rows[-1]["status"] == "finished"
    keep(task, out, answer)
    assert read_rows(task.rows) == rows

    changed = [{**row, "loss": 9.0} if row["kind"] == "step" else row for row in rows]
    write_rows(task.rows, changed)  # damaged: it is set aside
    keep(task, out, answer)
    assert read_rows(task.rows) == rows
    assert read_rows(task.rows.with_suffix(".damaged")) == changed
    write_rows(task.rows, [*changed[:-1], {**changed[-1], "rows_hash": rows_hash(changed)}])  # another result
    with pytest.raises(RecordError, match=f"{task.arm} seed {task.seed} ended in two places"):
        keep(task, out, answer)

    other = carry_out(type(order)(**{**vars(order), "out": str(there), "study": small_study(seeds=[7]).model_dump()}))
    assert other.status == 1
    assert "another study" in other.words
    old = carry_out(type(order)(**{**vars(order), "version": "0.0"}))
    assert old.status == 1
    assert "0.0" in old.words


# ---- on a local cluster of two workers -------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """A node with two workers: its address, and the variables of whoever connects to it."""
    log, port = tmp_path_factory.mktemp("ray") / "log", free_port()
    scratch = Path("/tmp") / f"dcr-{os.getpid()}"  # short, because the names of sockets are below it
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    environment |= {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    words = ["start", "--head", "--block", f"--port={port}", "--num-cpus=2", "--include-dashboard=false"]
    # fixed ports: for one that an agent chooses Ray waits only 15 seconds
    names = (
        "dashboard-agent-grpc-port",
        "dashboard-agent-listen-port",
        "runtime-env-agent-port",
        "metrics-export-port",
    )
    words += [f"--temp-dir={scratch}", "--disable-usage-stats", *(f"--{name}={free_port()}" for name in names)]
    with log.open("w") as handle:
        command = [sys.executable, "-c", "from ray.scripts.scripts import main; main()", *words]
        process = subprocess.Popen(command, env=environment, stdout=handle, stderr=handle, start_new_session=True)
    try:
        limit = time.monotonic() + 300
        while "Ray runtime started" not in log.read_text() and time.monotonic() < limit and process.poll() is None:
            time.sleep(0.5)
        assert process.poll() is None, log.read_text()[-3000:]
        yield f"127.0.0.1:{port}", environment
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(scratch, ignore_errors=True)


def workers_of(out: Path) -> list[int]:
    """The processes that train for ``out``, on whatever node."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = place.read_bytes().split(b"\0")
            if b"decondense.studies.worker" in words and str(out).encode() in words:
                found.append(int(place.parent.name))
    return found


def wait_for_steps(out: Path, wanted: int, process: subprocess.Popen[bytes]) -> None:
    limit = time.monotonic() + 300
    while time.monotonic() < limit and process.poll() is None:
        if sum(path.read_bytes().count(b'"kind":"step"') for path in out.glob("cells/*/*/rows.jsonl")) >= wanted:
            break
        time.sleep(0.05)
    assert process.poll() is None, "the study ended before it was killed"


class TestRay:
    pytestmark = needs_ray

    def test_a_worker_and_the_runner_are_killed_and_the_rows_are_those_of_a_plain_run(
        self, tmp_path: Path, cluster: tuple[str, dict[str, str]]
    ) -> None:
        study = small_study(train={**small_study().train.model_dump(), "steps": 60, "checkpoint_every": 10})
        (tmp_path / "study.yaml").write_text(study.to_yaml())
        out = tmp_path / "study"
        command = [sys.executable, "-m", "decondense", "study", str(tmp_path / "study.yaml"), "--out", str(out)]
        address, environment = cluster
        with (tmp_path / "log").open("wb") as log:
            process = subprocess.Popen([*command, "--ray", address], stdout=log, stderr=log, env=environment)
        wait_for_steps(out, 8, process)
        seen = workers_of(out)
        os.kill(seen[0], signal.SIGKILL)
        wait_for_steps(out, 24, process)  # the other one went on, and the task of the killed one was started again
        limit = time.monotonic() + 120
        while len(set(workers_of(out)) - {seen[0]}) < 2 and time.monotonic() < limit and process.poll() is None:
            time.sleep(0.05)
        assert len(set(workers_of(out)) - {seen[0]}) == 2
        process.kill()
        process.wait()
        limit = time.monotonic() + 5
        while workers_of(out) and time.monotonic() < limit:
            time.sleep(0.02)
        assert not workers_of(out)
        assert not all((path.parent / "final").exists() for path in out.glob("cells/*/*/rows.jsonl"))

        done = subprocess.run([*command, "--ray", address], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        rows = read_rows(out / "rows.jsonl")
        assert stable_rows(rows) == stable_rows(run_study(study, tmp_path / "whole", workers=0))
        assert any(row["timing"]["resumed_from_steps"] for row in rows if row.get("status") == "finished")
