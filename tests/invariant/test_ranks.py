"""Two gloo processes find what one process finds; unequal numbers of tokens, and of sequences, on the ranks."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import ranks
import torch
from attach_helpers import greatest_difference, mean_residual
from once import once


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What one process found, and what each of two found."""
    folder = once(tmp_path_factory, "ranks", find)
    return torch.load(folder / "found-1-0.pt"), [torch.load(folder / f"found-2-{rank}.pt") for rank in range(2)]


def find(folder: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    jobs = [(0, 1, folder), (0, 2, folder), (1, 2, folder)]
    together = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)} for rank, world, _ in jobs[1:]]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks.run("rank_worker.py", jobs, environments=[{}, *({**own, **place} for own in together)])


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize(
    "kind",
    ["ddp", "ddp attached first", "fsdp2", "fsdp2 attached first", "hsdp", "fsdp2 reentrant", "fsdp2 checkpointed"],
)
def test_gradients(found, family, kind):
    one, two = found
    for rank in two:
        assert greatest_difference(rank[f"{family} {kind}"], one[f"{family} one"]) < 1e-15
        assert mean_residual(rank[f"{family} {kind}"], one[f"{family} one"]) < 1e-15


@pytest.mark.parametrize(
    ("case", "alone"),
    [
        ("trainer", "trainer"),
        ("trainer, one micro-batch", "trainer"),
        ("trainer, tokens averaged per rank", "trainer"),
        ("trainer, fsdp2", "trainer"),
        ("pairs across ranks", "pairs across ranks"),
        ("callback", "callback"),
        ("callback, tokens averaged per rank", "callback"),
    ],
)
def test_dispersion_part_of_a_training_step(found, case, alone):
    one, two = found
    for rank in two:
        # transformers takes the cross-entropy in float32, and what is compared is the difference of two such runs;
        # an element is of the order of 1e-2
        assert greatest_difference(rank[case], one[alone]) < 1e-7
        assert mean_residual(rank[case], one[alone]) < 1e-7
        # and what is logged is the mean over all ranks
        for kind in ("with", "without"):
            assert rank[f"{case}: values"][kind].item() == pytest.approx(one[f"{alone}: values"][kind].item(), abs=1e-6)


@pytest.mark.parametrize(
    ("case", "alone"), [("target", "target"), ("target, fsdp2", "target"), ("target, callback", "target, callback")]
)
def test_a_target_moves_the_weights_of_one_process_on_every_rank(found, case, alone):
    one, two = found
    logged = [key for key in two[0][case] if key.startswith("dispersion_")]
    assert len(logged) == 8
    assert all(torch.equal(two[0][case][key], two[1][case][key]) for key in logged)
    for rank in two:
        assert greatest_difference(rank[case], one[alone]) < 1e-6


def test_accelerate_loop(found):
    one, two = found
    for rank in two:
        assert greatest_difference(rank["accelerate"], one["accelerate"]) < 1e-12
