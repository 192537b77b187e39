"""One of W gloo ranks: pipelines, tensor and sequence parallelism in float64, each against one rank.

Started as ``python stages_worker.py RANK WORLD STORE OUT``; writes the greatest difference of each case to OUT.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from attach_helpers import angular
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from decondense import attach
from decondense.attaching import Part

WIDTH, VOCABULARY, BLOCKS, TOKENS, WEIGHT = 8, 16, 8, 6, 0.7
# tokens of the rows of each micro-batch; rows of one token have no pair
LENGTHS = [[6, 3], [1, 5], [2, 6], [4, 1]]


class Attention(nn.Module):
    """Causal, two heads; works on the heads that a rank has."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.o = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (-1, WIDTH // 2)).transpose(1, 2) for part in (self.q, self.k, self.v))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH, bias=False), nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.silu(self.up(x)))


class Block(nn.Module):
    """Its own checkpoint, as in transformers: hooks run inside of it, and again when it is computed again."""

    reentrant: bool | None = None

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.RMSNorm(WIDTH), Attention()
        self.mlp_norm, self.mlp = nn.RMSNorm(WIDTH), Mlp()

    def __call__(self, x: Tensor) -> Tensor:
        if self.reentrant is None or not torch.is_grad_enabled():
            return super().__call__(x)
        return checkpoint(super().__call__, x, use_reentrant=self.reentrant)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Stack(nn.Module):
    """Blocks ``first`` to ``last`` of a language model, the embedding with the first, the head with the last."""

    def __init__(self, first: int = 0, last: int = BLOCKS) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        whole = [Block() for _ in range(BLOCKS)]
        embedding, norm, head = nn.Embedding(VOCABULARY, WIDTH), nn.RMSNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)
        for module in (embedding, *whole, head):  # every rank draws all
            for parameter in module.parameters():
                parameter.data = torch.randn(parameter.shape, generator=draw, dtype=torch.float64) * 0.4
        self.embedding = embedding if first == 0 else None
        self.layers = nn.ModuleDict({str(number): whole[number] for number in range(first, last)})
        self.norm = norm.double() if last == BLOCKS else None
        self.head = head if last == BLOCKS else None

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = tokens if self.embedding is None else self.embedding(tokens)
        for layer in self.layers.values():
            x = layer(x)
        x = x if self.norm is None else self.norm(x)
        return x if self.head is None else self.head(x)


def batch() -> tuple[Tensor, Tensor]:
    """Token ids and mask of all micro-batches, one after another."""
    ids = torch.randint(VOCABULARY, (8, TOKENS), generator=torch.Generator().manual_seed(3))
    mask = torch.zeros_like(ids)
    for row, length in enumerate(length for lengths in LENGTHS for length in lengths):
        mask[row, :length] = 1
    return ids, mask


def states(model: Stack, ids: Tensor) -> tuple[list[Tensor], Tensor]:
    """Embedding, states after the blocks, state after the norm; logits. Written out."""
    found = [model.embedding(ids)]
    for layer in model.layers.values():
        found.append(layer(found[-1]))
    found.append(model.norm(found[-1]))
    return found, model.head(found[-1])


def cross_entropy(logits: Tensor, ids: Tensor) -> Tensor:
    """Sum over all tokens but the first of each row."""
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


def oracle(chosen: list[int], whole_step: bool) -> dict[str, Tensor]:
    """Gradients of one rank: mean over the sequences of the step, or mean over micro-batches of theirs."""
    model, (ids, mask) = Stack(), batch()
    found, logits = states(model, ids)
    per_micro_batch = []
    for start in range(0, 8, 2):
        rows = [row for row in (start, start + 1) if mask[row].sum() > 1]
        per_micro_batch.append([[angular(found[at][row][mask[row].bool()]) for row in rows] for at in chosen])
    if whole_step:
        term = sum(sum(sum(rows) for rows in part) for part in per_micro_batch) / (len(chosen) * sequences())
    else:
        term = sum(sum(sum(rows) / len(rows) for rows in part) / len(chosen) for part in per_micro_batch) / 4
    (cross_entropy(logits, ids) / (8 * (TOKENS - 1)) + WEIGHT * term).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def sequences() -> int:
    return sum(length > 1 for lengths in LENGTHS for length in lengths)


def difference(models: list[nn.Module], expected: dict[str, Tensor]) -> float:
    greatest = 0.0
    for model in models:
        for name, parameter in model.named_parameters():
            grad = parameter.grad
            grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
            greatest = max(greatest, float((grad - expected[name]).abs().max()))
    return greatest


SCHEDULES = {
    "gpipe": (schedules.ScheduleGPipe, 1),
    "1f1b": (schedules.Schedule1F1B, 1),
    "interleaved": (schedules.ScheduleInterleaved1F1B, 2),
    "looped": (schedules.ScheduleLoopedBFS, 2),
    "zero bubble": (schedules.ScheduleInterleavedZeroBubble, 2),
    "zbv": (schedules.ScheduleZBVZeroBubble, 2),
    "dualpipev": (schedules.ScheduleDualPipeV, 2),
}


def pipeline(
    rank: int,
    world: int,
    name: str,
    layers: str | list[int],
    chosen: list[int],
    *,
    whole_step: bool = True,
    reentrant: bool | None = None,
    **settings: object,
) -> float:
    kind, each = SCHEDULES[name]
    total = world * each
    mine = [rank + part * world for part in range(each)]
    if name in ("zbv", "dualpipev"):
        mine = [rank, total - 1 - rank]
    size = BLOCKS // total
    models = [Stack(stage * size, (stage + 1) * size) for stage in mine]
    handles = []
    for stage, model in zip(mine, models, strict=True):
        for layer in model.layers.values():
            layer.reentrant = reentrant
        handle = attach(model, WEIGHT, layers, part=Part(stage * size, BLOCKS), **settings)
        if whole_step:
            handle.sequences = sequences()
        handles.append(handle)
    stages = [
        PipelineStage(model, stage, total, torch.device("cpu")) for stage, model in zip(mine, models, strict=True)
    ]
    ids, mask = batch()
    divisor = 8 * (TOKENS - 1) if whole_step else 2 * (TOKENS - 1)
    schedule = kind(
        stages[0] if each == 1 else stages,
        n_microbatches=4,
        loss_fn=lambda logits, labels: cross_entropy(logits, labels) / divisor,
        scale_grads=not whole_step,
    )
    first = (ids,) if 0 in mine else ()
    schedule.step(*first, attention_mask=mask, **({"target": ids} if total - 1 in mine else {}))
    found = difference(models, oracle(chosen, whole_step))
    logged: dict[str, float] = {}
    for handle in handles:
        logged |= {key: value for key, value in handle.pop().items() if "/" in key}
        handle.detach()
    with torch.no_grad():
        kept, _ = states(Stack(), ids)
    for at in chosen:
        key = "embedding" if at == 0 else "final_norm" if at > BLOCKS else f"block_{at:02d}"
        rows = [angular(kept[at][row][mask[row].bool()]) for row in range(8) if mask[row].sum() > 1]
        if f"dispersion/{key}" in logged:
            found = max(found, abs(logged.pop(f"dispersion/{key}") - float(sum(rows) / len(rows))) * 1e-6)  # float32
    assert not logged, logged
    return found


ALL = list(range(1, BLOCKS + 1))


def pipelines(rank: int, world: int) -> dict[str, float]:
    found = {}
    names = list(SCHEDULES) if world == 2 else ["gpipe", "1f1b", "interleaved"]
    for name in names:
        found[f"{name} all"] = pipeline(rank, world, name, "all", ALL)
    found["1f1b deep"] = pipeline(rank, world, "1f1b", "deep", ALL[4:])
    found["interleaved ends"] = pipeline(rank, world, "interleaved", [0, -1], [1, 8])
    found["interleaved mean of micro-batches"] = pipeline(rank, world, "interleaved", "all", ALL, whole_step=False)
    # torch's pipelines differentiate with autograd.grad, which reentrant checkpoints do not allow
    found["checkpointed"] = pipeline(rank, world, "1f1b", "all", ALL, reentrant=False)
    found["embedding, final norm"] = pipeline(
        rank, world, "1f1b", "all", [0, *ALL[:-1], 9], embedding=True, final_norm=True
    )
    return found


def shard(model: Stack, mesh: DeviceMesh, style: str) -> Stack:
    """Tensor parallelism as in torch's tutorial; ``whole`` states, ``shards`` of their tokens, or ``dtensors``."""
    local, cut = style != "dtensors", Replicate() if style == "whole" else Shard(1)
    block: dict[str, ParallelStyle] = {f"attention.{name}": ColwiseParallel() for name in "qkv"}
    block |= {"mlp.up": ColwiseParallel()}
    for name in ("attention.o", "mlp.down"):
        block[name] = RowwiseParallel(output_layouts=cut, use_local_output=local)
    whole: dict[str, ParallelStyle] = {}
    if style != "whole":
        for name in ("attention", "mlp"):
            block[name] = PrepareModuleInput(input_layouts=(cut,), desired_input_layouts=(Replicate(),))
            block[f"{name}_norm"] = SequenceParallel()
        whole = {
            "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=cut, use_local_output=local),
            "norm": SequenceParallel(),
            "head": ColwiseParallel(input_layouts=cut, output_layouts=Replicate()),
        }
    for layer in model.layers.values():
        parallelize_module(layer, mesh, block)
    return parallelize_module(model, mesh, {k: v for k, v in whole.items() if getattr(model, k) is not None})


def tensor_parallel(mesh: DeviceMesh, style: str, placement: str, reentrant: bool | None = None) -> float:
    model, (ids, mask) = shard(Stack(), mesh, style), batch()
    for layer in model.layers.values():
        layer.reentrant = reentrant
    part = Part(group=mesh.get_group() if style == "shards" else None)
    with attach(model, WEIGHT, "deep", part=part, placement=placement, final_norm=True) as handle:
        handle.defer = True
        logits = model(ids, attention_mask=mask)
        total, count = handle.take_sum_and_count()
        assert count == sequences()
        (cross_entropy(logits, ids) / (8 * (TOKENS - 1)) + handle.weight * total / count).backward()
    return difference([model], oracle([*ALL[4:-1], 9], True))


def both(rank: int, world: int) -> dict[str, float]:
    """Two stages of two ranks each, which share the tokens."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "tp"))
    stage = mesh["pp"].get_local_rank()
    model = shard(Stack(stage * 4, stage * 4 + 4), mesh["tp"], "shards")
    handle = attach(model, WEIGHT, [2, 3, 4, 7], part=Part(stage * 4, BLOCKS, mesh["tp"].get_group()))
    handle.sequences = sequences()
    schedule = schedules.Schedule1F1B(
        PipelineStage(model, stage, 2, torch.device("cpu"), group=mesh["pp"].get_group()),
        n_microbatches=4,
        loss_fn=lambda logits, labels: cross_entropy(logits, labels) / (8 * (TOKENS - 1)),
        scale_grads=False,
    )
    ids, mask = batch()
    schedule.step(*((ids,) if stage == 0 else ()), attention_mask=mask, **({"target": ids} if stage else {}))
    return {"stages of shards": difference([model], oracle([3, 4, 5, 8], True))}


def main(rank: int, world: int, store: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    found = pipelines(rank, world)
    if world == 4:
        found |= both(rank, world)
    else:
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
        for style in ("whole", "shards", "dtensors"):
            for placement in ("output", "block"):
                found[f"{style} {placement}"] = tensor_parallel(mesh, style, placement)
        for reentrant in (False, True):
            found[f"shards reentrant={reentrant}"] = tensor_parallel(mesh, "shards", "block", reentrant)
    Path(out).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
