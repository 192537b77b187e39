"""The callback that writes a cell's rows while the Trainer runs."""

from __future__ import annotations

import math
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from decondense.layers import parse
from decondense.records import make_row
from decondense.stopping import SAVE_FIRST, Stopped, save_requested
from decondense.training import checkpoints
from decondense.training.cell import Cell
from decondense.training.trainer import StudyTrainer, is_main_process, world_size


class Recorder(TrainerCallback):
    """Writes the rows of a cell: training metrics when the Trainer logs, evaluations at the study's points."""

    def __init__(self, cell: Cell, trainer: StudyTrainer, model: PreTrainedModel) -> None:
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
        """Evaluate the start."""
        if state.global_step == 0 and 0 in self.due:
            self.cell.evaluate(self.model, 0)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clocks."""
        self._began = (time.perf_counter(), time.process_time())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop the clocks; evaluate where the study has a point."""
        self.step_wall.append(time.perf_counter() - self._began[0])
        self.step_cpu.append(time.process_time() - self._began[1])
        self.since_log += 1
        if state.global_step >= state.max_steps:
            control.should_log = True
        self.cell.check_there()
        # on a logged step only: a logged value is a mean since the last one, and a resumed run knows no half of it
        if state.global_step % args.logging_steps == 0 and self._must_save():
            control.should_save = True
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
        """Write a step's row, or stop a run whose loss is NaN or infinite."""
        if logs is None or "loss" not in logs or not self.trainer.losses:
            return  # the summary at the end of training
        losses = {name: self._mean(total) for name, total in self.trainer.losses.items()}
        wall, cpu = self.step_wall[-self.since_log :], self.step_cpu[-self.since_log :]
        self.trainer.losses, self.since_log = {}, 0
        if not math.isfinite(losses["loss"]) or not math.isfinite(float(logs["loss"])):
            raise self.cell.diverged(self.model, state.global_step, losses["loss"])
        norm = float(logs.get("grad_norm", math.nan))
        self.cell.write(
            make_row(
                "step",
                **self.cell.identity,
                step=state.global_step,
                tokens=state.global_step * self.cell.tokens_per_step,
                **losses,
                learning_rate=float(logs["learning_rate"]),
                gradient_norm=norm if math.isfinite(norm) else None,
                dispersion=logs.get("dispersion"),
                dispersion_weight=logs.get("dispersion_weight"),
                dispersion_weights=_by_layer(logs, "dispersion_weight"),
                dispersion_cosines=_by_layer(logs, "dispersion_cosine"),
                timing={"step_wall_ms": 1e3 * median(wall), "step_cpu_ms": 1e3 * median(cpu)},
            )
        )

    def _mean(self, total: torch.Tensor) -> float:
        """Mean over the ranks and over the steps since the last logged row."""
        if world_size() > 1:
            torch.distributed.all_reduce(total)
            total = total / world_size()
        return float(total) / self.since_log

    def _must_save(self) -> bool:
        """Whether SIGUSR1 has come, on any rank: all of them save, or none."""
        if world_size() == 1:
            return save_requested()
        asked = torch.tensor(float(save_requested()), device=self.trainer.args.device)
        torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
        self.stopping = bool(asked)
        return self.stopping

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Mark the checkpoint as complete."""
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


def _by_layer(logs: dict[str, Any], name: str) -> dict[str, float] | None:
    """The logged values ``name/LAYER`` by the layers' labels; None: there are none."""
    values = {key.removeprefix(f"{name}/"): value for key, value in logs.items() if key.startswith(f"{name}/")}
    return {parse(layer).label: value for layer, value in values.items()} or None
