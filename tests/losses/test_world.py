"""``within="world"``: real processes, exact values and gradients, unequal ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loss_inputs import randn

from decondense.losses import dispersion_loss


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_are_one_set(world: int, tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "helpers" / "rank_of_world.py"
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(world), str(tmp_path / "store")],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    outputs = [rank.communicate(timeout=180) for rank in ranks]
    for (out, err), rank in zip(outputs, ranks, strict=True):
        assert rank.returncode == 0, err[-3000:]
        assert out.strip().endswith("ok")


def test_without_other_ranks_the_world_is_the_batch() -> None:
    z = randn(2, 7, 5)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, 3:] = False
    assert dispersion_loss(z, mask, within="world") == dispersion_loss(z, mask, within="batch")
    tokens = z[mask].unsqueeze(0)
    torch.testing.assert_close(dispersion_loss(z, mask, within="batch"), dispersion_loss(tokens))
