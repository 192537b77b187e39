"""The committed rows of one study at one scale, and the numbers that claims and tables take from them.

Rows lie in ``results/studies/NAME-SCALE.jsonl.gz``, as ``decondense study NAME --scale SCALE`` wrote them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from decondense.compare import VALIDATION, Cell, Comparison, Difference, Study, compare, paired_difference, profiles
from decondense.compare.sequential import anytime
from decondense.config import StudyConfig
from decondense.records import Row, read_rows
from decondense.report import interval, number

FOLDER = Path(__file__).resolve().parent / "results" / "studies"
CONTROLS = FOLDER.parent / "controls"
SCALES = ("quick", "tiny", "gpu", "paper")


@dataclass(frozen=True)
class Committed:
    """One study at one scale, as committed."""

    name: str
    scale: str
    study: Study
    comparison: Comparison
    _against: dict[str, Comparison] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def config(self) -> StudyConfig:
        assert self.study.config is not None
        return self.study.config

    def against(self, baseline: str) -> Comparison:
        if baseline not in self._against:
            self._against[baseline] = compare(self.study, baseline, incomplete="omit")
        return self._against[baseline]

    def cells(self, arm: str) -> list[Cell]:
        return self.study.of_arm(arm)

    def label(self, arm: str) -> str:
        return self.study.labels[arm]

    def setting(self, arm: str) -> tuple[float, float] | None:
        """Weight and temperature of the arm's dispersion loss; None without one."""
        entry = self.study.arm_config(arm)
        if entry is None or entry.dispersion is None:
            return None
        return entry.dispersion.weight, entry.dispersion.loss.tau

    def with_setting(self, weight: float, tau: float) -> str | None:
        """The arm with this weight and temperature."""
        return next((arm for arm in self.study.arms if self.setting(arm) == (weight, tau)), None)

    def weights(self) -> list[float]:
        return sorted({pair[0] for arm in self.study.arms if (pair := self.setting(arm))})

    def taus(self) -> list[float]:
        return sorted({pair[1] for arm in self.study.arms if (pair := self.setting(arm))})

    @property
    def tokens(self) -> int:
        """Training tokens of a run."""
        train = self.config.train
        return train.steps * train.batch_size * train.max_seq_length

    @property
    def width(self) -> object:
        return self.config.model.overrides["n_embd"]


@cache
def committed(name: str, scale: str = "tiny") -> Committed | None:
    path = FOLDER / f"{name}-{scale}.jsonl.gz"
    if not path.exists():
        return None
    study = Study.from_rows(read_rows(path))
    return Committed(name, scale, study, compare(study, incomplete="omit"))


def every_committed() -> list[Committed]:
    """All studies that have rows, at every scale."""
    names = [path.name.removesuffix(".jsonl.gz").rsplit("-", 1) for path in sorted(FOLDER.glob("*.jsonl.gz"))]
    return [f for name, scale in names if (f := committed(name, scale)) is not None]


# ---- numbers of a run ------------------------------------------------------------------------------------------------


def blocks(cell: Cell) -> float:
    """Mean cosine over the blocks of the final checkpoint."""
    value = profiles.BLOCKS.of(cell)
    assert value is not None
    return value


def last(cell: Cell, step: int | None = None) -> float:
    """Mean cosine of the last layer, of the final checkpoint or at a step."""
    return profiles.last(_profile(cell, step))


def deep_half(cell: Cell, step: int | None = None) -> float:
    """Mean cosine of the last L/2 layers: the paper's alternative metric."""
    return profiles.deep(_profile(cell, step))


def _profile(cell: Cell, step: int | None) -> Row:
    profile = cell.final_profile() if step is None else cell.profiles[step]
    assert profile is not None
    return profile


def depth(cell: Cell) -> float:
    """Spearman's correlation of the mean cosine with depth."""
    value = profiles.SPEARMAN.of(cell)
    assert value is not None
    return value


def mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


# ---- estimates -------------------------------------------------------------------------------------------------------


def estimate(values: Sequence[float], *, null: float = 0.0, of: Committed | None = None) -> Difference:
    """Mean and interval of one value per seed, less ``null``; ``of``: the study whose seeds they are."""
    return at_every_look(of, paired_difference([null] * len(values), list(values)))


def at_every_look(f: Committed | None, d: Difference) -> Difference:
    """The difference with Student's interval, or the sequence where the study added seeds until it was decided."""
    return d if f is None or f.study.until is None else anytime(d)


def paired(f: Committed, arm: str, baseline: str, of: Callable[[Cell], float]) -> Difference:
    """The paired difference of a number of the runs."""
    take = {(name, cell.seed): of(cell) for name in (arm, baseline) for cell in f.cells(name)}
    seeds = [seed for seed in f.study.seeds if (arm, seed) in take and (baseline, seed) in take]
    values = [[take[name, seed] for seed in seeds] for name in (baseline, arm)]
    return at_every_look(f, paired_difference(*values, arm=arm))


def loss_difference(f: Committed, arm: str, baseline: str | None = None) -> Difference:
    """The difference in held-out loss, at the final checkpoint."""
    compared = f.comparison if baseline is None else f.against(baseline)
    assert compared.validation is not None
    d = compared.validation.difference(arm)
    assert d is not None
    return d


def slope(f: Committed, arms: Sequence[str], of: Callable[[Cell], float]) -> Difference | None:
    """Change of a number per doubling of the parameters: least squares over the arms, seed by seed."""
    values = []
    for seed in f.study.seeds:
        cells = [f.study.cells[arm, seed] for arm in arms]
        if all(cell.status == "finished" for cell in cells):
            sizes = [np.log2(cell.run["parameters"]) for cell in cells]
            values.append(float(np.polyfit(sizes, [of(cell) for cell in cells], 1)[0]))
    return estimate(values, of=f) if values else None


def shown(d: Difference, digits: int = 3, *, sign: bool = True) -> str:
    return f"{number(d.mean, digits, sign=sign)} {interval(d.interval, digits)}, n = {d.n}"


def sweep_of(control: str) -> dict[tuple[str, float], dict[float, list[float]]]:
    """The trials of a control: (arm, warm-up) -> rate -> losses, one a seed."""
    tried: dict[tuple[str, float], dict[float, list[float]]] = {}
    for row in read_rows(CONTROLS / f"{control}.jsonl.gz"):
        if row["kind"] == "trial" and row["value"] is not None:
            tried.setdefault((row["arm"], row["warmup"]), {}).setdefault(row["learning_rate"], []).append(row["value"])
    return tried


def warm_up_control() -> tuple[StudyConfig, dict[tuple[float, bool], dict[int, float]]]:
    """The control of the schedule study, and its final held-out losses: (rate, dispersed) -> seed -> loss."""
    study = Study.from_rows(read_rows(CONTROLS / "warm-up.jsonl.gz"))
    assert study.config is not None
    last: dict[tuple[float, bool], dict[int, float]] = {}
    for cell in study.cells.values():
        arm = study.arm_config(cell.arm)
        assert arm is not None
        assert arm.learning_rate is not None
        if cell.status == "finished":
            losses = cell.scores[VALIDATION]
            key = (arm.learning_rate, arm.dispersion is not None)
            last.setdefault(key, {})[cell.seed] = float(losses[max(losses)]["value"])
    return study.config, last
