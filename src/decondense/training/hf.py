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
import resource
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from decondense.config import ArmConfig, ConfigError, StudyConfig
from decondense.corpora.packed import PackedCorpus
from decondense.evaluate import benchmark_rows
from decondense.models import build_model
from decondense.records import (
    RecordError,
    Row,
    make_row,
    provenance,
    read_rows,
    read_run,
    set_aside,
    terminal_row,
    write_rows,
)
from decondense.seeding import hash_parameters, seed_everything
from decondense.stopping import stop_if_requested
from decondense.tokenizers import vocabulary_of
from decondense.training import checkpoints
from decondense.training.cell import Cell, Diverged, device_name
from decondense.training.claim import CellBusy, claim
from decondense.training.recording import Recorder
from decondense.training.trainer import (
    OrderedSequences,
    StudyTrainer,
    is_main_process,
    quiet,
    training_arguments,
    whole_state,
    world_size,
)
from decondense.training.treatments import apply_treatments

__all__ = ["CellBusy", "Diverged", "build_model", "is_main_process", "run_cell", "world_size"]


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
    with_profile: bool = False,
) -> Row:
    """Train one arm with one seed, resuming if it was interrupted, and return its terminal run row.

    Args:
        study: the whole study; its fingerprint goes into every row.
        arm: one of the study's arms, with the learning rate that the sweep chose for it.
        seed: one of the study's seeds: it alone decides the initial weights and the order of the data.
        corpus: the prepared text.
        folder: the cell's own folder.
        retry_failed: start a failed cell again instead of returning its row.
        watch: called whenever rows are written; it may raise to stop the run where it can be resumed.
        prepared: directories of the study's prepared models, by name.
        with_profile: keep the trained model's profile in its directory, so that other arms can take a target from it.

    Raises:
        CellBusy: another process holds the cell.
        ConfigError: the configuration cannot be run here.
        OSError: rows or checkpoints cannot be written; what was written stays valid.
    """
    with contextlib.ExitStack() as stack:
        if is_main_process():
            stack.enter_context(claim(folder))
        cell = Cell(study, arm, seed, corpus, folder, watch or (lambda: None), prepared or {}, with_profile)
        rows = _existing_rows(cell)
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
                provenance=provenance(device=device_name()),
            )
        row = cell.end(row)
        _discard_checkpoints(folder)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # what comes next reads these rows on every rank
        return row


def _train(cell: Cell, rows: list[Row]) -> Row:
    study, folder, train = cell.study, cell.folder, cell.train
    tokenizer = cell.corpus.tokenizer()
    seed_everything(cell.seed, "initial weights")
    model = build_model(cell.model, vocabulary_of(tokenizer), train.max_seq_length, tokenizer.eos_token_id)
    init_hash = hash_parameters(model)
    if cell.arm.untrained:
        return _as_it_is(cell, model, tokenizer, init_hash)
    order = cell.corpus.order(cell.seed, train.steps * train.batch_size, train.max_seq_length)
    order_hash = cell.corpus.order_hash(order, train.max_seq_length)
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
        raise ConfigError("train.fsdp with model.lora is not supported; adapters are small, so use DDP (fsdp: false).")
    if train.optimizer == "muon" and train.fsdp and world_size() > 1:
        raise ConfigError(
            "train.fsdp with optimizer: muon is not supported, because a shard is not a whole matrix; use DDP."
        )
    resume = _prepare_rows(cell, rows, described)

    seed_everything(cell.seed, "training")
    trainer = StudyTrainer(
        model=model,
        args=training_arguments(train, folder, cell.seed),
        train_dataset=OrderedSequences(cell.corpus, order, train.max_seq_length),
        processing_class=None,
        train=train,
    )
    for callback in list(trainer.callback_handler.callbacks):
        # the Trainer's own reporters write to the terminal; ours write rows
        if type(callback).__name__ in ("PrinterCallback", "ProgressCallback"):
            trainer.remove_callback(callback)
    apply_treatments(trainer, model, cell)
    recorder = Recorder(cell, trainer, model)
    trainer.add_callback(recorder)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    with quiet():
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    wall = time.perf_counter() - began
    for treatment in trainer.treatments.values():
        treatment.close()

    if cell.model.lora is not None:
        model = model.merge_and_unload()  # type: ignore[operator]
    trained = whole_state(model)
    final_hash = hash_parameters(trained)  # before saving, which empties the dictionary as it goes
    _keep(cell, model, tokenizer, trained)
    resumed = [row["timing"]["from_step"] for row in rows if row["kind"] == "run" and row["status"] == "resumed"]
    if resume is not None:
        resumed.append(int(resume.name.rsplit("-", 1)[1]))
    earlier = [
        reason for row in rows if row["kind"] == "run" for reason in row["timing"].get("ignored_checkpoints", ())
    ]
    cell.ignored = [*earlier, *cell.ignored]
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
        provenance=provenance(device=device_name(), threads=torch.get_num_threads(), world_size=world_size()),
    )


def _as_it_is(cell: Cell, model: PreTrainedModel, tokenizer: Any, init_hash: str) -> Row:
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
    timing = _tell_ignored(cell)
    started = make_row("run", **described, status="started", timing=timing, provenance=provenance(device=device_name()))
    cell.write(started)
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
        timing=timing,
        provenance=provenance(device=device_name(), threads=torch.get_num_threads(), world_size=world_size()),
    )


def _keep(cell: Cell, model: PreTrainedModel, tokenizer: Any, trained: dict[str, Any]) -> None:
    """Write ``final/`` in one move, and score the study's benchmarks on it."""
    profile = cell.profile(model) if cell.with_profile else None  # every rank: parameters may be sharded
    if not is_main_process() or cell.study.evaluate.held_out_part == "tuning":
        return  # a trial has said all it is for
    final, staging = cell.folder / "final", cell.folder / ".final"
    shutil.rmtree(staging, ignore_errors=True)
    with quiet():
        model.save_pretrained(staging, state_dict=trained)  # safetensors
        tokenizer.save_pretrained(staging)
    if profile is not None:
        profile.save(staging / "profile")
    shutil.rmtree(final, ignore_errors=True)
    staging.rename(final)

    def progress(*_: Any) -> None:
        cell.watch()
        stop_if_requested()

    cell.benchmarks = benchmark_rows(
        final,
        cell.study.evaluate,
        {**cell.identity, "step": cell.steps, "tokens": cell.steps * cell.tokens_per_step},
        cell.folder / "benchmarks",
        threads=cell.train.threads,
        progress=progress,
    )


def _existing_rows(cell: Cell) -> list[Row]:
    """The rows of a cell. A damaged file is set aside and named: the cell then starts again."""
    if not cell.rows_path.exists():
        return []
    try:
        return read_run(cell.rows_path)
    except RecordError as error:
        if is_main_process():  # which alone tells what it ignored
            reason = str(error).replace(str(cell.rows_path), cell.rows_path.name)  # rows name no folder of this machine
            cell.ignored.append(f"{reason} {set_aside(cell.rows_path)} and the run starts again.")
        return []


def _discard_checkpoints(folder: Path) -> None:
    if is_main_process():
        checkpoints.discard(folder)


def _prepare_rows(cell: Cell, rows: list[Row], described: dict[str, Any]) -> Path | None:
    """Bring the rows to the state of the checkpoint to go on from, and return its folder (None: start afresh)."""
    newest, ignored = checkpoints.newest(cell.folder, cell.rows_path)
    started = [row for row in rows if row["kind"] == "run" and row["status"] == "started"]
    instead = "the run starts again" if newest is None or not started else f"the run resumes from step {newest.step}"
    cell.ignored += [f"{reason}; {instead}." for reason in ignored]
    timing = _tell_ignored(cell)
    if newest is None or not started:
        _discard_checkpoints(cell.folder)
        if is_main_process():
            row = make_row(
                "run", **described, status="started", timing=timing, provenance=provenance(device=device_name())
            )
            write_rows(cell.rows_path, [row])
        return None
    step, path = newest
    for key in ("init_hash", "order_hash", "corpus_hash"):
        if started[0][key] != described[key]:
            raise ConfigError(
                f"{cell.folder} cannot be resumed: its {key} was {started[0][key]} and is now {described[key]} (has "
                "the version of torch, of transformers or of the text changed?). Start again in another directory."
            )
    kept = [row for row in rows if row["kind"] == "run" or row["step"] <= step]
    timing = {"from_step": step, **timing}
    marker = make_row("run", **described, status="resumed", timing=timing, provenance=provenance())
    if is_main_process():
        checkpoints.discard(cell.folder, keep=path)  # those that cannot be used would be in the way of new ones
        write_rows(cell.rows_path, [*kept, marker])
    return path


def _tell_ignored(cell: Cell) -> dict[str, Any]:
    """Print what could not be used, and return it for the timing of the run's rows."""
    for reason in cell.ignored if is_main_process() else ():
        print(f"{cell.folder}: {reason}", file=sys.stderr)
    return {"ignored_checkpoints": cell.ignored} if cell.ignored else {}


def _peak_cuda() -> dict[str, int]:
    return {"peak_cuda_bytes": torch.cuda.max_memory_allocated()} if torch.cuda.is_available() else {}


def _peak_rss() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
