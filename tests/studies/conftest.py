from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from decondense.config import StudyConfig
from decondense.records import Row, stable
from decondense.studies import load_study

SMALL = {
    "model": {"architecture": "gpt2", "overrides": {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_inner": 64}},
    "corpus": {"source": "python_docs", "documents": "standard_library", "vocab_size": 512, "held_out": 0.1},
    "train": {"steps": 8, "batch_size": 4, "max_seq_length": 32, "log_every": 2, "checkpoint_every": 4},
    "evaluate": {"points": [0, 0.5, 1], "validation_tokens": 1024, "passages": 4, "passage_tokens": 32},
}


def small_study(**changes: object) -> StudyConfig:
    """The demo, small enough to train in a second; dropout stays at GPT-2's 0.1, so the random state matters."""
    return load_study("demo", "quick", **{**SMALL, "seeds": [0], **changes})


def stable_rows(rows: list[Row]) -> list[Row]:
    return [stable(row) for row in rows]


class Interrupted(Exception):
    pass


def stop_after(count: int) -> Callable[[], None]:
    """A watch that lets rows be written ``count`` times and then stops the run."""
    written = 0

    def watch() -> None:
        nonlocal written
        written += 1
        if written > count:
            raise Interrupted

    return watch


@pytest.fixture(scope="session")
def cache_base(tmp_path_factory: pytest.TempPathFactory, python_docs_cache: Callable[[Path], None]) -> Path:
    """One cache for the tests of this folder, and never the user's."""
    base = tmp_path_factory.getbasetemp() / "decondense-cache"
    python_docs_cache(base)
    return base


@pytest.fixture(autouse=True)
def own_cache(cache_base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, in the environment."""
    monkeypatch.setenv("DECONDENSE_CACHE", str(cache_base))
    return cache_base
