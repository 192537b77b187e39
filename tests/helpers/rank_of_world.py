"""One rank of test_world.py: run as ``python rank_of_world.py RANK WORLD STORE``; asserts, prints ``ok``."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from loss_inputs import randn

from decondense.losses import DispersionLoss, dispersion_loss

# ranks hold batches of different shapes with different numbers of real tokens; the last one has none
SHAPES = ((2, 9, 6), (3, 5, 6), (1, 4, 6))


def batch(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    b, t, d = SHAPES[rank]
    mask = torch.rand(b, t, generator=torch.Generator().manual_seed(rank)) > 0.3
    return randn(b, t, d, seed=rank + 10), mask if rank < 2 else torch.zeros_like(mask)


def main(rank: int, world: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    weight = randn(6, 6, seed=5)
    for form in (
        "angular",
        "hinge",
        "l2_repel",
        "mean_cosine",
        "decorrelation",
        "koleo",
        "vicreg",
    ):
        for impl in ("reference", "chunked"):
            z, mask = batch(rank)
            w = weight.clone().requires_grad_()
            loss = dispersion_loss(z @ w, mask, form=form, impl=impl, within="world")
            loss.backward()
            dist.all_reduce(w.grad)  # what data-parallel training does: the mean over ranks
            w.grad /= world

            whole = weight.clone().requires_grad_()
            tokens = torch.cat([z[m] for z, m in map(batch, range(world))])
            expected = dispersion_loss((tokens @ whole).unsqueeze(0), form=form, impl=impl)
            expected.backward()
            torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(w.grad, whole.grad, rtol=1e-8, atol=1e-10)
    # no masks, equal shapes; the module's count is of the world's one set
    module = DispersionLoss(within="world")
    total, count = module.sum_and_count(randn(2, 4, 6, seed=rank))
    everything = torch.cat([randn(2, 4, 6, seed=r) for r in range(world)]).reshape(1, -1, 6)
    torch.testing.assert_close(total, dispersion_loss(everything))
    assert count.item() == 1
    dist.destroy_process_group()
    print("ok", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
