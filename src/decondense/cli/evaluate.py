"""The verb ``evaluate``: benchmarks of a model with the lm-evaluation-harness."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from decondense.evaluate import Evaluation

_DATA = "Data"
_MODEL = "Model"


def evaluate_command(
    model: Annotated[
        str, typer.Argument(help="Model directory or hub id (ID@REVISION for a revision).", metavar="MODEL")
    ],
    tasks: Annotated[
        str,
        typer.Option(
            "--tasks",
            help="paper (ten benchmarks and paloma_wikitext_103), ten, or names of harness tasks, separated by commas.",
        ),
    ] = "paper",
    out: Annotated[
        Path | None, typer.Option("--out", help="Directory of the results. Default: decondense-evaluate-NAME.")
    ] = None,
    shots: Annotated[
        str | None,
        typer.Option(
            "--shots",
            help="Examples in the prompt: gpt2 or qwen3 as in the paper, or a number for all tasks. Default: gpt2.",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", help="Score the first N items of each task only; every table then says so."),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            "--data-dir",
            help="Benchmarks in local files: a folder a task, SPLIT.jsonl or SPLIT.parquet in it.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", min=1, help="Requests of a forward pass. Default: 16.", rich_help_panel=_MODEL),
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu, cuda, cuda:1. Default: a GPU if any.", rich_help_panel=_MODEL)
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.", rich_help_panel=_MODEL)
    ] = "auto",
    max_length: Annotated[
        int | None,
        typer.Option("--max-length", min=2, help="Context in tokens. Default: the model's.", rich_help_panel=_MODEL),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", help="Where the tokenizer is, if not with the model.", rich_help_panel=_MODEL),
    ] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Run code that comes with the model.", rich_help_panel=_MODEL),
    ] = False,
) -> None:
    """Score a model on the paper's benchmarks, or any of lm-evaluation-harness, from the hub or from local files."""
    from rich.console import Console

    from decondense.config import EvaluateConfig
    from decondense.evaluate import evaluate

    defaults = EvaluateConfig()
    console = Console()
    folder = out or Path(f"decondense-evaluate-{_slug(model)}")
    with _Display(console) as display:
        found = evaluate(
            model,
            tasks,
            shots=defaults.shots if shots is None else shots,
            limit=limit,
            data_dir=data_dir,
            out=folder,
            batch_size=batch_size or defaults.task_batch,
            device=device,
            dtype=dtype,
            max_length=max_length,
            tokenizer=tokenizer,
            trust_remote_code=trust_remote_code,
            progress=display,
        )
    _show(console, found)
    console.print(f"results: {folder}", highlight=False, markup=False, soft_wrap=True)


def _slug(model: str) -> str:
    path = Path(model).expanduser()
    name = path.resolve().name if path.is_dir() else Path(model).name
    return re.sub(r"[^\w.-]+", "-", name).strip("-") or "model"


def _show(console: Console, found: Evaluation) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    head, lines, notes = found.table()
    # eighty columns hold it
    shown = Table(
        title=escape(found.model), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False
    )
    for number, name in enumerate(head):
        shown.add_column(name, justify="left" if number < 2 else "right", no_wrap=True)
    for line in lines:
        shown.add_row(*map(escape, line))
    console.print(shown)
    for note in notes:
        console.print(escape(note), highlight=False, soft_wrap=True)


class _Display:
    """A bar a task on a terminal, a line a task in a log."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

        self.console = console
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.bars: dict[str, TaskID] = {}

    def __enter__(self) -> _Display:
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def __call__(self, task: str, what: str, done: int, total: int | None) -> None:
        name = task or "loading the harness and the model"
        if what in ("done", "kept", "failed"):
            if name in self.bars:
                self.progress.remove_task(self.bars.pop(name))
            words = {"done": f"{done:,} items", "kept": "kept from before", "failed": "failed"}[what]
            self.console.print(f"{name}: {words}", highlight=False)
            return
        if name not in self.bars:
            for other in self.bars.values():
                self.progress.remove_task(other)
            self.bars = {name: self.progress.add_task(name, total=total)}
        self.progress.update(self.bars[name], completed=done, total=total)
