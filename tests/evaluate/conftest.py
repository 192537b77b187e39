from __future__ import annotations

import sys
from pathlib import Path

import pytest

from decondense.evaluate import Evaluation, evaluate

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2 with a tokenizer of its own."""
    from evaluate_helpers import make_model

    return make_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few made-up rows of every benchmark, in all the splits that the hub has."""
    from evaluate_helpers import make_data

    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def whole(tiny: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Evaluation, Path]:
    """All of the paper's benchmarks on the made-up rows, with the paper's examples."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return evaluate(tiny, "paper", data_dir=data, out=out), out
