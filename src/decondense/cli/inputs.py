"""What the verb ``measure`` reads: the models that its arguments name, their labels, and the passages."""

from __future__ import annotations

import contextlib
import re
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decondense.cli.options import slug

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from decondense.cli.console import Console


def named_models(
    models: list[str], checkpoints: str | None, revisions: str | None, pairs: bool
) -> list[tuple[str, int | None]]:
    """The models to measure, with their training step where they are checkpoints."""
    from decondense.measuring.running import MeasureError

    if revisions is not None and checkpoints is None:
        if len(models) != 1:
            raise MeasureError(
                "--revisions needs exactly one hub id: decondense measure --checkpoints ID --revisions A,B,C."
            )
        checkpoints, models = models[0], []
    if checkpoints is not None:
        if models:
            raise MeasureError(f"--checkpoints measures one run; omit {', '.join(models)}.")
        return checkpoints_of(checkpoints, revisions)
    if not models:
        raise MeasureError("no model given: decondense measure DIRECTORY_OR_HUB_ID, or --checkpoints RUN.")
    if pairs and len(models) % 2:
        raise MeasureError(
            f"--pairs needs an even number of models (base distilled base distilled ...), got {len(models)}."
        )
    return [(model, None) for model in models]


def checkpoints_of(run: str, revisions: str | None) -> list[tuple[str, int | None]]:
    """The checkpoints of a run with their steps, in order."""
    from decondense.checkpoints import checkpoint_folders
    from decondense.measuring.running import MeasureError

    if revisions is not None:
        names = [name.strip() for name in revisions.split(",") if name.strip()]
        found = [(f"{run}@{name}", step_of(name)) for name in names]
    else:
        root = Path(run)
        if not root.is_dir():
            raise MeasureError(
                f"{run} is not a directory; to measure revisions of a hub model, name them with --revisions A,B,C."
            )
        folders = checkpoint_folders(root)
        found = [(str(path), step_of(path.name)) for path in folders]
    numbered = sorted((pair for pair in found if pair[1] is not None), key=lambda pair: pair[1] or 0)
    if not numbered:
        raise MeasureError(
            f"{run} has no checkpoints: expected folders or revisions named by their step (checkpoint-500, step1000)."
        )
    return numbered


def step_of(name: str) -> int | None:
    """The training step in the name of a folder or revision."""
    found = re.search(r"(?:step|checkpoint|iter)[-_ ]*(\d+)", name) or re.search(r"(\d+)(?!.*\d)", name)
    return int(found.group(1)) if found else None


def memory_budget(entries: list[str]) -> dict[Any, str] | None:
    """``--max-memory`` in the form that transformers expects."""
    from decondense.measuring.running import MeasureError

    budget: dict[Any, str] = {}
    for entry in entries:
        device, equals, amount = entry.partition("=")
        if not equals or not amount:
            raise MeasureError(f"--max-memory {entry!r}: expected DEVICE=AMOUNT, for example cpu=8GiB or 0=20GiB.")
        budget[int(device) if device.isdigit() else device] = amount
    return budget or None


def read_texts(
    console: Console,
    source: str,
    *,
    each: bool,
    split: str,
    field: str | None,
    passages: int,
    words: tuple[int, int],
    seed: int,
    most: int | None,
) -> list[str]:
    """The passages; warnings of the reader are printed."""
    from decondense.corpora.columns import TextWarning
    from decondense.corpora.passages import read_each, sample_passages

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", TextWarning)
        if each:
            texts: list[str] = read_each(source, split=split, field=field, most=most)
        else:
            texts = sample_passages(source, count=passages, words=words, seed=seed, split=split, field=field)
    for warning in told:
        note(console, str(warning.message))
    return texts


def note(console: Console, message: str) -> None:
    """Print a note."""
    console.print(f"note: {message}", highlight=False, markup=False, soft_wrap=True)


def long_enough(
    console: Console, label: str, texts: list[str], tokenizer: PreTrainedTokenizerBase, skipped: int
) -> list[str]:
    """The records of two tokens and more after the ``skipped`` ones: one token has no pairs."""
    from decondense.measuring.running import MeasureError

    least = 2 + skipped  # so many tokens are enough to tell
    kept = [text for text in texts if len(tokenizer(text, truncation=True, max_length=least)["input_ids"]) >= least]
    few = "fewer than two tokens" + (f" after the first {skipped}" if skipped else "")
    if not kept:
        raise MeasureError(f"all {len(texts):,} records have {few}; a cosine needs two. Omit --each.")
    if len(kept) < len(texts):
        short = len(texts) - len(kept)
        note(console, f"{label}: {short:,} of {len(texts):,} records have {few} and are skipped.")
    return kept


def check_folder(folder: Path, labels: list[str]) -> None:
    """Refuse a directory of results that cannot be written to, and leave nothing behind."""
    from decondense.measuring.running import MeasureError
    from decondense.outputs import check_output

    check_output(folder, *map(slug, labels))
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise MeasureError(
            f"{folder} cannot hold the results ({error.strerror or error}); choose a writable directory with --out."
        ) from error
    finally:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


def short_name(source: str) -> str:
    """The last part of the name of a directory, a file or a hub id."""
    name, at, revision = str(source).rstrip("/").rpartition("@")
    return f"{Path(name).name}@{revision}" if at and name else Path(str(source)).resolve().name


def labels_of(sources: list[str]) -> list[str]:
    """A short name for each source, all different: runs/a/final and runs/b/final are a and b, not final and final.

    They differ as the names of files too, where "m x" and "m-x" are one.
    """
    from decondense.measuring.running import MeasureError

    parts = [Path(source).resolve().parts for source in sources]
    if twice := [source for number, source in enumerate(sources) if parts[number] in parts[:number]]:
        raise MeasureError(f"{twice[0]} is given twice; give each model once.")
    labels = [short_name(source) for source in sources]
    if len(set(labels)) < len(labels):
        shared = 0
        while len({path[-1 - shared] for path in parts}) == 1:
            shared += 1
        parts = [path[: len(path) - shared] for path in parts]
        for depth in range(1, max(map(len, parts)) + 1):
            labels = ["/".join(path[-depth:]) for path in parts]
            if len(set(labels)) == len(labels):
                break
    taken: set[str] = set()
    for place, label in enumerate(labels):
        number = 1
        while slug(labels[place]).casefold() in taken:
            number += 1
            labels[place] = f"{label} ({number})"
        taken.add(slug(labels[place]).casefold())
    return labels
