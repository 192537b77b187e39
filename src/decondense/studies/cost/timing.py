"""Seconds of a training step and of an evaluation, timed on this machine."""

from __future__ import annotations

import math
import time
from statistics import median
from typing import Any

from decondense.config import DispersionConfig
from decondense.studies.cost.flops import training_flops
from decondense.studies.cost.runs import Run
from decondense.studies.cost.sizes import Models, Size

SMALL_STEP = 3e12
"""An optimizer step with fewer operations is timed instead of estimated."""
_TIMED_PASS = 2.5e10
"""Maximum operations of a timed pass on a CPU; a larger batch is timed on some of its sequences."""


class Timer:
    """Times one step of each distinct model and batch, within a budget of seconds."""

    def __init__(self, models: Models, budget: float) -> None:
        self.models, self.budget = models, budget
        self.until = math.inf
        self.steps: dict[str, float] = {}
        """Seconds per step, by what was timed."""
        self.speeds: list[tuple[float, float]] = []
        """(operations per step, operations per second) of what was timed."""
        self.parts, self.carried = False, False

    def seconds(self, run: Run, size: Size, plain: float, extra: float, share: float) -> float | None:
        """Seconds of one run; None: its steps are too large to be timed here, or its model is unknown."""
        train = run.train
        step = training_flops(size, train.batch_size * train.max_seq_length, train.max_seq_length)
        if math.isnan(plain) or step >= SMALL_STEP or size.note:
            return None
        alone = self._step(run, size, step, None)
        speed = step / alone if alone else self._speed(step)
        if speed is None:
            return None
        dispersion = None if run.arm is None else run.arm.dispersion
        if dispersion is None or not extra:
            return plain / speed
        both = self._step(run, size, step, dispersion) if alone else None
        # pairs are not computed at the speed of large products, so the loss is timed too where there is time for it
        more = extra / speed if both is None or alone is None else run.steps * share * max(0.0, both - alone)
        return plain / speed + more

    def how(self) -> str:
        """How the times were found, in words."""
        if not self.steps:
            return ""
        words = "timed on this machine"
        if self.parts:
            words += ", on part of the batch"
        if self.carried:
            words += ", other runs estimated at the same speed"
        return words

    def _speed(self, step: float) -> float | None:
        """The speed at which the model nearest in size was timed."""
        if not self.speeds:
            return None
        self.carried = True
        return min(self.speeds, key=lambda pair: abs(math.log(pair[0] / step)))[1]

    def _step(self, run: Run, size: Size, flops: float, dispersion: DispersionConfig | None) -> float | None:
        model = self.models.resolved(run.model)
        plain = (
            None if dispersion is None else dispersion.model_dump_json(exclude={"schedule", "seed", "target", "weight"})
        )
        key = " ".join(
            [
                model.model_dump_json(exclude={"lora", "parameters"}),
                run.train.model_dump_json(
                    include={"batch_size", "micro_batch_size", "max_seq_length", "optimizer", "precision", "threads"}
                ),
                str(plain),
            ]
        )
        if key in self.steps:
            return self.steps[key]
        if time.monotonic() > self.until:
            return None
        if math.isinf(self.until):  # loading torch and the architectures is not counted
            self.until = time.monotonic() + self.budget
        found = self._measured(run, flops, dispersion)
        if found is not None:
            self.steps[key] = found
            if dispersion is None:
                self.speeds.append((flops, flops / found))
        return found

    def _measured(self, run: Run, flops: float, dispersion: DispersionConfig | None) -> float | None:
        import torch

        from decondense.attaching import attach
        from decondense.config import WeightSchedule
        from decondense.seeding import generator
        from decondense.training.muon import optimizer_of

        if dispersion is not None and dispersion.loss.info.teacher:
            return None  # the teacher may not be there yet
        train = run.train
        cuda = torch.cuda.is_available()
        device = torch.device("cuda" if cuda else "cpu")
        micro = min(train.micro_batch_size or train.batch_size, train.batch_size)
        most = _TIMED_PASS * (100 if cuda else 1)
        sequences = max(1, min(micro, int(most * train.batch_size / flops)))
        self.parts |= sequences < micro
        threads = torch.get_num_threads()
        if train.threads is not None and not cuda:
            torch.set_num_threads(train.threads)
        try:
            with device:
                model: Any = self.models.build(self.models.resolved(run.model), train.max_seq_length)
            if model is None:
                return None
            model = model.to(torch.float32)
            model.config.use_cache = False
            model.train()
            if train.gradient_checkpointing:
                model.gradient_checkpointing_enable()
            if dispersion is not None:
                attach(model, config=dispersion.model_copy(update={"schedule": WeightSchedule(), "target": None}))
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters())
            if train.optimizer == "muon":
                optimizer = optimizer_of(model, train, ())
            vocabulary = int(model.config.get_text_config().vocab_size)
            shape = (sequences, train.max_seq_length)
            ids = torch.randint(vocabulary, shape, generator=generator(0, "estimate")).to(device)
            passes: list[float] = []
            updates: list[float] = []
            for number in range(5):
                began = _clock(cuda)
                with torch.autocast(device.type, torch.bfloat16, enabled=train.precision == "bf16"):
                    loss = model(input_ids=ids, labels=ids).loss
                loss.backward()
                middle = _clock(cuda)
                optimizer.step()
                optimizer.zero_grad()
                passes.append(middle - began)
                updates.append(_clock(cuda) - middle)
                if number and time.monotonic() > self.until:
                    break  # slow: the first pass warmed up, the others count
        finally:
            torch.set_num_threads(threads)
        warm = min(2, len(passes) - 1)
        return median(passes[warm:]) * train.batch_size / sequences + median(updates[warm:])


def _clock(cuda: bool) -> float:
    if cuda:
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()
