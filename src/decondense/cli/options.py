"""Options of the command line that more than one verb has, each written once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

CHANGES = "Changes to the study"
SOURCE = "Text"
MODEL = "Model"
DATA = "Data"

Json = Annotated[bool, typer.Option("--json", help="Print the results as one JSON object; see the docs, json.md.")]

# ---- studies ---------------------------------------------------------------------------------------------------------

StudyName = Annotated[str, typer.Argument(help="A shipped study or the path of a YAML file.", metavar="NAME|FILE")]
OptionalStudyName = Annotated[
    str | None, typer.Argument(help="A shipped study or the path of a YAML file.", metavar="NAME|FILE")
]
StudyFolder = Annotated[Path | None, typer.Option("--out", help="Directory of the study. Default: decondense-NAME.")]
Seeds = Annotated[int | None, typer.Option("--seeds", min=1, help="Number of seeds, 0 to N-1. Default: the study's.")]
Workers = Annotated[
    int | None,
    typer.Option("--workers", min=0, help="Runs in parallel. Default: one per GPU; without a GPU, one per core."),
]
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        help="Run on a Ray cluster: auto (the cluster of this machine) or HOST:PORT.",
        metavar="ADDRESS",
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Resume the study in --out, even if another study is named.")]
Retry = Annotated[bool, typer.Option("--retry-failed", help="Start failed runs again instead of reporting them.")]
Until = Annotated[
    Literal["decided"] | None,
    typer.Option("--until", help="decided: add seeds until each arm is decided against the baseline."),
]
Margin = Annotated[
    float | None,
    typer.Option("--margin", help="Loss differences up to this count as equal. Default: the study's.", min=1e-9),
]
MostSeeds = Annotated[
    int | None,
    typer.Option("--most-seeds", min=3, help="With --until: maximum number of seeds. Default: the study's (20)."),
]
Scale = Annotated[str | None, typer.Option("--scale", help="One of the study's scales.")]
StudyText = Annotated[
    str | None,
    typer.Option("--text", help="Text to train on: a file, a directory, or a hub id.", rich_help_panel=CHANGES),
]
StudyTokenizer = Annotated[
    str | None,
    typer.Option("--tokenizer", help="Directory or hub id of the tokenizer.", rich_help_panel=CHANGES),
]
Start = Annotated[
    str | None,
    typer.Option("--start", help="Model to start from: a directory or hub id.", rich_help_panel=CHANGES),
]
StudyTasks = Annotated[
    str | None,
    typer.Option("--tasks", help="Benchmarks of the final checkpoints, separated by commas.", rich_help_panel=CHANGES),
]
StudyDataDir = Annotated[
    str | None, typer.Option("--data-dir", help="Directory with local benchmark files.", rich_help_panel=CHANGES)
]
StudyLimit = Annotated[
    int | None, typer.Option("--limit", min=1, help="Maximum number of items per benchmark.", rich_help_panel=CHANGES)
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Any other key of the study file, e.g. train.steps=100 or arms.NAME.learning_rate=1e-3; repeatable.",
        metavar="KEY.PATH=VALUE",
        rich_help_panel=CHANGES,
    ),
]

# ---- models ----------------------------------------------------------------------------------------------------------

ID_HELP = "hub id (ID@REVISION for a revision)"
Tokenizer = Annotated[
    str | None,
    typer.Option(
        "--tokenizer", help="Directory or hub id of the tokenizer, if the model has none.", rich_help_panel=MODEL
    ),
]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.", rich_help_panel=MODEL)]

# ---- text to measure on ----------------------------------------------------------------------------------------------

Dataset = Annotated[
    str | None,
    typer.Option(
        "--dataset", help="embedded (default), wikitext, pubmed_qa, imdb, squad, or a hub id.", rich_help_panel=SOURCE
    ),
]
Text = Annotated[
    str | None,
    typer.Option(
        "--text",
        help="A file of text, JSON, CSV or parquet, a directory of them, or - for standard input.",
        rich_help_panel=SOURCE,
    ),
]
Each = Annotated[
    bool,
    typer.Option(
        "--each",
        help="Measure every record of the source as a passage instead of drawing passages from it.",
        rich_help_panel=SOURCE,
    ),
]
Split = Annotated[str, typer.Option("--split", help="Split of a hub data set.", rich_help_panel=SOURCE)]
Field = Annotated[str | None, typer.Option("--field", help="Column that holds the text.", rich_help_panel=SOURCE)]
Passages = Annotated[
    int | None, typer.Option("--passages", min=1, help="Number of passages. Default: 100.", rich_help_panel=SOURCE)
]
Words = Annotated[
    tuple[int, int] | None,
    typer.Option("--words", help="Minimum and maximum words in a passage. Default: 1024 1280.", rich_help_panel=SOURCE),
]
PassageSeed = Annotated[
    int | None,
    typer.Option("--seed", min=0, help="Seed for drawing the passages. Default: 0.", rich_help_panel=SOURCE),
]
Tokens = Annotated[
    int | None,
    typer.Option(
        "--tokens",
        min=2,
        help="Maximum tokens per passage. Default: 512, or the model's context length if shorter.",
        rich_help_panel=SOURCE,
    ),
]


def slug(label: str) -> str:
    """``label`` as the name of a file or directory."""
    return re.sub(r"[^\w.-]+", "-", label).strip("-") or "model"
