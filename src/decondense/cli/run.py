"""The verbs that train: ``demo``, ``study``, ``train``. The demo is a shipped study, run by the same code."""

from __future__ import annotations

import dataclasses
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from decondense.cli import options

if TYPE_CHECKING:
    from decondense.cli.console import Console
    from decondense.config import StudyConfig
    from decondense.studies.runner import Task
    from decondense.table import Entry


@dataclass(frozen=True)
class StudyOptions:
    """The options of the command line that change a study."""

    name: str
    scale: str | None = None
    seeds: int | None = None
    text: str | None = None
    tokenizer: str | None = None
    start: str | None = None
    tasks: str | None = None
    data_dir: str | None = None
    limit: int | None = None
    assignments: tuple[str, ...] = ()
    until: Literal["decided"] | None = None
    margin: float | None = None
    most_seeds: int | None = None

    def study(self) -> StudyConfig:
        """The study with the changes of the command line; ``--set`` is applied last."""
        from decondense.config import ConfigError, CorpusConfig
        from decondense.studies import load_study
        from decondense.studies.catalogue import assigned, merged

        base = load_study(self.name, self.scale)
        replaced: dict[str, Any] = {} if self.seeds is None else {"seeds": list(range(self.seeds))}
        rule = {"until": self.until, "margin": self.margin, "most_seeds": self.most_seeds}
        replaced |= {key: value for key, value in rule.items() if value is not None}
        model: dict[str, Any] = {}
        corpus: dict[str, Any] = {}
        evaluate: dict[str, Any] = {}
        laid_over: dict[str, Any] = {"model": model, "corpus": corpus, "evaluate": evaluate}
        if self.start is not None:
            old = base.model.pretrained
            if old is None:
                raise ConfigError(
                    f"--start {self.start!r}: the study {base.name!r} (scale {base.scale}) starts from scratch and has "
                    "no model.pretrained to replace. To start from a model: --set model.pretrained=... and "
                    "--tokenizer."
                )
            # revision and size belong to the model that is replaced
            model.update({"pretrained": self.start, "revision": None, "parameters": None})
            if base.corpus.tokenizer in (None, old):
                corpus["tokenizer"] = self.start
            named = {base.model_of(arm).prepared for arm in base.arms if arm.model and arm.model.pretrained}
            named |= {name for arm in base.arms for entry in arm.treatments.values() for name in entry.prepared_models}
            if base.model.prepared is not None and base.model.prepared not in named:
                replaced["prepared"] = {
                    name: entry.model_dump() for name, entry in base.prepared.items() if name != base.model.prepared
                }
        if self.text is not None:
            if base.measure is not None:
                laid_over["measure"] = {"dataset": self.text}
            else:
                # what the file says of its own source has no meaning for another one; --set can say it anew
                nothing = CorpusConfig.model_fields
                corpus.update({key: nothing[key].default for key in ("subset", "split", "text_field", "streaming")})
                corpus["source"] = self.text
        if self.tokenizer is not None:
            corpus["tokenizer"] = self.tokenizer
        if self.tasks is not None:
            evaluate["tasks"] = [name.strip() for name in self.tasks.split(",") if name.strip()]
        if self.data_dir is not None:
            evaluate["data_dir"] = self.data_dir
        if self.limit is not None:
            evaluate["limit"] = self.limit
        laid_over = {key: value for key, value in laid_over.items() if value}
        return load_study(self.name, self.scale, laid_over=merged(laid_over, assigned(self.assignments)), **replaced)

    def words(self) -> list[str]:
        """The same options as arguments of ``decondense study``, beginning with the name."""
        words = [self.name]
        for option, value in (
            ("--scale", self.scale),
            ("--seeds", self.seeds),
            ("--until", self.until),
            ("--margin", self.margin),
            ("--most-seeds", self.most_seeds),
            ("--text", self.text),
            ("--tokenizer", self.tokenizer),
            ("--start", self.start),
            ("--tasks", self.tasks),
            ("--data-dir", self.data_dir),
            ("--limit", self.limit),
            *(("--set", entry) for entry in self.assignments),
        ):
            if value is not None:
                words += [option, str(value)]
        return words


def demo(
    out: options.StudyFolder = None,
    seeds: options.Seeds = None,
    quick: Annotated[bool, typer.Option("--quick", help="A smaller model on less text: about half a minute.")] = False,
    workers: options.Workers = None,
    resume: options.Resume = False,
    text: options.StudyText = None,
    tasks: options.StudyTasks = None,
    data_dir: options.StudyDataDir = None,
    limit: options.StudyLimit = None,
    assignments: options.Set = None,
    as_json: options.Json = False,
) -> None:
    """Train with and without dispersion loss from the same starts, measure, compare, report.

    Everything runs on this machine, on text that every Python installation has. Run the same command again to
    resume an interrupted demo.
    """
    asked = StudyOptions(
        "demo",
        "quick" if quick else "tiny",
        seeds,
        text=text,
        tasks=tasks,
        data_dir=data_dir,
        limit=limit,
        assignments=tuple(assignments or ()),
    )
    folder = out or Path("decondense-demo-quick" if quick else "decondense-demo")
    _run(asked.study(), folder, workers, resume, False, "demo" if as_json else None)


def study(
    name: options.OptionalStudyName = None,
    scale: options.Scale = None,
    out: options.StudyFolder = None,
    seeds: options.Seeds = None,
    workers: options.Workers = None,
    resume: options.Resume = False,
    retry_failed: options.Retry = False,
    until: options.Until = None,
    margin: options.Margin = None,
    most_seeds: options.MostSeeds = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan; run nothing.")] = False,
    pilot: Annotated[
        Path | None,
        typer.Option(
            "--pilot",
            help="With --dry-run: rows of a pilot, to estimate the power from its spread over seeds.",
            metavar="DIR|ROWS",
        ),
    ] = None,
    as_yaml: Annotated[
        bool, typer.Option("--yaml", help="With --dry-run: print the study with every default spelled out.")
    ] = False,
    slurm: Annotated[
        Path | None, typer.Option("--slurm", help="Write a Slurm job array to this file; run nothing.", metavar="FILE")
    ] = None,
    ray: options.Ray = None,
    listed: Annotated[bool, typer.Option("--list", help="List the shipped studies.")] = False,
    text: options.StudyText = None,
    tokenizer: options.StudyTokenizer = None,
    start: options.Start = None,
    tasks: options.StudyTasks = None,
    data_dir: options.StudyDataDir = None,
    limit: options.StudyLimit = None,
    assignments: options.Set = None,
    as_json: options.Json = False,
) -> None:
    """Run a study: arms x seeds from the same starts on the same data in the same order."""
    if listed or name is None:
        _list()
        if not listed:
            typer.echo("Name a study or a YAML file; `decondense study NAME --dry-run` shows its plan.", err=True)
            raise typer.Exit(2)
        return
    changes = (text, tokenizer, start, tasks, data_dir, limit, tuple(assignments or ()))
    asked = StudyOptions(name, scale, seeds, *changes, until, margin, most_seeds)
    chosen = asked.study()
    folder = out or Path(f"decondense-{chosen.name}-{scale or chosen.scale}")
    if most_seeds is not None and chosen.until is None:
        raise typer.BadParameter("it needs --until decided, which adds seeds.", param_hint="--most-seeds")
    if pilot is not None and not dry_run:
        raise typer.BadParameter("it needs --dry-run.", param_hint="--pilot")
    if as_yaml and not dry_run:
        raise typer.BadParameter("it needs --dry-run.", param_hint="--yaml")
    if as_json and (as_yaml or slurm is not None):
        raise typer.BadParameter("it cannot be combined with --yaml or --slurm.", param_hint="--json")
    if ray is not None and (workers == 0 or dry_run or slurm is not None):
        raise typer.BadParameter("it cannot be combined with --dry-run, --slurm or --workers 0.", param_hint="--ray")
    if slurm is not None:
        _write_slurm(chosen, asked.words(), folder, slurm)
    if as_yaml:
        typer.echo(chosen.to_yaml(), nl=False)
    elif dry_run:
        _show_plan(chosen, asked.words(), folder, workers, pilot, as_json)
    elif slurm is None:
        _run(chosen, folder, workers, resume, retry_failed, "study" if as_json else None, ray)


def _show_plan(
    chosen: StudyConfig, words: list[str], folder: Path, workers: int | None, pilot: Path | None, as_json: bool
) -> None:
    """What ``--dry-run`` prints: what the study is, what it costs and how to start it."""
    from rich.markup import escape

    from decondense.cli.console import Console
    from decondense.cli.display import Display
    from decondense.studies.cost import plan_of, plan_table, totals
    from decondense.studies.launch import launches

    console = Console(highlight=False, stderr=as_json)
    console = Console(highlight=False, stderr=as_json, width=min(console.width, 100))
    console.print(f"[bold]{escape(chosen.title)}[/]")
    console.print(escape(chosen.question.strip()))
    with Display(console) as display:
        display.update("plan", "counting and timing")
        plan = plan_of(chosen, workers=workers)
    if as_json:
        from decondense.cli.printed import emit

        table = plan_table(plan)
        emit(
            "study --dry-run",
            study=chosen.name,
            scale=chosen.scale,
            title=chosen.title,
            fingerprint=chosen.fingerprint(),
            workers=plan.workers,
            runs=sum(line.runs for line in plan.lines),
            tokens=plan.tokens,
            flops=plan.flops,
            seconds=plan.seconds,
            disk_bytes={"final": plan.final_bytes, "checkpoints": plan.checkpoint_bytes},
            lines=[dict(zip(table.columns, map(_plain, row), strict=True)) for row in table.rows],
            notes=totals(plan),
            commands=[dataclasses.asdict(launch) for launch in launches(chosen, words, folder)],
        )
        return
    console.print()
    console.print(plan_table(plan).to_rich(fold=(0, 1)))
    for text in totals(plan):
        console.print(escape(text))
    _show_power(chosen, folder, pilot, console)
    for launch in launches(chosen, words, folder):
        # not through the table's console: a command is copied, so its lines are never broken elsewhere
        console.print(f"\n[bold]{escape(launch.title)}:[/]")
        typer.echo("\n".join(launch.lines))


def _plain(entry: Entry) -> str | float | None:
    """The value of a table's cell, or its text where it has none."""
    text, value = entry if isinstance(entry, tuple) else (entry, None)
    return value if isinstance(value, (int, float)) else text


def _show_power(chosen: StudyConfig, folder: Path, pilot: Path | None, console: Console) -> None:
    """What the rows of a pilot, of the study's directory, or of the shipped study say about the seeds it needs."""
    from decondense.cli.evidence import rows_at, rows_file
    from decondense.compare import CompareError
    from decondense.compare import compare as compared
    from decondense.report.power import power_table
    from decondense.studies.catalogue import committed_rows

    if chosen.measure is not None or len(chosen.arms) < 2:
        return
    lies_there = rows_file(folder) if folder.is_dir() else folder
    where = pilot or (lies_there if lies_there.is_file() else committed_rows(chosen))
    if where is None:
        console.print("Power: not known; --pilot ROWS estimates it from the rows of a pilot or of an earlier study.")
        return
    try:
        table = power_table(compared(rows_at(where), incomplete="omit"), chosen)
    except CompareError:
        if pilot is not None:
            raise
        table = None
    if table is None:
        console.print(f"Power: no arm has two seeds in the rows of\n    {where}", markup=False, soft_wrap=True)
        return
    console.print()
    console.print(table.to_rich(title=table.caption, fold=(0,)))
    console.print(f"From the rows of\n    {where}", markup=False, soft_wrap=True)


def _write_slurm(chosen: StudyConfig, words: list[str], folder: Path, path: Path) -> None:
    from decondense.config import ConfigError
    from decondense.studies.launch import slurm_script

    if chosen.launch == "torchtitan":
        raise ConfigError(
            f"--slurm: the study {chosen.name!r} (scale {chosen.scale}) runs under torchtitan; --dry-run prints its "
            "commands."
        )
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o777), "w", encoding="utf-8") as file:
            file.write("\n".join(slurm_script(chosen, words, folder)) + "\n")
    except FileExistsError as error:
        raise ConfigError(
            f"--slurm {path}: a file or a link exists there; choose another name or remove it."
        ) from error
    typer.echo(f"wrote {path}: sbatch {shlex.quote(str(path))}", err=True)


def _list() -> None:
    """The shipped studies, their scales and what they are about."""
    from decondense.cli.console import Console
    from decondense.studies import load_study, shipped_studies
    from decondense.studies.catalogue import scales_of
    from decondense.table import Table

    scales = {name: scales_of(name) for name in shipped_studies()}
    rows = tuple((name, ", ".join(of), load_study(name, of[0]).title) for name, of in scales.items())
    Console().print(Table("studies", "", ("study", "scales", "title"), rows, 3).to_rich(fold=(1, 2)))


def train(
    name: options.StudyName,
    arm: Annotated[str, typer.Option("--arm", help="Arm of the study.")],
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the study.")] = 0,
    scale: options.Scale = None,
    out: options.StudyFolder = None,
    seeds: options.Seeds = None,
    resume: options.Resume = False,
    retry_failed: options.Retry = False,
    until: options.Until = None,
    margin: options.Margin = None,
    most_seeds: options.MostSeeds = None,
    text: options.StudyText = None,
    tokenizer: options.StudyTokenizer = None,
    start: options.Start = None,
    tasks: options.StudyTasks = None,
    data_dir: options.StudyDataDir = None,
    limit: options.StudyLimit = None,
    assignments: options.Set = None,
) -> None:
    """Run one cell of a study (one arm, one seed) in this process, also under torchrun or accelerate launch.

    Models and learning rates that the cell needs are trained and tried first, once for all cells of the directory.
    Cells trained into the same --out make up the study: compare and report read them once all are done.
    """
    from decondense.cli.console import Console
    from decondense.cli.display import Display, StudyDisplay
    from decondense.config import ConfigError
    from decondense.records import RowReader, write_rows
    from decondense.studies.directory import study_of
    from decondense.studies.runner import cell_folder, collect, open_directory, study_corpus

    changes = (text, tokenizer, start, tasks, data_dir, limit, tuple(assignments or ()))
    asked = StudyOptions(name, scale, seeds, *changes, until, margin, most_seeds)
    chosen = asked.study()
    folder = out or Path(f"decondense-{chosen.name}-{scale or chosen.scale}")
    chosen.arm(arm)
    there = study_of(folder) if (folder / "study.yaml").is_file() else chosen
    if seed not in {*chosen.every_seed, *there.every_seed}:
        raise ConfigError(f"seed {seed} is not one of the study's seeds {list(chosen.every_seed)}; see --seeds.")
    console = Console(stderr=True)
    chosen = open_directory(chosen, folder, resume=resume)
    if chosen.measure is None:
        with Display(console) as display:
            study_corpus(chosen, folder, StudyDisplay(display))
    from decondense.studies.worker import run_one
    from decondense.training.hf import is_main_process

    readers: dict[Path, RowReader] = {}
    with Display(console) as display:

        def watch(task: Task) -> None:
            if not is_main_process():
                return
            reader = readers.setdefault(task.folder, RowReader(task.rows))
            name = f"{task.name} seed {task.seed}"
            for row in reader.read()[1]:
                display.drop("starting")
                if row["kind"] == "step":
                    display.update(task.folder, name, row["step"], task.steps, f"loss {row['loss']:.4f}")
                elif row["kind"] == "run" and row["status"] in ("finished", "failed"):
                    display.finish(task.folder, name, row["status"])

        display.update("starting", f"{arm} seed {seed}: starting")
        ended = run_one(chosen, arm, seed, folder, retry_failed=retry_failed, watch=watch)
    if is_main_process():
        write_rows(folder / "rows.jsonl", collect(chosen, folder))
    if ended["status"] == "failed":
        raise RuntimeError(f"{arm} seed {seed} failed: {ended['error']}")
    if is_main_process():
        console.print(f"finished: {cell_folder(folder, arm, seed)}", markup=False)


def _run(
    chosen: StudyConfig, out: Path, workers: int | None, resume: bool, retry_failed: bool, json_of: str | None,
    ray: str | None = None,
) -> None:  # fmt: skip
    from decondense.cli.console import Console
    from decondense.cli.display import Display, StudyDisplay
    from decondense.cli.evidence import present
    from decondense.config import ConfigError
    from decondense.studies import run_study
    from decondense.studies.cost import short_form
    from decondense.studies.directory import study_of
    from decondense.studies.launch import launches

    if chosen.launch == "torchtitan":
        (launch,) = launches(chosen, [], out)
        raise ConfigError(
            f"the study {chosen.name!r} (scale {chosen.scale}) is too large for the study's own runner; run it under "
            "torchtitan:\n" + "\n".join(launch.lines)
        )
    there = out / "study.yaml"
    planned = study_of(out) if resume and there.is_file() else chosen
    for line in short_form(planned):
        typer.echo(line, err=True)
    console = Console(stderr=json_of is not None)
    with Display(console) as display:
        watcher = StudyDisplay(display)
        rows = run_study(
            chosen, out, workers=workers, resume=resume, retry_failed=retry_failed, watcher=watcher, ray=ray
        )
    present(rows, out, console, json_of=json_of)
