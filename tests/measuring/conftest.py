from __future__ import annotations

import pytest


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    import decondense.metrics as module

    monkeypatch.setattr(module, "_REGISTRY", dict(module._REGISTRY))
