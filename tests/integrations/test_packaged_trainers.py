"""Packages that build their own trainer, each skipped where it is not installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import packaged_trainer
import pytest
import torch
from attach_helpers import greatest_difference


@pytest.mark.slow
@pytest.mark.parametrize("package", ["swift", "unsloth"])
def test_one_step_however_it_is_cut(tmp_path: Path, package: str) -> None:
    """What the loss adds to a step of gradient descent is the gradient of the mean over the documents, in float32."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    helpers = str(Path(packaged_trainer.__file__).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([helpers, *filter(None, sys.path)])}
    command = [sys.executable, packaged_trainer.__file__, package, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    found = torch.load(tmp_path / "found.pt")
    assert len(found["documents"]) == len(packaged_trainer.LENGTHS)
    for size in (8, 2):
        assert greatest_difference(found[f"part {size}"], found["expected"]) < 1e-6
        logged = found[f"log {size} {packaged_trainer.WEIGHT}"]
        assert logged["dispersion"] == pytest.approx(found["value"], abs=1e-5)
        assert logged["loss"] - logged["dispersion_weight"] * logged["dispersion"] == pytest.approx(
            found[f"log {size} 0.0"]["loss"], abs=1e-5
        )
