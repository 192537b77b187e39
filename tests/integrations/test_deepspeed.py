"""DeepSpeed's ZeRO stages 1, 2 and 3 on two gloo processes find what one process without DeepSpeed finds."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import deepspeed_worker
import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.deepspeed,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]
STAGES = pytest.mark.parametrize("stage", deepspeed_worker.STAGES)
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> tuple[dict[str, Weights], list[dict[str, Weights]]]:
    """What one process found, and what each of two found."""
    folder = tmp_path_factory.mktemp("deepspeed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    helpers = str(Path(deepspeed_worker.__file__).parent)
    processes = []
    for ranks, rank in ((1, 0), (2, 0), (2, 1)):
        paths = os.pathsep.join(filter(None, [helpers, os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": paths}
        environment["DS_ACCELERATOR"] = "cpu"
        if ranks > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, deepspeed_worker.__file__, str(rank), str(ranks), str(folder)]
        with (folder / f"log-{ranks}-{rank}").open("w") as log:
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0, 0], "\n".join(path.read_text()[-3000:] for path in sorted(folder.glob("log-*")))
    return torch.load(folder / "found-1-0.pt"), [torch.load(folder / f"found-2-{rank}.pt") for rank in range(2)]


def difference(one: Weights, other: Weights) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


@STAGES
@pytest.mark.parametrize("how", ["", ", attached first", ", resumed"])
def test_three_steps_of_an_engine(found, stage: int, how: str) -> None:
    """Unequal lengths, two micro-batches a step: float32 weights after plain gradient descent at a large rate."""
    one, two = found
    for rank in two:
        assert difference(rank[f"engine {stage}{how}"], one["engine"]) < 2e-6
        assert difference(rank[f"engine {stage}, weight 0"], one["engine"]) > 1e-3


@STAGES
@pytest.mark.parametrize("how", ["", ", resumed"])
def test_three_steps_of_the_trainer(found, stage: int, how: str) -> None:
    """The ranks differ in the number of sequences that have a pair."""
    one, two = found
    for rank in two:
        assert difference(rank[f"trainer {stage}{how}"]["weights"], one["trainer"]["weights"]) < 2e-6
        logged, expected = rank[f"trainer {stage}{how}"]["logged"], one["trainer"]["logged"]
        torch.testing.assert_close(logged, expected[-len(logged) :], rtol=0, atol=1e-5)


@STAGES
def test_weight_0_is_not_attached(found, stage: int) -> None:
    for rank in found[1]:
        assert difference(rank[f"engine {stage}, weight 0"], rank[f"engine {stage}, not attached"]) == 0
        zero, none = rank[f"trainer {stage}, weight 0"], rank[f"trainer {stage}, not attached"]
        assert difference(zero["weights"], none["weights"]) == 0


@pytest.mark.parametrize(
    "name",
    [
        *(f"accelerate {stage}" for stage in deepspeed_worker.STAGES),
        *(f"{how} {stage}, offload" for stage in deepspeed_worker.OFFLOADED for how in ("engine", "accelerate")),
    ],
)
def test_accelerate_and_offload(found, name: str) -> None:
    """``accelerator.prepare`` with a DeepSpeedPlugin; the optimizer (stage 2, 3) and the parameters (3) offloaded."""
    for rank in found[1]:
        assert difference(rank[name], found[0]["engine"]) < 2e-6


@STAGES
def test_bf16(found, stage: int) -> None:
    """What three steps changed, as a share of its norm: bfloat16 has 8 bits, so some parts in a hundred are its own."""
    one, two = found

    def share(weights: Weights, expected: Weights) -> float:
        error, moved = (
            torch.cat([(a[name] - b[name]).flatten() for name in a]).norm()
            for a, b in ((weights, expected), (expected, one["start"]))
        )
        return float(error / moved)

    for rank in two:
        assert share(rank[f"engine {stage}, bf16"], one["engine"]) < 0.03
        assert share(rank[f"engine {stage}, bf16, not attached"], one["plain"]) < 0.03
        assert share(rank[f"engine {stage}, bf16"], one["plain"]) > 0.5
