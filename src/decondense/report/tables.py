"""All tables of a report, in the order of the page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from decondense.compare import Comparison
from decondense.report.condensation_tables import condensation_table, layer_table, mediation_table, size_table
from decondense.report.score_tables import difference_table, headline, seed_table, selection_table, task_table
from decondense.report.training_tables import cost_table, plateau_table, speed_table, trials_table
from decondense.table import Table

TABLES: dict[str, Callable[[Comparison], Table | None]] = {
    "headline": headline,
    "seeds": seed_table,
    "layers": layer_table,
    "tasks": task_table,
    "cost": cost_table,
    "speed": speed_table,
    "plateaus": plateau_table,
    "mediation": mediation_table,
    "condensation": condensation_table,
    "size": size_table,
    "learning_rates": trials_table,
    "best_checkpoint": selection_table,
    "differences": difference_table,
}
"""By name; a table that does not apply to a comparison is None."""


def all_tables(comparison: Comparison | None) -> dict[str, Table]:
    """The tables that apply to ``comparison``."""
    if comparison is None:
        return {}
    tables = {name: make(comparison) for name, make in TABLES.items()}
    return {name: table for name, table in tables.items() if table is not None}


def write_tables(comparison: Comparison, folder: str | Path) -> list[Path]:
    """Every table of a comparison as ``NAME.csv``, ``NAME.md`` and ``NAME.tex`` in ``folder``, without a report."""
    return [path for table in all_tables(comparison).values() for path in table.write(Path(folder))]
