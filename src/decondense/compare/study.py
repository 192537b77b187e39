"""Rows sorted into a study's cells, one a run (arm x seed)."""

from __future__ import annotations

import contextlib
import gc
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from decondense.compare.gold import GoldItems, gold_scores
from decondense.compare.items import NO_ITEMS, ItemArrays, ItemTaker
from decondense.config import ArmConfig, ConfigError, StudyConfig
from decondense.records import ItemRows, Row, stable

Array = npt.NDArray[np.float64]
Key = tuple[str, str]
"""A task and its metric."""

VALIDATION: Key = ("validation", "loss")


class CellId(NamedTuple):
    """Identifies one run of a study."""

    arm: str
    seed: int

    def __str__(self) -> str:
        return f"{self.arm} (seed {self.seed})"


FaultKind = Literal[
    "missing", "failed", "unfinished", "conflict", "repeated", "no profile", "no score", "no hash", "other hash",
    "other items",
]  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """Why one run cannot be compared."""

    cell: CellId
    kind: FaultKind
    text: str
    """What is wrong, to be read after the name of the cell."""

    def __str__(self) -> str:
        return f"{self.cell} {self.text}"


class CompareError(ValueError):
    """Runs that must not be compared: ``reason``, the ``faults`` of single runs if any, and the ``remedy``."""

    def __init__(self, reason: str, faults: Iterable[Fault] = (), remedy: str = "") -> None:
        self.reason = reason
        self.faults = tuple(faults)
        self.remedy = remedy
        listed = "".join(f"\n  - {fault}" for fault in self.faults)
        super().__init__(f"{reason}{':' if listed else ''}{listed}" + (f"\n{remedy}" if remedy else ""))


@dataclass
class Cell:
    """One run of a study (arm x seed) and all that its rows say."""

    arm: str
    seed: int
    status: Literal["finished", "failed", "unfinished", "missing"] = "missing"
    run: Row = field(default_factory=dict)
    """The terminal row if there is one, else the latest ``run`` row."""
    started: Row = field(default_factory=dict)
    finishes: int = 0
    resumed: int = 0
    steps: dict[int, Row] = field(default_factory=dict)
    profiles: dict[int, Row] = field(default_factory=dict)
    scores: dict[Key, dict[int, Row]] = field(default_factory=dict)
    items: dict[Key, dict[int, ItemArrays]] = field(default_factory=dict)
    """Task and metric -> step -> scores of the items."""
    conflicts: list[str] = field(default_factory=list)
    gold: GoldItems = field(default_factory=dict)

    @property
    def id(self) -> CellId:
        """The id of the cell."""
        return CellId(self.arm, self.seed)

    def recorded(self, name: str) -> Any:
        """A field of the terminal row, or of the first row where the terminal one has none."""
        value = self.run.get(name)
        return self.started.get(name) if value is None else value

    @property
    def untrained(self) -> bool:
        """Whether the run ended where it started: the start was evaluated as it is."""
        return self.status == "finished" and self.run.get("steps") == 0

    @property
    def final_step(self) -> int | None:
        """The step of the final checkpoint: what the terminal row says, else the last one evaluated."""
        steps = self.run.get("steps") if self.status == "finished" else None
        if steps is not None:
            return int(steps)
        seen = [step for curve in self.scores.values() for step in curve] + list(self.profiles)
        return max(seen, default=None)

    def final_score(self, key: Key) -> float | None:
        """The score of the final checkpoint."""
        step = self.final_step
        row = self.scores.get(key, {}).get(-1 if step is None else step)
        return None if row is None else float(row["value"])

    def final_items(self, key: Key) -> ItemArrays:
        """Scores of the final checkpoint's items (empty when there are none)."""
        step = self.final_step
        return self.items.get(key, {}).get(-1 if step is None else step, NO_ITEMS)

    def final_profile(self) -> Row | None:
        """The profile of the final checkpoint."""
        step = self.final_step
        return None if step is None else self.profiles.get(step)

    def curve(self, key: Key = VALIDATION) -> tuple[Array, Array]:
        """(tokens, value) of every evaluated checkpoint, in the order of training."""
        rows = [row for _, row in sorted(self.scores.get(key, {}).items())]
        return np.array([row["tokens"] for row in rows], float), np.array([row["value"] for row in rows], float)

    def training_curve(self) -> tuple[Array, Array]:
        """(tokens, training loss) of the logged steps."""
        rows = [row for _, row in sorted(self.steps.items())]
        return np.array([row["tokens"] for row in rows], float), np.array([row["loss"] for row in rows], float)

    def timing(self, what: str) -> float | None:
        """One number of the terminal row's timing."""
        value = self.run.get("timing", {}).get(what)
        return float(value) if isinstance(value, (int, float)) and value > 0 else None


@dataclass
class Study:
    """The rows of one study, sorted into cells. Broken cells are described, not refused."""

    name: str
    fingerprint: str
    title: str
    question: str
    baseline: str | None
    arms: list[str]
    seeds: list[int]
    labels: dict[str, str]
    config: StudyConfig | None
    """None: the rows hold no configuration."""
    cells: dict[tuple[str, int], Cell]
    trials: list[Row] = field(default_factory=list)
    """Learning rates tried before the runs, on a seed that is none of the study's."""

    @classmethod
    def from_rows(cls, rows: Iterable[Row | ItemRows]) -> Study:
        """Sort rows into cells.

        Raises:
            CompareError: no rows of a run, rows of more than one study, or an invalid configuration.
        """
        # a row is taken when it comes: a file of rows may be larger than the memory
        studies: Counter[tuple[str, str]] = Counter()
        taken: dict[tuple[str, int], Cell] = {}
        trials, items = [], ItemTaker()
        known: list[dict[str, Any]] = []
        with _no_collection():
            for piece in rows:
                row, number = (piece.common, len(piece.item)) if isinstance(piece, ItemRows) else (piece, 1)
                kind = row.get("kind")
                if kind not in _KINDS:
                    continue
                studies[row["study"], row["study_fingerprint"]] += number
                if kind == "trial":  # its seed is none of the study's, so trials never become cells
                    trials.append(row)
                    continue
                if kind == "run":
                    known += [row["config"]] if row["config"] else []
                place = (row["arm"], row["seed"])
                if place not in taken:
                    taken[place] = Cell(*place)
                if kind == "eval_item":
                    items.take(piece)
                else:
                    _take(taken[place], row)
            for (arm, seed, task, metric, step), found in items.scored():
                cell = taken[arm, seed]
                cell.items.setdefault((task, metric), {})[step] = found.items
                if found.gold[0].names:
                    cell.gold.setdefault(task, {})[step] = found.gold
                cell.conflicts += [f"two different {task} scores of item {name} at step {step}"
                                   for name in found.conflicts]  # fmt: skip
        if not taken:
            raise CompareError("no rows of a run; give the rows.jsonl that a study or the demo wrote.")
        if len(studies) > 1:
            listed = "; ".join(f"{name} [{mark}], {n} rows" for (name, mark), n in sorted(studies.items()))
            raise CompareError(f"rows of {len(studies)} different studies: {listed}. Compare one study at a time.")
        config = _config(known) if known else None
        arms = list(dict.fromkeys([*(arm.name for arm in (config.arms if config else ())), *(arm for arm, _ in taken)]))
        seeds = list(dict.fromkeys([*(config.every_seed if config else ()), *(seed for _, seed in taken)]))
        labels = {arm: arm for arm in arms}
        labels |= {arm.name: arm.label for arm in config.arms if arm.label} if config else {}
        cells = {(arm, seed): taken.get((arm, seed)) or Cell(arm, seed) for arm in arms for seed in seeds}
        runs = list(cells.values())
        for cell, made in zip(runs, gold_scores([(cell.gold, cell.scores) for cell in runs]), strict=True):
            for key, steps in made.items():
                cell.scores[key] = {step: row for step, (row, _) in steps.items()}
                cell.items[key] = {step: items for step, (_, items) in steps.items()}
        for cell in cells.values():
            if cell.finishes == 0 and cell.status == "missing" and (cell.steps or cell.scores or cell.profiles):
                cell.status = "unfinished"
        baseline = config.baseline if config else "cross-entropy" if "cross-entropy" in arms else None
        (name, mark) = next(iter(studies))
        return cls(
            name=name,
            fingerprint=mark,
            title=config.title if config else name,
            question=config.question if config else "",
            baseline=baseline,
            arms=arms,
            seeds=seeds,
            labels=labels,
            config=config,
            cells=cells,
            trials=trials,
        )

    def arm_config(self, arm: str) -> ArmConfig | None:
        """The arm's part of the configuration; None if the rows do not have it."""
        return self._arm_configs.get(arm)

    @cached_property
    def _arm_configs(self) -> dict[str, ArmConfig]:
        return {entry.name: entry for entry in self.config.arms} if self.config else {}

    def has_own_model(self, arm: str) -> bool:
        """Whether the arm starts from other weights than the others by design."""
        entry = self.arm_config(arm)
        return entry is not None and entry.model is not None

    @property
    def dispersed(self) -> tuple[str, ...]:
        """The arms that are trained with a dispersion loss."""
        return tuple(
            arm
            for arm in self.arms
            if (e := self.arm_config(arm)) and e.dispersion is not None and not e.gradient_noise
        )

    @property
    def until(self) -> Literal["decided"] | None:
        """Whether seeds were added until the contrasts were decided, so that intervals must hold at every look."""
        return self.config.until if self.config is not None else None

    @property
    def measured(self) -> bool:
        """Whether nothing is trained: the arms are models that are measured as they are."""
        return self.config is not None and self.config.measure is not None

    def of_arm(self, arm: str, *, finished: bool = True) -> list[Cell]:
        """The cells of an arm by seed; only finished ones unless told otherwise."""
        cells = [self.cells[arm, seed] for seed in self.seeds]
        return [cell for cell in cells if not finished or cell.status == "finished"]

    def task_keys(self) -> list[Key]:
        """Every task and metric, validation loss first, then in order of appearance, the metrics of a task together."""
        found = {key: None for cell in self.cells.values() for key in cell.scores}
        place = {task: number for number, task in enumerate(dict.fromkeys(task for task, _ in found))}
        return sorted(found, key=lambda key: (key != VALIDATION, place[key[0]]))


_KINDS = frozenset({"run", "step", "profile", "eval", "eval_item", "trial"})


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Rows hold no circles, but Python looks for some in all that is kept, again and again: a quarter of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _config(known: list[dict[str, Any]]) -> StudyConfig:
    try:
        return StudyConfig.of_rows(known)
    except ConfigError as error:
        raise CompareError(f"the study configuration in the rows is not valid: {error}") from error


def _take(cell: Cell, row: Row) -> None:
    kind = row["kind"]
    if kind == "run":
        status = row["status"]
        cell.resumed += status == "resumed"
        if not cell.started:
            cell.started = row
        if status == "finished":
            cell.finishes += 1
            cell.run, cell.status = row, "finished"
        elif cell.status != "finished":
            cell.run = row
            cell.status = "failed" if status == "failed" else "unfinished"
    elif kind == "step":
        cell.steps[row["step"]] = row  # steps repeated after a resume are the same steps
    else:
        if kind == "profile":
            place, what = cell.profiles, "profiles"
        else:
            place = cell.scores.setdefault((row["task"], row["metric"]), {})
            what = f"{row['task']} {row['metric']} values"
        before = place.setdefault(row["step"], row)
        if before is not row and stable(before) != stable(row):
            cell.conflicts.append(f"two different {what} at step {row['step']}")
