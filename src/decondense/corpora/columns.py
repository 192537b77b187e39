"""Which column of a record is the text: one rule for local files, hub data sets, measuring and studies."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from decondense.config import suggest

TEXT = "text"
"""Kind of a column of strings."""
NULL = "null"
"""Kind of a column without any value so far."""
NUMBER = "number"
"""Kind of a column of strings that all read as numbers, as in CSV: text only where it is named."""
# last words of the names of columns that identify a record and never hold its text
_NEVER_TEXT = frozenset(
    {"id", "ids", "docid", "pmid", "idx", "index", "uuid", "guid", "hash", "sha", "sha1", "sha256", "md5"}
    | {"url", "urls", "uri", "date", "time", "timestamp", "datetime"}
)


class PassageError(ValueError):
    """A source of text cannot be used; the message names the source and the remedy."""


class TextWarning(UserWarning):
    """Part of a source of text is not used: records without text, files that cannot be read."""


def choose_column(kinds: Mapping[str, str], field: str | None, where: object) -> str:
    """The column that holds the text.

    The named column; else ``text``; else the only column of strings whose name does not suggest an identifier, an
    address or a date (``id``, ``doc_id``, ``uuid``, ``url``, ``timestamp`` ...).

    Args:
        kinds: name -> kind, in the order of the columns: :data:`TEXT`, :data:`NULL`, or the name of another type.
        field: the named column.
        where: name of the file or data set in messages.

    Raises:
        PassageError: there is no such column, it does not hold strings, or there is not exactly one candidate.
    """
    names = ", ".join(map(str, kinds)) or "nothing"
    strings = [name for name, kind in kinds.items() if kind == TEXT]
    if field is not None and field not in kinds:
        raise PassageError(f"{where} has no field {field!r}.{suggest(field, kinds)} It has: {names}.")
    column = field if field is not None else "text" if "text" in kinds else None
    if column is not None:
        if kinds[column] not in (TEXT, NUMBER, NULL):
            raise PassageError(
                f"field {column!r} of {where} holds {kinds[column]}, not text; fields of strings: "
                f"{', '.join(strings) or 'none'}."
            )
        return column
    candidates = [name for name in strings if not _names_a_record(name)]
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        beside = f" Identifiers, addresses and dates ({', '.join(strings)}) are not text." if strings else ""
        raise PassageError(
            f"{where} has no field of strings; it has: {names}.{beside} Name the field that holds the text (--field, "
            "field=)."
        )
    raise PassageError(
        f"{where} has several fields of strings; name the one that holds the text (--field, field=, "
        f"corpus.text_field): {', '.join(candidates)}."
    )


def _names_a_record(name: str) -> bool:
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    return re.split(r"[^a-z0-9]+", words)[-1] in _NEVER_TEXT


def kind_of_value(value: Any) -> str:
    """Kind of one value of a record: :data:`TEXT`, :data:`NULL`, or the name of its type."""
    if value is None or value != value:  # pandas writes missing values as NaN
        return NULL
    return TEXT if isinstance(value, str) else type(value).__name__
