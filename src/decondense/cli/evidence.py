"""The verbs that read rows: ``compare``, ``report``, and ``env``. None of them needs torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from decondense.compare import Comparison
    from decondense.records import Row

Where = Annotated[
    Path, typer.Argument(help="A study directory, or a file of rows (.jsonl, .jsonl.gz).", metavar="DIR|ROWS")
]
Baseline = Annotated[str | None, typer.Option("--baseline", help="Arm to compare with. Default: the study's.")]


def compare(
    where: Where,
    baseline: Baseline = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
    omit: Annotated[
        bool, typer.Option("--omit", help="Leave out runs that cannot be compared, and name them, instead of refusing.")
    ] = False,
    tables: Annotated[
        Path | None,
        typer.Option(
            "--tables", help="Write the tables as Markdown, LaTeX and CSV into this directory.", metavar="DIR"
        ),
    ] = None,
) -> None:
    """Compare the arms of a study pair by pair."""
    from rich.console import Console

    from decondense import compare as comparing

    found = comparing.compare(_rows(where), baseline=baseline, incomplete="omit" if omit else "refuse")
    if tables is not None:
        from decondense.report import write_tables

        written = write_tables(found, tables)
        # beside --json the output must stay JSON
        typer.echo(f"{len(written)} files of tables in {tables}", err=as_json)
    if as_json:
        import json

        typer.echo(json.dumps(found.to_dict(), indent=1))
        return
    _print_comparison(found, Console())


def report(
    where: Where,
    out: Annotated[Path | None, typer.Option("--out", help="Where the report goes. Default: beside the rows.")] = None,
    baseline: Baseline = None,
) -> None:
    """Write report.html, its figures and tables from a study's rows alone."""
    from rich.console import Console

    rows = _rows(where)
    folder = out or (where if where.is_dir() else where.parent)
    present(rows, folder, Console(), baseline=baseline, source=_rows_file(where))


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


def present(
    rows: list[Row], out: Path, console: Console, *, baseline: str | None = None, source: Path | None = None
) -> None:
    """Print the comparison, write the report, and say where everything lies; ``source`` is the file of the rows."""
    from decondense import compare as comparing
    from decondense.config import one_of
    from decondense.report import build_report

    study = comparing.Study.from_rows(rows)
    if baseline is not None:
        one_of("baseline arm", baseline, study.arms)
    paths = build_report(study, out, baseline=baseline)
    try:
        _print_comparison(comparing.compare(study, baseline, incomplete="omit"), console)
    except comparing.CompareError as error:
        console.print(f"no comparison: {error}", style="yellow", markup=False)
    console.print(
        f"\nreport:  {paths['report']}\nfigures: {out / 'figures'}\nrows:    {source or out / 'rows.jsonl'}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    failed = [cell for cell in study.cells.values() if cell.status == "failed"]
    if failed:
        raise RuntimeError(
            "some runs failed, and the report says so: "
            + "; ".join(f"{cell.arm} seed {cell.seed}: {cell.run['error'] or 'no reason recorded'}" for cell in failed)
        )


def _rows_file(where: Path) -> Path:
    if not where.is_dir():
        return where
    plain, packed = where / "rows.jsonl", where / "rows.jsonl.gz"
    return packed if packed.exists() and not plain.exists() else plain


def _rows(where: Path) -> list[Row]:
    from decondense.config import ConfigError
    from decondense.records import read_rows

    path = _rows_file(where)
    if not path.exists():
        raise ConfigError(f"{where}: there is no rows.jsonl; give a study's directory or its file of rows.")
    rows = read_rows(path)
    if not rows:
        raise ConfigError(f"{path} holds no rows; has any run of the study ended?")
    return rows


def _print_comparison(found: Comparison, console: Console) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from decondense.report import summary, terminal_table

    if found.omitted:
        console.print("Left out of the comparison:", style="yellow")
        for fault in found.omitted:
            console.print(f"  {fault}", highlight=False, markup=False)
        console.print()
    columns, lines = terminal_table(found)
    table = Table(
        title=escape(found.title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False
    )
    for index, column in enumerate(columns):
        # a header may wrap between its words, a value may not
        parts = [part for line in lines for part in line[index].splitlines()]
        words = column in ("", "arm")
        width = max(len(text) for text in [*column.split(), *parts] or [""])
        table.add_column(escape(column), justify="left" if words else "right", width=width)
    for number, line in enumerate(lines):
        # a measure begins where its name stands
        last = len(found.treated) > 1 and number + 1 < len(lines) and lines[number + 1][0] != ""
        table.add_row(*map(escape, line), end_section=last)
    console.print(table)
    console.print(summary(found), highlight=False, markup=False)
    for note in found.task_notes:
        console.print(f"Benchmarks: {note}.", highlight=False, markup=False)
    for note in found.notes:
        console.print(f"Note: {note}", highlight=False, markup=False)
