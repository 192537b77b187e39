"""One of two gloo processes: runs every case and saves what it found. Started by test_ranks.py."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from attach_helpers import gradients, tiny
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from trainer_helpers import examples, make_trainer, pad, weights

from decondense import DispersionCallback, attach, attach_trainer

WEIGHT = 2.0
KINDS = ["one", "ddp", "ddp attached first", "fsdp2", "fsdp2 attached first", "hsdp"]
KINDS += ["fsdp2 reentrant", "fsdp2 checkpointed"]
# rows 0-3 go to rank 0, rows 4-7 to rank 1: 28 and 33 real tokens, all sequences have a pair
LENGTHS = [12, 5, 9, 2, 7, 12, 10, 4]
# here rank 0 or 1 also gets sequences without a pair, so that the ranks differ in the number of sequences too
RAGGED = [12, 5, 9, 1, 1, 12, 1, 4]


def full(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gather sharded tensors."""
    return {n: (v.full_tensor() if hasattr(v, "full_tensor") else v).detach().clone() for n, v in values.items()}


def bare(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("module."): value for name, value in values.items()}


def shard(model: torch.nn.Module, mesh=None) -> torch.nn.Module:
    """FSDP2: every block, then the model."""
    layers = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def one_backward(model, handle, rank, ranks) -> dict[str, torch.Tensor]:
    """Gradient of the cross-entropy over the tokens of all ranks plus the dispersion of this rank's sequences."""
    batch = pad(examples(LENGTHS))
    rows = slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)
    mine = {name: value[rows] for name, value in batch.items()}
    logits = model(input_ids=mine["input_ids"], attention_mask=mine["attention_mask"]).logits
    total = (batch["labels"][:, 1:] != -100).sum()
    loss = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), mine["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )
    (loss * ranks / total + handle.weight * handle.take()).backward()
    return bare(full(gradients(model)))


def plain_cases(rank: int, ranks: int) -> dict[str, dict[str, torch.Tensor]]:
    found = {}
    for family in ("llama", "gpt2", "qwen3"):
        settings = {"tie_word_embeddings": True}
        for kind in (
            "one",
            "ddp",
            "ddp attached first",
            "fsdp2",
            "fsdp2 attached first",
            "hsdp",
            "fsdp2 reentrant",
            "fsdp2 checkpointed",
        ):
            if (ranks == 1) != (kind == "one"):
                continue
            model = tiny(family, **settings)
            first = "attached first" in kind
            handle = attach(model, WEIGHT) if first else None
            if "reentrant" in kind or "checkpointed" in kind:
                model.gradient_checkpointing_enable({"use_reentrant": "reentrant" in kind})
            if kind.startswith("ddp"):
                model = DistributedDataParallel(model)
            elif kind.startswith("fsdp2"):
                model = shard(model)
            elif kind == "hsdp":
                model = shard(model, init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp_replicate", "dp_shard")))
            handle = handle or attach(model, WEIGHT)
            handle.defer = True
            found[f"{family} {kind}"] = one_backward(model, handle, rank, ranks)
    return found


def one_training(
    folder, ranks, weight, *, average=True, fsdp=False, callback=False, lengths=RAGGED, steps=2, times=1, **loss
):
    settings = (
        {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}} if fsdp else {}
    )
    trainer = make_trainer(
        folder,
        data=examples(lengths),
        per_device_train_batch_size=8 // ranks // steps,
        gradient_accumulation_steps=steps,
        average_tokens_across_devices=average,
        max_steps=times,
        **settings,
    )
    if callback:
        trainer.add_callback(DispersionCallback(weight, **loss))
    else:
        attach_trainer(trainer, weight, **loss)
    trainer.train()
    [*_, log] = [row for row in trainer.state.log_history if "loss" in row]
    moved = {key: torch.tensor(value) for key, value in log.items() if key.startswith(("dispersion_w", "dispersion_c"))}
    return full(weights(trainer.model)), log["dispersion"], moved


def trainer_cases(folder: Path, ranks: int) -> dict[str, dict[str, torch.Tensor]]:
    """The part of one step that is the dispersion loss: with it minus without it."""
    cases = {
        "trainer": {},
        "trainer, tokens averaged per rank": {"average": False},
        "trainer, one micro-batch": {"steps": 1},
        "pairs across ranks": {"steps": 1, "within": "world"},
        "callback": {"callback": True, "lengths": LENGTHS},
        "callback, tokens averaged per rank": {"callback": True, "lengths": LENGTHS, "average": False},
    }
    if ranks > 1:
        cases["trainer, fsdp2"] = {"fsdp": True}
    found = {}
    for name, settings in cases.items():
        with_it, logged, _ = one_training(folder, ranks, WEIGHT, **settings)
        without, watched, _ = one_training(folder, ranks, 0.0, **settings)
        found[name] = {key: with_it[key] - without[key] for key in with_it}
        found[f"{name}: values"] = {"with": torch.tensor(logged), "without": torch.tensor(watched)}
    return found


def target_cases(folder: Path, ranks: int) -> dict[str, dict[str, torch.Tensor]]:
    """Weights of the model, and the logged weights and cosines of its layers, after three steps with a target."""
    cases = {"target": {}, "target, callback": {"callback": True, "lengths": LENGTHS}}
    if ranks > 1:
        cases["target, fsdp2"] = {"fsdp": True}
    found = {}
    for name, settings in cases.items():
        trained, _, moved = one_training(folder, ranks, 0.5, target=[0.02, 0.4, 0.01], times=3, **settings)
        found[name] = {**trained, **moved}
    return found


def accelerate_case(ranks: int) -> dict[str, dict[str, torch.Tensor]]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4 // ranks)
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    data = [{k: v[row] for k, v in pad(examples([12] * 8)).items()} for row in range(8)]
    loader = torch.utils.data.DataLoader(data, batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    with attach(model, WEIGHT):
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()
    return {"accelerate": bare(full(weights(model)))}


def main(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo", rank=rank, world_size=ranks)
    found = {**plain_cases(rank, ranks), **trainer_cases(folder / f"rank{rank}", ranks)}
    found |= {**target_cases(folder / f"rank{rank}", ranks), **accelerate_case(ranks)}
    torch.save(found, folder / f"found-{ranks}-{rank}.pt")
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
