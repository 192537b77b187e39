"""A study's directory: whose it is, which text it uses, what has ended, and how far the rest is.

OUT/study.yaml           the study, every default spelled out, folders by name
OUT/local.json           where those folders lie on this machine; not part of the study, not for publishing
OUT/corpus.json          the text that it is trained on, by its hash
OUT/prepared/NAME/       a model that the study trains first
OUT/sweep/ARM/SETTING/   an arm tried with a learning rate (and warm-up, clipping)
OUT/cells/ARM/seed-SEED/ one folder per cell, owned by the worker that holds its lock
OUT/rows.jsonl           the rows of all trials and cells in a fixed order, rewritten as they end
OUT/logs/                what the workers printed
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from decondense.config import SETTINGS, ArmConfig, ConfigError, StudyConfig, parse_yaml
from decondense.corpora.embedded import cache_directory
from decondense.corpora.packed import PackedCorpus, load, prepare
from decondense.locks import lock, open_lock
from decondense.outputs import check_output
from decondense.privacy import publishable, strings
from decondense.records import (
    RecordError,
    Row,
    RowReader,
    atomic_path,
    atomic_write,
    is_whole,
    make_row,
    read_json,
    read_run,
    terminal_row,
)
from decondense.studies.catalogue import refuse_credentials
from decondense.studies.plan import Setting, Task, tasks

STUDY, LOCAL, CORPUS = "study.yaml", "local.json", "corpus.json"
_OWNED = ("prepared", "sweep", "cells", "logs", "figures", "tables", ".study.lock")


class StudyFailed(RuntimeError):
    """A worker stopped before its tasks were done; what it wrote is kept, and the study can be resumed."""


@dataclass(frozen=True)
class CellState:
    """Progress of one task, according to its rows."""

    arm: str
    """The arm; ``prepared NAME`` for a prepared model; the arm and its setting for a trial."""
    seed: int
    step: int
    steps: int
    loss: float | None
    status: str
    """``waiting``, ``running``, ``finished`` or ``failed``."""
    kind: Literal["prepared", "trial", "cell"] = "cell"

    @property
    def ended(self) -> bool:
        """Whether there is nothing left to do."""
        return self.status in ("finished", "failed")


class Watcher(Protocol):
    """Receives the progress of a study."""

    def corpus(self, what: str, done: int, total: int) -> None:
        """The text is being prepared."""

    def cells(self, states: list[CellState]) -> None:
        """The states of the cells have changed."""


# --------------------------------------------------------------------------------------------------------------------
# Whose directory it is
# --------------------------------------------------------------------------------------------------------------------


def study_of(out: Path) -> StudyConfig:
    """The study in ``out``, with the folders of this machine.

    Raises:
        ConfigError: there is none, or its files are damaged.
    """
    path = out / STUDY
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{path}: cannot be read ({reason}). Restore it, or choose another directory with --out."
        ) from error
    data = parse_yaml(text, str(path))
    for place, folder in _local(out).items():
        data = _put(data, place.split("/"), folder)
    return StudyConfig.parse(data, where=str(path))


def _local(out: Path) -> dict[str, str]:
    path = out / LOCAL
    if not path.exists():
        return {}
    try:
        return {place: str(folder) for place, folder in read_json(path).items()}
    except RecordError as error:
        raise ConfigError(
            f"{error} It holds the paths on this machine of the folders that {STUDY} names: run the "
            "command with those folders again in a new directory (--out)."
        ) from error


def _put(data: Any, keys: list[str], value: str) -> Any:
    """``data`` with the string at ``keys`` replaced; keys that do not exist (an edited file) are ignored."""
    if not keys:
        return value if isinstance(data, str) else data
    first, *rest = keys
    if isinstance(data, dict) and first in data:
        return {**data, first: _put(data[first], rest, value)}
    if isinstance(data, list) and first.isdigit() and int(first) < len(data):
        return [_put(item, rest, value) if place == int(first) else item for place, item in enumerate(data)]
    return data


def open_directory(study: StudyConfig, out: Path, *, resume: bool = False) -> StudyConfig:
    """Make ``out`` this study's directory, or check that it is, and return the study in it.

    A directory whose study failed before its text was prepared can be used for another study.

    Raises:
        ConfigError: the directory holds another study (unless ``resume`` asks for that one), or other files; or the
            study names a URL with credentials, which would be written into files.
        OutputError: its name is not UTF-8, or it holds links that lead elsewhere.
    """
    refuse_credentials(study)
    check_output(out, *_OWNED, models=True)
    path = out / STUDY
    if not path.exists():
        if out.exists() and not out.is_dir():
            raise ConfigError(f"{out} is a file; give a directory with --out.")
        if out.exists() and any(not item.name.startswith(".") for item in out.iterdir()):
            raise ConfigError(f"{out} is not empty and holds no study; choose a new or empty directory with --out.")
        if resume:
            raise ConfigError(f"{out} holds no study to resume; omit --resume to start one.")
        if _write_study(study, out, new=True):
            return study
    there = study_of(out)
    if resume or there.fingerprint() == study.fingerprint():
        return _updated(there, study, out, margin=not resume)
    if _unused(there, out):
        _write_study(study, out, new=False)
        return study
    raise ConfigError(
        f"{out} holds another study ({there.name}, scale {there.scale}, seeds {list(there.seeds)}, fingerprint "
        f"{there.fingerprint()}; requested: {study.name}, scale {study.scale}, seeds {list(study.seeds)}, "
        f"fingerprint {study.fingerprint()}). Choose another directory with --out, or resume the "
        "study in it with --resume."
    )


def _updated(there: StudyConfig, study: StudyConfig, out: Path, *, margin: bool) -> StudyConfig:
    """The study in ``out`` with the margin and the seeds that the command asks for; added seeds are kept."""
    names = ("margin", "until", "most_seeds") if study.until is not None else ("margin",) if margin else ()
    said = {name: getattr(study, name) for name in names}
    if all(getattr(there, name) == value for name, value in said.items()):
        return there
    return change_study(out, lambda study: StudyConfig.parse({**study.model_dump(), **said}, where=str(out / STUDY)))


def change_study(out: Path, change: Callable[[StudyConfig], StudyConfig]) -> StudyConfig:
    """Change fields of the study's file that are not part of its identity, under a lock, and return the study."""
    with open_lock(out / ".study.lock") as handle:
        lock(handle, handle.name, wait=True)
        there = study_of(out)
        changed = change(there)
        if changed != there:
            _write_study(changed, out, new=False)
    return changed


def _unused(there: StudyConfig, out: Path) -> bool:
    # the text comes before the first run; a measured study has none, so its directory counts as used at once
    return there.measure is None and not (out / CORPUS).exists() and next(out.glob("*/**/rows.jsonl"), None) is None


def _write_study(study: StudyConfig, out: Path, *, new: bool) -> bool:
    """Write the study's files; with ``new``, return False instead if another process has just written them."""
    plain = study.model_dump(mode="json")
    shown = publishable(plain)
    names = dict(strings(shown))
    local = {"/".join(place): text for place, text in strings(plain) if names.get(place) != text}
    text = StudyConfig.parse(shown, where=STUDY).to_yaml()
    if local:
        text = f"# Folders are written without their paths on this machine, which are in {LOCAL}.\n{text}"
    try:
        with atomic_path(out / STUDY, exclusive=new) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except FileExistsError:
        return False
    if local:
        atomic_write(out / LOCAL, json.dumps(local, indent=1))
    else:
        (out / LOCAL).unlink(missing_ok=True)
    return True


# --------------------------------------------------------------------------------------------------------------------
# The text
# --------------------------------------------------------------------------------------------------------------------


def study_corpus(study: StudyConfig, out: Path, watcher: Watcher | None = None) -> PackedCorpus:
    """The study's prepared text; the first call of a study fixes which text that is.

    Raises:
        ConfigError: the text differs from the one the study was started with, or the directory now holds another study.
    """
    corpus = prepare(study.corpus, progress=None if watcher is None else watcher.corpus)
    if study_of(out).fingerprint() != study.fingerprint():
        raise ConfigError(f"another study was started in {out} at the same time; choose another directory with --out.")
    path = out / CORPUS
    known = _known_corpus(out) if path.exists() else None
    if known is not None and known["content_hash"] != corpus.content_hash:
        raise ConfigError(
            f"{out} was started on the text {known['content_hash']}, but {study.corpus.source!r} is now "
            f"{corpus.content_hash} (a file or an installed version has changed). Start again in another directory."
        )
    if known is None or known.get("folder") != corpus.path.name:
        manifest = {key: value for key, value in publishable(corpus.manifest).items() if key != "path"}
        atomic_write(path, json.dumps({**manifest, "folder": corpus.path.name}, indent=1))
    return corpus


def _known_corpus(out: Path) -> Mapping[str, Any]:
    path = out / CORPUS
    try:
        manifest = read_json(path)
        if not isinstance(manifest.get("content_hash"), str):
            raise RecordError(f"{path} is damaged: its content_hash is not a text.")
    except RecordError as error:
        raise ConfigError(
            f"{error} Remove it and run the same command again: each run checks by hash that it resumes on the text "
            "that it was started on."
        ) from error
    return manifest


def opened_corpus(out: Path) -> PackedCorpus:
    """The text that :func:`study_corpus` fixed, for a worker."""
    manifest = _known_corpus(out)
    # files of earlier releases hold the whole path
    name = manifest.get("folder") or Path(str(manifest.get("path", ""))).name
    corpus = load(cache_directory() / "packed" / str(name)) if name else None
    if corpus is None or corpus.content_hash != manifest["content_hash"]:
        raise ConfigError(
            f"the prepared text {manifest['content_hash']} is missing or damaged in the cache ({cache_directory()}); "
            "run `decondense study` with the same arguments to prepare it again."
        )
    return corpus


# --------------------------------------------------------------------------------------------------------------------
# What has ended
# --------------------------------------------------------------------------------------------------------------------


def task_end(folder: Path) -> Row | None:
    """The terminal row of a task, or None while there is work left; a damaged file is work left."""
    rows = _rows_of(folder)
    return None if rows is None else terminal_row(rows)


def _rows_of(folder: Path) -> list[Row] | None:
    """A task's rows; None when there are none or when they are damaged (the task is then started again)."""
    path = folder / "rows.jsonl"
    try:
        return read_run(path) if path.exists() else None
    except RecordError:
        return None


@dataclass(frozen=True)
class Trial:
    """One ended trial."""

    task: Task
    end: Row
    loss: float | None
    """Loss on the documents set aside for the choice; None: the trial failed."""

    @property
    def setting(self) -> Setting:
        """The setting that it tried."""
        assert self.task.setting is not None
        return self.task.setting


@dataclass(frozen=True)
class Sweep:
    """The trials of one arm. The only place where a setting is chosen."""

    trials: tuple[Trial, ...]
    expected: int

    @property
    def chosen(self) -> Setting | None:
        """The setting with the lowest mean loss; None while trials are missing. One failed seed rules a setting out;
        if every setting failed, the smallest one is taken, so that the comparison can report it."""
        if len(self.trials) < self.expected or not self.trials:
            return None
        losses: dict[Setting, list[float | None]] = {}
        for trial in self.trials:
            losses.setdefault(trial.setting, []).append(trial.loss)
        means = {
            setting: sum(value for value in values if value is not None) / len(values)
            for setting, values in losses.items()
            if None not in values
        }
        return min(means, key=lambda setting: (means[setting], _order(setting))) if means else min(losses, key=_order)

    @property
    def edge(self) -> dict[str, str]:
        """The knobs whose chosen value is the smallest or largest tried."""
        chosen = self.chosen
        found: dict[str, str] = {}
        if chosen is None:
            return found
        for knob in SETTINGS:
            value = getattr(chosen, knob)
            values = sorted({getattr(trial.setting, knob) for trial in self.trials if value is not None})
            if len(values) < 2:
                continue
            if value == values[-1]:
                found[knob] = "largest"
            elif value == values[0] and value != 0.0:
                found[knob] = "smallest"
        return found


def _order(setting: Setting) -> tuple[float, float, float]:
    return (setting.learning_rate, setting.warmup or 0.0, setting.max_grad_norm or 0.0)


def sweep_of(listed: Iterable[Task], arm: str) -> Sweep:
    """The trials of an arm as they have ended so far."""
    expected, ended = 0, []
    for task in listed:
        if task.kind != "trial" or task.arm != arm:
            continue
        expected += 1
        rows = _rows_of(task.folder) or []
        end = terminal_row(rows)
        if end is not None:
            ended.append(Trial(task, end, _tuning_loss(rows, end)))
    return Sweep(tuple(ended), expected)


def _tuning_loss(rows: list[Row], end: Row) -> float | None:
    if end["status"] == "failed":
        return None
    scores = [row for row in rows if row["kind"] == "eval" and row["step"] == end["steps"]]
    return float(scores[-1]["value"]) if scores else None


def trial_rows(study: StudyConfig, listed: Iterable[Task]) -> list[Row]:
    """One row for each trial that has ended; the arm's best setting is marked once all of them have."""
    listed = list(listed)
    rows = []
    for arm in study.arms:
        sweep = sweep_of(listed, arm.name)
        chosen, edge = sweep.chosen, sweep.edge
        for trial in sweep.trials:
            setting = trial.setting
            rows.append(
                make_row(
                    "trial",
                    study=study.name,
                    study_fingerprint=study.fingerprint(),
                    arm=arm.name,
                    seed=trial.task.seed,
                    status=trial.end["status"],
                    learning_rate=setting.learning_rate,
                    warmup=setting.warmup,
                    max_grad_norm=setting.max_grad_norm,
                    steps=trial.end["steps"],
                    value=trial.loss,
                    chosen=setting == chosen,
                    edge=edge if setting == chosen else {},
                    error=trial.end["error"],
                    timing=trial.end["timing"],
                    provenance=trial.end["provenance"],
                )
            )
    return rows


def resolved_arm(study: StudyConfig, arm: str, listed: Iterable[Task]) -> ArmConfig:
    """The arm with the setting that its trials chose; they must have ended."""
    entry = study.arm(arm)
    if not study.swept(entry):
        return entry
    chosen = sweep_of(listed, arm).chosen
    if chosen is None:
        raise StudyFailed(f"{arm}: some trials have not ended; run the same command again to finish them.")
    return chosen.of(entry)


def collect(study: StudyConfig, out: Path, listed: Iterable[Task] | None = None) -> list[Row]:
    """The rows of all trials and cells in the order of the plan; tasks without rows contribute none."""
    listed = tasks(study, out) if listed is None else list(listed)
    rows = trial_rows(study, listed)
    # every row says what the study says now of its margin and of the seeds that were added
    now = study.model_dump(mode="json", include=set(study.not_identity))
    for task in listed:
        for row in (_rows_of(task.folder) or []) if task.kind == "cell" else []:
            rows.append({**row, "config": {**row["config"], **now}} if row.get("config") else row)
    return rows


# --------------------------------------------------------------------------------------------------------------------
# How far the rest is
# --------------------------------------------------------------------------------------------------------------------


class Progress:
    """The state of every task; each call reads only what was written since the last one."""

    def __init__(self, listed: Iterable[Task]) -> None:
        self._tasks = {task.folder: task for task in listed}
        self._readers = {folder: RowReader(task.rows) for folder, task in self._tasks.items()}
        self._states = {folder: _waiting(task) for folder, task in self._tasks.items()}

    def state(self, folder: Path) -> CellState:
        """Where the task of a folder is."""
        try:
            restarted, rows = self._readers[folder].read()
        except RecordError:  # damaged: it will be started again
            restarted, rows = True, []
        if restarted:
            self._states[folder] = _waiting(self._tasks[folder])
        if rows:
            self._states[folder] = _later(self._states[folder], rows)
        state, task = self._states[folder], self._tasks[folder]
        return _waiting(task) if state.ended and not is_whole(task.rows) else state

    def states(self) -> list[CellState]:
        """One state per task, in their order."""
        return [self.state(folder) for folder in self._tasks]


def _waiting(task: Task) -> CellState:
    return CellState(task.name, task.seed, 0, task.steps, None, "waiting", task.kind)


def _later(state: CellState, rows: Iterable[Row]) -> CellState:
    status, step, loss = state.status, state.step, state.loss
    for row in rows:
        if row["kind"] == "run":
            status = row["status"] if row["status"] in ("finished", "failed") else "running"
        elif row["kind"] == "step":
            step, loss = row["step"], row["loss"]
    return CellState(state.arm, state.seed, step, state.steps, loss, status, state.kind)


def states(study: StudyConfig, out: Path) -> list[CellState]:
    """The state of every task, read from its rows."""
    return Progress(tasks(study, out)).states()


def reset_failed(listed: Iterable[Task]) -> list[Task]:
    """Clear the failures of a study's tasks, so that they are started again, and return these tasks.

    Done before any worker starts: a failed row counts as an end, and an arm's cell must not take a setting before the
    repeated trial has ended. A task that another process holds is not touched.
    """
    forgotten = []
    for task in listed:
        end = task_end(task.folder)
        if end is None or end["status"] != "failed":
            continue
        with contextlib.suppress(BlockingIOError), open_lock(task.folder / "lock") as handle:
            lock(handle, handle.name)
            task.rows.unlink(missing_ok=True)
            forgotten.append(task)
    return forgotten


def make_below(out: Path, folder: Path) -> None:
    """Create a task's folder, but not the study's directory: a removed directory stays removed.

    Raises:
        FileNotFoundError: ``out`` does not exist.
        ConfigError: a file is in the way.
    """
    place = out
    for part in folder.relative_to(out).parts:
        place = place / part
        with contextlib.suppress(FileExistsError):
            os.mkdir(place)
        if place.is_file():
            raise ConfigError(
                f"{place} is a file, but a directory is needed there. Remove it and run the same command again."
            )
