"""One cell of a study (an arm with a seed) on the Hugging Face Trainer: trained, measured, recorded, resumable.

The same code runs in one process, under ``torchrun`` and under ``accelerate launch``. A cell owns a folder:

    rows.jsonl        what happened so far; the cell is done when its last run row has a terminal status
    checkpoint-K/     Trainer checkpoints; one counts only with its inventory (decondense.training.checkpoints)
    final/            the trained model and its tokenizer (safetensors), written in one move

A killed cell starts again from its newest complete checkpoint: rows of later steps are dropped first, so that a
finished cell has the same rows whether it was interrupted or not.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import math
import os
import resource
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, SequentialSampler
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging as transformers_logging

from decondense.config import ArmConfig, ConfigError, LoraConfig, ModelConfig, StudyConfig, TrainConfig, suggest
from decondense.corpora.packed import PackedCorpus
from decondense.corpora.passages import sample_passages
from decondense.evaluate import benchmark_rows, held_out_loss
from decondense.integrations.huggingface import attach_trainer
from decondense.measuring import measure
from decondense.measuring.loading import load_model
from decondense.records import (
    RecordError,
    Row,
    append_rows,
    make_row,
    provenance,
    read_rows,
    terminal_row,
    write_rows,
)
from decondense.seeding import hash_parameters, seed_everything
from decondense.stopping import SAVE_FIRST, Stopped, save_requested, stop_if_requested
from decondense.training import checkpoints
from decondense.training.baselines import ActiveForgetting, NoisyEmbedding, Teacher, own_group, split_schedule

if TYPE_CHECKING:
    from decondense.attaching import DispersionHandle


class CellBusy(RuntimeError):
    """Another process is working on this cell."""


class Diverged(RuntimeError):
    """Training produced a number that is none; the message names the step and, when found, the layer."""


# --------------------------------------------------------------------------------------------------------------------
# The start
# --------------------------------------------------------------------------------------------------------------------


def build_model(config: ModelConfig, vocabulary: int, positions: int, end_token: int) -> PreTrainedModel:
    """The model that an arm starts from; the caller seeds the global generators first.

    Args:
        config: architecture and overrides, or a pretrained start; with adapters where it says so.
        vocabulary: entries of the tokenizer.
        positions: tokens of a training sequence.
        end_token: id of the end-of-text token.

    Raises:
        ConfigError: unknown architecture or field, or a start whose vocabulary is not the tokenizer's.
    """
    if config.start is not None:
        try:
            model = AutoModelForCausalLM.from_pretrained(
                config.start, revision=config.revision or "main", use_safetensors=True, dtype=torch.float32
            )
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"model.start {config.start!r} cannot be loaded: {reason} Without network, give a directory."
            ) from error
        longest = getattr(model.config, "max_position_embeddings", None)
        if longest is not None and longest < positions:
            raise ConfigError(
                f"model.start {config.start!r} has {longest} positions, less than train.sequence_tokens {positions}."
            )
        if model.config.vocab_size < vocabulary:
            raise ConfigError(
                f"model.start {config.start!r} has a vocabulary of {model.config.vocab_size}, the corpus one of "
                f"{vocabulary}: they do not belong together."
            )
    else:
        try:
            blank = AutoConfig.for_model(config.architecture)
        except ValueError as error:
            from transformers import CONFIG_MAPPING

            raise ConfigError(
                f"model.architecture {config.architecture!r} is no Hugging Face model type."
                f"{suggest(config.architecture, CONFIG_MAPPING)}"
            ) from error
        known = {*blank.to_dict(), *type(blank).attribute_map}
        for name in config.overrides:
            if name not in known:
                raise ConfigError(
                    f"model.overrides: {config.architecture} has no field {name!r}.{suggest(name, sorted(known))}"
                )
            default = getattr(blank, name, None)
            value = config.overrides[name]
            # a model of -1 layers would be built, without any
            if type(value) is int and type(default) is int and value < 0 < default:
                raise ConfigError(
                    f"model: {config.architecture} with {config.overrides} cannot be built: {name} {value} is negative."
                )
        values = {
            "vocab_size": vocabulary,
            "bos_token_id": end_token,
            "eos_token_id": end_token,
            "pad_token_id": end_token,
        }
        for name in ("n_positions", "max_position_embeddings"):
            if name in blank.to_dict() and name not in config.overrides:
                values[name] = positions
        try:
            settings = AutoConfig.for_model(config.architecture, **{**values, **config.overrides})
            model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)  # type: ignore[no-untyped-call]
        except Exception as error:  # whatever a wrong type or a negative size meets first in the model's own code
            raise ConfigError(
                f"model: {config.architecture} with {config.overrides} cannot be built: "
                f"{str(error).strip() or type(error).__name__}"
            ) from error
    # GPT-2 declares no loss type; the Trainer then counts the labels before the shift and scales the cross-entropy
    # by (T - 1) / T
    model.loss_type = "ForCausalLM"
    model.config.use_cache = False
    return model if config.lora is None else _with_adapters(model, config.lora)


def _with_adapters(model: PreTrainedModel, lora: LoraConfig) -> PreTrainedModel:
    try:
        import peft
    except ImportError as error:
        raise ConfigError("model.lora needs the package peft: pip install peft.") from error
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    make: Any = peft.LoraConfig  # alpha may be a fraction, whatever its annotation says
    settings = make(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out")  # GPT-2's layers; peft turns it round itself
            adapted: Any = peft.get_peft_model(model, settings)
    except ValueError as error:
        raise ConfigError(
            f"model.lora.targets {lora.targets!r} cannot be used: {str(error).splitlines()[0]}"
        ) from error
    return adapted  # type: ignore[no-any-return]


class _OrderedSequences(Dataset[dict[str, torch.Tensor]]):
    """The training sequences in the order in which the run reads them: item k is the k-th sequence of the run."""

    def __init__(self, corpus: PackedCorpus, order: np.ndarray[Any, Any], length: int) -> None:
        self.corpus, self.order, self.length = corpus, order, length

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self.corpus.sequence(int(self.order[index]), self.length).astype(np.int64))
        return {"input_ids": ids, "labels": ids}


# --------------------------------------------------------------------------------------------------------------------
# The run
# --------------------------------------------------------------------------------------------------------------------


class _StudyTrainer(Trainer):
    """The Trainer with the study's order of data, and the plain cross-entropy kept apart from what is added to it."""

    cross_entropy: torch.Tensor | None = None
    distillation: torch.Tensor | None = None
    forgetting: ActiveForgetting | None = None
    teacher: Teacher | None = None

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if new and self.forgetting is not None:
            own_group(optimizer, self.forgetting.weight)
        return optimizer

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        new = self.lr_scheduler is None
        scheduler = super().create_scheduler(*args, **kwargs)
        if new and self.forgetting is not None:
            assert isinstance(scheduler, LambdaLR)
            scheduler = self.lr_scheduler = split_schedule(scheduler, self.forgetting)
        return scheduler

    def get_train_dataloader(self) -> DataLoader[Any]:
        data = self.train_dataset
        assert isinstance(data, _OrderedSequences)
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
        found = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        assert isinstance(found, tuple)
        loss, outputs = found
        # already divided by the tokens of the whole optimizer step, so micro-batches add up
        self.cross_entropy = _plus(self.cross_entropy, loss)
        if self.teacher is not None:
            # all sequences have one length, so every micro-batch has the same share of the step
            taught = self.teacher.loss(inputs["input_ids"], outputs.logits) / self.args.gradient_accumulation_steps
            self.distillation = _plus(self.distillation, taught)
            loss = loss + self.teacher.config.weight * taught
        return (loss, outputs) if return_outputs else loss


def _plus(total: torch.Tensor | None, value: torch.Tensor) -> torch.Tensor:
    value = value.detach().float()
    return value if total is None else total + value


def world_size() -> int:
    """Processes of this run (torchrun's WORLD_SIZE)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process writes the rows."""
    return int(os.environ.get("RANK", "0")) == 0


def _arguments(train: TrainConfig, folder: Path, seed: int) -> TrainingArguments:
    world = world_size()
    per_rank, rest = divmod(train.batch_sequences, world)
    micro = min(train.micro_batch_sequences or per_rank, per_rank)
    if rest or micro < 1 or per_rank % micro:
        raise ConfigError(
            f"train.batch_sequences {train.batch_sequences} cannot be shared by {world} processes in micro-batches of "
            f"{train.micro_batch_sequences or per_rank}."
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
        max_grad_norm=train.gradient_clip,
        lr_scheduler_type=train.decay,
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


class _Recorder(TrainerCallback):
    """Writes the rows of a cell: training metrics when the Trainer logs, evaluations at the study's points."""

    def __init__(self, cell: _Cell, trainer: _StudyTrainer, model: PreTrainedModel) -> None:
        self.cell, self.trainer, self.model = cell, trainer, model
        self.due = set(cell.study.evaluate.steps(cell.train.steps))
        self.step_wall: list[float] = []
        self.step_cpu: list[float] = []
        self.since_log = 0
        self.stopping = False
        self._began = (0.0, 0.0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0 and 0 in self.due:
            self.cell.evaluate(self.model, 0)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._began = (time.perf_counter(), time.process_time())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.cell.check_there()
        # on a logged step only: a logged value is a mean since the last one, and a resumed run knows no half of it
        if state.global_step % args.logging_steps == 0 and self._must_save():
            control.should_save = True
        self.step_wall.append(time.perf_counter() - self._began[0])
        self.step_cpu.append(time.process_time() - self._began[1])
        self.since_log += 1
        if state.global_step >= state.max_steps:
            control.should_log = True
        if state.global_step in self.due:
            self.cell.evaluate(self.model, state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs or self.trainer.cross_entropy is None:
            return  # the summary at the end of training
        loss = self._mean(self.trainer.cross_entropy)
        taught = None if self.trainer.distillation is None else self._mean(self.trainer.distillation)
        wall, cpu = self.step_wall[-self.since_log :], self.step_cpu[-self.since_log :]
        self.trainer.cross_entropy, self.trainer.distillation, self.since_log = None, None, 0
        if not math.isfinite(loss) or not math.isfinite(float(logs["loss"])):
            raise self.cell.diverged(self.model, state.global_step, loss)
        norm = float(logs.get("grad_norm", math.nan))
        self.cell.write(
            make_row(
                "step",
                **self.cell.identity,
                step=state.global_step,
                tokens=state.global_step * self.cell.tokens_per_step,
                loss=loss,
                learning_rate=float(logs["learning_rate"]),
                gradient_norm=norm if math.isfinite(norm) else None,
                dispersion=logs.get("dispersion"),
                dispersion_weight=logs.get("dispersion_weight"),
                distillation=taught,
                timing={"step_wall_ms": 1e3 * median(wall), "step_cpu_ms": 1e3 * median(cpu)},
            )
        )

    def _must_save(self) -> bool:
        """Whether SIGUSR1 has come, on any rank: all of them save, or none."""
        if world_size() == 1:
            return save_requested()
        asked = torch.tensor(float(save_requested()), device=self.trainer.args.device)
        torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
        self.stopping = bool(asked)
        return self.stopping

    def _mean(self, total: torch.Tensor) -> float:
        """Mean over the ranks and over the steps since the last logged row."""
        if world_size() > 1:
            torch.distributed.all_reduce(total)
            total = total / world_size()
        return float(total) / self.since_log

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # every rank has written its part
        if is_main_process():
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            checkpoints.mark(folder, state.global_step, self.cell.rows_path)
        if (self.stopping or (world_size() == 1 and save_requested())) and state.global_step < state.max_steps:
            if torch.distributed.is_initialized():
                torch.distributed.barrier()
            assert SAVE_FIRST is not None
            raise Stopped(SAVE_FIRST)


class _Cell:
    """What the pieces of a run share: who it is, where its rows go, how its checkpoints are evaluated."""

    def __init__(
        self,
        study: StudyConfig,
        arm: ArmConfig,
        seed: int,
        corpus: PackedCorpus,
        folder: Path,
        watch: Callable[[], None],
        prepared: Mapping[str, Path],
    ) -> None:
        self.study, self.arm, self.seed, self.corpus, self.folder, self.watch = study, arm, seed, corpus, folder, watch
        self.model = study.model_of(arm)
        if (name := self.model.prepared) is not None:
            self.model = self.model.model_copy(update={"start": str(prepared[name])})
        self.distillation = arm.distillation
        if self.distillation is not None and (name := self.distillation.prepared) is not None:
            self.distillation = self.distillation.model_copy(update={"teacher": str(prepared[name])})
        self.train = study.train.model_copy(
            update={
                name: value
                for name in ("learning_rate", "warmup", "gradient_clip")
                if (value := getattr(arm, name)) is not None
            }
        )
        self.setting = {
            "learning_rate": self.train.learning_rate,
            "warmup": self.train.warmup,
            "gradient_clip": self.train.gradient_clip,
        }
        self.tokens_per_step = self.train.batch_sequences * self.train.sequence_tokens
        self.steps = 0 if arm.untrained else self.train.steps
        self.identity: dict[str, Any] = {
            "study": study.name,
            "study_fingerprint": study.fingerprint(),
            "arm": arm.name,
            "seed": seed,
        }
        self.rows_path = folder / "rows.jsonl"
        self.ignored: list[str] = []
        """Checkpoints and rows that could not be used, and why."""
        self.benchmarks: list[Row] = []
        """Of the final checkpoint; written together with the terminal row, so that they are there once."""

    def differs(self, row: Row) -> bool:
        """Whether a run row was written at another learning rate, warm-up or clipping; rows that do not say fit."""
        return any(
            row[name] is not None and row[name] != getattr(self.train, name)
            for name in ("learning_rate", "warmup", "gradient_clip")
        )

    def check_there(self) -> None:
        """Raise when the folder was removed: neither rows nor a checkpoint may make it again."""
        if is_main_process() and not self.folder.is_dir():
            raise RuntimeError(f"{self.folder} was removed while its run was training; nothing is written there.")

    def write(self, *rows: Row) -> None:
        self.watch()
        self.check_there()
        if is_main_process():
            append_rows(self.rows_path, rows)

    def evaluate(self, model: PreTrainedModel, step: int) -> None:
        """Condensation on held-out passages and held-out loss; the last step's is kept document by document."""
        settings = self.study.evaluate
        began = time.perf_counter()
        tokens = step * self.tokens_per_step
        profile = self._profile(model, step)
        documents = self.corpus.held_out_documents(settings.validation_tokens, part=settings.held_out_part)
        scores = held_out_loss(model, documents, window=self.train.sequence_tokens)
        rows = [
            make_row("profile", **self.identity, step=step, tokens=tokens, **profile),
            make_row(
                "eval",
                **self.identity,
                step=step,
                tokens=tokens,
                task="validation",
                metric="loss",
                value=scores.mean,
                higher_is_better=False,
                items=len(scores.documents),
                timing={"wall_s": time.perf_counter() - began},
            ),
        ]
        if step == self.steps:
            rows += [
                make_row(
                    "eval_item",
                    **self.identity,
                    step=step,
                    task="validation",
                    metric="loss",
                    item=document.identity,
                    value=document.mean,
                    weight=float(document.tokens),
                )
                for document in scores.documents
            ]
        self.write(*rows)

    def _profile(self, model: PreTrainedModel, step: int) -> dict[str, Any]:
        settings = self.study.evaluate
        ids = torch.from_numpy(self.corpus.passages(settings.passages, settings.passage_tokens).astype(np.int64))
        try:
            return measure(model, input_ids=ids, tokens=settings.passage_tokens).to_row()
        except ValueError as error:
            raise Diverged(f"step {step}: {error}") from error

    def diverged(self, model: PreTrainedModel, step: int, loss: float) -> Diverged:
        """Say at which step the loss stopped being a number, and in which layer when the states tell."""
        try:
            self._profile(model, step)
        except Diverged as error:
            return error
        return Diverged(f"step {step}: the training loss is {loss}, though the hidden states are finite.")


@contextlib.contextmanager
def _claim(folder: Path) -> Iterator[None]:
    """Own the cell while the block runs. The lock is the operating system's: it goes when the process does."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CellBusy(f"{folder}: another process is training this cell.") from error
        except OSError as error:
            error.filename = error.filename or f"{folder / 'lock'} (a file system without locks? choose another one)"
            raise
        yield


def _rows_there(cell: _Cell) -> list[Row]:
    """The rows of a cell. A damaged file is set aside and named: the cell then starts again."""
    if not cell.rows_path.exists():
        return []
    try:
        return read_rows(cell.rows_path)
    except RecordError as error:
        if is_main_process():
            cell.rows_path.replace(cell.rows_path.with_suffix(".damaged"))
        cell.ignored.append(f"{error} The file is kept as {cell.rows_path.stem}.damaged and the run starts again.")
        return []


def run_cell(
    study: StudyConfig,
    arm: ArmConfig,
    seed: int,
    corpus: PackedCorpus,
    folder: Path,
    *,
    retry_failed: bool = False,
    watch: Callable[[], None] | None = None,
    prepared: Mapping[str, Path] | None = None,
) -> Row:
    """Train one arm with one seed, from where it was left, and return its terminal run row.

    Args:
        study: the whole study; its fingerprint goes into every row.
        arm: one of the study's arms, with the learning rate that the sweep chose for it.
        seed: one of the study's seeds: it alone decides the initial weights and the order of the data.
        corpus: the prepared text.
        folder: the cell's own folder.
        retry_failed: start a failed cell again instead of returning its row.
        watch: called whenever rows are written; it may raise to stop the run where it can be resumed.
        prepared: directories of the study's prepared models, by name.

    Raises:
        CellBusy: another process holds the cell.
        ConfigError: the configuration cannot be run here.
        OSError: rows or checkpoints cannot be written; what was written stays valid.
    """
    with contextlib.ExitStack() as stack:
        if is_main_process():
            stack.enter_context(_claim(folder))
        cell = _Cell(study, arm, seed, corpus, folder, watch or (lambda: None), prepared or {})
        rows = _rows_there(cell)
        foreign = [row for row in rows if any(row[key] != value for key, value in cell.identity.items())]
        if foreign:
            raise ConfigError(
                f"{cell.rows_path} holds rows of another run ({foreign[0]['study']!r}); choose another directory."
            )
        ended = terminal_row(rows)
        repeated = retry_failed and ended is not None and ended["status"] == "failed"
        # rows of a setting that a repeated trial no longer chooses: seeds of an arm must not train at different ones
        other = [row for row in rows if row["kind"] == "run" and not arm.untrained and cell.differs(row)]
        if ended is not None and not repeated and not other:
            return ended
        if ended is not None or other:
            rows = []
            _discard_checkpoints(folder)
        if study.train.threads is not None and not torch.cuda.is_available():
            torch.set_num_threads(study.train.threads)
        try:
            row = _train(cell, rows)
        except (Diverged, torch.OutOfMemoryError) as error:
            # a result, not an accident: the same start would end here again
            reason = f"out of memory: {error}" if isinstance(error, torch.OutOfMemoryError) else str(error)
            row = make_row(
                "run",
                **cell.identity,
                status="failed",
                config=study.model_dump(mode="json"),
                steps=cell.steps,
                **({} if arm.untrained else cell.setting),
                error=reason,
                timing={"ignored_checkpoints": cell.ignored} if cell.ignored else {},
                provenance=provenance(device=_device_name()),
            )
        cell.write(*cell.benchmarks, row)
        _discard_checkpoints(folder)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # what comes next reads these rows on every rank
        return row


def _train(cell: _Cell, rows: list[Row]) -> Row:
    study, folder, train = cell.study, cell.folder, cell.train
    tokenizer = cell.corpus.tokenizer()
    seed_everything(cell.seed, "initial weights")
    model = build_model(cell.model, cell.corpus.vocabulary, train.sequence_tokens, tokenizer.eos_token_id)
    init_hash = hash_parameters(model)
    if cell.arm.untrained:
        return _as_it_is(cell, model, tokenizer, init_hash)
    order = cell.corpus.order(cell.seed, train.steps * train.batch_sequences, train.sequence_tokens)
    order_hash = cell.corpus.order_hash(order, train.sequence_tokens)
    described: dict[str, Any] = {
        **cell.identity,
        "config": study.model_dump(mode="json"),
        "init_hash": init_hash,
        "order_hash": order_hash,
        "corpus_hash": cell.corpus.content_hash,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": train.steps,
        "tokens": train.steps * cell.tokens_per_step,
        **cell.setting,
    }
    if cell.model.lora is not None and train.fsdp and world_size() > 1:
        raise ConfigError("train.fsdp with model.lora is not supported; adapters are small, use DDP (fsdp: false).")
    resume = _prepare_rows(cell, rows, described)

    seed_everything(cell.seed, "training")
    trainer = _StudyTrainer(
        model=model,
        args=_arguments(train, folder, cell.seed),
        train_dataset=_OrderedSequences(cell.corpus, order, train.sequence_tokens),
        processing_class=None,
    )
    for callback in list(trainer.callback_handler.callbacks):
        # the Trainer's own reporters write to the terminal; ours write rows
        if type(callback).__name__ in ("PrinterCallback", "ProgressCallback"):
            trainer.remove_callback(callback)
    if cell.arm.noisy_embedding is not None:
        rank = int(os.environ.get("RANK", "0"))
        trainer.add_callback(NoisyEmbedding(model, cell.arm.noisy_embedding, cell.seed, rank))
    if cell.arm.active_forgetting is not None:
        if cell.model.lora is not None:
            raise ConfigError(
                f"arm {cell.arm.name!r}: active forgetting trains the input embedding, which model.lora freezes; "
                "use one of them."
            )
        trainer.forgetting = ActiveForgetting(model, cell.arm.active_forgetting, cell.seed)
        trainer.add_callback(trainer.forgetting)
    if cell.distillation is not None:
        trainer.teacher = Teacher(cell.distillation, tokenizer)
    handle: DispersionHandle | None = None
    if cell.arm.dispersion is not None:
        handle = attach_trainer(trainer, config=cell.arm.dispersion)
    recorder = _Recorder(cell, trainer, model)
    trainer.add_callback(recorder)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    with _quiet():
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    wall = time.perf_counter() - began
    if handle is not None:
        handle.detach()

    if cell.model.lora is not None:
        model = model.merge_and_unload()  # type: ignore[operator]
    trained = _whole_state(model)
    final_hash = hash_parameters(trained)  # before saving, which empties the dictionary as it goes
    _keep(cell, model, tokenizer, trained)
    resumed = [row["timing"]["from_step"] for row in rows if row["kind"] == "run" and row["status"] == "resumed"]
    earlier = [
        reason for row in rows if row["kind"] == "run" for reason in row["timing"].get("ignored_checkpoints", ())
    ]
    cell.ignored = [*earlier, *cell.ignored]
    if resume is not None:
        resumed.append(int(resume.name.rsplit("-", 1)[1]))
    if is_main_process():
        # how often the run was interrupted is no result: it moves into the terminal row's timing
        write_rows(cell.rows_path, [row for row in read_rows(cell.rows_path) if row.get("status") != "resumed"])
    return make_row(
        "run",
        **described,
        status="finished",
        final_hash=final_hash,
        timing={
            "train_wall_s": wall,
            "step_wall_ms": 1e3 * median(recorder.step_wall) if recorder.step_wall else None,
            "step_cpu_ms": 1e3 * median(recorder.step_cpu) if recorder.step_cpu else None,
            "peak_rss_bytes": _peak_rss(),
            **_peak_cuda(),
            "resumed_from_steps": resumed,
            **({"ignored_checkpoints": cell.ignored} if cell.ignored else {}),
        },
        provenance=provenance(device=_device_name(), threads=torch.get_num_threads(), world_size=world_size()),
    )


def _as_it_is(cell: _Cell, model: PreTrainedModel, tokenizer: Any, init_hash: str) -> Row:
    """The arm that is not trained: its start, evaluated and kept like a trained model."""
    if is_main_process():
        write_rows(cell.rows_path, [])  # half an evaluation is done again as a whole
    described: dict[str, Any] = {
        **cell.identity,
        "config": cell.study.model_dump(mode="json"),
        "init_hash": init_hash,
        "corpus_hash": cell.corpus.content_hash,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": 0,
        "tokens": 0,
    }
    cell.write(make_row("run", **described, status="started", provenance=provenance(device=_device_name())))
    if torch.cuda.is_available():
        model.to("cuda")  # type: ignore[arg-type]
    cell.evaluate(model, 0)
    if cell.model.lora is not None:
        model = model.merge_and_unload()  # type: ignore[operator]
    _keep(cell, model, tokenizer, model.state_dict())
    return make_row(
        "run",
        **described,
        status="finished",
        final_hash=init_hash,
        provenance=provenance(device=_device_name(), threads=torch.get_num_threads(), world_size=world_size()),
    )


def _unless_stopped(watch: Callable[[], None]) -> Callable[..., None]:
    """A progress of work without checkpoints: it is left at once when SIGUSR1 has come."""

    def progress(*_: object) -> None:
        watch()
        stop_if_requested()

    return progress


def _keep(cell: _Cell, model: PreTrainedModel, tokenizer: Any, trained: dict[str, Any]) -> None:
    """Write ``final/`` in one move, and score the study's benchmarks on it."""
    if not is_main_process() or cell.study.evaluate.held_out_part == "tuning":
        return  # a trial has said all it is for
    final, staging = cell.folder / "final", cell.folder / ".final"
    shutil.rmtree(staging, ignore_errors=True)
    with _quiet():
        model.save_pretrained(staging, state_dict=trained)  # safetensors
        tokenizer.save_pretrained(staging)
    shutil.rmtree(final, ignore_errors=True)
    staging.rename(final)
    cell.benchmarks = benchmark_rows(
        final,
        cell.study.evaluate,
        {**cell.identity, "step": cell.steps, "tokens": cell.steps * cell.tokens_per_step},
        cell.folder / "benchmarks",
        threads=cell.train.threads,
        progress=_unless_stopped(cell.watch),
    )


def measure_cell(study: StudyConfig, arm: ArmConfig, seed: int, folder: Path, watch: Callable[[], None]) -> Row:
    """One start of a measured study: its condensation on passages drawn with ``seed``, as rows like any cell's.

    Raises:
        CellBusy: another process holds the cell.
        ConfigError: the model or the text cannot be loaded.
    """
    assert study.measure is not None
    settings, start = study.measure, study.model_of(arm)
    assert start.start is not None
    path = folder / "rows.jsonl"
    identity = {"study": study.name, "study_fingerprint": study.fingerprint(), "arm": arm.name, "seed": seed}
    with _claim(folder):
        if path.exists() and (ended := terminal_row(read_rows(path))) is not None:
            return ended
        watch()
        texts = sample_passages(
            settings.dataset,
            count=settings.passages,
            words=settings.passage_words,
            seed=settings.passage_seed + seed * settings.passages,  # passage r draws with seed + r
        )
        model, tokenizer = load_model(start.start, revision=start.revision)
        if torch.cuda.is_available():
            model.to("cuda")
        profile = measure(
            model,
            tokenizer,
            texts,
            tokens=settings.tokens,
            histograms=settings.histograms,
            metrics=settings.metrics,
            logits=settings.logits,
            batch_size=settings.batch_size,
            progress=_unless_stopped(watch),
        )
        ended = make_row(
            "run",
            **identity,
            status="finished",
            config=study.model_dump(mode="json"),
            parameters=sum(p.numel() for p in model.parameters()),
            steps=0,
            tokens=0,
            provenance=provenance(device=_device_name()),
        )
        write_rows(path, [make_row("profile", **identity, step=0, tokens=0, **profile.to_row()), ended])
        profile.save(folder / "profile", sums="averaged" in settings.histograms)
        return ended


def _peak_cuda() -> dict[str, int]:
    return {"peak_cuda_bytes": torch.cuda.max_memory_allocated()} if torch.cuda.is_available() else {}


def _whole_state(model: PreTrainedModel) -> dict[str, Any]:
    """The model's parameters and buffers, gathered from all ranks where FSDP has sharded them. Every rank must call."""
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return model.state_dict()
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def _prepare_rows(cell: _Cell, rows: list[Row], described: dict[str, Any]) -> Path | None:
    """Bring the rows to the state of the checkpoint to go on from, and return its folder (None: start afresh)."""
    newest, ignored = checkpoints.newest(cell.folder, cell.rows_path)
    started = [row for row in rows if row["kind"] == "run" and row["status"] == "started"]
    instead = "the run starts again" if newest is None or not started else f"the run resumes from step {newest.step}"
    cell.ignored += [f"{reason}; {instead}." for reason in ignored]
    for reason in cell.ignored if is_main_process() else ():
        print(f"{cell.folder}: {reason}", file=sys.stderr)
    if newest is None or not started:
        _discard_checkpoints(cell.folder)
        if is_main_process():
            write_rows(
                cell.rows_path,
                [
                    make_row(
                        "run",
                        **described,
                        status="started",
                        timing={"ignored_checkpoints": cell.ignored} if cell.ignored else {},
                        provenance=provenance(device=_device_name()),
                    )
                ],
            )
        return None
    step, path = newest
    for key in ("init_hash", "order_hash", "corpus_hash"):
        if started[0][key] != described[key]:
            raise ConfigError(
                f"{cell.folder} cannot be resumed: its {key} was {started[0][key]} and is now {described[key]} "
                "(another version of torch, transformers or of the text?). Start again in another directory."
            )
    kept = [row for row in rows if row["kind"] == "run" or row["step"] <= step]
    told = {"ignored_checkpoints": cell.ignored} if cell.ignored else {}
    marker = make_row("run", **described, status="resumed", timing={"from_step": step, **told}, provenance=provenance())
    if is_main_process():
        checkpoints.discard(cell.folder, keep=path)  # those that cannot be used would be in the way of new ones
        write_rows(cell.rows_path, [*kept, marker])
    return path


def _discard_checkpoints(folder: Path) -> None:
    if is_main_process():
        checkpoints.discard(folder)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The Trainer warns about what is meant here (no tokenizer, aligned special tokens); keep the terminal readable."""
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


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _peak_rss() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
