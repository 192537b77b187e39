"""Pipelines of torch, tensor and sequence parallelism on gloo ranks: the gradients of one rank, in float64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).parents[1] / "helpers" / "stages_worker.py"


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_that_hold_parts_of_a_model(tmp_path, world):
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                str(WORKER),
                str(rank),
                str(world),
                str(tmp_path / "store"),
                str(tmp_path / f"{rank}.json"),
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        outputs = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-4000:]
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world)]
    assert len(found[0]) == {2: 20, 4: 9}[world]
    wrong = {case: value for ranks in found for case, value in ranks.items() if value > 1e-12}
    assert not wrong
