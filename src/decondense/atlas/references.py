"""What is known about other models: the shipped table, one line per model."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from pathlib import Path

from decondense.atlas.entry import Entry, EntryError
from decondense.config import suggest


@cache
def references() -> tuple[Entry, ...]:
    """The shipped references (``references.jsonl``): published numbers, and models measured with this package."""
    lines = files("decondense.atlas").joinpath("references.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(Entry.model_validate(json.loads(line)) for line in lines)


def find_reference(name: str | Path) -> Entry:
    """A shipped reference by name, or the entry or profile in a file or directory.

    Raises:
        EntryError: there is no such reference, or no such file.
    """
    for entry in references():
        if entry.model.lower() == str(name).lower():
            return entry
    path = Path(name)
    if path.exists() or path.suffix in (".json", ".npz"):
        return Entry.read(name)
    names = [entry.model for entry in references()]
    raise EntryError(
        f"no reference {str(name)!r}.{suggest(str(name), names)} Known: {', '.join(names)}; or give the path of a "
        "profile or of an atlas entry."
    )
