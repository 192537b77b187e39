"""The handle of an attached loss: detaches it, follows the schedule, reports, and keeps its state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from decondense.attaching.checks import AttachError
from decondense.attaching.computation import EMBEDDING_KEY, Computation
from decondense.attaching.hooks import Begin, End, Keep, KeepInput
from decondense.attaching.part import Part
from decondense.config import DispersionConfig
from decondense.sequences import SequencesError, count_in_batch


class DispersionHandle(Computation):
    """The handle returned by :func:`attach`: detaches, reports, and follows the weight schedule.

    ``copy.deepcopy(model)`` copies the hooks with a handle of their own; detach first for a plain copy.
    """

    def __init__(
        self,
        model: nn.Module,
        config: DispersionConfig,
        teacher: nn.Module | None = None,
        placement: str = "output",
        part: Part | None = None,
    ) -> None:
        super().__init__(model, config, teacher, placement, part)
        self._on_detach: list[Callable[[], None]] = []
        root = self._blocks.root
        self._removable = [module.register_forward_hook(Keep(self, number)) for number, module in self._sources.items()]
        if self._states_of:  # a stage may have none
            self._removable.append(root.register_forward_pre_hook(Begin(self), with_kwargs=True))
            self._removable.append(root.register_forward_hook(End(self), with_kwargs=True))
        if EMBEDDING_KEY in self._states_of:
            keep_input = KeepInput(self, EMBEDDING_KEY)
            self._removable.append(self._blocks.modules[0].register_forward_pre_hook(keep_input, with_kwargs=True))

    def __enter__(self) -> DispersionHandle:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    def __repr__(self) -> str:
        loss = self.config.loss
        now = "" if self.weight == self.config.weight else f" (now {self.weight:.4g})"
        if self.targets:
            now += f", target={', '.join(f'{value:.4g}' for value in dict.fromkeys(self.targets))}"
        return (
            f"DispersionHandle(layers={', '.join(map(str, self._states_of.values()))} of {self._total} blocks at "
            f"{self._blocks.path!r}, form={loss.form!r}, tau={loss.tau:g}, weight={self.config.weight:g}{now}, "
            f"impl={loss.impl!r}, {'attached' if self._attached else 'detached'})"
        )

    @property
    def is_attached(self) -> bool:
        """Whether the hooks are on the model."""
        return self._attached

    @property
    def layers(self) -> list[int]:
        """Indices in the whole model of the blocks whose outputs are dispersed; for a pipeline stage, those that it
        holds."""
        return list(self._layers)

    @property
    def step(self) -> int | None:
        """The optimizer step that :meth:`set_progress` set last."""
        return self._step

    @property
    def weight(self) -> float:
        """The weight lambda that the next training forward uses, after the schedule. With a target: the mean of the
        layers' weights, which synchronizes with the device."""
        return self._weight if self._controller is None else float(self._controller.mean)

    def detach(self) -> None:
        """Remove every hook, which restores the model. Detaching twice does nothing."""
        self._attached = self._active = False
        while self._removable:
            self._removable.pop().remove()
        self._forward = self._in_backward = self._pending = None
        while self._on_detach:
            self._on_detach.pop()()

    def restart(self) -> None:
        """Discard the states, sums and step of a run that was interrupted (out of memory)."""
        self._forward = self._in_backward = self._pending = None
        self._active = False
        self._discarded = self._forwards = 0
        self._ratio = self._ratio_step = self._step = self._total_steps = None
        self._totals.reset()
        if self._controller is not None:
            self._controller.restart()
        self._set_weight()

    def on_detach(self, action: Callable[[], None]) -> None:
        """Call ``action`` when the handle is detached."""
        self._on_detach.append(action)

    def __getstate__(self) -> dict[str, Any]:
        # a copied or pickled model has its hooks and so the handle, but neither the trainer nor a running forward
        running = dict.fromkeys(("_pending", "_forward", "_in_backward"))
        return {**self.__dict__, **running, "_on_detach": [], "_active": False}

    def set_progress(self, step: int, total_steps: int | None = None) -> None:
        """Set the step (from 0) of the next forward, and the number of steps, which only a schedule needs.

        When the step changes, the previous step is ended (:meth:`end_step`).
        """
        if total_steps is None and not self.config.schedule.is_constant:
            raise AttachError("the weight schedule needs the number of steps: handle.set_progress(step, total_steps).")
        if step != self._step:
            self.end_step()
            self._forwards = 0
            if self._controller is not None:
                self._controller.ended = False
        self._step, self._total_steps = step, total_steps
        self._set_weight()

    def end_step(self) -> None:
        """With a target: adjust the weights from the micro-batches of the step, once per step. Otherwise does nothing.

        Sums one small tensor over the ranks, so every rank must call it. It is called by :meth:`set_progress` when the
        step changes; call it yourself before :meth:`state_dict` where several ranks train.
        """
        if self._controller is not None:
            self._controller.end_step()
            self._set_weight()

    def take(self) -> Tensor | None:
        """With ``defer``: the loss of the last training forward with its graph, to be multiplied by :attr:`weight`.

        None if there was no forward. With a target each layer is scaled by its weight divided by the mean weight.
        """
        taken = self.take_sum_and_count()
        return None if taken is None else taken[0] / taken[1].clamp(min=1)

    def take_sum_and_count(self) -> tuple[Tensor, Tensor] | None:
        """With ``defer``: (sum over sequences of the mean over layers, number of sequences) of the last forward."""
        taken, self._pending = self._pending, None
        return taken

    def pop(self, reduce: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """Mean values since the last call, for a log; empty if there was no training forward since then.

        ``dispersion`` (mean over layers), ``dispersion_weight``, ``dispersion/block_01`` ..., ``cross_entropy`` (the
        model's own loss without the added term, if it returns one), and with ``gradient_ratio_every`` also
        ``dispersion_gradient_ratio``. With a target also the weights of the last step by layer
        (``dispersion_weight/block_01``, ...), whose mean is ``dispersion_weight``, and the mean cosines of the steps
        that have ended (``dispersion_cosine``, ``dispersion_cosine/block_01``, ...). Waits for the device. ``reduce``
        sums a tensor over ranks.
        """
        try:
            self._reader.sequences.check()
        except SequencesError as error:
            raise AttachError(str(error)) from None
        means, loss = self._totals.pop(reduce)
        if means is None:
            return {}
        values = {"dispersion": sum(means) / len(means), "dispersion_weight": self.weight}
        keys = [layer.key(self._total) for layer in self._states_of.values()]
        values.update({f"dispersion/{key}": mean for key, mean in zip(keys, means, strict=True)})
        if self._controller is not None:
            values.update(self._controller.pop(keys))
        if loss is not None:
            values["cross_entropy"] = loss
        if self._ratio is not None:
            values["dispersion_gradient_ratio"] = float(self._ratio)
            self._ratio = None
        return values

    def count_sequences(self, batch: Mapping[str, Any]) -> Tensor | int:
        """Number of sequences with a pair in a collated batch, counted as by the attached model.

        Raises:
            AttachError: they cannot be counted.
        """
        try:
            return count_in_batch(batch, self._reader.sequences)
        except SequencesError as error:
            raise AttachError(str(error)) from None

    def state_dict(self) -> dict[str, Any]:
        """State of the schedule, of the weights that a target moves, and of the random generator; the configuration."""
        clock = {"step": self._step, "total_steps": self._total_steps, "forwards": self._forwards}
        weights = {} if self._controller is None else {"controller": self._controller.state_dict()}
        return {"config": self.config.model_dump(mode="json"), "targets": self.targets, **clock, **weights}

    def differences(self, state: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Settings that differ between a :meth:`state_dict` and this handle, as (saved, current)."""
        # parsed, so that a state of an earlier release has today's keys
        saved = DispersionConfig.parse(dict(state["config"]), where="the saved dispersion state")
        then, now = saved.model_dump(mode="json"), self.config.model_dump(mode="json")
        # a file may have moved: what it says counts, which a controller compares when it is loaded
        same = self._controller is not None or state.get("targets") == self.targets
        if same and isinstance(self.config.target, str) and isinstance(saved.target, str):
            then["target"] = now["target"]
        return {key: (then[key], now[key]) for key in sorted(now) if then[key] != now[key]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from :meth:`state_dict`; a state with different settings is refused."""
        pairs = ", ".join(f"{key}: saved {then}, now {now}" for key, (then, now) in self.differences(state).items())
        if pairs:
            raise AttachError(
                f"the saved dispersion state has different settings ({pairs}); attach with the saved settings."
            )
        if self._controller is not None:
            self._controller.load_state_dict(state["controller"])
        if state["step"] is not None:
            self._step, self._total_steps = int(state["step"]), state["total_steps"]
        self._set_weight()
        self._forwards = int(state["forwards"])
