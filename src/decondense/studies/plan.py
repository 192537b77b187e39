"""What a study trains: its tasks in the order in which they are run, and the folder of each.

A study is a list of tasks: prepared models, then trials, then cells; a task waits for those that it needs. Only this
module knows the names of the folders, and nothing is ever read from a name.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from decondense.config import ArmConfig, StudyConfig


@dataclass(frozen=True, order=True)
class Setting:
    """One point of a sweep's grid; None: the setting is not swept for the arm."""

    learning_rate: float
    warmup: float | None = None
    max_grad_norm: float | None = None

    def of(self, arm: ArmConfig) -> ArmConfig:
        """The arm with this setting."""
        update = {name: value for name, value in vars(self).items() if value is not None}
        return arm.model_copy(update=update)

    def __str__(self) -> str:
        words = [f"rate {self.learning_rate!r}"]
        if self.warmup is not None:
            words.append(f"warm-up {self.warmup!r}")
        if self.max_grad_norm is not None:
            words.append(f"clip {self.max_grad_norm!r}")
        return ", ".join(words)


@dataclass(frozen=True)
class Task:
    """One training run of a study's directory, and what must be done before it."""

    kind: Literal["prepared", "trial", "cell"]
    name: str
    """Its name in progress and messages."""
    study: StudyConfig
    """Whose run it is: the study itself, or for a prepared model or a trial the small study made for it."""
    arm: str
    seed: int
    folder: Path
    needs: tuple[Path, ...] = ()
    """Folders of the tasks that must have ended."""
    setting: Setting | None = None
    """The setting that a trial tries."""

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        arm = self.study.arm(self.arm)
        return 0 if arm.untrained else self.study.train_of(arm).steps

    @property
    def rows(self) -> Path:
        """Its file of rows."""
        return self.folder / "rows.jsonl"


def cell_folder(out: Path, arm: str, seed: int) -> Path:
    """Folder of a cell. A row itself says which cell it belongs to, not the folder's name."""
    return out / "cells" / arm / f"seed-{seed}"


def prepared_folder(out: Path, name: str) -> Path:
    """Folder of a prepared model's run; the model itself is in its subfolder ``final``."""
    return out / "prepared" / name


def trial_folder(out: Path, arm: str, setting: Setting | float, seed: int | None = None) -> Path:
    """Folder of a trial: different settings never share one. It names ``seed`` if a setting has several."""
    if not isinstance(setting, Setting):
        setting = Setting(float(setting))
    # repr is the shortest text that gives the same number back
    words = [repr(setting.learning_rate)]
    if setting.warmup is not None:
        words.append(f"warmup-{setting.warmup!r}")
    if setting.max_grad_norm is not None:
        words.append(f"clip-{setting.max_grad_norm!r}")
    if seed is not None:
        words.append(f"seed-{seed}")
    return out / "sweep" / arm / "_".join(words)


def plan(study: StudyConfig) -> list[tuple[str, int]]:
    """The cells (arm, seed) in the order in which they are run: pair by pair, so that pairs are complete early."""
    return [(arm.name, seed) for seed in study.every_seed for arm in study.arms]


def settings_of(study: StudyConfig, arm: ArmConfig) -> list[Setting]:
    """What the sweep tries for an arm, in ascending order; what the arm fixes for itself is not varied."""
    if study.sweep is None or not study.swept(arm):
        return []
    warmups = study.sweep.warmups if study.sweep.warmups and arm.warmup is None else (None,)
    clips = study.sweep.max_grad_norms if study.sweep.max_grad_norms and arm.max_grad_norm is None else (None,)
    return [
        Setting(float(rate), warmup, clip)
        for rate in study.sweep.learning_rates
        for warmup in warmups
        for clip in clips
    ]


def prepared_models(study: StudyConfig, out: Path) -> dict[str, Path]:
    """Directories of the prepared models, by name."""
    return {name: prepared_folder(out, name) / "final" for name in study.prepared}


def _prepared_study(study: StudyConfig, name: str) -> StudyConfig:
    entry = study.prepared[name]
    dispersion = {} if entry.dispersion is None else {"dispersion": entry.dispersion.model_dump()}
    return StudyConfig.parse(
        {
            "name": f"{study.name}.prepared.{name}",
            "title": f"{name}, trained first for {study.title}",
            "question": study.question,
            "scale": study.scale,
            "baseline": "cross-entropy",
            "arms": [{"name": "cross-entropy", "untrained": entry.untrained, **dispersion}],
            "seeds": [entry.seed],
            "model": entry.model.model_dump(),
            "corpus": study.corpus.model_dump(),
            "train": entry.train.model_dump(),
            "evaluate": {**study.evaluate.model_dump(), "tasks": ()},
        },
        where=f"prepared.{name}",
    )


def _trial_study(study: StudyConfig, arm: ArmConfig, setting: Setting, seed: int) -> StudyConfig:
    assert study.sweep is not None
    steps = study.sweep.steps or study.train.steps
    tried = setting.of(arm)
    warmup = study.train.warmup if tried.warmup is None else tried.warmup
    if study.sweep.warmup_unit == "steps":
        # the run's warm-up in steps: a rate that is right after 30 steps of it may not be after 100
        warmup = round(warmup * study.train.steps) / steps
    train = study.train.model_copy(update={"steps": steps, "learning_rate": setting.learning_rate, "warmup": warmup})
    # only the end is looked at, on documents that the comparison does not score
    evaluate = study.evaluate.model_copy(update={"points": (1.0,), "held_out_part": "tuning", "tasks": ()})
    return study.model_copy(
        update={
            "name": f"{study.name}.sweep.{arm.name}",
            "baseline": arm.name,
            "arms": (tried.model_copy(update={"warmup": warmup}),),
            "seeds": (seed,),
            "added_seeds": (),
            "until": None,
            "train": train,
            "evaluate": evaluate,
            "sweep": None,
        }
    )


def tasks(study: StudyConfig, out: Path) -> list[Task]:
    """Everything a study trains, in the order in which it is run."""
    listed = []
    for name in study.prepared:
        own = _prepared_study(study, name)
        listed.append(
            Task("prepared", f"prepared {name}", own, "cross-entropy", own.seeds[0], prepared_folder(out, name))
        )
    needs = {arm.name: [prepared_folder(out, name) for name in study.prepared_of(arm)] for arm in study.arms}
    for arm in study.arms:
        trials = [_trial(study, arm, setting, seed, out) for setting, seed in _grid(study, arm)]
        listed += [replace(trial, needs=tuple(needs[arm.name])) for trial in trials]
        needs[arm.name] += [trial.folder for trial in trials]
    for name, seed in plan(study):
        listed.append(Task("cell", name, study, name, seed, cell_folder(out, name, seed), tuple(needs[name])))
    return listed


def _grid(study: StudyConfig, arm: ArmConfig) -> list[tuple[Setting, int]]:
    seeds = study.sweep.trial_seeds if study.sweep is not None else ()
    return [(setting, seed) for setting in settings_of(study, arm) for seed in seeds]


def _trial(study: StudyConfig, arm: ArmConfig, setting: Setting, seed: int, out: Path) -> Task:
    assert study.sweep is not None
    several = len(study.sweep.trial_seeds) > 1
    folder = trial_folder(out, arm.name, setting, seed if several else None)
    own = _trial_study(study, arm, setting, seed)
    return Task("trial", f"{arm.name} at {setting}", own, arm.name, seed, folder, setting=setting)
