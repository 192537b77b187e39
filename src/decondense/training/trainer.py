"""The Trainer of a study's cell: its order of data, its arguments, and what it keeps apart from the loss."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset, SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.utils import logging as transformers_logging

from decondense.config import ConfigError, TrainConfig
from decondense.corpora.packed import PackedCorpus
from decondense.training.muon import optimizer_of
from decondense.training.treatments.applied import Applied, process_rank


class OrderedSequences(Dataset[dict[str, torch.Tensor]]):
    """The training sequences in the order in which the run reads them: item k is the k-th sequence of the run."""

    def __init__(self, corpus: PackedCorpus, order: np.ndarray[Any, Any], length: int) -> None:
        self.corpus, self.order, self.length = corpus, order, length

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self.corpus.sequence(int(self.order[index]), self.length).astype(np.int64))
        return {"input_ids": ids, "labels": ids}


class StudyTrainer(Trainer):
    """The Trainer with the study's order of data, and the plain cross-entropy kept apart from what is added to it."""

    def __init__(self, *args: Any, train: TrainConfig | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.train_config = train
        self.treatments: dict[str, Applied] = {}
        """By id, in the order in which they were prepared."""
        self.losses: dict[str, torch.Tensor] = {}
        """Sums since the last logged row: the plain cross-entropy as ``loss``, and what treatments add by their ids."""

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The Trainer's, or Muon with AdamW, as the treatments change it."""
        new, train = self.optimizer is None, self.train_config
        if new and train is not None and train.optimizer == "muon":
            assert self.model is not None
            self.optimizer = optimizer_of(self.model, train, self.get_decay_parameter_names(self.model))
        optimizer = super().create_optimizer(*args, **kwargs)
        for treatment in self.treatments.values() if new else ():
            treatment.change_optimizer(optimizer)
        return optimizer

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, as the treatments change it."""
        new = self.lr_scheduler is None
        scheduler = super().create_scheduler(*args, **kwargs)
        for treatment in self.treatments.values() if new else ():
            scheduler = self.lr_scheduler = treatment.change_scheduler(scheduler)
        return scheduler

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The sequences in the study's order, never shuffled."""
        data = self.train_dataset
        assert isinstance(data, OrderedSequences)
        loader: DataLoader[Any] = DataLoader(
            data,
            batch_size=self._train_batch_size,
            sampler=SequentialSampler(data),
            collate_fn=self.data_collator,
            drop_last=True,
        )
        return self.accelerator.prepare(loader)  # type: ignore[no-any-return]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The Trainer's loss, counted as plain cross-entropy, and what the treatments add to it."""
        pair = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        assert isinstance(pair, tuple)
        loss, outputs = pair
        # already divided by the tokens of the whole optimizer step, so micro-batches add up
        self._count("loss", loss)
        for name, treatment in self.treatments.items():
            extra = treatment.extra_loss(inputs["input_ids"], outputs)
            if extra is not None:
                # all sequences have one length, so every micro-batch has the same share of the step
                extra = extra / self.args.gradient_accumulation_steps
                self._count(name, extra)
                loss = loss + treatment.loss_weight * extra
        return (loss, outputs) if return_outputs else loss

    def _count(self, name: str, value: torch.Tensor) -> None:
        value = value.detach().float()
        self.losses[name] = self.losses[name] + value if name in self.losses else value


def world_size() -> int:
    """Processes of this run (torchrun's WORLD_SIZE)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process writes the rows."""
    return process_rank() == 0


def training_arguments(train: TrainConfig, folder: Path, seed: int) -> TrainingArguments:
    """The Trainer's arguments of a cell.

    Raises:
        ConfigError: the batch cannot be shared by the processes of this run.
    """
    world = world_size()
    per_rank, rest = divmod(train.batch_size, world)
    micro = min(train.micro_batch_size or per_rank, per_rank)
    if rest or micro < 1 or per_rank % micro:
        raise ConfigError(
            f"train.batch_size {train.batch_size} cannot be split over {world} processes in micro-batches of "
            f"{train.micro_batch_size or per_rank}; it must be a multiple of the processes times "
            "train.micro_batch_size."
        )
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=per_rank // micro,
        max_steps=train.steps,
        learning_rate=train.learning_rate,
        adam_beta1=train.betas[0],
        adam_beta2=train.betas[1],
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        lr_scheduler_type=train.lr_scheduler_type,
        warmup_steps=round(train.warmup * train.steps),
        logging_strategy="steps",
        logging_steps=train.log_every,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=train.checkpoint_every,
        # two, because a checkpoint counts only once it is marked, and rotation comes before the mark
        save_total_limit=2,
        seed=seed,
        use_cpu=not torch.cuda.is_available(),
        ddp_backend=None if torch.cuda.is_available() or world == 1 else "gloo",
        ddp_find_unused_parameters=False if world > 1 else None,
        bf16=train.precision == "bf16",
        **_checkpointing(train.gradient_checkpointing),
        **_sharding(train.fsdp and world > 1),
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        report_to=[],
    )


def _checkpointing(on: bool) -> dict[str, Any]:
    # renamed in transformers 5.23: the old name warns there, the new one does not exist before
    new = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    return {"activation_checkpointing" if new else "gradient_checkpointing": True} if on else {}


def _sharding(on: bool) -> dict[str, Any]:
    settings = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
    return {"fsdp": True, "fsdp_config": settings} if on else {}


def whole_state(model: PreTrainedModel) -> dict[str, Any]:
    """The model's parameters and buffers, gathered from all ranks where FSDP has sharded them. Every rank must call."""
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return model.state_dict()
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the Trainer's warnings about intended settings (no tokenizer, aligned special tokens)."""
    logger = logging.getLogger("transformers")
    level, bars = logger.level, transformers_logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
