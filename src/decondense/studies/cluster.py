"""A study's tasks on a Ray cluster: one Ray task each, whose rows come back by value and are merged by their hash.

The runner runs on a machine of the cluster and decides what is ready. A machine that sees the runner's directory works
in it, with its locks and checkpoints. One that does not, works in a directory of the same path on its own disk, on a
text that it prepares itself and checks by its hash. What runs there is a worker process like any other, which ends with
Ray's process, as that does with the runner. Rows travel as their file and are read as such; what is pickled is Ray's
own transport of :class:`Order` and :class:`Answer`.
"""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import sys
import tempfile
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decondense import __version__
from decondense.config import ConfigError, StudyConfig
from decondense.lifeline import Lifeline
from decondense.records import (
    COMMAND,
    RecordError,
    Row,
    atomic_path,
    atomic_write,
    command_line,
    merged,
    read_rows,
    read_run,
    set_aside,
    write_rows,
)
from decondense.studies.directory import CORPUS, make_below, open_directory, task_end
from decondense.studies.plan import Task
from decondense.studies.process import start_worker

MARK = ".ray"
_POLL_SECONDS = 0.5
_TRIES = 3
"""Attempts to run a task whose process or machine was killed."""


@dataclass(frozen=True)
class Order:
    """What a machine of the cluster is asked to run."""

    version: str
    command: str
    study: dict[str, Any]
    out: str
    token: str
    """What the runner's ``out`` holds in ``MARK``; where it is seen, ``out`` is shared."""
    task: str
    """The task's folder below ``out``."""
    files: dict[str, bytes]
    """What a machine that does not share ``out`` needs, by its path below it; a model that was trained first is not
    among them."""


@dataclass(frozen=True)
class Answer:
    """The result of an order."""

    machine: str
    status: int
    """Exit status of its process, or minus the signal that killed it."""
    words: str = ""
    rows: bytes = b""
    """The task's file of rows."""


def carry_out(order: Order) -> Answer:
    """Run a task on this machine, in a process of its own that ends when this one does."""
    out, machine = Path(order.out), platform.node()
    if order.version != __version__:
        return Answer(
            machine,
            1,
            f"has decondense {__version__}, the runner has {order.version}; install the same version on all machines.",
        )
    if _mark(out) != order.token:
        study = StudyConfig.parse(order.study, where="the runner's study")
        if study.prepared:
            return Answer(
                machine, 1, f"cannot see the runner's {out}; a study with prepared models needs --out on a file "
                "system that all machines share."
            )  # fmt: skip
        try:
            open_directory(study, out)
            for name, data in order.files.items():
                if not (out / name).exists():
                    make_below(out, (out / name).parent)
                    atomic_write(out / name, data)
        except (ConfigError, OSError) as error:
            return Answer(machine, 1, str(error))
    rows = out / order.task / "rows.jsonl"
    with Lifeline() as lifeline:
        worker = start_worker(
            out, f"{order.task.replace('/', '-')}.log", lifeline, "--task", order.task,
            environment={COMMAND: order.command},
        )  # fmt: skip
        try:
            status = worker.process.wait()
        finally:
            worker.process.kill()
            worker.process.wait()
    return Answer(machine, status, worker.last_words(), rows.read_bytes() if status == 0 and rows.exists() else b"")


def keep(task: Task, out: Path, answer: Answer) -> None:
    """Merge the rows of an answer into the task's folder.

    Raises:
        RecordError: they are not valid rows, or the folder holds a different result of the same run.
    """
    there = task.rows.read_bytes() if task.rows.exists() else b""
    if answer.rows == there:
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{answer.machine}.jsonl"
        path.write_bytes(answer.rows)
        came = read_rows(path)
    try:
        known: list[Row] = read_run(task.rows) if there else []
    except RecordError as error:
        print(f"{error} {set_aside(task.rows)}, and {answer.machine} has run it again.", file=sys.stderr)
        known = []
    rows = merged({str(task.folder): known, answer.machine: came})
    if rows != known:
        make_below(out, task.folder)
        write_rows(task.rows, rows)


class Cluster:
    """The connection to a Ray cluster, from ``with`` to its end."""

    def __init__(self, address: str) -> None:
        """
        Args:
            address: ``auto``: the cluster that this machine belongs to; or ``HOST:PORT``.

        Raises:
            ConfigError: Ray is not installed, or this machine belongs to no such cluster.
        """
        if address == "local" or address.startswith("ray://"):  # no cluster yet, or only a client of one
            raise ConfigError(
                f"--ray {address} is not supported; run the command on a machine of a cluster (ray start) with --ray "
                "auto."
            )
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError as error:
            raise ConfigError("--ray needs Ray: pip install 'decondense[ray]'") from error
        self._ray = ray
        main = threading.current_thread() is threading.main_thread()
        before = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(f"--ray {address}: {error}") from error
        finally:
            if main:
                signal.signal(signal.SIGTERM, before)  # Ray's own ends this process with another status

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *exception: object) -> None:
        self._ray.shutdown()

    def _needs(self, study: StudyConfig) -> dict[str, float]:
        gpus = 1 if self._ray.cluster_resources().get("GPU", 0) else 0
        return {"num_cpus": study.train.threads or 1, "num_gpus": gpus}

    def slots(self, study: StudyConfig) -> int:
        """How many of the study's tasks the cluster runs in parallel."""
        there = self._ray.cluster_resources()
        needs = self._needs(study)
        fits = [there.get("CPU", 0) / needs["num_cpus"], *([there["GPU"]] if needs["num_gpus"] else [])]
        return max(1, int(min(fits)))

    def run(
        self, study: StudyConfig, out: Path, listed: Sequence[Task], most: int, look: Callable[[], None]
    ) -> dict[str, str]:
        """Run every task once the tasks that it needs have ended.

        Args:
            study: the study in ``out``, whose text is prepared.
            out: its directory.
            listed: its tasks.
            most: maximum number of tasks in parallel.
            look: called twice a second.

        Returns:
            Why tasks could not be run, by name.

        Raises:
            RecordError: a task ended here and elsewhere with different rows.
        """
        carry = self._ray.remote(carry_out).options(max_retries=0, **self._needs(study))
        with contextlib.suppress(FileExistsError), atomic_path(out / MARK, exclusive=True) as path:
            path.write_text(uuid.uuid4().hex)
        ended = {task.folder for task in listed if task_end(task.folder) is not None}
        waiting = [task for task in listed if task.folder not in ended]
        running: dict[Any, Task] = {}
        tries: Counter[Path] = Counter()
        words: dict[str, str] = {}
        try:
            while True:
                for task in list(waiting):
                    if len(running) < most and ended.issuperset(task.needs):
                        waiting.remove(task)
                        tries[task.folder] += 1
                        running[carry.remote(_order(study, out, task, listed))] = task
                if not running:
                    return words
                done, _ = self._ray.wait(list(running), timeout=_POLL_SECONDS)
                look()
                for reference in done:
                    task, answer = running.pop(reference), self._answer(reference)
                    if answer.status == 0:
                        keep(task, out, answer)
                        ended.add(task.folder)
                    elif answer.status < 0 and tries[task.folder] < _TRIES:
                        waiting.insert(0, task)
                    else:
                        words[f"{task.name} seed {task.seed}"] = f"{answer.machine}: {answer.words}"
        finally:
            for reference in running:
                with contextlib.suppress(Exception):  # it may have ended meanwhile
                    self._ray.cancel(reference, force=True)

    def _answer(self, reference: Any) -> Answer:
        from ray.exceptions import RayError, RayTaskError

        try:
            answer: Answer = self._ray.get(reference)
        except RayTaskError as error:  # what it raised; anything else of Ray's: the process or the machine was killed
            return Answer("Ray", 1, str(error).strip().splitlines()[-1])
        except RayError as error:
            return Answer("Ray", -signal.SIGKILL, str(error).strip().splitlines()[0])
        if answer.status < 0 and not answer.words:
            return Answer(answer.machine, answer.status, f"ended by {signal.Signals(-answer.status).name}")
        return answer


def _mark(out: Path) -> str:
    try:
        return (out / MARK).read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def _order(study: StudyConfig, out: Path, task: Task, listed: Sequence[Task]) -> Order:
    needed = [other.rows for other in listed if other.folder in task.needs]
    files = [path for path in [out / CORPUS, *needed] if path.exists()]
    return Order(
        version=__version__,
        command=os.environ.get(COMMAND) or command_line() or "",
        study=study.model_dump(mode="json"),
        out=str(out.absolute()),
        token=_mark(out),
        task=task.folder.relative_to(out).as_posix(),
        files={path.relative_to(out).as_posix(): path.read_bytes() for path in files},
    )
