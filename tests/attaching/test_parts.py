"""Pipelines of torch, tensor and sequence parallelism on gloo ranks: the gradients of one rank, in float64."""

from __future__ import annotations

import json

import pytest
import ranks


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_that_hold_parts_of_a_model(tmp_path, world):
    jobs = [(rank, world, tmp_path / "store", tmp_path / f"{rank}.json") for rank in range(world)]
    ranks.run("stages_worker.py", jobs, timeout=600)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world)]
    assert len(found[0]) == {2: 20, 4: 9}[world]
    wrong = {case: value for rank in found for case, value in rank.items() if value > 1e-12}
    assert not wrong
