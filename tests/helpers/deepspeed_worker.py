"""One of two gloo processes under DeepSpeed, or one process without it. Started by test_deepspeed.py."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch
from attach_helpers import tiny
from torch.nn import functional
from trainer_helpers import examples, make_trainer, pad
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from decondense import attach, attach_trainer

WEIGHT = 2.0
STAGES = (1, 2, 3)
OFFLOADED = {2: ("optimizer",), 3: ("optimizer", "param")}
"""What each stage can keep in the processor's memory."""
LENGTHS = [12, 5, 9, 2, 7, 12, 10, 4]  # rows 0-3 are rank 0's; all have a pair
RAGGED = [12, 5, 9, 1, 1, 12, 1, 4]  # the ranks differ in the number of sequences too
STEPS, CUTS = 3, 2  # optimizer steps; micro-batches of each on a rank
RATE = 0.5


def model() -> torch.nn.Module:
    # under the ZeRO 3 of a Trainer or a plugin that is still alive, it is built in pieces, with other random weights
    unset_hf_deepspeed_config()
    return tiny("gpt2", dtype=torch.float32)


def loss_of(run, handle, rows: range, share: float) -> torch.Tensor:
    """Cross-entropy over all tokens of the step, as a share of it, plus the dispersion of these rows."""
    batch = pad(examples(LENGTHS))
    mine = {name: value[rows.start : rows.stop] for name, value in batch.items()}
    logits = run(input_ids=mine["input_ids"], attention_mask=mine["attention_mask"]).logits
    total = (batch["labels"][:, 1:] != -100).sum()
    own = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), mine["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )
    plain = own / total * share
    taken = None if handle is None else handle.take()  # None at weight 0
    return plain if taken is None else plain + handle.weighted(taken)


def alone(weight: float | None) -> dict[str, torch.Tensor]:
    """One process, plain torch, the whole batch at once."""
    made = model()
    handle = None if weight is None else attach(made, weight)
    if handle is not None:
        handle.defer = True
    optimizer = torch.optim.SGD(made.parameters(), lr=RATE)
    for _ in range(STEPS):
        loss_of(made, handle, range(8), 1.0).backward()
        optimizer.step()
        optimizer.zero_grad()
    return whole(made)


def whole(made: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All weights by name, gathered where a stage has cut them."""
    gathered = contextlib.nullcontext()
    if "deepspeed" in sys.modules:
        gathered = sys.modules["deepspeed"].zero.GatheredParameters(list(made.parameters()))
    with gathered:
        return {name.removeprefix("module."): value.detach().float().clone() for name, value in made.named_parameters()}


def settings_of(stage: int, *, offload: bool = False, bf16: bool = False) -> dict[str, object]:
    kept = {f"offload_{name}": {"device": "cpu"} for name in OFFLOADED[stage]} if offload else {}
    return {
        "train_micro_batch_size_per_gpu": 8 // 2 // CUTS,
        "gradient_accumulation_steps": CUTS,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's optimizer, so that nothing is compiled
        "zero_optimization": {"stage": stage, **kept},
        **({"bf16": {"enabled": True}} if bf16 else {}),
    }


def engine_of(made: torch.nn.Module, stage: int, **options: bool):
    import deepspeed

    optimizer = torch.optim.SGD(made.parameters(), lr=RATE)
    return deepspeed.initialize(model=made, optimizer=optimizer, config=settings_of(stage, **options))[0]


def accelerated(stage: int, weight: float | None, rank: int, **options: bool):
    """Two ranks under ``accelerator.prepare`` with a plugin, in a loop as Accelerate's guide has it."""
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    # a Trainer's: stopped amid an epoch by its number of steps, it leaves its last batch as the end of the data, at
    # which every micro-batch is a step
    GradientState._reset_state()
    settings = settings_of(stage, **options)
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings))
    assert str(accelerator.distributed_type).endswith("DEEPSPEED")
    made = model()
    run, optimizer = accelerator.prepare(made, torch.optim.SGD(made.parameters(), lr=RATE))
    handle = None if weight is None else attach(run, weight)
    if handle is not None:
        handle.defer = True
    for _ in range(STEPS):
        for cut in range(CUTS):
            begin = 4 * rank + cut * 4 // CUTS
            with accelerator.accumulate(run):
                loss = loss_of(run, handle, range(begin, begin + 4 // CUTS), 2.0 * CUTS)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
    return whole(run)


def together(
    stage: int, weight: float | None, rank: int, *, first: bool = False, folder: Path | None = None, **options: bool
):
    """Two ranks under ``deepspeed.initialize``; ``folder``: saved after the first step, continued by another engine."""

    def start():
        made = model()
        handle = attach(made, weight) if first and weight is not None else None
        engine = engine_of(made, stage, **options)
        if handle is None and weight is not None:
            handle = attach(engine, weight)
        if handle is not None:
            handle.defer = True
        return engine, handle

    def step():
        for cut in range(CUTS):
            begin = 4 * rank + cut * 4 // CUTS
            # DeepSpeed divides by the micro-batches and averages over the ranks
            engine.backward(loss_of(engine, handle, range(begin, begin + 4 // CUTS), 2.0 * CUTS))
            engine.step()

    engine, handle = start()
    for number in range(STEPS):
        step()
        if folder is not None and number == 0:
            engine.save_checkpoint(str(folder), tag="one")
            engine, handle = start()
            engine.load_checkpoint(str(folder), tag="one")
    return whole(engine)


def trained(folder: Path, stage: int | None, weight: float | None, *, resume: bool = False):
    """The Hugging Face Trainer: weights after three steps, and the logged dispersion."""
    ranks = 1 if stage is None else 2
    settings = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage},
    }
    saving = {"save_strategy": "steps", "save_steps": 1} if resume else {}

    def make(steps: int):
        trainer = make_trainer(
            folder,
            model(),
            data=examples(RAGGED),
            per_device_train_batch_size=8 // ranks // CUTS,
            gradient_accumulation_steps=CUTS,
            max_steps=steps,
            **({} if stage is None else {"deepspeed": settings}),
            **saving,
        )
        if weight is not None:
            attach_trainer(trainer, weight)
        return trainer

    if resume:
        make(1).train()
    trainer = make(STEPS)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-1") if resume else None)
    logged = [row["dispersion"] for row in trainer.state.log_history if "dispersion" in row]
    return {"weights": whole(trainer.model), "logged": torch.tensor(logged)}


def main(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    found: dict[str, object] = {}
    if ranks == 1:
        found = {"start": whole(model()), "engine": alone(WEIGHT), "plain": alone(None)}
        found |= {"trainer": trained(folder / "alone", None, WEIGHT)}
    else:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled here, in minutes
        deepspeed.init_distributed("gloo")
        for stage in STAGES:
            place = folder / f"stage{stage}"
            found |= {
                f"engine {stage}": together(stage, WEIGHT, rank),
                f"engine {stage}, attached first": together(stage, WEIGHT, rank, first=True),
                f"engine {stage}, resumed": together(stage, WEIGHT, rank, folder=place / "engine"),
                f"engine {stage}, weight 0": together(stage, 0.0, rank),
                f"engine {stage}, not attached": together(stage, None, rank),
                f"trainer {stage}": trained(place / f"trainer{rank}", stage, WEIGHT),
                f"trainer {stage}, weight 0": trained(place / f"zero{rank}", stage, 0.0),
                f"trainer {stage}, not attached": trained(place / f"none{rank}", stage, None),
                f"trainer {stage}, resumed": trained(place / "resumed", stage, WEIGHT, resume=True),
            }
        for stage in STAGES:
            found[f"engine {stage}, bf16"] = together(stage, WEIGHT, rank, bf16=True)
            found[f"engine {stage}, bf16, not attached"] = together(stage, None, rank, bf16=True)
            found[f"accelerate {stage}"] = accelerated(stage, WEIGHT, rank)
            if stage in OFFLOADED:
                found[f"engine {stage}, offload"] = together(stage, WEIGHT, rank, offload=True)
                found[f"accelerate {stage}, offload"] = accelerated(stage, WEIGHT, rank, offload=True)
    torch.save(found, folder / f"found-{ranks}-{rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
