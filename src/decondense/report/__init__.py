"""The report of a study: one self-contained HTML file, its figures and its tables, from the rows alone (no torch).

Nothing is typed by hand: sentences, tables and figures are computed from the rows, and equal rows give equal bytes.
A study with failed or missing runs still gets its report, which then names them first.
"""

import importlib
from typing import TYPE_CHECKING, Any

from decondense.formatting import interval, number, probability
from decondense.report.condensation_tables import condensation_table, layer_table, size_table
from decondense.report.notes import notes_in_words
from decondense.report.score_tables import difference_table, headline, seed_table, selection_table, task_table
from decondense.report.sentences import sentences, size_sentences, summary
from decondense.report.tables import write_tables
from decondense.report.terminal import terminal_table
from decondense.report.training_tables import cost_table, plateau_table, speed_table, trials_table
from decondense.table import Table

if TYPE_CHECKING:
    from decondense.report.page import ReportPaths, build_report

__all__ = [
    "ReportPaths",
    "Table",
    "build_report",
    "condensation_table",
    "cost_table",
    "difference_table",
    "headline",
    "interval",
    "layer_table",
    "notes_in_words",
    "number",
    "plateau_table",
    "probability",
    "seed_table",
    "selection_table",
    "sentences",
    "size_sentences",
    "size_table",
    "speed_table",
    "summary",
    "task_table",
    "terminal_table",
    "trials_table",
    "write_tables",
]


def __getattr__(name: str) -> Any:
    if name in ("ReportPaths", "build_report"):  # on first use: only the page needs matplotlib
        return getattr(importlib.import_module("decondense.report.page"), name)
    raise AttributeError(f"module 'decondense.report' has no attribute {name!r}")
