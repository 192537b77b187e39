"""Lightning: ``Trainer(callbacks=[DispersionCallback(weight=0.1)])`` for modules that call ``self.model(...).loss``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from decondense.attaching import AttachError, DispersionHandle, attach

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
        LightningModule
            itself, if its ``forward`` returns the loss.
        **keywords: As for :func:`decondense.attach`.

    With ``accumulate_grad_batches`` and several ranks, the loss is the mean over batches and ranks of each one's mean
    over
    sequences: exact for equal numbers of sequences.
    """

    def __init__(self, *arguments: Any, module: str = "model", **keywords: Any) -> None:
        self.module, self.arguments, self.keywords = module, arguments, keywords
        self.handle: DispersionHandle | None = None
        self._restored: dict[str, Any] | None = None
        self._logged = 0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach; a resumed run goes on with the state of the checkpoint."""
        names = dict(pl_module.named_modules())
        if self.module not in names:
            top = ", ".join(name for name in names if name and "." not in name)
            raise AttachError(
                f"{type(pl_module).__name__} has no module {self.module!r}; name the model that returns the loss: "
                f"DispersionCallback(module=...). It has: {top}."
            )
        self.handle = attach(names[self.module], *self.arguments, **self.keywords)
        self._logged = trainer.global_step
        if self._restored is not None:
            self.handle.load_state_dict(self._restored)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Move the weight schedule."""
        if self.handle is not None:
            total = trainer.estimated_stepping_batches
            steps = int(total) if total != float("inf") else 0
            if not steps and not self.handle.config.schedule.is_constant:
                raise AttachError("the weight schedule needs an end of training: set max_steps or max_epochs.")
            self.handle.set_progress(trainer.global_step, max(steps, 1))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the means since the last log."""
        step = trainer.global_step
        if self.handle is not None and step != self._logged and step % trainer.log_every_n_steps == 0:
            self._logged = step
            pl_module.log_dict(self.handle.pop(), on_step=True, on_epoch=False)

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
