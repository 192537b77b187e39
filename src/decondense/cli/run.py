"""The verbs that train: ``demo``, ``study``, ``train``. The demo is a shipped study, run by the same code."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from decondense.config import StudyConfig
    from decondense.studies import CellState

Out = Annotated[Path | None, typer.Option("--out", help="Directory of the study. Default: decondense-NAME.")]
Seeds = Annotated[int | None, typer.Option("--seeds", min=1, help="Number of seeds, 0 to N-1. Default: the study's.")]
Workers = Annotated[
    int | None, typer.Option("--workers", min=0, help="Runs side by side. Default: one a core; one on a GPU.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the study that lies in --out, whatever it is.")]
Retry = Annotated[bool, typer.Option("--retry-failed", help="Start failed runs again instead of reporting them.")]


def demo(
    out: Out = None,
    seeds: Seeds = None,
    quick: Annotated[bool, typer.Option("--quick", help="A smaller model on less text: about half a minute.")] = False,
    workers: Workers = None,
    resume: Resume = False,
) -> None:
    """Train with and without dispersion loss from the same starts, measure, compare, report.

    Everything runs on this machine, on text that every Python installation has. An interrupted demo goes on where it
    was when the same command is given again.
    """
    from decondense.studies import load_study

    chosen = load_study("demo", "quick" if quick else "tiny", **_seeds(seeds))
    _run(chosen, out or Path("decondense-demo-quick" if quick else "decondense-demo"), workers, resume, False)


def study(
    name: Annotated[str, typer.Argument(help="A shipped study or the path of a YAML file.", metavar="NAME|FILE")],
    scale: Annotated[str | None, typer.Option("--scale", help="One of the study's scales.")] = None,
    out: Out = None,
    seeds: Seeds = None,
    workers: Workers = None,
    resume: Resume = False,
    retry_failed: Retry = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved study and its cells; run nothing.")
    ] = False,
) -> None:
    """Run a study: arms x seeds from the same starts on the same data in the same order."""
    from decondense.studies import load_study

    chosen = load_study(name, scale, **_seeds(seeds))
    if dry_run:
        from decondense.studies.runner import plan

        typer.echo(chosen.to_yaml())
        for arm, seed in plan(chosen):
            typer.echo(f"cell: arm {arm}, seed {seed}: {chosen.train.steps} steps")
        return
    _run(chosen, out or Path(f"decondense-{chosen.name}-{chosen.scale}"), workers, resume, retry_failed)


def train(
    name: Annotated[str, typer.Argument(help="A shipped study or the path of a YAML file.", metavar="NAME|FILE")],
    arm: Annotated[str, typer.Option("--arm", help="Which arm of the study.")],
    seed: Annotated[int, typer.Option("--seed", min=0, help="Which seed of the study.")] = 0,
    scale: Annotated[str | None, typer.Option("--scale", help="One of the study's scales.")] = None,
    out: Out = None,
    seeds: Seeds = None,
    resume: Resume = False,
    retry_failed: Retry = False,
) -> None:
    """Run one cell of a study (one arm, one seed) in this process, also under torchrun or accelerate launch.

    Cells trained into the same --out make up the study: compare and report read them once all are done.
    """
    from rich.console import Console

    from decondense.config import ConfigError
    from decondense.records import read_rows, write_rows
    from decondense.studies import load_study
    from decondense.studies.runner import cell_folder, collect, open_directory, study_corpus

    chosen = load_study(name, scale, **_seeds(seeds))
    folder = out or Path(f"decondense-{chosen.name}-{chosen.scale}")
    chosen.arm(arm)
    if seed not in chosen.seeds:
        raise ConfigError(f"seed {seed} is not one of the study's seeds {list(chosen.seeds)}; see --seeds.")
    console = Console(stderr=True)
    chosen = open_directory(chosen, folder, resume=resume)
    with _Display(console) as display:
        corpus = study_corpus(chosen, folder, display)
    from decondense.training.hf import is_main_process, run_cell

    rows_path = cell_folder(folder, arm, seed) / "rows.jsonl"

    shown = 0

    def watch() -> None:
        nonlocal shown
        if not is_main_process() or not rows_path.exists():
            return
        steps = [row for row in read_rows(rows_path, check=False) if row["kind"] == "step" and row["step"] > shown]
        for row in steps:
            shown = row["step"]
            console.print(f"{arm} seed {seed}: step {shown}/{chosen.train.steps}, loss {row['loss']:.4f}")

    ended = run_cell(chosen, chosen.arm(arm), seed, corpus, rows_path.parent, retry_failed=retry_failed, watch=watch)
    if is_main_process():
        write_rows(folder / "rows.jsonl", collect(chosen, folder))
    if ended["status"] == "failed":
        raise RuntimeError(f"{arm} seed {seed} failed: {ended['error']}")
    if is_main_process():
        console.print(f"finished: {rows_path.parent / 'final'}")


def _seeds(number: int | None) -> dict[str, object]:
    return {} if number is None else {"seeds": list(range(number))}


def _run(chosen: StudyConfig, out: Path, workers: int | None, resume: bool, retry_failed: bool) -> None:
    from rich.console import Console

    from decondense.cli.evidence import present
    from decondense.studies import run_study

    console = Console()
    with _Display(console) as display:
        rows = run_study(chosen, out, workers=workers, resume=resume, retry_failed=retry_failed, watcher=display)
    present(rows, out, console)


class _Display:
    """Progress bars: the text first, then one bar a cell."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

        self.console = console
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.tasks: dict[object, TaskID] = {}
        self.told: set[object] = set()

    def __enter__(self) -> _Display:
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def corpus(self, what: str, done: int, total: int) -> None:
        self._task(what, what, total, done, f"{done}/{total}")

    def cells(self, states: list[CellState]) -> None:
        for state in states:
            key = (state.arm, state.seed)
            note = state.status if state.loss is None else f"step {state.step}/{state.steps}, loss {state.loss:.3f}"
            if state.status == "failed":
                note = "failed"
            started = state.status != "waiting"
            self._task(key, f"{state.arm}, seed {state.seed}", state.steps, state.step, note, begin=started)

    def _task(self, key: object, name: str, total: int, done: int, note: str, begin: bool = True) -> None:
        if key not in self.tasks:
            self.tasks[key] = self.progress.add_task(name, total=total, note=note, start=False)
        if begin:
            task = self.progress.tasks[self.progress.task_ids.index(self.tasks[key])]
            if not task.started:
                self.progress.start_task(self.tasks[key])
        self.progress.update(self.tasks[key], completed=done, note=note)
        if done >= total and key not in self.told:
            self.told.add(key)
            if not self.console.is_terminal:  # a log gets a line at the end of each thing instead of bars
                self.console.print(f"{name}: {note}")
