"""The verbs that read rows: ``compare``, ``report``, and ``env``. None of them needs torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from decondense.compare import Comparison
    from decondense.records import Row

Where = Annotated[Path, typer.Argument(help="A study directory or a rows.jsonl file.", metavar="DIR|ROWS")]


def compare(
    where: Where,
    baseline: Annotated[
        str | None, typer.Option("--baseline", help="Arm to compare with. Default: the study's.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
) -> None:
    """Compare the arms of a study pair by pair."""
    from rich.console import Console

    from decondense import compare as comparing

    found = comparing.compare(_rows(where), baseline=baseline)
    if as_json:
        import json

        typer.echo(json.dumps(found.to_dict(), indent=1))
        return
    _print_comparison(found, Console())


def report(
    where: Where,
    out: Annotated[Path | None, typer.Option("--out", help="Where the report goes. Default: beside the rows.")] = None,
) -> None:
    """Write report.html, its figures and tables from a study's rows alone."""
    from rich.console import Console

    rows = _rows(where)
    folder = out or (where if where.is_dir() else where.parent)
    present(rows, folder, Console())


def env() -> None:
    """Show versions, devices and directories: what to send along with a question."""
    import json

    from decondense.corpora.embedded import cache_directory
    from decondense.records import provenance

    found = provenance()
    import torch

    found["devices"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] or ["cpu"]
    found["threads"] = torch.get_num_threads()
    found["cache"] = str(cache_directory())
    typer.echo(json.dumps(found, indent=1))


def present(rows: list[Row], out: Path, console: Console) -> None:
    """Print the comparison, write the report beside the rows, and say where everything lies."""
    from decondense import compare as comparing
    from decondense.report import build_report

    paths = build_report(rows, out)
    try:
        _print_comparison(comparing.compare(rows), console)
    except ValueError as error:
        console.print(f"no comparison: {error}", style="yellow")
    console.print(
        f"\nreport:  {paths['report']}\nfigures: {out / 'figures'}\nrows:    {out / 'rows.jsonl'}", highlight=False
    )
    failed = [row for row in rows if row["kind"] == "run" and row["status"] == "failed"]
    if failed:
        raise RuntimeError(
            "some runs failed, and the report says so: "
            + "; ".join(f"{row['arm']} seed {row['seed']}: {row['error']}" for row in failed)
        )


def _rows(where: Path) -> list[Row]:
    from decondense.config import ConfigError
    from decondense.records import read_rows

    path = where / "rows.jsonl" if where.is_dir() else where
    if not path.exists():
        raise ConfigError(f"{where}: there is no rows.jsonl; give a study's directory or its file of rows.")
    rows = read_rows(path)
    if not rows:
        raise ConfigError(f"{path} holds no rows; has any run of the study ended?")
    return rows


def _print_comparison(found: Comparison, console: Console) -> None:
    from rich import box
    from rich.table import Table

    from decondense.report import summary, terminal_table

    columns, lines = terminal_table(found)
    table = Table(title=found.title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for index, column in enumerate(columns):
        # a header may wrap between its words, a value may not
        width = max(len(text) for text in [*column.split(), *(line[index] for line in lines)] or [""])
        table.add_column(column, justify="left" if index == 0 else "right", width=width)
    for line in lines:
        table.add_row(*line)
    console.print(table)
    console.print(summary(found), highlight=False)
    for note in found.task_notes:
        console.print(f"Benchmarks: {note}.", highlight=False, markup=False)
