"""Real transformers trainers on tiny data."""

from __future__ import annotations

import torch
from attach_helpers import tiny, tokens
from transformers import Trainer, TrainingArguments


def examples(lengths: list[int], seed: int = 0) -> list[dict[str, list[int]]]:
    """Token sequences of the given lengths, labels equal to the tokens."""
    rows = tokens(len(lengths), max(lengths), seed)
    return [{"input_ids": row[:n].tolist(), "labels": row[:n].tolist()} for row, n in zip(rows, lengths, strict=True)]


def pad(features: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Collate with right padding to 12 tokens: every cut of a batch sees the same columns."""

    def column(name: str, fill: int) -> torch.Tensor:
        return torch.tensor([feature[name] + [fill] * (12 - len(feature[name])) for feature in features])

    mask = torch.tensor([[1] * len(f["input_ids"]) + [0] * (12 - len(f["input_ids"])) for f in features])
    return {"input_ids": column("input_ids", 0), "labels": column("labels", -100), "attention_mask": mask}


PLAIN_SGD = {
    "per_device_train_batch_size": 1,
    "max_steps": 1,
    "optim": "sgd",
    "learning_rate": 0.5,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "use_cpu": True,
}
"""One step that writes nothing, after which the weights are the gradient."""


def make_trainer(folder, model=None, *, data=None, cls: type[Trainer] = Trainer, loss_func=None, **settings) -> Trainer:
    """A trainer whose optimizer is plain SGD, so that the weights after a step are the gradient."""
    arguments = {**PLAIN_SGD, "gradient_accumulation_steps": 1, "seed": 0, **settings}
    model = tiny() if model is None else model
    return cls(
        model,
        TrainingArguments(str(folder), **arguments),
        train_dataset=examples([12, 5, 9, 2, 7, 12, 1, 4]) if data is None else data,
        data_collator=pad,
        **({} if loss_func is None else {"compute_loss_func": loss_func}),
    )


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Clones of all weights by name."""
    return {name: value.detach().clone() for name, value in model.named_parameters()}
