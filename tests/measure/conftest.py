from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    import decondense.metrics as module

    monkeypatch.setattr(module, "_REGISTRY", dict(module._REGISTRY))
