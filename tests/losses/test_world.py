"""``within="world"``: real processes, exact values and gradients, unequal ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import ranks
import torch
from loss_inputs import randn

from decondense.losses import dispersion_loss


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_are_one_set(world: int, tmp_path: Path) -> None:
    outputs = ranks.run("rank_of_world.py", [(rank, world, tmp_path / "store") for rank in range(world)])
    assert all("ok" in output.splitlines() for output in outputs)


def test_without_other_ranks_the_world_is_the_batch() -> None:
    z = randn(2, 7, 5)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, 3:] = False
    assert dispersion_loss(z, mask, within="world") == dispersion_loss(z, mask, within="batch")
    tokens = z[mask].unsqueeze(0)
    torch.testing.assert_close(dispersion_loss(z, mask, within="batch"), dispersion_loss(tokens))
