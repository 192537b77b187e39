"""Lightning: ``Trainer(callbacks=[DispersionCallback(weight=0.1)])`` for modules that call ``self.model(...).loss``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import Tensor

from decondense.attaching import AttachError, DispersionHandle, attach
from decondense.blocks import unwrap
from decondense.integrations.plain_loss import KeepPlainLoss, PlainLoss, keep_plain_loss

if TYPE_CHECKING:
    Callback: type = object
else:
    try:
        from lightning.pytorch import Callback
    except ImportError:  # the older name of the same package
        from pytorch_lightning import Callback


class DispersionCallback(Callback):  # type: ignore[misc]
    """Attaches when fitting begins, logs once per optimizer step that is logged, and detaches at the end.

    Args:
        module: Dotted path, in the LightningModule, of the model whose output holds the loss; ``""`` for the
            LightningModule itself, if its ``forward`` returns the loss.
        **keywords: As for :func:`decondense.attach`.

    With ``accumulate_grad_batches`` and several ranks, each batch takes the mean over its own sequences, and the loss
    is the mean over batches and ranks: exact for equal numbers of sequences. With manual optimization, a step of the
    weight schedule is a batch, no matter how many optimizers step in it; otherwise it is an optimizer step.
    ``cross_entropy`` is the mean of the model's own loss since the last log.
    """

    def __init__(self, *arguments: Any, module: str = "model", **keywords: Any) -> None:
        self.module, self.arguments, self.keywords = module, arguments, keywords
        self.handle: DispersionHandle | None = None
        self.plain = PlainLoss()
        self._restored: dict[str, Any] | None = None
        self._logged = 0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach; a resumed run restores the state of the checkpoint."""
        names = dict(pl_module.named_modules())
        if self.module not in names:
            top = ", ".join(name for name in names if name and "." not in name)
            raise AttachError(
                f"{type(pl_module).__name__} has no module {self.module!r}; name the model that returns the loss: "
                f"DispersionCallback(module=...). It has: {top}."
            )
        model = names[self.module]
        self.plain = PlainLoss(pl_module.device)
        self.handle = keep_plain_loss(
            unwrap(model), lambda: attach(model, *self.arguments, **self.keywords), KeepPlainLoss(self._keep)
        )
        self.handle.set_progress(0, 1)  # for forwards before training begins, such as those of BatchSizeFinder
        if self._restored is not None:
            self.handle.load_state_dict(self._restored)

    def _keep(self, loss: Tensor, inputs: dict[str, Any]) -> None:
        self.plain.add(loss)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start counting at the current step."""
        self._logged = _steps_done(trainer, pl_module)
        if self.handle is not None:
            self.plain.reset()
            self.handle.restart()
            if self._restored is not None:
                self.handle.load_state_dict(self._restored)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Move the weight schedule."""
        if self.handle is not None:
            step, total = _step(trainer, pl_module)
            if total is None and not self.handle.config.schedule.is_constant:
                raise AttachError("the weight schedule needs the length of training: set max_steps or max_epochs.")
            self.handle.set_progress(step, max(total or 0, 1))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Adjust the weights to a target after an optimizer step, and log the means since the last log."""
        if self.handle is not None and not (
            pl_module.automatic_optimization and trainer.global_step == self.handle.step
        ):
            self.handle.end_step()  # before a checkpoint of this batch is saved
        every = trainer.log_every_n_steps
        step = _steps_done(trainer, pl_module)
        if self.handle is not None and every and step != self._logged and step % every == 0:
            self._logged = step
            total, count = self.plain.pop()
            values = {"cross_entropy": total / count} if count else {}
            pl_module.log_dict({**values, **self.handle.pop()}, on_step=True, on_epoch=False)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Detach."""
        if self.handle is not None:
            self.handle.detach()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Detach."""
        self.on_fit_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """For Lightning's checkpoints."""
        return {} if self.handle is None else self.handle.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From Lightning's checkpoints, before fitting begins."""
        self._restored = state_dict or None


def _steps_done(trainer: Any, pl_module: Any) -> int:
    """Steps done, in the unit of Lightning's ``log_every_n_steps``: optimizer steps, or batches if manual."""
    return int(trainer.global_step if pl_module.automatic_optimization else trainer.fit_loop.total_batch_idx + 1)


def _step(trainer: Any, pl_module: Any) -> tuple[int, int | None]:
    """The next step, from 0, and the number of steps of the training (None: unlimited)."""
    if pl_module.automatic_optimization:
        total = trainer.estimated_stepping_batches
        return trainer.global_step, None if total in (-1, math.inf) else int(total)
    # with manual optimization global_step and max_steps count the steps of every optimizer; convert to batches
    batch = max(trainer.fit_loop.total_batch_idx, 0)
    ends: list[float] = []
    if trainer.max_epochs not in (None, -1):
        ends.append(trainer.num_training_batches * max(trainer.max_epochs, 1))
    if trainer.max_steps != -1:
        ends.append(trainer.max_steps * batch / trainer.global_step if trainer.global_step else trainer.max_steps)
    end = min(ends, default=math.inf)
    return batch, None if end == math.inf else math.ceil(end)
