"""What a study will cost, before it starts: one line per kind of run, and totals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from decondense.compare.sequential import FEWEST_SEEDS
from decondense.config import ModelConfig, StudyConfig
from decondense.formatting import NONE, count, duration, flops, plural, storage
from decondense.studies.cost.flops import (
    dispersion_flops,
    evaluation_flops,
    forward_flops,
    share_of_steps,
    training_flops,
)
from decondense.studies.cost.runs import Run, runs_of
from decondense.studies.cost.sizes import Models, Size
from decondense.studies.cost.timing import Timer
from decondense.studies.cost.words import GPUS, UTILISATION, gpu_hours, gpu_hours_of, hours
from decondense.table import Table


@dataclass(frozen=True)
class Line:
    """Runs of one kind and name: one line of the table. Numbers are sums over its runs."""

    kind: str
    name: str
    what: str
    runs: int
    steps: int
    """Steps of one run."""
    size: Size
    tokens: float
    flops: float
    """nan: unknown."""
    seconds: float | None
    """Computing time of the runs, one after the other; None: not timed on this machine."""


@dataclass(frozen=True)
class Plan:
    """A study, what it consists of and what it costs."""

    study: StudyConfig
    runs: list[Run]
    lines: list[Line]
    workers: int
    final_bytes: float
    """Disk space for the trained models."""
    checkpoint_bytes: float
    """Disk space for the two checkpoints of the largest run while it trains."""
    how: str
    """How the times were found."""
    notes: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> float:
        """Tokens of all runs."""
        return sum(line.tokens for line in self.lines)

    @property
    def flops(self) -> float:
        """Operations of all runs whose model is known."""
        return sum(line.flops for line in self.lines if not math.isnan(line.flops))

    @property
    def flops_on_gpus(self) -> float:
        """Operations of the runs that are too large to be timed here."""
        return sum(line.flops for line in self.lines if line.seconds is None and not math.isnan(line.flops))

    @property
    def seconds(self) -> float:
        """Time of the timed runs, with the workers in parallel."""
        timed = [line for line in self.lines if line.seconds is not None]
        longest = max((line.seconds / line.runs for line in timed if line.seconds), default=0.0)
        return max(sum(line.seconds or 0.0 for line in timed) / self.workers, longest)

    def with_seeds(self, seeds: int) -> Plan:
        """The plan for another number of seeds."""
        factor = seeds / len(self.study.every_seed)
        lines = [
            line
            if line.kind != "cell"
            else replace(
                line,
                runs=round(line.runs * factor),
                tokens=line.tokens * factor,
                flops=line.flops * factor,
                seconds=None if line.seconds is None else line.seconds * factor,
            )
            for line in self.lines
        ]
        return replace(self, lines=lines)


def _together(notes: Iterable[str]) -> list[str]:
    """Notes ``NAME: text``, merged into one note for all names with the same text."""
    said: dict[str, list[str]] = {}
    for note in dict.fromkeys(note for note in notes if note):
        name, _, words = note.partition(": ")
        said.setdefault(words, []).append(name)
    return [f"{', '.join(names)}: {words}" if words else ", ".join(names) for words, names in said.items()]


def plan_of(study: StudyConfig, *, workers: int | None = None, budget: float = 3.0) -> Plan:
    """Count everything that a study will do, and time small steps.

    Nothing is read over the network, and random states are left unchanged.

    Args:
        study: the study.
        workers: runs in parallel; None: the runner's default.
        budget: seconds after which no further model is timed; the others are estimated at the measured speed.

    Raises:
        ConfigError: an architecture or one of its fields does not exist.
    """
    from decondense.seeding import fence
    from decondense.studies.runner import default_workers

    with fence():
        models = Models(study)
        timer = Timer(models, budget)
        runs = runs_of(study)
        lines = [_line(study, models, timer, group) for group in _grouped(runs)]
    notes = [*dict.fromkeys(models.notes), *_together(line.size.note for line in lines)]
    if study.evaluate.tasks:
        notes.append(f"Not included: the benchmarks of the final checkpoints ({', '.join(study.evaluate.tasks)}).")
    trained = [line for line in lines if line.steps]
    final = sum(4.0 * line.runs * (line.size.total or 0.0) for line in trained)
    checkpoints = max((2 * _checkpoint_bytes(line.size) for line in trained), default=0.0)
    return Plan(
        study,
        runs,
        lines,
        1 if study.launch == "torchtitan" else max(1, min(workers or default_workers(study), len(runs))),
        final,
        checkpoints,
        timer.how(),
        notes,
    )


def _checkpoint_bytes(size: Size) -> float:
    # weights and AdamW's two moments of what is trained, all of them float32
    return 4.0 * 3 * (size.trained or 0.0)


def _grouped(runs: Sequence[Run]) -> list[list[Run]]:
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.kind, run.name), []).append(run)
    return list(groups.values())


@dataclass(frozen=True)
class _Cost:
    """A run as :class:`decondense.config.treatment.RunCost`."""

    study: StudyConfig
    models: Models
    run: Run

    @property
    def steps(self) -> int:
        return self.run.steps

    @property
    def tokens(self) -> int:
        return self.run.tokens

    def forward(self, model: ModelConfig | None = None) -> float:
        length = own = self.run.train.max_seq_length
        model = self.run.model if model is None else model
        if model.prepared is not None:
            own = self.study.prepared[model.prepared].train.max_seq_length
        return forward_flops(self.models.size(model, own), self.run.tokens, length)


def _line(study: StudyConfig, models: Models, timer: Timer, runs: list[Run]) -> Line:
    run = runs[0]
    length = run.train.max_seq_length
    size = models.size(run.model, length)
    what = describe(run, study)
    if run.kind == "measured":
        assert study.measure is not None
        tokens = float(study.measure.passages * study.measure.tokens)
        flops = forward_flops(size, tokens, study.measure.tokens)
        return Line(run.kind, run.name, what, len(runs), 0, size, tokens * len(runs), flops * len(runs), None)
    plain = training_flops(size, run.tokens, length, checkpointing=run.train.gradient_checkpointing)
    plain += evaluation_flops(study.evaluate, size, length, run.evaluations)
    arm = run.arm
    extra, share = 0.0, 0.0
    if arm is not None and run.steps:
        cost = _Cost(study, models, run)
        plain += sum(treatment.extra_flops(cost) for treatment in arm.treatments.values())
    if arm is not None and arm.dispersion is not None and run.steps:
        share = share_of_steps(arm.dispersion, run.steps)
        sequences = run.steps * run.train.batch_size
        together = run.train.micro_batch_size or run.train.batch_size
        extra = share * dispersion_flops(arm.dispersion, size, sequences, length, together)
    seconds = timer.seconds(run, size, plain, extra, share)
    return Line(
        run.kind,
        run.name,
        what,
        len(runs),
        run.steps,
        size,
        float(run.tokens * len(runs)),
        (plain + extra) * len(runs),
        None if seconds is None else seconds * len(runs),
    )


def describe(run: Run, study: StudyConfig) -> str:
    """A short description of a run: the arm's label, and how it differs from training."""
    arm, words = run.arm, []
    if run.kind == "prepared":
        words.append("trained first")
    elif run.kind == "trial" and study.sweep is not None:
        sweep = study.sweep
        settings = len(sweep.learning_rates) * max(1, len(sweep.warmups)) * max(1, len(sweep.max_grad_norms))
        words.append(f"trials of {plural(settings, 'setting')}")
    elif run.kind == "cell" and arm is not None and arm.untrained:
        words.append("start as it is")
    if arm is not None and arm.label is not None and run.kind != "trial":
        words.append(arm.label)
    return ", ".join(words)


def time_of(line: Line) -> str:
    """The time in a line of the table: as timed, or in hours of the first GPU in :data:`GPUS`."""
    if line.seconds is not None:
        return duration(line.seconds)
    gpu = next(iter(GPUS))
    return NONE if math.isnan(line.flops) else f"{hours(gpu_hours(line.flops, gpu))} {gpu}-h"


def plan_table(plan: Plan) -> Table:
    """One row for every line of the plan."""
    rows = tuple(
        (
            f"prepared:{line.name}" if line.kind == "prepared" else line.name,
            line.what,
            (str(line.runs), line.runs),
            (count(line.size.total, short=True), line.size.total),
            (count(line.tokens, short=True), line.tokens),
            (flops(line.flops), line.flops),
            (time_of(line), line.seconds),
        )
        for line in plan.lines
    )
    return Table("plan", plan.study.title, ("arm", "what it is", "runs", "size", "tokens", "FLOPs", "time"), rows, 2)


def totals(plan: Plan) -> list[str]:
    """The lines below the table: sums, time, disk, and what is unknown."""
    study, kinds = plan.study, [run.kind for run in plan.runs]
    names = {"prepared": "prepared model", "trial": "trial", "cell": "run", "measured": "measured model"}
    parts = [plural(kinds.count(kind), name) for kind, name in names.items() if kind in kinds]
    lines = [f"{', '.join(parts)}; {count(plan.tokens, short=True)} tokens, {flops(plan.flops)} FLOPs in all."]
    if plan.how:
        lines.append(f"Time: {duration(plan.seconds)} on {plural(plan.workers, 'worker')} ({plan.how}).")
    if plan.flops_on_gpus:
        peaks = " and ".join(f"{peak / 1e12:.0f}" for peak in GPUS.values())
        begin = "And " if plan.how else "Time: "
        lines.append(
            f"{begin}{gpu_hours_of(plan.flops_on_gpus)}, estimated at {100 * UTILISATION:.0f} % of their peak in bf16 "
            f"({peaks} TFLOP/s)."
        )
        if study.measure is None and study.train.precision == "fp32":
            lines.append("The study trains in fp32, which is slower; use bf16 with --set train.precision=bf16.")
    if plan.final_bytes:
        lines.append(
            f"Disk: {storage(plan.final_bytes)} for the trained models, up to {storage(plan.checkpoint_bytes)} of "
            "checkpoints for each run while it trains."
        )
    if study.until is not None:
        ends = [plan.with_seeds(seeds) for seeds in (max(len(study.every_seed), FEWEST_SEEDS), study.most_seeds)]
        runs = [sum(line.runs for line in end.lines if line.kind == "cell") for end in ends]
        time = [duration(end.seconds) if plan.how else gpu_hours_of(end.flops_on_gpus) for end in ends]
        lines.append(
            f"Until decided: {runs[0] // len(study.arms)} to {study.most_seeds} seeds, that is {runs[0]} to {runs[1]} "
            f"runs, {count(ends[0].tokens, short=True)} to {count(ends[1].tokens, short=True)} tokens and {time[0]} to "
            f"{time[1]}, including the models and trials before them."
        )
    return [*lines, *plan.notes]
