from __future__ import annotations

import sys
from pathlib import Path

import pytest

# the tiny models, batches and trainers of the attach tests
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "attach"))


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in Path(item.fspath).parents:
            item.add_marker(pytest.mark.invariant)
