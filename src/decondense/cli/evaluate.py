"""The verb ``evaluate``: benchmarks of a model with the lm-evaluation-harness."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from decondense.cli import options

if TYPE_CHECKING:
    from decondense.cli.console import Console
    from decondense.evaluate import Evaluation


def evaluate_command(
    model: Annotated[str, typer.Argument(help=f"Model directory, GGUF file or {options.ID_HELP}.", metavar="MODEL")],
    tasks: Annotated[
        str,
        typer.Option(
            "--tasks",
            help="paper (ten benchmarks and paloma_wikitext_103), ten, or names of harness tasks, separated by commas.",
        ),
    ] = "paper",
    out: Annotated[
        Path | None, typer.Option("--out", help="Directory for the results. Default: decondense-evaluate-NAME.")
    ] = None,
    shots: Annotated[
        str | None,
        typer.Option(
            "--shots",
            help="Few-shot examples: gpt2 or qwen3 as in the paper, or a number for all tasks. Default: gpt2.",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", help="Score the first N items of each task only; every table then says so."),
    ] = None,
    data_dir: Annotated[
        str | None,
        typer.Option(
            "--data-dir",
            help="Directory with local benchmark files: one folder per task with SPLIT.jsonl or SPLIT.parquet.",
            rich_help_panel=options.DATA,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size", min=1, help="Requests per forward pass. Default: 16.", rich_help_panel=options.MODEL
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option("--device", help="cpu, cuda, cuda:1. Default: a GPU if available.", rich_help_panel=options.MODEL),
    ] = None,
    dtype: options.Dtype = "auto",
    max_length: Annotated[
        int | None,
        typer.Option(
            "--max-length", min=2, help="Context length in tokens. Default: the model's.", rich_help_panel=options.MODEL
        ),
    ] = None,
    tokenizer: options.Tokenizer = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Run code that comes with the model.", rich_help_panel=options.MODEL),
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Score a model on the paper's benchmarks, or any of lm-evaluation-harness, from the hub or from local files."""
    from decondense.cli.console import Console
    from decondense.cli.display import Display, EvaluationDisplay
    from decondense.config import EvaluateConfig
    from decondense.evaluate import evaluate

    defaults = EvaluateConfig()
    console = Console(stderr=as_json)
    folder = out or Path(f"decondense-evaluate-{_name(model)}")
    with Display(console) as display:
        found = evaluate(
            model,
            tasks,
            shots=defaults.num_fewshot if shots is None else shots,
            limit=limit,
            data_dir=data_dir,
            out=folder,
            batch_size=batch_size or defaults.task_batch,
            device=device,
            dtype=dtype,
            max_length=max_length,
            tokenizer=tokenizer,
            trust_remote_code=trust_remote_code,
            progress=EvaluationDisplay(display),
        )
    _show(console, found)
    console.print(f"results: {folder}", highlight=False, markup=False, soft_wrap=True)
    if as_json:
        from decondense.cli.printed import emit

        scores = [row for row in found.rows() if row["kind"] == "eval"]
        emit("evaluate", model=model, results=str(folder), scores=scores, notes=list(found.table().notes))


def _name(model: str) -> str:
    path = Path(model).expanduser()
    return options.slug(path.resolve().name if path.is_dir() else Path(model).name)


def _show(console: Console, found: Evaluation) -> None:
    table = found.table()
    console.print(table.to_rich(title=found.model))
    for note in table.notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)
