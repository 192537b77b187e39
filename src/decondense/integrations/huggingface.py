r"""The transformers ``Trainer`` and trainers built on it (TRL's ``SFTTrainer``).

:func:`attach_trainer` adds the loss around ``trainer.compute_loss``, with the divisor that makes one optimizer step the
gradient of

.. math:: L_{CE} + \lambda \, \frac{1}{S} \sum_{s=1}^{S} D_s

over all S sequences of the step, in all micro-batches and on all ranks. A term that is simply added to ``outputs.loss``
is (accumulation steps x ranks) times too large, because the Trainer does not divide a loss that the model has already
divided by ``num_items_in_batch``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from decondense.attaching import AttachError, DispersionHandle, attach, attached
from decondense.attaching.target import world_size
from decondense.blocks import unwrap
from decondense.config import DispersionConfig
from decondense.integrations.plain_loss import KeepPlainLoss, PlainLoss, keep_plain_loss


def attach_trainer(trainer: Any, *arguments: Any, **keywords: Any) -> DispersionHandle:
    """Add the dispersion loss to the training of a transformers or TRL trainer.

    Args:
        trainer: A ``transformers.Trainer`` or ``trl.SFTTrainer``, before ``train()``.
        *arguments: As for :func:`decondense.attach`: ``weight``, ``layers``.
        **keywords: As for :func:`decondense.attach`: ``config``, ``schedule``, ``form``, ``tau``, ...

    Returns:
        The handle. The values are logged through ``trainer.log`` together with ``loss``: ``loss`` includes the weighted
        term, ``cross_entropy`` is the trainer's own loss without it, reduced in the same way. The schedule follows the
        trainer's steps, and checkpoints store the settings. ``handle.detach()`` restores the trainer.

    Raises:
        AttachError: the gradient would not be exact: ``nn.DataParallel``, tensor or context parallelism, trainers that
            run the model twice for one loss (DPO, GRPO).

    Exact for any number of sequences per micro-batch and rank, for packed sequences (a document counts as a sequence),
    with ``average_tokens_across_devices`` on or off, with label smoothing and with ``compute_loss_func``. A run that
    ``auto_find_batch_size`` restarts counts from its own first step.
    """
    _refuse(trainer)
    return _TrainerHandle(trainer, attach(trainer.model, *arguments, **keywords)).handle


class _TrainerHandle:
    """Connects one handle to one trainer: wraps three methods of this instance, and unwraps them again."""

    def __init__(self, trainer: Any, handle: DispersionHandle) -> None:
        self.trainer, self.handle = trainer, handle
        handle.defer = True
        self.sequences: Tensor | None = None  # of the whole optimizer step, over all ranks
        self.expected = self.seen = torch.zeros(())
        self.plain = PlainLoss(trainer.args.device)
        self.reduce = partial(_sum_over_ranks, device=trainer.args.device)
        self.run: Any = None  # the state object of the run: the Trainer makes a new one at each start
        self.logged_step = 0
        self.callback = DispersionState(handle)
        trainer.add_callback(self.callback)
        self.wrapped = {name: trainer.__dict__.get(name) for name in ("compute_loss", "get_batch_samples", "log")}
        self.compute_loss = self.wrap("compute_loss", self.add_to_loss)
        self.get_batch_samples = self.wrap("get_batch_samples", self.count_step)
        self.log = self.wrap("log", self.add_to_log)
        handle.on_detach(self.unwrap)

    def wrap(self, name: str, replacement: Callable[..., Any]) -> Callable[..., Any]:
        original: Callable[..., Any] = getattr(self.trainer, name)
        setattr(self.trainer, name, replacement)
        return original

    def unwrap(self) -> None:
        for name, previous in self.wrapped.items():
            if previous is None:
                self.trainer.__dict__.pop(name, None)
            else:
                setattr(self.trainer, name, previous)
        self.trainer.remove_callback(self.callback)

    def follow(self) -> None:
        """Move the weight schedule to the trainer's step."""
        state = self.trainer.state
        self.handle.set_progress(state.global_step, max(state.max_steps, 1))

    def restart(self) -> None:
        """Reset for a new run: the first one, or another attempt after running out of memory."""
        self.run = self.trainer.state
        self.logged_step = self.run.global_step
        self.expected, self.seen = torch.zeros_like(self.expected), torch.zeros_like(self.seen)
        self.plain.reset()
        self.handle.restart()
        resume(self.handle, self.run)

    def count_step(self, *arguments: Any, **keywords: Any) -> Any:
        """Count the sequences of an optimizer step over all ranks, once the trainer has its micro-batches."""
        batches, items = self.get_batch_samples(*arguments, **keywords)
        self.sequences = None
        if self.run is not self.trainer.state:
            self.restart()
        self.follow()
        if self.handle.is_off or not batches:
            return batches, items
        counts = [1 if self.handle.counts_batches else self.handle.count_sequences(_mapping(b)) for b in batches]
        device = self.trainer.args.device
        count = torch.stack([torch.as_tensor(count, device=device) for count in counts]).sum().float()
        self.expected = self.expected.to(device) + count
        self.sequences = self.reduce(count)
        return batches, items

    def add_to_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **keywords: Any
    ) -> Any:
        trainer, handle = self.trainer, self.handle
        if model.training:
            self.follow()
        handle.take_sum_and_count()
        before = handle.training_forwards
        result = self.compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch, **keywords
        )
        taken = handle.take_sum_and_count()
        loss = result[0] if return_outputs else result
        trains = model.training and torch.is_grad_enabled()
        steps = getattr(trainer, "current_gradient_accumulation_steps", 1)
        divided_later = 1 if self.is_scaled(num_items_in_batch) else steps
        if trains:
            self.plain.add(loss, 1 / divided_later)
        if taken is None:
            if trains and not handle.is_off and handle.training_forwards == before:
                raise AttachError(
                    "the trainer computed a training loss without running the model that the dispersion loss is "
                    "attached to; attach after the trainer's model has been wrapped or replaced."
                )
            return result
        total, count = taken
        if handle.config.loss.pairs == "all":  # a random subset may hold no pair of a short sequence: that adds 0
            self.seen = self.seen.to(count.device) + count
        # the factors undo later steps: the mean of the gradients over ranks, the division of an unscaled loss
        if self.sequences is not None:
            share = total / self.sequences.clamp(min=1).to(total.dtype) * (world_size() * divided_later)
        else:  # training_step called directly: only one micro-batch is known
            share = total / count.clamp(min=1) * (divided_later / steps)
        extra = handle.weighted(share)
        handle.measure_gradient_ratio(loss, extra)
        loss = loss + extra
        return (loss, result[1]) if return_outputs else loss

    def is_scaled(self, num_items_in_batch: Any) -> bool:
        """Whether ``training_step`` treats the loss as already divided: the rule of transformers."""
        trainer = self.trainer
        declared = getattr(trainer, "loss_is_scaled_for_ga", None)
        if declared is not None:
            return bool(declared)
        by_model = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
        return bool(by_model or trainer.compute_loss_func is not None)

    def add_to_log(self, logs: dict[str, float], *arguments: Any, **keywords: Any) -> Any:
        if "loss" in logs:
            self.check_counts()
            steps = self.trainer.state.global_step - self.logged_step
            self.logged_step += steps
            logs = {**logs, **self.handle.pop(self.reduce), **_cross_entropy(self.plain, steps, self.reduce)}
        return self.log(logs, *arguments, **keywords)

    def check_counts(self) -> None:
        seen, expected = float(self.seen), float(self.expected)
        self.seen, self.expected = torch.zeros_like(self.seen), torch.zeros_like(self.expected)
        if seen and expected and seen != expected:
            raise AttachError(
                f"the batches of the last steps held {expected:g} sequences, but the model saw {seen:g}: the trainer "
                "changes its batches between fetching and the forward pass, so the mean over sequences would be wrong."
            )


class _EndsSteps(TrainerCallback, ExportableState):
    """A callback with a handle, whose state goes into the trainer's checkpoints."""

    handle: DispersionHandle | None
    saved: dict[str, Any] | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        """Move the weights by a target, before a checkpoint is saved."""
        if self.handle is not None:
            self.handle.end_step()


class DispersionState(_EndsSteps):
    """Stores the settings of the loss and the weights that a target moves in the trainer's checkpoints.

    It warns when a run resumes with other settings.
    """

    def __init__(self, handle: DispersionHandle | None = None) -> None:
        self.handle = handle

    def state(self) -> dict[str, Any]:
        """The state in the format of transformers' exportable callbacks."""
        return {"args": {}, "attributes": {"saved": None if self.handle is None else self.handle.state_dict()}}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **keywords: Any) -> None:
        """Compare with the settings of a checkpoint."""
        if self.handle is None and model is not None:  # rebuilt by the Trainer from the checkpoint
            self.handle = attached(model)
        saved = _saved(state)
        different = {} if self.handle is None or saved is None else self.handle.differences(saved)
        if different:
            warnings.warn(
                "the run resumes with a dispersion loss that differs from that of the checkpoint in these settings: "
                f"{', '.join(different)}.",
                stacklevel=2,
            )


def _saved(state: Any) -> dict[str, Any] | None:
    """The handle's state in the checkpoint from which a run resumes; None: it does not, or the loss was not there."""
    callbacks = state.stateful_callbacks if state.global_step else {}
    for name in (DispersionState.__name__, DispersionCallback.__name__):
        saved = ((callbacks.get(name) or {}).get("attributes") or {}).get("saved")
        if saved:
            return dict(saved)
    return None


def resume(handle: DispersionHandle, state: Any) -> None:
    """Give the handle the state of the checkpoint from which a run resumes, if its settings are the same."""
    saved = _saved(state)
    if saved is not None and not handle.differences(saved):
        handle.load_state_dict(saved)


class DispersionCallback(_EndsSteps):
    """For launchers that accept callbacks but hide the trainer (LLaMA-Factory). Attaches when training begins.

    Takes the arguments of :func:`decondense.attach`. The loss is added inside the model, which does not see the other
    micro-batches: exact if all micro-batches have the same number of sequences. With access to the trainer, prefer
    :func:`attach_trainer`, which is exact without this condition.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        if isinstance(keywords.get("config"), dict):  # rebuilt by the Trainer from a checkpoint
            keywords["config"] = DispersionConfig.parse(keywords["config"], where="DispersionCallback()")
        self.arguments, self.keywords = arguments, keywords
        self.handle = None
        self.plain = PlainLoss()
        self._logged_step = 0
        self._micro_batches = self._ranks = 1

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **keywords: Any) -> None:
        """Attach to the trained model; on another attempt after running out of memory, reset the counts."""
        if getattr(args, "n_gpu", 1) > 1:
            raise AttachError("nn.DataParallel is not supported; start with torchrun or accelerate launch.")
        if getattr(args, "label_smoothing_factor", 0):
            raise AttachError("label smoothing computes the loss outside the model; use attach_trainer(trainer).")
        self._logged_step = state.global_step
        if self.handle is not None and self.handle.is_attached and attached(model) is self.handle:
            self.plain.reset()
            self.handle.restart()
            resume(self.handle, state)
            return
        if self.handle is not None:
            self.handle.detach()
        self.plain = PlainLoss(args.device)
        self.handle = keep_plain_loss(
            unwrap(model), lambda: attach(model, *self.arguments, **self.keywords), KeepPlainLoss(self._keep)
        )
        resume(self.handle, state)

    def _keep(self, loss: Tensor, inputs: Mapping[str, Any]) -> None:
        """Scale as the Trainer later does: a divided loss is multiplied by the ranks, any other is divided."""
        scaled = inputs.get("num_items_in_batch") is not None
        self.plain.add(loss, self._ranks if scaled else 1 / self._micro_batches)

    def on_step_begin(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        """Move the weight schedule and set the number of micro-batches of this step."""
        if self.handle is None:
            return
        self.handle.set_progress(state.global_step, max(state.max_steps, 1))
        micro_batches = args.gradient_accumulation_steps
        loader = keywords.get("train_dataloader")
        if loader is not None and hasattr(loader, "__len__"):
            steps_of_epoch = -(-len(loader) // micro_batches)
            # the last step takes the remainder of the epoch
            if state.global_step % steps_of_epoch == steps_of_epoch - 1:
                micro_batches = len(loader) % micro_batches or micro_batches
        # with this setting the Trainer multiplies the whole loss by the number of ranks
        ranks = world_size() if getattr(args, "average_tokens_across_devices", False) else 1
        self._micro_batches, self._ranks = micro_batches, ranks
        self.handle.micro_batches = micro_batches * ranks

    def state(self) -> dict[str, Any]:
        """The handle's state, in the format of transformers' exportable callbacks."""
        if self.handle is None:
            return {"args": {}, "attributes": {}}
        saved = self.handle.state_dict()
        return {"args": {"config": saved["config"]}, "attributes": {"saved": saved}}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **keywords: Any) -> None:
        """Add the values to the log and its history. Callbacks that ran before this one do not see them."""
        if self.handle is not None and logs is not None and "loss" in logs:
            reduce = partial(_sum_over_ranks, device=args.device)
            steps, self._logged_step = state.global_step - self._logged_step, state.global_step
            values = {**self.handle.pop(reduce), **_cross_entropy(self.plain, steps, reduce)}
            logs.update(values)
            if state.log_history:
                state.log_history[-1].update(values)

    def on_train_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        """Detach."""
        if self.handle is not None:
            self.handle.detach()


def _sum_over_ranks(values: Tensor, device: torch.device) -> Tensor:
    if world_size() == 1:
        return values
    values = values.to(device)
    torch.distributed.all_reduce(values)
    return values


def _cross_entropy(plain: PlainLoss, steps: int, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """The mean over steps and ranks of the sum over micro-batches, as transformers computes ``loss``."""
    total, _ = plain.pop(reduce)
    return {"cross_entropy": total / (world_size() * steps)} if steps > 0 else {}


def _refuse(trainer: Any) -> None:
    if not hasattr(trainer, "compute_loss") or not hasattr(trainer, "get_batch_samples"):
        raise AttachError(
            f"attach_trainer() needs a transformers Trainer (4.46 or newer), got {type(trainer).__name__}; use "
            "attach(model) for other loops."
        )
    if trainer.args.n_gpu > 1:
        raise AttachError("nn.DataParallel is not supported; start with torchrun or accelerate launch.")
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    for kind in ("tp", "cp", "sp"):
        if getattr(parallel, f"{kind}_enabled", False):
            raise AttachError(
                f"{kind.upper()} parallelism is not supported, because a rank holds only part of a sequence or of a "
                "hidden state; use data parallelism (DDP, FSDP2, HSDP)."
            )


def _mapping(batch: Any) -> Mapping[str, Any]:
    if not isinstance(batch, Mapping):
        raise AttachError(
            f"the batches are {type(batch).__name__} objects; dispersion needs mappings with 'input_ids'."
        )
    return batch
