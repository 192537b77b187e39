r"""Add the dispersion loss to any model, whatever trains it: :func:`attach`, or :func:`attach_trainer` on a trainer.

What is trained is (Liu et al. 2026, arXiv:2602.00217, section "Dispersion loss")

.. math:: L = L_{CE} + \lambda \, \frac{1}{|\mathcal L|} \sum_{l \in \mathcal L} \frac{1}{S} \sum_{s=1}^{S} D_s^{(l)}

with the hidden states after the blocks :math:`\mathcal L`, and :math:`S` sequences of at least two real tokens.

How: hooks on the blocks only *keep* each output; the loss is computed in the forward hook of the whole model, and only
there. A loss computed in a block's own hook is silently wrong under reentrant gradient checkpointing, where the hook
runs again during the recomputation; kept tensors are the very ones that the backward pass goes through. Nothing is
patched: the hooks sit on this one model, and :meth:`DispersionHandle.detach` takes them off.

Layer numbers are block numbers from 0. The state of the last block is the residual stream *before* the model's final
norm; ``final_norm=True`` takes it after the norm, which is what ``output_hidden_states`` of transformers returns.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from decondense import seeding
from decondense.blocks import base_model, find_blocks, find_final_norm, resolve_layers, unwrap
from decondense.config import DispersionConfig, LossConfig, WeightSchedule
from decondense.losses import DispersionLoss
from decondense.sequences import SequencesError, real_and_same

_DEFAULT = DispersionConfig()
_DISCARDED_BEFORE_ERROR = 3
# names of device-mesh dimensions along which a rank holds only part of a sequence, of a layer or of the model
_INEXACT_MESH_DIMENSIONS = ("tp", "cp", "sp", "pp", "ulysses")


class AttachError(ValueError):
    """The loss cannot be attached, or would not be exact; the message says what to do instead."""


def attach(
    model: nn.Module,
    weight: float = _DEFAULT.weight,
    layers: str | Sequence[int] = _DEFAULT.layers,
    *,
    config: DispersionConfig | None = None,
    schedule: WeightSchedule = _DEFAULT.schedule,
    blocks: str | None = _DEFAULT.blocks,
    final_norm: bool = _DEFAULT.final_norm,
    embedding: bool = _DEFAULT.embedding,
    gradient_ratio_every: int | None = _DEFAULT.gradient_ratio_every,
    seed: int = _DEFAULT.seed,
    **loss: Any,
) -> DispersionHandle:
    """Add ``weight`` times the dispersion loss to the loss that ``model`` returns in training.

    In ``model.train()`` mode with gradients enabled, the model's ``loss`` (the entry of a dictionary-like output, or
    the one scalar of a tuple) becomes ``loss + weight * dispersion``; evaluation and generation are left alone. With
    ``weight=0`` nothing is added and the values are still recorded for logs: a control arm.

    Args:
        model: A causal or masked language model, also inside PEFT, DDP, ``fully_shard`` or ``torch.compile`` wrappers.
        weight: The coefficient lambda. Liu et al.: 0.1.
        layers: ``"all"``, ``"deep"`` (second half), ``"shallow"``, ``"last"``, or block numbers from 0.
        config: All of these settings as one object, instead of the keywords.
        schedule: How the weight changes over training; then call :meth:`DispersionHandle.set_progress` every step.
        blocks: Dotted path of the list of blocks, where the rule of :func:`decondense.blocks.find_blocks` cannot tell.
        final_norm: Take the last block's state after the model's final norm.
        embedding: Also disperse the input of the first block.
        gradient_ratio_every: Every so many optimizer steps, log the norm of the gradient of the added term over the
            norm of the gradient of the model's own loss. Costs two extra backward passes then.
        seed: Seed of the loss's own random generator (only ``pairs="grouped"`` and ``"subset"`` draw).
        **loss: Keywords of :class:`decondense.config.LossConfig`: ``form``, ``tau``, ``impl``, ``pairs``, ...

    Returns:
        A handle, also a context manager: ``with attach(model) as handle: ...`` detaches at the end.

    Raises:
        AttachError: a model for which the gradient would not be exact, or that is attached already.

    Gradient accumulation and several ranks: the result is the mean over micro-batches and ranks of each one's mean over
    sequences, exact where all have the same number of sequences. A trainer that divides by the number of tokens of all
    micro-batches (transformers' ``num_items_in_batch``) is followed by token share. :func:`attach_trainer` is exact
    without these conditions: prefer it with a transformers or TRL trainer.
    """
    if config is None:
        loss_config = LossConfig.parse(loss, where="attach()")
        config = DispersionConfig.parse(
            {
                "weight": weight,
                "layers": layers if isinstance(layers, str) else tuple(layers),
                "loss": loss_config,
                "schedule": schedule,
                "blocks": blocks,
                "final_norm": final_norm,
                "embedding": embedding,
                "gradient_ratio_every": gradient_ratio_every,
                "seed": seed,
            },
            where="attach()",
        )
        return DispersionHandle(model, config)
    settings = {"weight": weight, "layers": layers, "schedule": schedule, "blocks": blocks, "final_norm": final_norm}
    settings |= {"embedding": embedding, "gradient_ratio_every": gradient_ratio_every, "seed": seed, **loss}
    extra = [name for name, value in settings.items() if name in loss or value != getattr(_DEFAULT, name)]
    if extra:
        raise AttachError(f"attach() got config= and also {', '.join(extra)}; put them into the DispersionConfig.")
    return DispersionHandle(model, config)


def attached(model: nn.Module) -> DispersionHandle | None:
    """The handle that is attached to ``model`` or to one of its blocks, if there is one."""
    for module in unwrap(model).modules():
        # torch has no public way to list a module's hooks; without these names nothing is found, and nothing breaks
        tables: list[dict[int, Any]] = [vars(module).get(name, {}) for name in ("_forward_hooks", "_forward_pre_hooks")]
        for hook in (hook for table in tables for hook in table.values()):
            if isinstance(hook, _Hook) and hook.handle.is_attached:
                return hook.handle
    return None


class DispersionHandle:
    """What :func:`attach` returns: detaches, reports, and follows the weight schedule.

    ``copy.deepcopy(model)`` copies the hooks with a handle of their own; detach first where that is not wanted.
    """

    def __init__(self, model: nn.Module, config: DispersionConfig) -> None:
        _refuse(model)
        other = attached(model)
        if other is not None:
            raise AttachError(f"the model has a dispersion loss already: {other!r}. Call its detach() first.")
        self.config = config
        self.defer = False
        """Keep the value for :meth:`take` instead of adding it to the model's loss."""
        self.loss = DispersionLoss.from_config(config.loss)
        blocks = find_blocks(model, config.blocks)
        self._blocks = blocks
        self._layers = resolve_layers(config.layers, len(blocks))
        self._labels = [f"block_{number:02d}" for number in self._layers]
        self._attached = True
        self._active = False
        self._monitoring = config.weight == 0
        self._off = False
        self._states: dict[int, Tensor] = {}
        self._batch: dict[str, Any] = {}
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
        """What divides a value where the trainer divides by the tokens of several micro-batches; None: token share."""
        self.training_forwards = 0
        """Forwards of the model in training mode since attaching (not counted inside compiled graphs)."""
        self.last: Tensor | None = None
        """Dispersion loss of the last training forward (mean over layers and sequences), detached."""

        device = next((p.device for p in blocks.root.parameters() if p.device.type != "meta"), torch.device("cpu"))
        # A Python number would recompile a compiled model each time that the schedule moves it; a tensor does not.
        self._weight_tensor = torch.zeros(
            (), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device
        )
        self._set_weight()
        sources: list[tuple[int, nn.Module]] = [(number, blocks.modules[number]) for number in self._layers]
        if config.final_norm:
            if self._layers[-1] != len(blocks) - 1:
                raise AttachError(
                    f"final_norm=True is about the last block, {len(blocks) - 1}, which is not among the layers "
                    f"{self._layers}."
                )
            sources[-1] = (self._layers[-1], find_final_norm(blocks))
            self._labels[-1] = "final_norm"
        self._trainable_above = dict(sources)
        if config.embedding:
            self._labels.insert(0, "embedding")
        self._keys = [-1, *self._layers] if config.embedding else list(self._layers)
        self._shifts_labels = _shifts_labels(base_model(blocks.root))
        self._looks_once: bool | None = None  # None: where a look waits for the device
        self._numbered: bool | None = None  # whether integer masks number documents
        self._overlooked: Tensor | None = None
        # sums over sequences per layer, then the number of sequences
        self._totals = torch.zeros(len(self._keys) + 1, device=device)

        root = blocks.root
        self._parameter_names = list(inspect.signature(root.forward).parameters)
        self._removable = [
            root.register_forward_pre_hook(_Begin(self), with_kwargs=True),
            root.register_forward_hook(_End(self), with_kwargs=True),
            *(module.register_forward_hook(_Keep(self, number)) for number, module in sources),
        ]
        if config.embedding:
            keep_input = _KeepInput(self, -1)
            self._removable.append(blocks.modules[0].register_forward_pre_hook(keep_input, with_kwargs=True))

    # ---- the user's side -------------------------------------------------------------------------------------------

    def __enter__(self) -> DispersionHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def __repr__(self) -> str:
        loss = self.config.loss
        now = "" if self.weight == self.config.weight else f" (now {self.weight:.4g})"
        return (
            f"DispersionHandle(layers={', '.join(self._labels)} of {len(self._blocks)} blocks at "
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
    def weight(self) -> float:
        """The weight lambda that the next training forward uses, after the schedule."""
        return self._weight

    def detach(self) -> None:
        """Take every hook off; the model is as it was. Detaching twice does nothing."""
        self._attached = self._active = False
        while self._removable:
            self._removable.pop().remove()
        self._states, self._batch, self._pending = {}, {}, None
        while self._on_detach:
            self._on_detach.pop()()

    def restart(self) -> None:
        """Forget what a run left that was cut short (out of memory): its states, its sums for the log, its step."""
        self._states, self._batch, self._pending, self._active = {}, {}, None, False
        self._discarded = self._forwards = 0
        self._overlooked = self._ratio = self._ratio_step = self._step = self._total_steps = None
        self._totals.zero_()
        self._set_weight()

    def on_detach(self, action: Callable[[], None]) -> None:
        """Have ``action`` called when the handle is detached."""
        self._on_detach.append(action)

    def __getstate__(self) -> dict[str, Any]:
        # A copied or pickled model carries its hooks, and so the handle; but not the trainer, nor a forward under way.
        fresh: dict[str, Any] = {"_on_detach": [], "_pending": None, "_states": {}, "_batch": {}, "_active": False}
        return {**self.__dict__, **fresh}

    def set_progress(self, step: int, total_steps: int) -> None:
        """Say that the next forward belongs to step ``step`` (from 0) of ``total_steps``; moves the weight."""
        if step != self._step:
            self._forwards = 0
        self._step, self._total_steps = step, total_steps
        self._set_weight()

    def take(self) -> Tensor | None:
        """With ``defer``: the loss of the last training forward with its graph, unweighted; None if there was none."""
        taken = self.take_sum_and_count()
        return None if taken is None else taken[0] / taken[1].clamp(min=1)

    def take_sum_and_count(self) -> tuple[Tensor, Tensor] | None:
        """With ``defer``: (sum over sequences of the mean over layers, number of sequences) of the last forward."""
        taken, self._pending = self._pending, None
        return taken

    def pop(self, reduce: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """Mean values since the last call, for a log; empty when there was no training forward since.

        ``dispersion`` (mean over layers), ``dispersion_weight``, ``dispersion/block_00`` ..., and with
        ``gradient_ratio_every`` also ``dispersion_gradient_ratio``. Waits for the device. ``reduce`` sums a tensor over
        ranks.
        """
        overlooked, self._overlooked = self._overlooked, None
        if overlooked is not None and bool(overlooked):
            raise AttachError(
                "some attention masks number the documents of packed rows and the first one did not, so pairs were "
                "formed across documents since the last log. Pass masks of one kind, or position_ids."
            )
        totals = self._totals.double() if self._totals.device.type != "mps" else self._totals.clone()
        self._totals.zero_()
        if reduce is not None:
            totals = reduce(totals)
        *sums, count = totals.tolist()
        if not count:
            return {}
        means = [value / count for value in sums]
        values = {"dispersion": sum(means) / len(means), "dispersion_weight": self.weight}
        values.update({f"dispersion/{label}": value for label, value in zip(self._labels, means, strict=True)})
        if self._ratio is not None:
            values["dispersion_gradient_ratio"] = float(self._ratio)
            self._ratio = None
        return values

    @property
    def is_off(self) -> bool:
        """Whether nothing is added at present: ``weight=0``, or the schedule has come to (or not left) 0."""
        return self._off or self._monitoring

    @property
    def counts_batches(self) -> bool:
        """Whether the mean is over batches (pairs across sequences) instead of sequences."""
        return self.config.loss.within != "sequence"

    def weighted(self, value: Tensor) -> Tensor:
        """``value`` times the current weight."""
        if torch.compiler.is_compiling():
            return self._weight_tensor.to(value.device, value.dtype) * value
        return self._weight * value

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule and the random generator stand, and the configuration they belong to."""
        return {
            "config": self.config.model_dump(mode="json"),
            "step": self._step,
            "total_steps": self._total_steps,
            "forwards": self._forwards,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`; a state of other settings is refused."""
        here, there = self.config.model_dump(mode="json"), dict(state["config"])
        different = sorted(key for key in {*here, *there} if here.get(key) != there.get(key))
        if different:
            pairs = ", ".join(f"{key}: {there.get(key)} then, {here.get(key)} now" for key in different)
            raise AttachError(
                f"the saved dispersion state was made with other settings ({pairs}); attach with the same."
            )
        if state["step"] is not None and state["total_steps"] is not None:
            self.set_progress(int(state["step"]), int(state["total_steps"]))
        self._forwards = int(state["forwards"])

    # ---- the hooks' side -------------------------------------------------------------------------------------------

    def _set_weight(self) -> None:
        factor = 1.0
        if self._step is not None and self._total_steps is not None:
            factor = self.config.schedule.factor(self._step, self._total_steps)
        self._off = factor == 0
        self._weight = self.config.weight * factor
        self._weight_tensor.fill_(self._weight)

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
        self._batch = {**dict(zip(self._parameter_names, args, strict=False)), **kwargs}

    def _check_once(self) -> None:
        if torch.compiler.is_compiling():
            return
        self._checked = True
        _refuse_meshes(self._blocks.root)
        if self._step is None and not self.config.schedule.is_constant:
            raise AttachError(
                "the weight schedule needs to know the progress of training: call handle.set_progress(step, "
                "total_steps) before each optimizer step, or use attach_trainer(trainer)."
            )

    def _keep(self, key: int, module: nn.Module, state: Any) -> None:
        if self._active:
            if key in self._states:
                raise AttachError(
                    f"block {max(key, 0)} ran twice in one forward (layers that share their weights?); dispersion "
                    "needs one state per layer."
                )
            self._states[key] = state[0] if isinstance(state, (tuple, list)) else state
        elif self._attached and module.training and torch.is_grad_enabled() and not self._off and not _in_backward():
            raise AttachError(
                f"block {max(key, 0)} ran outside the forward of the model that the loss is attached to, so the loss "
                "would be missed. Attach to the model that is called (after wrapping it with PEFT), or detach() first."
            )

    def _end(self, output: Any) -> Any:
        if not self._active:
            return None
        self._active = False
        batch, states = self._batch, self._states
        self._batch, self._states = {}, {}
        if self._monitoring:
            with torch.no_grad():
                self._values(states, batch)
            return None
        total, count = self._values(states, batch)
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
        return self._add(output, self.weighted(self._share(batch) * total / count.clamp(min=1)))

    def _values(self, states: dict[int, Tensor], batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        missing = [label for key, label in zip(self._keys, self._labels, strict=True) if key not in states]
        if missing:
            raise AttachError(
                f"no hidden state came from {', '.join(missing)}: the block did not run (layer drop, early exit), or "
                "the loss was attached after the model had been compiled and called (then call torch._dynamo.reset() "
                "after attaching)."
            )
        first = states[self._keys[0]]
        if first.ndim == 2:  # newer torchtitan folds the batch into one row [T, D] with positions [T]
            states = {key: state[None] for key, state in states.items()}
            first = states[self._keys[0]]
        if first.ndim != 3 or type(first).__name__ == "DTensor":
            raise AttachError(
                f"the blocks return {type(first).__name__} of shape {tuple(first.shape)}; dispersion needs plain "
                "tensors [batch, tokens, features] with whole sequences on each rank. Tensor, sequence and context "
                "parallelism are not supported; use data parallelism (DDP, FSDP2)."
            )
        if not self._monitoring:
            self._check_graph(states)
        rows, positions = first.shape[:2]
        try:
            mask, segments = real_and_same(self._plain_mask(batch), rows, positions, first.device)
        except SequencesError as error:
            raise AttachError(str(error)) from None
        self._seed_draws()
        sums, counts = [], []
        # inside autocast the products would be taken in bfloat16
        with torch.autocast(first.device.type, enabled=False):
            for key in self._keys:
                z_BTD = states[key]
                here = (mask, segments) if z_BTD.device == first.device else _move((mask, segments), z_BTD.device)
                value, count = self.loss.sum_and_count(z_BTD, *here)
                sums.append(value.to(first.device))
                counts.append(count.to(first.device))
            sums_L = torch.stack(sums)
            total, count = sums_L.mean(), counts[0]
            self._record(sums_L.detach(), total.detach(), count)
        return total, count

    def _plain_mask(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Away from the processor: take an integer mask for a plain one if the first was, and verify that in pop().

        An integer mask may number the documents of packed rows. To look at each would wait for the device each time; to
        treat each as if it did costs a third of the loss.
        """
        mask = batch.get("attention_mask")
        if not isinstance(mask, Tensor) or torch.compiler.is_compiling():
            return batch
        if not (mask.device.type != "cpu" if self._looks_once is None else self._looks_once):
            return batch
        if mask.dtype not in (torch.int64, torch.int32) or self._numbered:
            return batch
        numbers = (mask > 1).any()
        if self._numbered is None:
            self._numbered = bool(numbers)
            if self._numbered:
                return batch
        self._overlooked = numbers if self._overlooked is None else self._overlooked | numbers
        return {**batch, "attention_mask": mask != 0}

    def _seed_draws(self) -> None:
        if self.config.loss.pairs == "all" and not self.loss.settings.info.random:
            return
        # a function of (seed, step, micro-batch) alone, so that a resumed run draws what the uninterrupted one drew
        purpose = f"dispersion loss, micro-batch {self._forwards}"
        self._forwards += 1
        self.loss.generator.manual_seed(seeding.derive(self.config.seed, purpose, self._step or 0))

    def _record(self, sums_L: Tensor, total: Tensor, count: Tensor) -> None:
        self.last = total / count.clamp(min=1)
        if self._totals.device != sums_L.device:
            self._totals = self._totals.to(sums_L.device)
        # tensors, in place: a Python counter would give a compiled model a new graph at every step
        self._totals += torch.cat([sums_L, count.reshape(1).to(sums_L.dtype)]).to(self._totals.dtype)

    def _check_graph(self, states: Mapping[int, Tensor]) -> None:
        # asked here and not in the hook: reentrant checkpointing gives the kept tensor its graph only afterwards
        for key, label in zip(self._keys, self._labels, strict=True):
            if states[key].requires_grad or key not in self._trainable_above:
                continue
            if any(parameter.requires_grad for parameter in self._trainable_above[key].parameters()):
                raise AttachError(
                    f"the output of {label} carries no gradient although its parameters are trained. With frozen "
                    "embeddings and reentrant checkpointing call model.enable_input_require_grads(), or use "
                    "use_reentrant=False."
                )
        if not any(states[key].requires_grad for key in self._keys):
            raise AttachError(
                f"nothing that is trained lies below the layers {', '.join(self._labels)}, so their dispersion has no "
                "gradient. Choose deeper layers."
            )

    def _watch(self, total: Tensor) -> None:
        node = total.grad_fn
        if node is None:
            return
        watch = _Watch(self)
        # the node's own dictionary lives as long as the graph: a graph that dies unused takes the watch with it
        metadata: dict[str, Any] = node.metadata  # type: ignore[assignment]
        metadata["decondense"] = watch
        total.register_hook(watch.reached)  # type: ignore[no-untyped-call]

    def _share(self, batch: Mapping[str, Any]) -> Tensor | float:
        """This micro-batch's share of the tokens that transformers divides the sum of the cross-entropy by."""
        items, labels = batch.get("num_items_in_batch"), batch.get("shift_labels")
        if items is None:
            return 1.0
        if self.micro_batches is not None:
            return 1 / self.micro_batches
        if labels is None:
            labels = batch.get("labels")
            if labels is None:
                raise AttachError(
                    "num_items_in_batch came without labels, so the share of this micro-batch cannot be told; use "
                    "attach_trainer(trainer)."
                )
            if self._shifts_labels:
                labels = labels[..., 1:]
        share: Tensor = (labels != -100).sum() / items
        return share

    def _add(self, output: Any, extra: Tensor) -> Any:
        scalars = dict(_scalars(output))
        if len(scalars) != 1:
            raise AttachError(
                "the output of the model has no loss to add to (no labels passed? label smoothing or "
                "compute_loss_func, which take the loss out of the model?). Use attach_trainer(trainer), or "
                "handle.defer and handle.take()."
            )
        key, loss = next(iter(scalars.items()))
        self.measure_gradient_ratio(loss, extra)
        new = loss + extra
        if isinstance(output, Tensor):
            return new
        if isinstance(output, tuple) and not hasattr(output, "_replace"):
            return tuple(new if place == key else value for place, value in enumerate(output))
        if isinstance(output, (list, dict)):
            output[key] = new
        elif isinstance(output, tuple):
            return output._replace(**{output._fields[key]: new})  # type: ignore[attr-defined]
        else:
            setattr(output, key, new)
        return output

    # ---- gradient ratio --------------------------------------------------------------------------------------------

    def measure_gradient_ratio(self, loss: Tensor, extra: Tensor) -> None:
        """Where one is due, keep ||grad of extra|| / ||grad of loss|| over this rank's parameters for the log."""
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
        parameters = [parameter for parameter in self._blocks.root.parameters() if parameter.requires_grad]
        if any(
            type(parameter).__name__ == "DTensor" or hasattr(parameter, "_local_tensor") for parameter in parameters
        ):
            raise AttachError("gradient_ratio_every does not work with sharded parameters (FSDP); leave it out.")
        if "Liger" in _node_names(loss):
            raise AttachError(
                "gradient_ratio_every does not work with Liger's fused cross-entropy, whose backward can run only "
                "once; leave it out."
            )
        try:
            norms = [
                _norm(torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True))
                for term in (extra, loss)
            ]
        except RuntimeError as error:
            if "memory" in str(error):  # a trainer may start again with smaller batches
                raise
            raise AttachError(
                f"gradient_ratio_every needs a second backward pass, which failed ({error}). Reentrant checkpointing "
                "and compiled models do not allow it; leave it out."
            ) from error
        self._ratio = norms[0] / norms[1]


class _Hook:
    """A hook that knows its handle. A class, not a closure, so that models can still be copied and pickled."""

    def __init__(self, handle: DispersionHandle) -> None:
        self.handle = handle


class _Begin(_Hook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.handle._begin(module, args, kwargs)


class _End(_Hook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return self.handle._end(output)


class _Keep(_Hook):
    def __init__(self, handle: DispersionHandle, key: int) -> None:
        super().__init__(handle)
        self.key = key

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.handle._keep(self.key, module, output)


class _KeepInput(_Keep):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        self.handle._keep(self.key, module, args[0] if args else kwargs["hidden_states"])


class _Watch:
    """Counts a loss that is thrown away without ever having had a gradient."""

    def __init__(self, handle: DispersionHandle) -> None:
        self.handle = handle
        self.used = False

    def reached(self, gradient: Tensor) -> None:
        self.used = True
        self.handle._discarded = 0

    def __del__(self) -> None:
        if not self.used:
            self.handle._discarded += 1


def _refuse(model: nn.Module) -> None:
    if isinstance(model, nn.DataParallel):
        raise AttachError("nn.DataParallel is not supported, its replicas have no hooks; use DDP or FSDP2 (torchrun).")
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise AttachError(
            "FSDP1 (FullyShardedDataParallel) was never verified; use FSDP2 (fully_shard, fsdp_version 2)."
        )
    core = base_model(unwrap(model))
    if getattr(getattr(core, "config", None), "is_encoder_decoder", False):
        raise AttachError(
            f"{type(core).__name__} is an encoder-decoder model, whose attention mask is the encoder's; only "
            "decoder-only and encoder-only models are supported."
        )
    if (getattr(core, "_tp_size", None) or 1) > 1:  # set by from_pretrained(tp_plan=...)
        raise AttachError("tensor parallelism (tp_plan) is not supported; use data parallelism (DDP, FSDP2).")
    _refuse_meshes(model)


def _refuse_meshes(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        mesh: Any = getattr(parameter, "device_mesh", None)
        for dimension in getattr(mesh, "mesh_dim_names", None) or ():
            if any(part in _INEXACT_MESH_DIMENSIONS for part in dimension.split("_")) and mesh[dimension].size() > 1:
                raise AttachError(
                    f"parameter {name} is distributed over the mesh dimension {dimension!r}: tensor, sequence, context "
                    "and pipeline parallelism are not supported, because a rank does not hold whole sequences of "
                    "whole states. Use data parallelism (DDP, FSDP2, HSDP)."
                )


def _scalars(output: Any) -> Iterable[tuple[Any, Tensor]]:
    if isinstance(output, dict):
        items: Iterable[tuple[Any, Any]] = [("loss", output.get("loss"))]
    elif isinstance(output, (tuple, list)):
        items = enumerate(output)
    elif isinstance(output, Tensor):
        items = [(0, output)]
    else:
        items = [("loss", getattr(output, "loss", None))]
    return [
        (key, value) for key, value in items if isinstance(value, Tensor) and value.ndim == 0 and value.requires_grad
    ]


def _shifts_labels(core: nn.Module) -> bool:
    """Whether transformers' Trainer counts this model's labels without the first: causal ones that have a loss_type."""
    loss_type = getattr(core, "loss_type", None)
    if loss_type is None:
        return False
    import transformers
    from packaging.version import Version
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    # before that release it counted every model's labels unshifted
    return Version(transformers.__version__) >= Version("5.10.1") and LOSS_MAPPING.get(loss_type) is ForCausalLMLoss


def _in_backward() -> bool:
    # Private, but the only way to tell a block that a checkpoint recomputes from one that is called on its own; where a
    # torch release lacks it, the check for calls outside the model is given up rather than raised in vain.
    current = getattr(torch._C, "_current_graph_task_id", None)
    return current is None or current() != -1


def _move(tensors: tuple[Tensor | None, ...], device: torch.device) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else tensor.to(device) for tensor in tensors)


def _norm(gradients: Sequence[Tensor | None]) -> Tensor:
    return torch.stack([gradient.float().square().sum() for gradient in gradients if gradient is not None]).sum().sqrt()


def _node_names(tensor: Tensor) -> str:
    seen, todo = {tensor.grad_fn}, [tensor.grad_fn]
    while todo:
        node = todo.pop()
        fresh = {parent for parent, _ in node.next_functions} - seen if node is not None else set()
        seen |= fresh
        todo.extend(fresh)
    return " ".join(node.name() for node in seen if node is not None)
