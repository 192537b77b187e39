"""Benchmarks of a model with the lm-evaluation-harness, in a process of its own.

    OUT/evaluation.json   whose results these are: the model and how it is loaded
    OUT/tasks/TASK.json   a finished task: its scores, its items, how they were measured
    OUT/rows.jsonl        the rows of all finished tasks
    OUT/table.md, .csv    the table
    OUT/evaluate.log      what the harness printed

A finished task is reused while everything it depends on is unchanged, so an interrupted evaluation resumes with the
next task. The harness seeds the generators of Python, numpy and torch and takes seconds to import: both happen in the
worker process, which communicates through files, so neither affects the caller.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from decondense.checkpoints import ModelError, adapter_of, check_folder, locate
from decondense.config import EvaluateConfig, suggest
from decondense.evaluate.catalogue import SETS, TASKS, EvaluationError, resolve_shots, resolve_tasks
from decondense.evaluate.local import LocalTask, find_tasks
from decondense.evaluate.results import Evaluation, TaskResult
from decondense.gguf_files import is_gguf, only_gguf
from decondense.lifeline import Lifeline
from decondense.locks import lock, open_lock
from decondense.outputs import check_output
from decondense.privacy import has_credentials, without_credentials, without_folder
from decondense.records import RecordError, Row, atomic_write, read_json, read_rows, write_rows

_D = EvaluateConfig()
_POLL_SECONDS = 0.1
_LOCK_SECONDS = 10.0
DTYPES = ("auto", "float32", "bfloat16", "float16")

Progress = Callable[[str, str, int, "int | None"], None]
"""Called with the task, what happens to it (``loading``, ``kept``, ``damaged``: its file, ``running``, ``done``,
``failed``), requests answered and their total (None: the harness does not say)."""


class EvaluationStopped(RuntimeError):
    """The evaluation ended before all tasks were done; finished tasks are kept, and the same command resumes."""


def evaluate(
    model: str | Path,
    tasks: str | Iterable[str] = "paper",
    *,
    shots: str | int = _D.num_fewshot,
    limit: int | None = _D.limit,
    data_dir: str | Path | None = _D.data_dir,
    out: str | Path | None = None,
    batch_size: int = _D.task_batch,
    device: str | None = None,
    dtype: str = "auto",
    max_length: int | None = None,
    tokenizer: str | Path | None = None,
    trust_remote_code: bool = False,
    threads: int | None = None,
    identity: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Score a model on benchmarks with the lm-evaluation-harness; see Liu et al. 2026, section 3, for the paper's.

    Args:
        model: directory with ``config.json`` and weights, or a hub id; ``ID@REVISION`` is a revision too.
        tasks: ``paper`` (ten benchmarks and Paloma's WikiText-103), ``ten``, or names of harness tasks.
        shots: few-shot examples: the paper's for ``gpt2`` or ``qwen3``, or a number for every task that takes any.
        limit: score the first ``limit`` items of each task only (a task of parts, like MMLU, gives the first items of
            each part in turn). Every table and row then says so.
        data_dir: directory with one folder of local files per benchmark, read instead of the hub.
        out: directory of the results; an interrupted evaluation resumes there. None: no files are kept.
        batch_size: requests per forward pass; halved when memory runs out. It changes scores only by rounding.
        device: ``cpu``, ``cuda``, ``cuda:1``; None: a GPU when there is one.
        dtype: dtype of the weights: ``auto`` (as in the checkpoint), ``float32``, ``bfloat16``, ``float16``.
        max_length: context length in tokens; None: the model's own.
        tokenizer: directory or hub id of the tokenizer, if it does not come with the model.
        trust_remote_code: run code that comes with the model.
        threads: CPU threads; None: torch's default. It changes scores only by rounding.
        identity: ``study``, ``study_fingerprint``, ``arm``, ``seed``, ``step``, ``tokens`` of the rows. None: those of
            the study's run when ``model`` is the final checkpoint of one, else made from the model's name.
        progress: called as the work proceeds.

    Raises:
        EvaluationError: the evaluation cannot be run; the message names the reason and the remedy.
        EvaluationStopped: the worker ended early; finished tasks are kept in ``out``.
    """
    if limit is not None and limit < 1:
        raise EvaluationError(f"limit {limit} leaves nothing to score; give a positive number, or no limit.")
    if dtype not in DTYPES:
        raise EvaluationError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}.")
    _refuse_credentials(model=model, tokenizer=tokenizer, data_dir=data_dir)
    source = check_model(str(model))
    shots_of, local, notes = _plan(tasks, shots, data_dir)
    settings = {
        "model": _fingerprint(source),
        "tokenizer": None if tokenizer is None else _tokenizer_fingerprint(str(tokenizer)),
        "dtype": dtype,
        "max_length": max_length,
    }
    keys = {
        name: {
            **settings,
            "shots": number,
            "limit": limit,
            "data": local[name].hash if name in local else "hub",
            "harness": metadata.version("lm_eval"),
        }
        for name, number in shots_of.items()
    }
    label = without_folder(str(model)).rstrip("/")
    report = progress or (lambda task, what, done, total: None)
    with contextlib.ExitStack() as stack:
        folder = Path(out) if out is not None else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        held = stack.enter_context(_claimed(folder))
        _open_directory(folder, label, settings)
        todo = [name for name, key in keys.items() if finished(folder, name, key, report) is None]
        for name in keys:
            if name not in todo:
                report(name, "kept", 1, 1)
        request = {
            "model": source,
            "settings": {**settings, "tokenizer": None if tokenizer is None else str(tokenizer)},
            "batch_size": batch_size,
            "device": device,
            "trust_remote_code": trust_remote_code,
            "tasks": [
                {"name": name, "key": keys[name], "local": asdict(local[name]) if name in local else None}
                for name in todo
            ],
        }
        failures = _work(folder, request, held, report, threads) if todo else []
        results = tuple(result for name, key in keys.items() if (result := finished(folder, name, key)) is not None)
        run = dict(identity) if identity is not None else _identity(source, label, settings)
        evaluation = Evaluation(label, results, tuple(notes), run)
        if results:
            write_rows(folder / "rows.jsonl", evaluation.rows())
            atomic_write(folder / "table.md", evaluation.to_markdown())
            atomic_write(folder / "table.csv", evaluation.to_csv())
        if failures:
            if results and out is not None:
                failures.append(f"Finished and kept: {', '.join(result.task for result in results)}.")
            raise EvaluationError("\n".join(failures))
        return evaluation


def _plan(
    tasks: str | Iterable[str], shots: str | int, data_dir: str | Path | None
) -> tuple[dict[str, int | None], dict[str, LocalTask], list[str]]:
    """Task -> examples in its prompt, task -> local files, and notes on omitted tasks."""
    names, of_a_set = resolve_tasks(tasks)
    shots_of = {name: resolve_shots(shots, name) for name in names}
    if importlib.util.find_spec("lm_eval") is None:
        raise EvaluationError(
            'the benchmarks are run by lm-evaluation-harness, which is not installed: pip install "decondense[eval]".'
        )
    if data_dir is None:
        return shots_of, {}, []
    local, absent = find_tasks(data_dir, shots_of, of_a_set)
    notes = [f"{name} is not among the local data and was omitted." for name in absent]
    return {name: shots_of[name] for name in names if name not in absent}, local, notes


def check_benchmarks(settings: EvaluateConfig) -> None:
    """Refuse a study's benchmarks before anything is trained for them.

    Raises:
        EvaluationError: the harness is not installed, an unknown task, files are missing, an unknown number of
            examples.
    """
    if settings.tasks:
        _refuse_unknown(_plan(settings.tasks, settings.num_fewshot, settings.data_dir)[0])


def _refuse_unknown(names: Iterable[str]) -> None:
    """Refuse a task that the harness does not define, without importing the harness, which is slow."""
    unknown = {name for name in names if name not in TASKS}
    spec = importlib.util.find_spec("lm_eval") if unknown else None
    if spec is None or spec.origin is None:
        return
    for path in (Path(spec.origin).parent / "tasks").rglob("*.yaml"):
        text = path.read_text(encoding="utf-8", errors="replace")
        # as the value of a key or an item of a list
        unknown -= {
            n for n in unknown if n in text and re.search(rf"[:-]\s+[\"']?{re.escape(n)}[\"']?\s*(#|$)", text, re.M)
        }
        if not unknown:
            return
    name = min(unknown)
    raise EvaluationError(f"the harness has no task {name!r}.{suggest(name, [*TASKS, *SETS])}")


def benchmark_rows(
    model: str | Path,
    settings: EvaluateConfig,
    identity: Mapping[str, Any],
    out: str | Path,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """The rows of a study's final checkpoint: the metric that the paper reports, for each benchmark of the study.

    Args:
        model: directory of the trained model.
        settings: settings of the study; without tasks there are no rows.
        identity: ``study``, ``study_fingerprint``, ``arm``, ``seed``, ``step``, ``tokens``.
        out: directory of finished tasks, which an interrupted run does not score again.
        threads: CPU threads.
        progress: called as the work proceeds; an exception in it ends the evaluation, which can be resumed.
    """
    if not settings.tasks:
        return []
    evaluation = evaluate(
        model,
        settings.tasks,
        shots=settings.num_fewshot,
        limit=settings.limit,
        data_dir=settings.data_dir,
        out=out,
        batch_size=settings.task_batch,
        threads=threads,
        identity=identity,
        progress=progress,
    )
    return evaluation.rows("headline")


def check_model(source: str) -> str:
    """The absolute directory or GGUF file of a model, or a hub id.

    Raises:
        EvaluationError: ``source`` is neither.
    """
    path = Path(source).expanduser()
    if is_gguf(source) or (path.is_dir() and adapter_of(path) is None and only_gguf(path)):
        try:
            name, _ = locate(source)
        except ModelError as error:
            raise EvaluationError(str(error)) from error
        return str(Path(name).resolve()) if Path(name).is_file() else source
    if path.is_dir():
        try:
            check_folder(path)
        except ModelError as error:
            raise EvaluationError(str(error)) from error
        if adapter_of(path) is not None:
            return str(path.resolve())
        try:
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise EvaluationError(f"{path / 'config.json'} cannot be read ({error}).") from error
        if not isinstance(config, dict) or "model_type" not in config:
            raise EvaluationError(f"{source} is not a transformers model: its config.json names no model_type.")
        if not [*path.glob("*.safetensors"), *path.glob("*.bin"), *path.glob("*.index.json")]:
            raise EvaluationError(f"{source} has a config.json but no weights (*.safetensors).")
        return str(path.resolve())
    if path.is_file():
        raise EvaluationError(f"{source} is a file; give the directory that holds config.json and the weights.")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?", source) or source.startswith("."):
        raise EvaluationError(f"there is no model directory {source}, and it is not a hub id (OWNER/NAME).")
    return source


def finished(folder: Path, task: str, key: Mapping[str, Any], report: Progress | None = None) -> TaskResult | None:
    """The stored result of a task that was measured with the settings ``key``; None: there is none.

    A damaged file counts as none, and ``report`` is told.
    """
    path = folder / "tasks" / f"{task}.json"
    if not path.exists():
        return None
    try:
        data = read_json(path)
        return TaskResult.from_json(data) if data["key"] == dict(key) else None
    except (ValueError, KeyError):
        if report is not None:
            report(task, "damaged", 0, None)
        return None


_TOKENIZER_SUFFIXES = (".json", ".model", ".txt", ".jinja", ".py")
_MODEL_SUFFIXES = (*_TOKENIZER_SUFFIXES, ".safetensors", ".bin")
_UNRELATED = re.compile(r"training_args\.bin|optimizer.*|scheduler.*|rng_state.*|trainer_state\.json")


def _refuse_credentials(**options: str | Path | None) -> None:
    for name, value in options.items():
        if value is not None and has_credentials(str(value)):
            raise EvaluationError(
                f"{name} {without_credentials(str(value))!r} is given with a user, password, query or token, which "
                "would be written into the results. Give it without them, and set credentials in the environment "
                "(HF_TOKEN, ~/.netrc)."
            )


def _tokenizer_fingerprint(source: str) -> str:
    """The hash of a tokenizer's files, or its hub id."""
    path = Path(source).expanduser()
    return _fingerprint(str(path), _TOKENIZER_SUFFIXES) if path.exists() else without_folder(source)


def _fingerprint(source: str, suffixes: tuple[str, ...] = _MODEL_SUFFIXES) -> str:
    """Identifies a model: the hash of its files, or its hub id."""
    path = Path(source)
    if not path.exists():
        return source
    digest = hashlib.blake2b(digest_size=8)
    if (adapter := adapter_of(path)) is not None:
        digest.update(_fingerprint(adapter.base, suffixes).encode())
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        of_the_model = file == path or file.suffix in suffixes
        if file.is_file() and of_the_model and not _UNRELATED.fullmatch(file.name):
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as handle:
                while block := handle.read(1 << 22):
                    digest.update(block)
    return digest.hexdigest()


def _identity(source: str, label: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    rows_path = Path(source).parent / "rows.jsonl"
    if Path(source).is_dir() and rows_path.is_file():
        with contextlib.suppress(RecordError):
            runs = [row for row in read_rows(rows_path) if row["kind"] == "run" and row["status"] == "finished"]
            if runs:
                run = runs[-1]
                cell = {key: run[key] for key in ("study", "study_fingerprint", "arm", "seed")}
                return {**cell, "step": run["steps"] or 0, "tokens": run["tokens"] or 0}
    fingerprint = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    return {"study": "evaluate", "study_fingerprint": fingerprint, "arm": label, "seed": 0, "step": 0, "tokens": 0}


@contextlib.contextmanager
def _claimed(folder: Path) -> Iterator[int]:
    """Lock the directory; the worker inherits the lock, which holds until both processes have ended."""
    if folder.exists() and not folder.is_dir():
        raise EvaluationError(f"{folder} is a file; give a directory with --out.")
    check_output(folder, "tasks", "evaluate.log", ".lock", ".events.jsonl")
    folder.mkdir(parents=True, exist_ok=True)
    with open_lock(folder / ".lock") as handle:
        # the worker of a killed command ends by itself, but not at once
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                lock(handle, handle.name)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise EvaluationStopped(
                        f"{folder}: another process is evaluating there; wait for it or choose another --out."
                    ) from error
                time.sleep(_POLL_SECONDS)
        yield handle.fileno()


def _open_directory(folder: Path, label: str, settings: Mapping[str, Any]) -> None:
    path = folder / "evaluation.json"
    if path.exists():
        try:
            stored = read_json(path)
            before, kept = stored.get("model"), stored.get("settings")
            if not isinstance(before, str) or not isinstance(kept, dict):
                raise RecordError(f"{path} is damaged: it does not name a model and its settings.")
        except RecordError as error:
            raise EvaluationError(
                f"{error} It says whose results {folder} holds: choose another directory with --out."
            ) from error
        # without a scored task (a model that does not load) there are no results to keep apart
        if kept != dict(settings) and any((folder / "tasks").glob("*.json")):
            raise EvaluationError(
                f"{folder} holds the results of {before} ({_listed(kept)}; requested: {label}, {_listed(settings)}). "
                "Choose another directory with --out."
            )
    elif foreign := sorted(item.name for item in folder.iterdir() if not item.name.startswith(".")):
        raise EvaluationError(
            f"{folder} is not empty and holds no evaluation ({', '.join(foreign[:3])}); choose a new or empty "
            "directory with --out."
        )
    atomic_write(path, json.dumps({"model": label, "settings": settings}, indent=1))


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items() if value is not None)


def _work(folder: Path, request: Mapping[str, Any], held: int, report: Progress, threads: int | None) -> list[str]:
    """Run the worker to its end and return the messages of failed tasks, then the remedies."""
    (folder / "tasks").mkdir(exist_ok=True)
    events, log = folder / ".events.jsonl", folder / "evaluate.log"
    events.write_bytes(b"")
    atomic_write(folder / ".request.json", json.dumps(request))
    lifeline = Lifeline()
    with log.open("ab") as handle:
        process = subprocess.Popen(
            lifeline.command("decondense.evaluate.worker.__main__", str(folder)),
            stdin=subprocess.DEVNULL,
            stdout=handle,
            stderr=handle,
            pass_fds=(held, *lifeline.pass_fds),
            env=_environment(threads),
        )
    failures: list[str] = []
    remedies: dict[str, None] = {}
    ended = False
    try:
        with events.open("rb") as stream:
            while True:
                alive = process.poll() is None
                for event in _new_events(stream):
                    kind = event["event"]
                    if kind == "ended":
                        ended = True
                        continue
                    if kind == "failed":
                        failures.append(event["message"])
                        remedies.update({event["remedy"]: None} if "remedy" in event else {})
                    report(event.get("task", ""), kind, event.get("done", 0), event.get("total"))
                if not alive:
                    break
                time.sleep(_POLL_SECONDS)
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait()
        lifeline.close()
        for path in (events, folder / ".request.json"):
            path.unlink(missing_ok=True)
    if not ended:
        last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
        detail = f" Last line of the log: {last[0]}" if last else ""
        raise EvaluationStopped(
            f"the evaluation stopped (exit status {process.returncode}; log: {log}). Finished tasks are kept: the same "
            f"command resumes with the next.{detail}"
        )
    return [*failures, *remedies]


_LAUNCHER = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|(TORCHELASTIC|ACCELERATE|PMI|OMPI)_.*"
)


def _environment(threads: int | None) -> dict[str, str]:
    """The worker's environment, without a launcher's variables: it is a single process under ``torchrun`` too."""
    variables = {key: value for key, value in os.environ.items() if not _LAUNCHER.fullmatch(key)}
    if threads is not None:
        variables |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return {**variables, "TOKENIZERS_PARALLELISM": "false"}


def _new_events(stream: Any) -> Iterator[dict[str, Any]]:
    while True:
        start = stream.tell()
        line = stream.readline()
        if not line.endswith(b"\n"):
            stream.seek(start)
            return
        yield json.loads(line)
