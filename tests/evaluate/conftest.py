from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from decondense.evaluate import Evaluation, evaluate


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


def random_states() -> list[Any]:
    """Where the generators of Python, numpy and torch stand."""
    return [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]


@pytest.fixture(scope="session")
def whole_and_states(
    tiny: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[tuple[Evaluation, Path], list[Any], list[Any]]:
    """The evaluation that most tests look at, and the random states around it."""
    out = tmp_path_factory.mktemp("whole") / "out"
    before = random_states()
    evaluation = evaluate(tiny, "paper", data_dir=data, out=out)
    return (evaluation, out), before, random_states()


@pytest.fixture(scope="session")
def whole(whole_and_states: Any) -> tuple[Evaluation, Path]:
    """All of the paper's benchmarks on the made-up rows, with the paper's examples."""
    found: tuple[Evaluation, Path] = whole_and_states[0]
    return found
