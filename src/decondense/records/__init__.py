"""Result rows: plain dictionaries with a schema, in append-only JSON lines, written so that a kill loses nothing.

Everything that a table, a figure or a report shows is computed from these rows; nothing is ever parsed from a folder
name. What differs between two runs of the same thing (clock readings, versions, devices) lives under the two keys
``timing`` and ``provenance``, so that :func:`stable` can compare the rest. No torch here.

In a file, a configuration is written once, in a line of its own before the first run row that has it; run rows name it
by its hash. Readers return run rows with their whole configuration, as one shared dictionary that must not be
changed. Files in which every run row holds its own configuration can be read as well.
"""

from __future__ import annotations

from decondense.provenance import COMMAND, command_line, provenance
from decondense.records.json_files import read_json
from decondense.records.merging import content_hash, merged
from decondense.records.reading import ItemRows, RowReader, iter_pieces, iter_rows, read_rows
from decondense.records.runs import is_whole, read_run, rows_hash, set_aside
from decondense.records.schema import (
    SCHEMA_VERSION,
    RecordError,
    Row,
    check_row,
    make_row,
    stable,
    terminal_row,
)
from decondense.records.writing import append_rows, atomic_path, atomic_write, write_rows

__all__ = [
    "COMMAND",
    "SCHEMA_VERSION",
    "ItemRows",
    "RecordError",
    "Row",
    "RowReader",
    "append_rows",
    "atomic_path",
    "atomic_write",
    "check_row",
    "command_line",
    "content_hash",
    "is_whole",
    "iter_pieces",
    "iter_rows",
    "make_row",
    "merged",
    "provenance",
    "read_json",
    "read_rows",
    "read_run",
    "rows_hash",
    "set_aside",
    "stable",
    "terminal_row",
    "write_rows",
]
