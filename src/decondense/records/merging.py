"""Merges rows of the same runs that were written in several places."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

from decondense.records.schema import RecordError, Row, stable, terminal_row

_Run = tuple[str, str, int]


def content_hash(rows: Sequence[Row]) -> str:
    """SHA-256 of what two executions of one run have in common: without clock readings and machine (:func:`stable`),
    interruptions, the study's configuration, whose fingerprint is in every row, and the hash of these rows."""
    found = hashlib.sha256()
    for row in rows:
        if row.get("status") != "resumed":
            kept = {key: value for key, value in stable(row).items() if key not in ("config", "rows_hash")}
            found.update(json.dumps(kept, sort_keys=True, allow_nan=False).encode() + b"\n")
    return found.hexdigest()


def merged(places: Mapping[str, Sequence[Row]]) -> list[Row]:
    """The rows of several places with every run (study, arm, seed) once, in the order in which runs appear.

    A run that ended in several places with the same :func:`content_hash` is taken from the first of them. A run that
    has not ended anywhere is taken from the place that has the most rows of it.

    Args:
        places: the rows of each place, by its name.

    Raises:
        RecordError: a run ended in two places with different rows; the message names the run and the places.
    """
    runs: dict[_Run, dict[str, list[Row]]] = {}
    for place, rows in places.items():
        for row in rows:
            key = (row["study_fingerprint"], row["arm"], row["seed"])
            runs.setdefault(key, {}).setdefault(place, []).append(row)
    found: list[Row] = []
    for (_, arm, seed), there in runs.items():
        ended = {place: rows for place, rows in there.items() if terminal_row(rows) is not None}
        if not ended:
            longest: list[Row] = max(there.values(), key=len)
            found += longest
            continue
        (first, kept), *others = ended.items()
        for place, rows in others:
            if content_hash(rows) != content_hash(kept):
                raise RecordError(
                    f"{arm} seed {seed} ended in two places with different rows: {first} and {place}. Remove the rows "
                    "of one of them."
                )
        found += kept
    return found
