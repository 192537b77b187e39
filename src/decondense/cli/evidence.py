"""The verbs that read rows: ``compare``, ``report``, and ``env``. None of them needs torch."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from decondense.cli import options

if TYPE_CHECKING:
    from decondense.cli.console import Console
    from decondense.compare import Comparison
    from decondense.records import ItemRows, Row

Where = Annotated[
    Path, typer.Argument(help="A study directory, or a file of rows (.jsonl, .jsonl.gz).", metavar="DIR|ROWS")
]
Baseline = Annotated[str | None, typer.Option("--baseline", help="Arm to compare with. Default: the study's baseline.")]


def compare(
    where: Where,
    baseline: Baseline = None,
    as_json: options.Json = False,
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
    from decondense import compare as comparing
    from decondense.cli.console import Console

    with named(where):
        comparison = comparing.compare(rows_at(where), baseline=baseline, incomplete="omit" if omit else "refuse")
    if tables is not None:
        from decondense.report import write_tables

        written = write_tables(comparison, tables)
        # beside --json the output must stay JSON
        typer.echo(f"{len(written)} files of tables in {tables}", err=as_json)
    if as_json:
        from decondense.cli.printed import emit

        emit("compare", **comparison.to_dict())
        return
    _print_comparison(comparison, Console())


def report(
    where: Where,
    out: Annotated[Path | None, typer.Option("--out", help="Where the report goes. Default: beside the rows.")] = None,
    baseline: Baseline = None,
    as_json: options.Json = False,
) -> None:
    """Write report.html, its figures and tables from a study's rows alone."""
    from decondense.cli.console import Console

    rows = rows_at(where)
    folder = out or (where if where.is_dir() else where.parent)
    console, command = Console(stderr=as_json), "report" if as_json else None
    with named(where):
        present(rows, folder, console, baseline=baseline, source=rows_file(where), json_of=command)


def env(
    gpu: Annotated[
        bool,
        typer.Option(
            "--gpu", help="Check the fused kernels on the GPU against float64 and time them (about a minute)."
        ),
    ] = False,
) -> None:
    """Show versions, devices and directories. Include the output when you report a problem."""
    if gpu:
        _check_gpu()
        return
    import json

    from decondense.corpora.embedded import cache_directory
    from decondense.records import provenance

    comparison = provenance()
    import torch

    comparison["devices"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] or ["cpu"]
    comparison["threads"] = torch.get_num_threads()
    comparison["cache"] = str(cache_directory())
    typer.echo(json.dumps(comparison, indent=1))


def _check_gpu() -> None:
    """Print what the kernels do on the GPU; exit status 1 where they are wrong or do not run, 2 without a GPU."""
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        reason = "no driver or no visible device" if built else f"torch {torch.__version__} is built for the CPU"
        raise ValueError(f"--gpu needs a GPU that torch can use, and there is none: {reason}. See `decondense env`.")
    from decondense.losses.device_check import check_device, sentences

    found = check_device()
    typer.echo("\n".join(sentences(found)))
    if not found.right:
        raise typer.Exit(1)


def present(
    rows: Iterable[Row | ItemRows],
    out: Path,
    console: Console,
    *,
    baseline: str | None = None,
    source: Path | None = None,
    json_of: str | None = None,
) -> None:
    """Print the comparison, write the report, and print where the files are; ``source`` is the file of the rows.

    ``json_of``: the verb whose JSON object goes to standard output, in addition to what the console shows.
    """
    from decondense.cli.printed import emit
    from decondense.compare import Study
    from decondense.config import one_of
    from decondense.report.page import compare_if_possible, write_report

    study = Study.from_rows(rows)
    if baseline is not None:
        one_of("baseline arm", baseline, study.arms)
        study = dataclasses.replace(study, baseline=baseline)
    comparison, problems = compare_if_possible(study)
    paths = write_report(study, comparison, problems, out)
    if comparison is not None:
        _print_comparison(comparison, console)
    else:
        console.print("no comparison: " + "; ".join(problems), style="yellow", markup=False)
    console.print(
        f"\nreport:  {paths['report']}\nfigures: {out / 'figures'}\nrows:    {source or out / 'rows.jsonl'}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    failed = [cell for cell in study.cells.values() if cell.status == "failed"]
    if json_of is not None:
        emit(
            json_of,
            report=str(paths["report"]),
            figures=str(out / "figures"),
            rows=str(source or out / "rows.jsonl"),
            comparison=None if comparison is None else comparison.to_dict(),
            problems=list(problems),
            failed=[{"arm": cell.arm, "seed": cell.seed, "error": cell.run["error"]} for cell in failed],
        )
    if failed:
        raise RuntimeError(
            "some runs failed, and the report lists them: "
            + "; ".join(f"{cell.arm} seed {cell.seed}: {cell.run['error'] or 'no reason recorded'}" for cell in failed)
        )


def rows_file(where: Path) -> Path:
    """The file of rows in a study's directory, or ``where`` itself if it is a file."""
    if not where.is_dir():
        return where
    plain, packed = where / "rows.jsonl", where / "rows.jsonl.gz"
    return packed if packed.exists() and not plain.exists() else plain


@contextlib.contextmanager
def named(where: Path) -> Iterator[None]:
    """Name the file of rows in every :class:`CompareError`: a truncated file looks like missing runs."""
    from decondense.compare import CompareError

    try:
        yield
    except CompareError as error:
        raise CompareError(f"{rows_file(where)}: {error.reason}", error.faults, error.remedy) from error


def rows_at(where: Path) -> Iterator[Row | ItemRows]:
    """The rows of a study's directory or of a file of rows, one by one, with the items of a task grouped.

    Raises:
        ConfigError: there are none.
    """
    from decondense.config import ConfigError
    from decondense.records import iter_pieces

    path = rows_file(where)
    if not path.exists():
        raise ConfigError(f"{where}: there is no rows.jsonl; give a study's directory or its file of rows.")
    rows = iter_pieces(path)
    first = next(rows, None)
    if first is None:
        raise ConfigError(f"{path} holds no rows; wait until a run of the study has ended.")
    yield first
    yield from rows


def _print_comparison(comparison: Comparison, console: Console) -> None:
    from decondense.report import notes_in_words, summary, terminal_table

    if comparison.omitted:
        console.print("Left out of the comparison:", style="yellow")
        for fault in comparison.omitted:
            console.print(f"  {fault}", highlight=False, markup=False)
        console.print()
    table = terminal_table(comparison)
    console.print(table.to_rich(title=comparison.title))
    for note in table.notes:
        remedy = "The tables of `decondense report` and of `decondense compare --tables DIR` show all arms."
        console.print(f"{note} {remedy}\n", style="bold", highlight=False, markup=False)
    console.print(summary(comparison), highlight=False, markup=False)
    for note in comparison.task_notes:
        console.print(f"Benchmarks: {note}.", highlight=False, markup=False)
    for note in notes_in_words(comparison):
        console.print(f"Note: {note}", highlight=False, markup=False)
