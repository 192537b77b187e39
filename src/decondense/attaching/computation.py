"""What the hooks of an attached loss do: read the states of a forward, compute the loss and add it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from decondense import seeding
from decondense.attaching.checks import (
    AttachError,
    check_graph,
    in_backward,
    infers_shapes,
    refuse,
    refuse_meshes,
    refuse_settings,
)
from decondense.attaching.forward import Carrier, Forward, Tap, with_state
from decondense.attaching.gradient_ratio import gradient_ratio
from decondense.attaching.hooks import Watch, attached
from decondense.attaching.metrics import Totals
from decondense.attaching.output import returned_loss, share_of_step, shifts_labels, tensors, with_loss
from decondense.attaching.part import Part
from decondense.attaching.target import Controller
from decondense.attaching.target_values import resolve_target
from decondense.attaching.teacher import Teacher
from decondense.blocks import base_model, find_blocks, find_final_norm, resolve_layers
from decondense.config import DispersionConfig
from decondense.layers import EMBEDDING, FINAL_NORM, Layer, block
from decondense.layout import Call, StateReader, hidden_state
from decondense.losses import DispersionLoss
from decondense.sequences import SequencesError

_DISCARDED_BEFORE_ERROR = 3
EMBEDDING_KEY = -1  # beside the indices of the blocks
_NORM = "final norm"


class Computation:
    """The added term of one model: its layers, its weight, and the forward that runs. The handle is its public side."""

    def __init__(
        self,
        model: nn.Module,
        config: DispersionConfig,
        teacher: nn.Module | None = None,
        placement: str = "output",
        part: Part | None = None,
    ) -> None:
        refuse(model, part)
        refuse_settings(config, teacher, placement, part)
        other = attached(model)
        if other is not None:
            raise AttachError(f"the model already has a dispersion loss: {other!r}. Call its detach() first.")
        self.config = config
        self.defer = False
        """Store the value for :meth:`take` instead of adding it to the model's loss."""
        self.branch: Callable[[Tensor, Tensor | None], Tensor] | None = None
        """Takes the states of a layer and the mask to what the loss is computed on; it may change the gradient."""
        self.loss = DispersionLoss.from_config(config.loss)
        blocks = find_blocks(model, config.blocks)
        self._blocks = blocks
        self.part = part or Part()
        """What the model holds of the whole one."""
        first, self._total = self.part.place(len(blocks))
        chosen = resolve_layers(config.layers, self._total)
        self._n_states = len(chosen) + config.embedding
        self._layers = [number for number in chosen if first <= number < first + len(blocks)]
        self.scale: Tensor | float = 1.0
        """For a stage of a pipeline: what the loss of a micro-batch is multiplied by before backward (a gradient
        scaler's scale)."""
        self.sequences: Tensor | float | None = None
        """For a stage of a pipeline: divisor of the sum over sequences, instead of the micro-batch's number of them:
        the sequences of the whole step, where the losses of micro-batches and ranks are summed and not averaged."""
        self._draws = config.loss.draws
        self._at_blocks = placement == "block" or self.part.is_stage
        self._attached = True
        self._active = self._inferring = False
        self._monitoring = config.weight == 0
        self._off = False
        self._forward: Forward | None = None
        self._in_backward: Forward | None = None  # whose blocks a checkpoint may compute again now
        self._pending: tuple[Tensor, Tensor] | None = None
        self._discarded = 0
        self._checked = False
        self._step: int | None = None
        self._total_steps: int | None = None
        self._forwards = 0  # training forwards since the last step; with the step, the clock of the random generator
        self._ratio: Tensor | None = None
        self._ratio_step: int | None = None
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
        sources = {number: blocks.modules[number - first] for number in self._layers}
        layers = {number: block(number + 1) for number in self._layers}
        if config.final_norm:
            last = self._total - 1
            if chosen[-1] != last:
                raise AttachError(
                    f"final_norm=True applies to the last block, block {last + 1}, which is not among the layers: "
                    f"{', '.join(map(str, layers.values()))}. Add it to layers, or omit final_norm."
                )
            if last in sources:
                sources[last], layers[last] = find_final_norm(blocks), FINAL_NORM
        self._sources = sources
        embedding = config.embedding and first == 0
        self._states_of: dict[int, Layer] = {EMBEDDING_KEY: EMBEDDING, **layers} if embedding else layers
        # the state after the final norm may have another layout than the blocks'
        norm = {_NORM: sources[chosen[-1]]} if FINAL_NORM in layers.values() else {}
        self._reader = StateReader(blocks, config.tokens_first, norm)
        self._shifts_labels = shifts_labels(base_model(blocks.root))
        self._totals = Totals(len(self._states_of), device)
        states = list(self._states_of.values())
        self.targets = [] if config.target is None else resolve_target(config.target, states, len(blocks))
        """The mean cosine that each layer is held to, over pairs of different tokens; empty without a target."""
        self._controller: Controller | None = None
        losses = [self.loss] * len(states)
        if config.loss.form == "profile" and self.targets:
            each = [config.loss.model_copy(update={"target_cosine": value}) for value in self.targets]
            losses = [DispersionLoss.from_config(one) for one in each]
        elif self.targets:
            self._controller = Controller(config.weight, self.targets, device)
        self._loss_of = dict(zip(self._states_of, losses, strict=True))
        self._teacher = None if teacher is None else Teacher(teacher, blocks, states)
        self._set_weight()

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
        self._inferring = self.part.is_stage and infers_shapes()
        self._active = module.training and torch.is_grad_enabled() and not self._off and not self._inferring
        if not self._active:
            return
        if not torch.compiler.is_compiling():
            self.training_forwards += 1
        if not self._checked:
            self._check_once()
        if self._discarded >= _DISCARDED_BEFORE_ERROR:
            raise AttachError(
                f"the last {self._discarded} dispersion losses were discarded without a gradient. Either this trainer "
                "does not use the loss that the model returns (TRL's trainers do not): use attach_trainer(trainer), "
                "or handle.defer and handle.take() in a custom loss. Or the model was evaluated in training mode: use "
                "model.eval() or torch.no_grad()."
            )
        try:
            # may call the model to determine the layout; this hook then runs inside itself, in evaluation mode
            call = self.part.begin(self._reader.begin(module, args, kwargs))
        except SequencesError as error:
            self._active = False
            raise AttachError(str(error)) from None
        self._active, self._forward = True, Forward(call, self._forwards)
        if self._draws:
            self._forwards += 1

    def _check_once(self) -> None:
        if torch.compiler.is_compiling():
            return
        self._checked = True
        refuse_meshes(self._blocks.root, self.part)
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

    def _keep(self, key: int, module: nn.Module, output: Any) -> Any:
        """The output with a carrier in it; None: it stays as it is."""
        forward = self._forward
        again = False  # computed again by a checkpoint
        if not self._active:
            if not (self._attached and module.training and torch.is_grad_enabled()) or self._off or self._inferring:
                return None
            if not in_backward():
                raise AttachError(
                    f"{self._states_of[key]} ran outside the forward of the model that the loss is attached to, so its "
                    "loss would be lost. Attach to the model that is called (after wrapping it with PEFT), or call "
                    "detach() first."
                )
            if not self._at_blocks or self._monitoring:
                return None
            again, forward = True, self._in_backward or forward
        assert forward is not None
        layer = self._states_of[key]
        if not again and (key in forward.kept or key in forward.sums):
            raise AttachError(
                f"{layer} ran twice in one forward (shared weights?); dispersion needs one state per layer."
            )
        state = hidden_state(output)
        if state is None:
            raise AttachError(
                f"{layer} ({type(module).__name__}) returned a {type(output).__name__}; expected hidden states [batch, "
                "tokens, width], alone or first in a tuple."
            )
        if torch.compiler.is_compiling() and self.part.is_stage:
            raise AttachError("compiled blocks in a pipeline stage have not been tested; do not compile them.")
        # a graph of one block cannot wait for the gradient of the loss of another
        if not self._at_blocks or torch.compiler.is_compiling():
            forward.kept[key] = state
            return None
        if not torch.is_grad_enabled():
            forward.kept[key] = state  # the output of a reentrant checkpoint, which gets its graph later
        elif not again:
            forward.trained[key] = state.requires_grad
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._monitoring):
            value = self._value(forward, key, state, watched=not again)
        if not again:
            forward.sums[key] = value.detach()
        if not value.requires_grad:
            return None
        if self.part.is_stage:
            assert forward.count is not None
            divisor = forward.count.clamp(min=1) if self.sequences is None else self.sequences
            forward.scale = self._weight_tensor * self.scale / divisor
        relative: Tensor | float = 1.0
        if self._controller is not None:
            relative = self._controller.relative_L[list(self._states_of).index(key)]
        carried: Tensor = Carrier.apply(state, value, forward, relative / self._n_states)  # type: ignore[no-untyped-call]
        if not again:
            forward.anchor = carried
        return with_state(output, carried)

    def _end(self, output: Any) -> Any:
        if not self._active:
            return None
        self._active = False
        forward = self._forward
        assert forward is not None
        if not self._at_blocks:
            self._forward = None
        try:
            return self._add(forward, output)
        finally:
            if self._at_blocks:
                forward.end()

    def _add(self, forward: Forward, output: Any) -> Any:
        call = forward.call
        if self._monitoring:
            with torch.no_grad():
                self._values(forward)
                own = returned_loss(output)
                if own is not None and not self.defer:
                    self._totals.add_loss(own[1], self._share(call))
            return None
        total, count = self._values(forward)
        if self.part.is_stage:
            for tensor in tensors(output):
                tensor.register_hook(forward.announce(self))  # type: ignore[no-untyped-call]
            return None
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
                "the output of the model has no loss to add to. Either no labels were passed, or label smoothing or "
                "compute_loss_func computes the loss outside the model. Use attach_trainer(trainer), or handle.defer "
                "and handle.take()."
            )
        place, loss = own
        share = self._share(call)
        extra = self.weighted(share * total / count.clamp(min=1))
        self._totals.add_loss(loss, share)
        self.measure_gradient_ratio(loss, extra)
        return with_loss(output, place, loss + extra)

    def _share(self, call: Call) -> Tensor | float:
        return share_of_step(call.arguments, self.micro_batches, self._shifts_labels)

    def _values(self, forward: Forward) -> tuple[Tensor, Tensor]:
        """Mean over layers of the sums over sequences, to be differentiated; number of sequences."""
        missing = [
            str(layer) for key, layer in self._states_of.items() if key not in forward.kept and key not in forward.sums
        ]
        if missing:
            raise AttachError(
                f"no hidden state was seen at {', '.join(missing)}: the block did not run (layer drop, early exit), or "
                "the loss was attached after the model had been compiled and called (then call torch._dynamo.reset() "
                "after attaching)."
            )
        if not self._monitoring:
            # a new dictionary: a compiled graph that has changed one does not look up the form of the loss
            waiting = {key: state.requires_grad for key, state in forward.kept.items()}
            check_graph({**forward.trained, **waiting}, self._states_of, self._sources)
        sums = [
            forward.sums[key] if key in forward.sums else self._value(forward, key, forward.kept[key])
            for key in self._states_of
        ]
        count = forward.count
        assert count is not None
        device = count.device
        sums_L = torch.stack([value.to(device) for value in sums])
        if self._controller is None:
            total = sums_L.mean()
        else:
            total = self._controller.weigh(sums_L)
        self.last = sums_L.detach().mean() / count.clamp(min=1)
        self._totals.add(sums_L.detach(), count)
        if forward.sums and not self._monitoring and not self.part.is_stage:
            anchor = forward.anchor
            if anchor is None:  # reentrant checkpoints: the carriers come with the recomputation
                anchor = next(state for state in reversed(forward.kept.values()) if state.requires_grad)
            total = Tap.apply(total, anchor, forward, self)  # type: ignore[no-untyped-call]
        return total, count

    def _value(self, forward: Forward, key: int, state: Tensor, watched: bool = True) -> Tensor:
        """Sum over the sequences of the loss of one layer."""
        layer, place = self._states_of[key], list(self._states_of).index(key)
        try:
            whole = self.part.whole(state, forward.call, 0 if self.config.tokens_first else 1)
            z_BTD = self._reader.states(forward.call, whole, str(layer), _NORM if layer == FINAL_NORM else "blocks")
            if not forward.is_read:
                forward.mask, forward.segments = self._reader.read(forward.call, z_BTD.device)
                forward.is_read = True
        except SequencesError as error:
            raise AttachError(str(error)) from None
        self._seed_draws(forward, layer)
        mask, segments = (None if one is None else one.to(z_BTD.device) for one in (forward.mask, forward.segments))
        if self._teacher is not None and forward.others is None:
            forward.others = self._teacher.states(forward.call)
        other = None if forward.others is None else forward.others[place].to(z_BTD.device)
        # inside autocast the products would be taken in bfloat16
        with torch.autocast(z_BTD.device.type, enabled=False):
            own = z_BTD if self.branch is None else self.branch(z_BTD, mask)
            value, count = self._loss_of[key].sum_and_count(own, mask, segments, other)
            if watched and self._controller is not None:
                self._controller.observe(place, z_BTD, mask, segments)
        if forward.count is None:
            forward.count = count
        return value

    def _seed_draws(self, forward: Forward, layer: Layer) -> None:
        if not self._draws or (not self._at_blocks and forward.count is not None):
            return
        # a function of (seed, step, micro-batch) alone, so that a resumed run draws the same numbers; at the blocks
        # also of the layer, for a checkpoint that computes a block again and for the stages of a pipeline
        purpose = f"dispersion loss, micro-batch {forward.number}{f', {layer}' if self._at_blocks else ''}"
        self.loss.generator.manual_seed(seeding.derive(self.config.loss.seed, purpose, self._step or 0))

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
