r"""Watch condensation while a model trains: exact means from the hidden states that the training pass computes anyway.

On one forward pass every few steps, hooks on the blocks reduce each state to its mean cosine
:math:`\lvert \frac1N \sum_i \hat z_i \rvert^2` (no pairs, O(N D)) and its mean norm, without gradients, without a
second forward pass, without random numbers. In training mode the states are those with dropout, as the optimizer sees
them.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from decondense.blocks import find_blocks
from decondense.geometry import inverse_norm
from decondense.layers import EMBEDDING, Layer, block, deep_half
from decondense.layout import Call, StateReader, hidden_state
from decondense.measuring.alarm import GRACE, PATIENCE, PREFIX, Action, Alarm
from decondense.measuring.depth import spearman
from decondense.measuring.states import StateError, first_state
from decondense.measuring.statistics import exact_matmul
from decondense.sequences import SequencesError

if TYPE_CHECKING:
    from transformers import TrainerCallback
else:
    try:
        from transformers import TrainerCallback
    except ImportError:  # the watch and the Lightning callback work without transformers
        TrainerCallback = object


def batch_means(
    z_BTD: Tensor, mask_BT: Tensor | None = None, segments_BT: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""Mean cosine and mean norm of a batch, as 0-dim float64 tensors.

    Per sequence of N real tokens :math:`\mu = \lvert \sum_i \hat z_i \rvert^2 / N^2` (diagonal included), then the mean
    over sequences with at least two tokens. Padding (``mask_BT`` 0) counts for nothing; each document of a packed row
    (``segments_BT``, its number from 0) is a sequence.
    """
    z_BTD = z_BTD.detach()
    if z_BTD.dtype not in (torch.float32, torch.float64):
        z_BTD = z_BTD.float()
    wide = torch.float32 if z_BTD.device.type == "mps" else torch.float64
    with torch.no_grad(), exact_matmul(z_BTD.device):
        scale_BT, norm_BT = inverse_norm(z_BTD)
        if mask_BT is None:
            tokens_B = torch.full((z_BTD.shape[0],), z_BTD.shape[1], dtype=wide, device=z_BTD.device)
            norm_sum_B = norm_BT.sum(dim=1, dtype=wide)
        else:
            real_BT = mask_BT.to(device=z_BTD.device, dtype=torch.bool)
            scale_BT = torch.where(real_BT, scale_BT, torch.zeros_like(scale_BT))
            tokens_B = real_BT.sum(dim=1).to(wide)
            norm_sum_B = torch.where(real_BT, norm_BT, torch.zeros_like(norm_BT)).sum(dim=1, dtype=wide)
        if segments_BT is None:
            # the sum of unit vectors as a product: one pass over the states instead of three
            sum_SD = torch.bmm(scale_BT[:, None], z_BTD)[:, 0].to(wide)
            tokens_S = tokens_B
        else:
            segments_BT = segments_BT.to(z_BTD.device)
            documents = int(segments_BT.max()) + 1
            place_BT = segments_BT + documents * torch.arange(len(z_BTD), device=z_BTD.device)[:, None]
            unit_BTD = z_BTD.to(wide) * scale_BT.to(wide)[..., None]
            empty = torch.zeros(documents * len(z_BTD), dtype=wide, device=z_BTD.device)
            sum_SD = empty[:, None].repeat(1, z_BTD.shape[-1]).index_add(0, place_BT.flatten(), unit_BTD.flatten(0, 1))
            real = torch.ones_like(norm_BT) if mask_BT is None else real_BT
            tokens_S = empty.index_add(0, place_BT.flatten(), real.flatten().to(wide))
        mu_S = sum_SD.square().sum(dim=-1) / tokens_S.clamp_min(1) ** 2
        counted_S = tokens_S >= 2
        cosine = torch.where(counted_S, mu_S, torch.zeros_like(mu_S)).sum() / counted_S.sum().clamp_min(1)
        norm = norm_sum_B.sum() / tokens_B.sum().clamp_min(1)
    return cosine, norm


class CondensationWatch:
    """Per-layer mean cosine, Spearman and norms of a training model, for any loop.

    Padding, documents of packed rows and the axis of the tokens are read as :func:`decondense.attach` reads them; what
    cannot be determined raises :class:`decondense.sequences.SequencesError`.

    Use as a context manager, or :meth:`close` it. Call :meth:`arm` before a forward pass that should be watched (or
    give ``every`` and call :meth:`step` after each optimizer step), and :meth:`read` the numbers afterwards::

        with CondensationWatch(model, every=50) as watch:
            for batch in batches:
                loss = model(**batch).loss
                ...
                if numbers := watch.step():
                    tracker.log(numbers)
                if watch.should_stop:
                    break

    ``alarm``, ``action``, ``patience`` and ``grace`` are those of :class:`decondense.measuring.Alarm`. In distributed
    training each process watches its own batches: agree on ``should_stop`` before any of them breaks.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int = 50,
        blocks: str | None = None,
        tokens_first: bool | None = None,
        alarm: Mapping[str, float] | None = None,
        action: Action = "warn",
        patience: int = PATIENCE,
        grace: int = GRACE,
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1 step, got {every}.")
        self.every = every
        self._alarm = None if alarm is None else Alarm(alarm, action, patience=patience, grace=grace)
        found = find_blocks(model, blocks)
        self._reader = StateReader(found, tokens_first)
        self._steps = 0
        self._armed = True
        self._owner: nn.Module | None = None
        self._call: Call | None = None
        self._sequences: tuple[Tensor | None, Tensor | None] | None = None  # of this pass: real tokens, documents
        self._pending: dict[Layer, tuple[Tensor, Tensor]] = {}
        if self._alarm is not None:
            states = [EMBEDDING, *(block(number) for number in range(1, len(found.modules) + 1))]
            self._alarm.check(_numbers(states, [(0.0, 0.0)] * len(states), every_key=True))
        parts = found.path.split(".")
        # whichever of them is called first owns the pass: Lightning calls the model inside the module, not the module
        owners = [found.root.get_submodule(".".join(parts[:end])) for end in range(len(parts))]
        self._handles = [
            *(owner.register_forward_pre_hook(self._begin, with_kwargs=True) for owner in owners),
            found.modules[0].register_forward_pre_hook(self._entry, with_kwargs=True),
            *(block.register_forward_hook(self._block) for block in found.modules),
            *(owner.register_forward_hook(self._end, always_call=True) for owner in owners),
        ]

    def arm(self) -> None:
        """Watch the next forward pass in training mode."""
        self._armed = True

    def step(self) -> dict[str, float]:
        """Call after each optimizer step. Returns the numbers of the watched pass, if there was one; arms every
        ``every`` steps."""
        self._steps += 1
        numbers = self.read(self._steps)
        if self._steps % self.every == 0:
            self.arm()
        return numbers

    @property
    def should_stop(self) -> bool:
        """Whether an alarm with ``action="stop"`` was raised."""
        return self._alarm is not None and self._alarm.should_stop

    def read(self, step: int | None = None) -> dict[str, float]:
        """The numbers of the last watched pass, returned once; empty if there was none since the last call.

        Keys: ``condensation/mean_cosine/embedding``, ``.../block_01`` and on, ``condensation/norm/...``,
        ``condensation/mean_cosine`` (mean over blocks), ``condensation/deep_half`` (mean over the last L/2 of them) and
        ``condensation/spearman``; ``condensation/alarm`` at the reading that raises an alarm. The states are those of
        the residual stream: the last one is taken before the final norm.

        Args:
            step: optimizer step of the reading, for the alarm; None: the number of calls of :meth:`step`.

        Raises:
            ValueError: there is an alarm, and no step was given or counted.
        """
        if not self._pending or self._owner is not None:
            return {}
        values = torch.stack([torch.stack(pair) for pair in self._pending.values()]).tolist()
        layers, self._pending = list(self._pending), {}
        numbers = _numbers(layers, values)
        if self._alarm is not None:
            step = step or self._steps
            if not step:
                raise ValueError("an alarm counts optimizer steps: call step() after each of them, or read(step).")
            self._alarm.act(step, numbers)
        return numbers

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> CondensationWatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # watched from the owner's first call to its return: a recomputation under gradient checkpointing comes after that

    def _begin(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        if not (self._armed and module.training and torch.is_grad_enabled()):
            return
        self._armed, self._pending, self._sequences = False, {}, None
        self._call = self._reader.begin(module, args, kwargs)
        self._owner = module

    def _entry(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        if self._owner is not None and not self._pending:
            state = first_state(args, kwargs)
            if state is None:
                raise StateError(
                    f"the first block ({type(module).__name__}) was called without a recognisable hidden state: its "
                    "first argument must be the tensor [batch, tokens, width]."
                )
            self._take(EMBEDDING, state)

    def _block(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._owner is None:
            return
        layer, state = block(len(self._pending)), hidden_state(output)
        if state is None:
            raise StateError(
                f"{layer} ({type(module).__name__}) returned a {type(output).__name__}; expected hidden states [batch, "
                "tokens, width], alone or first in a tuple."
            )
        self._take(layer, state)

    def _take(self, layer: Layer, state: Tensor) -> None:
        assert self._call is not None
        try:
            z_BTD = self._reader.states(self._call, state, str(layer))
            if self._sequences is None:
                self._sequences = self._reader.read(self._call, z_BTD.device)
        except SequencesError:
            self._pending = {}  # half a pass is not a measurement
            raise
        self._pending[layer] = batch_means(z_BTD, *self._sequences)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if module is self._owner:
            self._owner = self._call = self._sequences = None


def _numbers(
    layers: Sequence[Layer], values: Sequence[Sequence[float]], *, every_key: bool = False
) -> dict[str, float]:
    """What a reading logs, from the (cosine, norm) of each state."""
    numbers: dict[str, float] = {}
    for layer, (cosine, norm) in zip(layers, values, strict=True):
        name = layer.key(len(layers) - 1)
        numbers[f"{PREFIX}/mean_cosine/{name}"] = cosine
        numbers[f"{PREFIX}/norm/{name}"] = norm
    means = [cosine for cosine, _ in values]
    blocks = max(1, len(means) - 1)
    half = deep_half(len(means))
    numbers[f"{PREFIX}/mean_cosine"] = sum(means[1:]) / blocks
    numbers[f"{PREFIX}/deep_half"] = sum(means[-half:]) / half
    rho = float(spearman(means))
    if every_key or math.isfinite(rho):
        numbers[f"{PREFIX}/spearman"] = rho
    return numbers


class CondensationCallback(TrainerCallback):  # type: ignore[misc,unused-ignore]
    """Log condensation during training with the Hugging Face Trainer (or any trainer that takes its callbacks).

    ``CondensationCallback.add_to(trainer)`` puts it before the trackers, so that TensorBoard, W&B or trackio receive
    the numbers in the same ``log`` call as the loss. If it is passed as ``callbacks=[...]``, it comes after them: the
    numbers then reach only ``trainer.state.log_history`` and the callbacks after it.

    In each logged step, the first forward pass is watched (see :class:`CondensationWatch`): the numbers are exact for
    that micro-batch, on rank 0. ``alarm``, ``action`` and ``patience`` are those of
    :class:`decondense.measuring.Alarm`; ``grace=None`` stands for 100 steps, or the warm-up of the learning rate where
    that is longer. ``action="stop"`` ends the training through ``control.should_training_stop``: at the logged step, or
    one step later if several processes have to agree.
    """

    def __init__(
        self,
        *,
        blocks: str | None = None,
        tokens_first: bool | None = None,
        alarm: Mapping[str, float] | None = None,
        action: Action = "warn",
        patience: int = PATIENCE,
        grace: int | None = None,
    ) -> None:
        self.blocks, self.tokens_first, self.grace = blocks, tokens_first, grace
        # the same on every rank; what cannot be used is refused here and not when training begins
        self._alarm: dict[str, Any] = {"alarm": alarm, "action": action, "patience": patience}
        self._stops = alarm is not None and Alarm(alarm, action, patience=patience, grace=grace or 0).action == "stop"
        self._watch: CondensationWatch | None = None

    @classmethod
    def add_to(cls, trainer: Any, **options: Any) -> CondensationCallback:
        """Create the callback with its options and put it before the trainer's trackers."""
        callback = cls(**options)
        trainer.callback_handler.callbacks.insert(0, callback)
        return callback

    def on_train_begin(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        """Install the hooks."""
        model = keywords.get("model")
        if model is not None and self._watch is None and getattr(state, "is_world_process_zero", True):
            warm_up = int(args.get_warmup_steps(state.max_steps)) if hasattr(args, "get_warmup_steps") else 0
            self._watch = CondensationWatch(
                model,
                blocks=self.blocks,
                tokens_first=self.tokens_first,
                grace=max(GRACE, warm_up) if self.grace is None else self.grace,
                **self._alarm,
            )
            self._watch._armed = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        """Arm when the step that begins will be logged."""
        if self._watch is not None and self._is_logged(args, state, state.global_step + 1):
            self._watch.arm()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **keywords: Any) -> None:
        """Add the numbers to what is logged."""
        numbers = self._watch.read(state.global_step) if self._watch is not None else {}
        if numbers and logs is not None:
            logs.update(numbers)
            if state.log_history:
                state.log_history[-1].update(numbers)
        if self._watch is not None and self._watch.should_stop and not _several():
            control.should_training_stop = True

    def on_step_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        """If several processes train, end all of them at the step after the alarm: only rank 0 watches."""
        # a logged step's numbers are read after this call, so the decision is taken with the step that follows
        if self._stops and _several() and self._is_logged(args, state, state.global_step - 1):
            stop = torch.tensor(float(self._watch is not None and self._watch.should_stop), device=args.device)
            torch.distributed.all_reduce(stop, op=torch.distributed.ReduceOp.MAX)
            control.should_training_stop |= bool(stop)

    def on_train_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        """Remove the hooks."""
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    @staticmethod
    def _is_logged(args: Any, state: Any, step: int) -> bool:
        every = max(1, int(getattr(state, "logging_steps", 0) or getattr(args, "logging_steps", 1) or 1))
        return step % every == 0 or (step == 1 and bool(getattr(args, "logging_first_step", False)))


def _several() -> bool:
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )


def lightning_callback(**options: Any) -> Any:
    """A Lightning callback that logs the same numbers through ``LightningModule.log_dict``.

    ``options`` are those of :class:`CondensationWatch` (``every``, ``blocks``, ``tokens_first``, ``alarm``, ...).
    ``action="stop"`` sets ``trainer.should_stop`` when any process raises the alarm.
    """
    if options.get("alarm") is not None:  # refused here and not when training begins
        Alarm(options["alarm"], **{name: options[name] for name in ("action", "patience", "grace") if name in options})
    for package in ("lightning.pytorch", "pytorch_lightning"):
        try:
            base: Any = importlib.import_module(package).Callback
            break
        except ImportError:
            continue
    else:
        raise ImportError("lightning_callback needs Lightning: pip install lightning")

    class CondensationLightningCallback(base):  # type: ignore[misc,unused-ignore]
        """Watches one training pass every ``every`` steps and logs it."""

        watch: CondensationWatch | None = None

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.watch = CondensationWatch(pl_module, **options)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if self.watch is not None and (numbers := self.watch.step()):
                pl_module.log_dict(numbers, on_step=True, on_epoch=False)
                if options.get("action") == "stop" and options.get("alarm") is not None:
                    stop = trainer.strategy.reduce_boolean_decision(self.watch.should_stop, all=False)
                    trainer.should_stop = trainer.should_stop or stop

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            if self.watch is not None:
                self.watch.close()

    return CondensationLightningCallback()
