"""An atlas: a directory with one file for every model and text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from decondense.atlas.entry import Entry, EntryError
from decondense.config import suggest
from decondense.records import atomic_path


class Atlas:
    """The entries of a directory, by name (``MODEL--TEXT``, the name of the file without ``.json``)."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @staticmethod
    def name(entry: Entry) -> str:
        """The name of an entry's file: letters, digits, dots and dashes of its model and text."""
        parts = [entry.model, entry.text, *(["before-norm"] if entry.final == "before" else [])]
        return "--".join(re.sub(r"[^\w.]+", "-", part, flags=re.ASCII).strip("-.")[:90] or "x" for part in parts)

    def entries(self) -> dict[str, Entry]:
        """All entries in the order of their names.

        Raises:
            EntryError: there is no such directory, or a file in it is not an entry.
        """
        if not self.folder.is_dir():
            raise EntryError(
                f"no atlas at {self.folder}; decondense atlas add PROFILE --atlas {self.folder} creates it."
            )
        return {path.stem: Entry.read(path) for path in sorted(self.folder.glob("*.json"))}

    def add(self, entries: Sequence[Entry], *, replace: bool = False) -> list[Path]:
        """Write entries as files: each atomically, and none if one of them cannot be added.

        Raises:
            EntryError: two entries have one name, or the name is taken and ``replace`` is False.
        """
        names = [self.name(entry) for entry in entries]
        # file systems that fold case would merge what differs in nothing else
        taken = {path.stem.lower() for path in self.folder.glob("*.json")} if self.folder.is_dir() else set()
        for place, name in enumerate(names):
            twice = name.lower() in (other.lower() for other in names[:place])
            if twice or (name.lower() in taken and not replace):
                raise EntryError(
                    f"{self.folder / name}.json {'would be written twice' if twice else 'exists'}: "
                    f"{entries[place].model!r} on {entries[place].text!r}. Give the model or the text a different name "
                    "(--model, --text-name), or replace the entry (--replace, replace=True)."
                )
        paths = [self.folder / f"{name}.json" for name in names]
        for path, entry in zip(paths, entries, strict=True):
            try:
                with atomic_path(path, exclusive=not replace) as temporary:
                    temporary.write_text(entry.to_json(), encoding="utf-8")
            except FileExistsError as error:  # another process added it at the same moment
                raise EntryError(f"{path} exists; replace the entry (--replace, replace=True).") from error
        return paths

    def find(self, name: str) -> Entry:
        """An entry by its name, or by its model's name if only one entry has it.

        Raises:
            EntryError: there is none, or there are several.
        """
        entries = self.entries()
        found = [entry for key, entry in entries.items() if name == key] or [
            entry for entry in entries.values() if name == entry.model
        ]
        if len(found) != 1:
            which = [key for key, entry in entries.items() if entry.model == name] or list(entries)
            reason = "several entries are called" if found else "no entry is called"
            raise EntryError(f"{reason} {name!r}.{suggest(name, which)} Known: {', '.join(which) or 'none'}.")
        return found[0]
