"""The handle of an attached loss: collects the states of a forward, computes the loss, adds it and reports it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from decondense import seeding
from decondense.attaching.checks import AttachError, check_graph, in_backward, refuse, refuse_meshes
from decondense.attaching.gradient_ratio import gradient_ratio
from decondense.attaching.hooks import Begin, End, Keep, KeepInput, Watch, attached
from decondense.attaching.metrics import Totals
from decondense.attaching.output import returned_loss, share_of_step, shifts_labels, with_loss
from decondense.attaching.target import Controller
from decondense.attaching.target_values import resolve_target
from decondense.attaching.teacher import Teacher
from decondense.blocks import base_model, find_blocks, find_final_norm, resolve_layers
from decondense.config import DispersionConfig
from decondense.layers import EMBEDDING, FINAL_NORM, Layer, block
from decondense.layout import Call, StateReader, hidden_state
from decondense.losses import DispersionLoss
from decondense.sequences import SequencesError, count_in_batch

_DISCARDED_BEFORE_ERROR = 3
_EMBEDDING = -1  # beside the indices of the blocks
_NORM = "final norm"


class DispersionHandle:
    """The handle returned by :func:`attach`: detaches, reports, and follows the weight schedule.

    ``copy.deepcopy(model)`` copies the hooks with a handle of their own; detach first for a plain copy.
    """

    def __init__(self, model: nn.Module, config: DispersionConfig, teacher: nn.Module | None = None) -> None:
        refuse(model)
        if config.loss.info.teacher != (teacher is not None):
            what = "needs a teacher: attach(model, teacher=...)" if teacher is None else "has no use for a teacher"
            raise AttachError(f"form {config.loss.form!r} {what}.")
        other = attached(model)
        if other is not None:
            raise AttachError(f"the model has a dispersion loss already: {other!r}. Call its detach() first.")
        self.config = config
        self.defer = False
        """Store the value for :meth:`take` instead of adding it to the model's loss."""
        self.branch: Callable[[Tensor, Tensor | None], Tensor] | None = None
        """Takes the states of a layer and the mask to what the loss is computed on; it may change the gradient."""
        self.loss = DispersionLoss.from_config(config.loss)
        blocks = find_blocks(model, config.blocks)
        self._blocks = blocks
        self._layers = resolve_layers(config.layers, len(blocks))
        self._attached = True
        self._active = False
        self._monitoring = config.weight == 0
        self._off = False
        self._states: dict[int, Tensor] = {}
        self._call: Call | None = None
        self._pending: tuple[Tensor, Tensor] | None = None
        self._discarded = 0
        self._checked = False
        self._step: int | None = None
        self._total_steps: int | None = None
        self._forwards = 0  # training forwards since the last step; with the step, the clock of the random generator
        self._ratio: Tensor | None = None
        self._ratio_step: int | None = None
        self._on_detach: list[Callable[[], None]] = []
        self.micro_batches: int | None = None
        """Divisor of a value if the trainer divides by the tokens of several micro-batches; None: token share."""
        self.training_forwards = 0
        """Forwards of the model in training mode since attaching (not counted inside compiled graphs)."""
        self.last: Tensor | None = None
        """Dispersion loss of the last training forward (mean over layers and sequences), detached."""

        device = next((p.device for p in blocks.root.parameters() if p.device.type != "meta"), torch.device("cpu"))
        # a Python number would recompile a compiled model each time that the schedule changes it; a tensor does not
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._weight_tensor = torch.zeros((), dtype=dtype, device=device)
        sources = {number: blocks.modules[number] for number in self._layers}
        layers = {number: block(number + 1) for number in self._layers}
        if config.final_norm:
            last = len(blocks) - 1
            if self._layers[-1] != last:
                raise AttachError(
                    f"final_norm=True concerns the last block, block {last + 1}, which is not among the layers: "
                    f"{', '.join(map(str, layers.values()))}."
                )
            sources[last], layers[last] = find_final_norm(blocks), FINAL_NORM
        self._sources = sources
        self._states_of: dict[int, Layer] = {_EMBEDDING: EMBEDDING, **layers} if config.embedding else layers
        # the state after the final norm may have another layout than the blocks'
        norm = {_NORM: sources[self._layers[-1]]} if config.final_norm else {}
        self._reader = StateReader(blocks, config.tokens_first, norm)
        self._shifts_labels = shifts_labels(base_model(blocks.root))
        self._totals = Totals(len(self._states_of), device)
        states = list(self._states_of.values())
        self.targets = [] if config.target is None else resolve_target(config.target, states, len(blocks))
        """The mean cosine that each layer is held to, over pairs of different tokens; empty without a target."""
        self._controller: Controller | None = None
        self._losses = [self.loss] * len(states)
        if config.loss.form == "profile" and self.targets:
            each = [config.loss.model_copy(update={"target_cosine": value}) for value in self.targets]
            self._losses = [DispersionLoss.from_config(one) for one in each]
        elif self.targets:
            self._controller = Controller(config.weight, self.targets, device)
        self._teacher = None if teacher is None else Teacher(teacher, blocks, states)
        self._set_weight()

        root = blocks.root
        self._removable = [
            root.register_forward_pre_hook(Begin(self), with_kwargs=True),
            root.register_forward_hook(End(self), with_kwargs=True),
            *(module.register_forward_hook(Keep(self, number)) for number, module in sources.items()),
        ]
        if config.embedding:
            keep_input = KeepInput(self, _EMBEDDING)
            self._removable.append(blocks.modules[0].register_forward_pre_hook(keep_input, with_kwargs=True))

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
            f"DispersionHandle(layers={', '.join(map(str, self._states_of.values()))} of {len(self._blocks)} blocks at "
            f"{self._blocks.path!r}, form={loss.form!r}, tau={loss.tau:g}, weight={self.config.weight:g}{now}, "
            f"impl={loss.impl!r}, {'attached' if self._attached else 'detached'})"
        )

    @property
    def is_attached(self) -> bool:
        """Whether the hooks are on the model."""
        return self._attached

    @property
    def layers(self) -> list[int]:
        """Numbers of the blocks whose outputs are dispersed."""
        return list(self._layers)

    @property
    def step(self) -> int | None:
        """The optimizer step that :meth:`set_progress` set last."""
        return self._step

    @property
    def weight(self) -> float:
        """The weight lambda that the next training forward uses, after the schedule; with a target the mean of the
        layers' weights, for which the device is waited for."""
        return self._weight if self._controller is None else float(self._controller.mean)

    def detach(self) -> None:
        """Remove every hook, which restores the model. Detaching twice does nothing."""
        self._attached = self._active = False
        while self._removable:
            self._removable.pop().remove()
        self._states, self._call, self._pending = {}, None, None
        while self._on_detach:
            self._on_detach.pop()()

    def restart(self) -> None:
        """Discard the states, sums and step of a run that was interrupted (out of memory)."""
        self._states, self._call, self._pending, self._active = {}, None, None, False
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
        fresh: dict[str, Any] = {"_on_detach": [], "_pending": None, "_states": {}, "_call": None, "_active": False}
        return {**self.__dict__, **fresh}

    def set_progress(self, step: int, total_steps: int | None = None) -> None:
        """Set the step (from 0) of the next forward, and the number of steps, which only a schedule needs.

        Another step than before ends that one (:meth:`end_step`).
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
        """With a target: move the weights by what the micro-batches of the step showed, once a step; else nothing.

        Sums one small tensor over the ranks, so every rank must call it. :meth:`set_progress` does when the step
        changes; call it before :meth:`state_dict` where several ranks train.
        """
        if self._controller is not None:
            self._controller.end_step()
            self._set_weight()

    def take(self) -> Tensor | None:
        """With ``defer``: the loss of the last training forward with its graph, to be multiplied by :attr:`weight`.

        None if there was no forward. With a target a layer counts by its weight over the mean weight.
        """
        taken = self.take_sum_and_count()
        return None if taken is None else taken[0] / taken[1].clamp(min=1)

    def take_sum_and_count(self) -> tuple[Tensor, Tensor] | None:
        """With ``defer``: (sum over sequences of the mean over layers, number of sequences) of the last forward."""
        taken, self._pending = self._pending, None
        return taken

    def pop(self, reduce: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """Mean values since the last call, for a log; empty without a training forward since then.

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
        keys = [layer.key(len(self._blocks)) for layer in self._states_of.values()]
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

    @property
    def is_off(self) -> bool:
        """Whether nothing is added at present: ``weight=0``, or the schedule is at 0."""
        return self._off or self._monitoring

    @property
    def counts_batches(self) -> bool:
        """Whether the mean is over batches (pairs across sequences) instead of sequences."""
        return self.config.loss.within != "sequence"

    def weighted(self, value: Tensor) -> Tensor:
        """``value`` times the current weight."""
        if torch.compiler.is_compiling() or self._controller is not None:
            return self._weight_tensor.to(value.device, value.dtype) * value
        return self._weight * value

    def state_dict(self) -> dict[str, Any]:
        """State of the schedule, of the weights that a target moves, and of the random generator; the configuration."""
        clock = {"step": self._step, "total_steps": self._total_steps, "forwards": self._forwards}
        weights = {} if self._controller is None else {"controller": self._controller.state_dict()}
        return {"config": self.config.model_dump(mode="json"), "targets": self.targets, **clock, **weights}

    def differences(self, state: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Settings of a :meth:`state_dict` that are not this handle's: then and now."""
        # parsed, so that a state of an earlier release has today's keys
        saved = DispersionConfig.parse(dict(state["config"]), where="the saved dispersion state")
        then, now = saved.model_dump(mode="json"), self.config.model_dump(mode="json")
        # a file may have moved: what it says counts, which a controller compares when it is loaded
        same = self._controller is not None or state.get("targets") == self.targets
        if same and isinstance(self.config.target, str) and isinstance(saved.target, str):
            then["target"] = now["target"]
        return {key: (then[key], now[key]) for key in sorted(now) if then[key] != now[key]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from :meth:`state_dict`; a state of other settings is refused."""
        pairs = ", ".join(f"{key}: {then} then, {now} now" for key, (then, now) in self.differences(state).items())
        if pairs:
            raise AttachError(
                f"the saved dispersion state was made with other settings ({pairs}); attach with the same."
            )
        if self._controller is not None:
            self._controller.load_state_dict(state["controller"])
        if state["step"] is not None:
            self._step, self._total_steps = int(state["step"]), state["total_steps"]
        self._set_weight()
        self._forwards = int(state["forwards"])

    # ---- called by the hooks

    def _set_weight(self) -> None:
        factor = 1.0
        if self._step is not None and self._total_steps is not None:
            factor = self.config.schedule.factor(self._step, self._total_steps)
        self._off = factor == 0
        self._weight = self.config.weight * factor
        if self._controller is None:
            self._weight_tensor.fill_(self._weight)
        else:
            self._weight_tensor.copy_(self._controller.mean)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._states = {}
        self._active = module.training and torch.is_grad_enabled() and not self._off
        if not self._active:
            return
        if not torch.compiler.is_compiling():
            self.training_forwards += 1
        if not self._checked:
            self._check_once()
        if self._discarded >= _DISCARDED_BEFORE_ERROR:
            raise AttachError(
                f"the last {self._discarded} dispersion losses were discarded without a gradient. Either this trainer "
                "does not use the loss that the model returns (TRL's trainers do not): then use "
                "attach_trainer(trainer), or handle.defer and handle.take() in a loss of your own. Or the model was "
                "evaluated in training mode: then use model.eval() or torch.no_grad()."
            )
        try:
            # may call the model to determine the layout; this hook then runs inside itself, in evaluation mode
            self._call = self._reader.begin(module, args, kwargs)
        except SequencesError as error:
            self._active = False
            raise AttachError(str(error)) from None
        self._active, self._states = True, {}

    def _check_once(self) -> None:
        if torch.compiler.is_compiling():
            return
        self._checked = True
        refuse_meshes(self._blocks.root)
        if self._step is None and not self.config.schedule.is_constant:
            raise AttachError(
                "the weight schedule needs to know the progress of training: call handle.set_progress(step, "
                "total_steps) before each optimizer step, or use attach_trainer(trainer)."
            )
        if self._step is None and self._controller is not None:
            raise AttachError(
                "a target needs to know where an optimizer step begins: call handle.set_progress(step) before each, or "
                "use attach_trainer(trainer)."
            )

    def _keep(self, key: int, module: nn.Module, output: Any) -> None:
        if self._active:
            layer = self._states_of[key]
            if key in self._states:
                raise AttachError(
                    f"{layer} ran twice in one forward (layers that share their weights?); dispersion needs one state "
                    "per layer."
                )
            state = hidden_state(output)
            if state is None:
                raise AttachError(
                    f"{layer} ({type(module).__name__}) gives a {type(output).__name__} without a tensor of hidden "
                    "states [batch, tokens, width], alone or first."
                )
            self._states[key] = state
        elif self._attached and module.training and torch.is_grad_enabled() and not self._off and not in_backward():
            raise AttachError(
                f"{self._states_of[key]} ran outside the forward of the model that the loss is attached to, so the "
                "loss would be missed. Attach to the model that is called (after wrapping it with PEFT), or detach() "
                "first."
            )

    def _end(self, output: Any) -> Any:
        if not self._active:
            return None
        self._active = False
        call, states = self._call, self._states
        self._call, self._states = None, {}
        assert call is not None
        if self._monitoring:
            with torch.no_grad():
                self._values(states, call)
                own = returned_loss(output)
                if own is not None and not self.defer:
                    self._totals.add_loss(own[1], self._share(call))
            return None
        total, count = self._values(states, call)
        if not torch.compiler.is_compiling():
            self._watch(total)
        if self.defer:
            if self._pending is not None:
                raise AttachError(
                    "the model ran two training forwards for one loss (as DPO and GRPO trainers do); that is not "
                    "supported. Call handle.take() after each forward."
                )
            self._pending = (total, count)
            return None
        own = returned_loss(output)
        if own is None:
            raise AttachError(
                "the output of the model has no loss to add to (no labels passed? label smoothing or "
                "compute_loss_func, which take the loss out of the model?). Use attach_trainer(trainer), or "
                "handle.defer and handle.take()."
            )
        place, loss = own
        share = self._share(call)
        extra = self.weighted(share * total / count.clamp(min=1))
        self._totals.add_loss(loss, share)
        self.measure_gradient_ratio(loss, extra)
        return with_loss(output, place, loss + extra)

    def _share(self, call: Call) -> Tensor | float:
        return share_of_step(call.arguments, self.micro_batches, self._shifts_labels)

    def _values(self, states: dict[int, Tensor], call: Call) -> tuple[Tensor, Tensor]:
        missing = [str(layer) for key, layer in self._states_of.items() if key not in states]
        if missing:
            raise AttachError(
                f"no hidden state came from {', '.join(missing)}: the block did not run (layer drop, early exit), or "
                "the loss was attached after the model had been compiled and called (then call torch._dynamo.reset() "
                "after attaching)."
            )
        try:
            states = {
                key: self._reader.states(call, states[key], str(layer), _NORM if layer == FINAL_NORM else "blocks")
                for key, layer in self._states_of.items()
            }
            first = states[next(iter(self._states_of))]
            mask, segments = self._reader.read(call, first.device)
        except SequencesError as error:
            raise AttachError(str(error)) from None
        if not self._monitoring:
            check_graph(states, self._states_of, self._sources)
        self._seed_draws()
        sums, counts = [], []
        others = [None] * len(states) if self._teacher is None else self._teacher.states(call)
        # inside autocast the products would be taken in bfloat16
        with torch.autocast(first.device.type, enabled=False):
            for loss, z_BTD, other in zip(self._losses, states.values(), others, strict=True):
                inputs = [None if one is None else one.to(z_BTD.device) for one in (mask, segments, other)]
                own = z_BTD if self.branch is None else self.branch(z_BTD, inputs[0])
                value, count = loss.sum_and_count(own, *inputs)
                sums.append(value.to(first.device))
                counts.append(count.to(first.device))
            sums_L, count = torch.stack(sums), counts[0]
            if self._controller is None:
                total = sums_L.mean()
            else:
                total = self._controller.weigh(sums_L)
                self._controller.observe(list(states.values()), mask, segments)
            self.last = sums_L.detach().mean() / count.clamp(min=1)
            self._totals.add(sums_L.detach(), count)
        return total, count

    def _seed_draws(self) -> None:
        if not self.config.loss.draws:
            return
        # a function of (seed, step, micro-batch) alone, so that a resumed run draws the same numbers
        purpose = f"dispersion loss, micro-batch {self._forwards}"
        self._forwards += 1
        for loss in self._losses:
            loss.generator.manual_seed(seeding.derive(self.config.loss.seed, purpose, self._step or 0))

    def _watch(self, total: Tensor) -> None:
        node = total.grad_fn
        if node is None:
            return
        watch = Watch(self)
        # the node's dictionary lives as long as the graph: freeing an unused graph frees the watch
        metadata: dict[str, Any] = node.metadata  # type: ignore[assignment]
        metadata["decondense"] = watch
        total.register_hook(watch.reached)  # type: ignore[no-untyped-call]

    def measure_gradient_ratio(self, loss: Tensor, extra: Tensor) -> None:
        """At the configured steps, compute ||grad of extra|| / ||grad of loss|| on this rank for the log."""
        every = self.config.gradient_ratio_every
        if every is None or torch.compiler.is_compiling():
            return
        if self._step is None:
            raise AttachError(
                "gradient_ratio_every counts optimizer steps: call handle.set_progress(step, total_steps)."
            )
        if self._step % every or self._step == self._ratio_step:
            return
        self._ratio_step = self._step
        self._ratio = gradient_ratio(self._blocks.root, loss, extra)
