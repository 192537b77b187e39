"""The process that :func:`decondense.evaluate.evaluate` starts, through :mod:`decondense.lifeline`."""

from __future__ import annotations

import sys
from pathlib import Path

from decondense.evaluate.worker.main import main as work


def main() -> int:
    """Do what the directory in the first argument asks for."""
    return work(Path(sys.argv[1]))
