"""Studies: what is compared with what, at which scale, and the runner that turns the plan into rows."""

from __future__ import annotations

from decondense.studies.catalogue import load_study, shipped_studies
from decondense.studies.directory import CellState, StudyFailed, Watcher
from decondense.studies.runner import run_study

__all__ = ["CellState", "StudyFailed", "Watcher", "load_study", "run_study", "shipped_studies"]
