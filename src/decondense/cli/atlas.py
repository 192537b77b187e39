"""The verbs ``atlas`` (add, show, compare) and ``card``: profiles beside each other. Only measuring needs torch."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from decondense.cli import options

app = typer.Typer(help="Collect profiles of many models in one page.", no_args_is_help=True)

Folder = Annotated[Path, typer.Option("--atlas", help="Directory of the atlas: one JSON file per model and text.")]
Reference = Annotated[
    str | None,
    typer.Option("--reference", help="A shipped reference, a profile or an atlas entry.", metavar="NAME|FILE"),
]


@app.command()
def add(
    profiles: Annotated[
        list[Path], typer.Argument(help="Directories or files of profiles, or atlas entries.", metavar="PROFILE...")
    ],
    atlas: Folder = Path("atlas"),
    family: Annotated[str, typer.Option("--family", help="Name of the family: models that differ only in size.")] = "",
    model: Annotated[str, typer.Option("--model", help="Name of the model. Default: the profile's.")] = "",
    text_name: Annotated[str, typer.Option("--text-name", help="Name of the text. Default: the profile's.")] = "",
    source: Annotated[str, typer.Option("--source", help="Where the numbers come from.")] = "",
    replace: Annotated[bool, typer.Option("--replace", help="Replace entries that have the same name.")] = False,
) -> None:
    """Add profiles to an atlas and rebuild its page."""
    from decondense.atlas import Atlas, Entry, EntryError
    from decondense.report.atlas import page_path, write_page

    if model and len(profiles) > 1:
        raise EntryError(f"--model names one profile, but {len(profiles)} are given; add them one by one.")
    names = {"model": model, "family": family, "text": text_name, "source": source}
    entries = [Entry.read(path, **names) for path in profiles]
    found = Atlas(atlas)
    page_path(found)  # a page that must not be overwritten is refused before entries are written
    for path in found.add(entries, replace=replace):
        typer.echo(f"added {path}")
    typer.echo(f"page: {write_page(found)}")


@app.command()
def show(atlas: Folder = Path("atlas")) -> None:
    """Print an atlas and rebuild its page."""
    from decondense.atlas import Atlas
    from decondense.cli.console import Console
    from decondense.report.atlas import terminal_entries, write_page

    found = Atlas(atlas)
    page = write_page(found)
    Console().print(terminal_entries(found.entries()).to_rich(fold=(0, 2)))
    typer.echo(f"page: {page}")


@app.command()
def compare(
    first: Annotated[str, typer.Argument(help="An entry of the atlas, a shipped reference, or a file.", metavar="A")],
    second: Annotated[str, typer.Argument(help="What to compare with.", metavar="B")],
    atlas: Folder = Path("atlas"),
) -> None:
    """Compare two models, and say what makes the comparison unreliable."""
    from decondense.atlas import Atlas, EntryError, caution, describe, find_reference, relate
    from decondense.cli.console import Console
    from decondense.report.atlas import comparison_table

    def find(name: str) -> object:
        if atlas.is_dir():
            with contextlib.suppress(EntryError):
                return Atlas(atlas).find(name)
        return find_reference(name)

    own, other = find(first), find(second)
    compared = relate(own, other)  # type: ignore[arg-type]
    console = Console()
    console.print(comparison_table(own, compared).to_rich(fold=(1, 2)))  # type: ignore[arg-type]
    for entry in (own, other):
        console.print(f"{describe(entry)}: {entry.text}", highlight=False, markup=False, soft_wrap=True)  # type: ignore
    if note := caution(compared, own.text).strip():  # type: ignore[attr-defined]
        console.print(f"{compared.reference.model}: {note}", highlight=False, markup=False, soft_wrap=True)


def card(
    what: Annotated[
        str,
        typer.Argument(help="A profile (directory or file), or a model to measure first.", metavar="PROFILE|MODEL"),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="Directory for the heat map. Default: the directory of the profile.")
    ] = None,
    reference: Reference = None,
) -> None:
    """Print a section for a model card, and write its heat map."""
    from decondense.atlas import find_reference, read_summary
    from decondense.records import atomic_write
    from decondense.report import atlas

    path = Path(what)
    if not (path.is_file() or (path / "profile.json").is_file()):
        from decondense.cli.measure import measure_command

        path = Path(f"decondense-measure-{options.slug(path.name)}") if out is None else out
        with contextlib.redirect_stdout(sys.stderr):  # the output is the card
            measure_command([what], out=path)
    summary = read_summary(path)
    chosen = None if reference is None else find_reference(reference)
    folder = out or (path if path.is_dir() else path.parent)
    picture = "condensation.png" if (png := atlas.heat_map(summary)) is not None else ""
    text = atlas.card(summary, picture=picture, reference=chosen)
    if png is not None:
        atomic_write(folder / picture, png)
    typer.echo(text, nl=False)
