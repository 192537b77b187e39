"""The runs of a study, with what determines their cost. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from decondense.config import ArmConfig, ModelConfig, StudyConfig, TrainConfig
from decondense.formatting import count, plural
from decondense.studies.plan import tasks


@dataclass(frozen=True)
class Run:
    """One task of a study, in the order in which it is taken."""

    kind: Literal["prepared", "trial", "cell", "measured"]
    name: str
    """The arm, or the prepared model."""
    seed: int
    model: ModelConfig
    train: TrainConfig
    steps: int
    evaluations: int
    """Checkpoints that are evaluated on held-out text."""
    arm: ArmConfig | None = None
    learning_rate: float | None = None
    """The learning rate of a trial."""

    @property
    def tokens(self) -> int:
        """Tokens that are trained on."""
        return self.steps * self.train.batch_size * self.train.max_seq_length


def runs_of(study: StudyConfig) -> list[Run]:
    """The tasks of the runner, with what determines their cost. Needs no torch."""
    found = []
    for task in tasks(study, Path()):
        arm = None if task.kind == "prepared" else study.arm(task.arm)
        own, model = task.study, task.study.model if arm is None else study.model_of(arm)
        if study.measure is not None:
            found.append(Run("measured", task.arm, task.seed, model, own.train, 0, 0, arm))
            continue
        name = task.folder.name if arm is None else arm.name
        rate = own.train.learning_rate if task.kind == "trial" else None
        points = len(own.evaluate.steps(task.steps))
        # a trial differs from the arm's runs in its steps and rate alone, which are said beside it
        train = own.train if arm is None else study.train_of(arm)
        found.append(Run(task.kind, name, task.seed, model, train, task.steps, points, arm, rate))
    return found


def short_form(study: StudyConfig) -> list[str]:
    """Two or three lines for a run that is about to start: its runs and its tokens.

    The command that starts the workers does not import torch; :func:`plan_of` estimates sizes and times.
    """
    runs = runs_of(study)
    cells = [run for run in runs if run.kind in ("cell", "measured")]
    arms = len(study.arms)
    what = "to measure" if study.measure is not None else "to train" if any(run.steps for run in cells) else "to score"
    first = f"{plural(len(cells), 'run')} {what}: {plural(arms, 'arm')} x {plural(len(study.every_seed), 'seed')}"
    if study.until is not None:
        first += f", then more until decided, at most {study.most_seeds}"
    before = [
        plural(sum(run.kind == kind for run in runs), name)
        for kind, name in (("prepared", "prepared model"), ("trial", "trial"))
        if any(run.kind == kind for run in runs)
    ]
    lines = [f"{first}, after {' and '.join(before)}." if before else f"{first}."]
    if study.measure is not None:
        each = study.measure.passages * study.measure.tokens
        lines.append(f"Up to {count(each, short=True)} tokens each, {count(each * len(cells), short=True)} in all.")
    else:
        trained = {run.tokens for run in cells if run.steps}
        total = f"{count(sum(run.tokens for run in runs), short=True)} tokens in all"
        lines.append(f"{total}, {count(trained.pop(), short=True)} per run." if len(trained) == 1 else f"{total}.")
    return [*lines, "--dry-run estimates the time."]
