"""Matches the hidden states of a model with its inputs: which axis holds the tokens, and which tokens they are.

Most blocks return [batch, tokens, width]; those of ``nn.TransformerEncoder`` with torch's default
``batch_first=False``, of fairseq and of XLNet return [tokens, batch, width]. Confusing the two gives a wrong loss
without any error, so the layout is never assumed. It is, in this order:

1. given by the user (``tokens_first=``);
2. known from the class (torch's own layers);
3. read from the shapes if the inputs are [batch, tokens] by convention and there are not as many sequences as tokens;
4. determined once by a probe: one sequence of the batch is changed, and the states that change with it are its own.

States that do not correspond one to one to the tokens of the input are refused.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from decondense.blocks import Blocks, base_model
from decondense.formatting import plural
from decondense.seeding import undisturbed
from decondense.sequences import SequenceReader, SequencesError, argument_names, bind, is_batch_first

_TORCH_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_STACK = "blocks"
# share of the change of the states that may fall outside of the sequence that was changed: rounding
_LEAK = 1e-9


@dataclass
class Call:
    """One call of the model: its arguments by name, and the shape of its tokens."""

    arguments: dict[str, Any]
    tokens: tuple[str, Tensor] | None
    rows: int = 0
    """Sequences B, or what the first axis of the tokens has where it is not determined yet."""
    positions: int = 0
    """Tokens T of each sequence."""
    tokens_first: bool | None = False
    """Whether the inputs are [tokens, batch]; None: not determined yet."""


class StateReader:
    """Turns the states of one model's blocks into [batch, tokens, width], with the real tokens and the documents.

    Args:
        blocks: The blocks whose states are read.
        tokens_first: Whether the blocks return [tokens, batch, width]; None: determined as described above.
        places: Further modules whose outputs are read, by a name for :meth:`states`; each has its own layout.
    """

    def __init__(
        self, blocks: Blocks, tokens_first: bool | None = None, places: Mapping[str, nn.Module] | None = None
    ) -> None:
        core = base_model(blocks.root)
        self._core = core
        self._modules: dict[str, nn.Module] = {_STACK: blocks.modules[-1], **(places or {})}
        self._stated = tokens_first
        self._layout: dict[str, bool] = {}  # place -> whether its states are [tokens, batch, width]
        known = _of_torch(blocks.modules) if tokens_first is None else tokens_first
        if known is not None:
            self._layout[_STACK] = known
        self._inputs: bool | None = None  # whether the model takes [tokens, batch]
        names = argument_names(blocks.root, core)
        self._root, self._root_names = blocks.root, names
        # transformers' models take every token as real that no mask marks as padding
        self.sequences = SequenceReader(
            decoder=_reads_decoder(blocks, core, names),
            padding_id=None if _of_transformers(blocks, core) else _padding_id(core),
            embeds_segments=any(
                isinstance(module, nn.Embedding) and ("seg" in name or "type" in name)
                for name, module in core.named_modules()
            ),
        )

    # ---- a call ----------------------------------------------------------------------------------------------------

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """Read the arguments of a call of ``module`` before it runs; probes the model if that is needed."""
        names = self._root_names
        if module is not self._root:
            names = argument_names(module, self._core)
        arguments = bind(names, args, kwargs)
        call = self._call(arguments, names)
        if not torch.compiler.is_compiling() and self._needs_probe(call):
            self._probe(module, args, kwargs, call)
            call = self._call(arguments, names)
        return call

    def input_layout(self, module: nn.Module, inputs: Mapping[str, Any]) -> bool:
        """Whether ``module`` takes its tokens as [tokens, batch], by its name or else by a probe with ``inputs``.

        Raises:
            SequencesError: the probe did not tell.
        """
        call = self._call(dict(inputs), tuple(inputs))
        if call.tokens_first is None:
            self._probe(module, (), inputs, call)
            if self._inputs is None:
                raise SequencesError(self._unsettled(call))
        return bool(call.tokens_first if call.tokens_first is not None else self._inputs)

    def _call(self, arguments: dict[str, Any], names: Sequence[str]) -> Call:
        tokens = self.sequences.tokens(arguments, names)
        if tokens is None:
            return Call(arguments, None)
        name, value = tokens
        first: bool | None = False if is_batch_first(name) else self._inputs
        shape = tuple(value.shape)
        if len(shape) == (2 if value.is_floating_point() else 1):  # one row without a batch axis
            return Call(arguments, (name, value[None]), 1, shape[0])
        if len(shape) != (3 if value.is_floating_point() else 2):
            return Call(arguments, None)
        rows, positions = shape[:2]
        if first is None and rows == 1:
            first = False  # the other reading, many sequences of one token, has no pair
        return Call(arguments, tokens, *((positions, rows) if first else (rows, positions)), first)

    def states(self, call: Call, state: Tensor, what: str, place: str = _STACK) -> Tensor:
        """A state of the call as [batch, tokens, width].

        Raises:
            SequencesError: the states are not those of the call's tokens; the message names the possible cause.
        """
        shape = tuple(state.shape)
        if state.is_nested or type(state).__name__ == "DTensor":
            raise SequencesError(
                f"{what} returns a {'nested tensor' if state.is_nested else 'DTensor'}; dispersion needs plain tensors "
                "[batch, tokens, width] with whole sequences on each rank. Nested tensors come from "
                "nn.TransformerEncoder(enable_nested_tensor=True); tensor, sequence and context parallelism are not "
                "supported; use data parallelism (DDP, FSDP2)."
            )
        if len(shape) == 2 and call.tokens is not None and shape[0] == call.positions and call.rows == 1:
            return state[None]  # torchtitan folds the batch into one row [T, D]
        if len(shape) != 3:
            raise SequencesError(f"{what} has states of shape {shape}; {why_not_three(len(shape))}")
        if call.tokens is None:
            tensors = [(name, value) for name, value in call.arguments.items() if isinstance(value, Tensor)]
            given = ", ".join(f"{name} of shape {tuple(value.shape)}" for name, value in tensors) or "no tensor"
            raise SequencesError(
                f"{what} has states of shape {shape}, and the call has no argument that holds its tokens: expected "
                "input_ids [batch, tokens], inputs_embeds [batch, tokens, width], or token ids [batch, tokens] as the "
                f"first argument of the model; got {given}."
            )
        first = self._settle(call, shape[:2], place)
        wanted = (call.positions, call.rows) if first else (call.rows, call.positions)
        if shape[:2] != wanted:
            raise SequencesError(self._mismatch(call, shape, what, first))
        return state.transpose(0, 1) if first else state

    def read(self, call: Call, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """``(mask_BT, segments_BT)`` of the call; see :meth:`decondense.sequences.SequenceReader.read`."""
        return self.sequences.read(
            call.arguments,
            call.rows,
            call.positions,
            device,
            tokens=call.tokens,
            tokens_first=bool(call.tokens_first),
        )

    # ---- the layout ------------------------------------------------------------------------------------------------

    def _settle(self, call: Call, shape: tuple[int, ...], place: str) -> bool:
        """Whether the states of ``place`` are [tokens, batch, width]; settles what the shapes tell."""
        known = self._layout.get(place)
        square = call.rows == call.positions
        if call.tokens_first is None:  # [n, m], not known which of them is the batch
            if known is None or square:
                raise SequencesError(self._unsettled(call))
            same = shape == (call.rows, call.positions)
            call.tokens_first = known if same else not known
            if call.tokens_first:
                call.rows, call.positions = call.positions, call.rows
            self._remember_inputs(call.tokens_first)
        if known is None:
            if square:
                raise SequencesError(self._unsettled(call))
            known = shape == (call.positions, call.rows)
            # a graph cannot remember; and shapes that fit neither way settle nothing
            if not torch.compiler.is_compiling() and (known or shape == (call.rows, call.positions)):
                self._layout[place] = known
        return known

    def _remember_inputs(self, tokens_first: bool) -> None:
        if not torch.compiler.is_compiling():
            self._inputs = tokens_first

    def _unsettled(self, call: Call) -> str:
        state_it = (
            "Pass tokens_first=False for blocks that return [batch, tokens, width], tokens_first=True for [tokens, "
            "batch, width]."
        )
        if torch.compiler.is_compiling():  # a graph formats no numbers
            return (
                "it cannot be determined inside a compiled graph which axis of the blocks' states holds the tokens, "
                "because the name of the model's input does not say it or the first batch has as many sequences as "
                "tokens. " + state_it + " Or call the model once before compiling it."
            )
        name = call.tokens[0] if call.tokens is not None else "the input"
        return (
            f"it cannot be determined from {name!r}, of shape ({call.rows}, {call.positions}), which axis of the "
            "blocks' states holds the tokens, and the model was not or could not be probed (sharded parameters; "
            f"sequences that depend on each other). {state_it} Or name its input input_ids if it is [batch, tokens]."
        )

    def _mismatch(self, call: Call, shape: tuple[int, ...], what: str, first: bool) -> str:
        if torch.compiler.is_compiling():
            return (
                "the blocks' states do not have the shape of the tokens that the model was given: call the model once "
                "without compiling it for the details."
            )
        rows, positions = (shape[1], shape[0]) if first else shape[:2]
        name = call.tokens[0] if call.tokens is not None else "the input"
        message = f"{what} has states of shape {shape} for {call.rows} rows of {call.positions} tokens in {name!r}: "
        if shape[:2] == ((call.rows, call.positions) if first else (call.positions, call.rows)):
            axes = "[batch, tokens, width]" if first else "[tokens, batch, width]"
            return (
                f"{message}they are {axes}, not the layout that was detected or given. Attach with "
                f"tokens_first={not first}."
            )
        cause = why_other_tokens((rows, positions), (call.rows, call.positions), self._root)
        remedy = (
            "name blocks that see the tokens themselves (blocks='dotted.path'), or give the model inputs that keep "
            "their shape"
        )
        return f"{message}{cause}, so these are not the states of the given tokens. This is not supported" + (
            "." if _prompt_tuning(self._root) else f": {remedy}."
        )

    # ---- the probe -------------------------------------------------------------------------------------------------

    def _needs_probe(self, call: Call) -> bool:
        if call.tokens is None or call.rows < 1 or max(call.rows, call.positions) < 2:
            return False
        square = call.rows == call.positions
        if call.tokens_first is None:
            # a statement is about the states; the probe says what the inputs are, and whether it is true
            return square or _STACK not in self._layout or self._stated is not None
        return square and any(place not in self._layout for place in self._modules)

    def _probe(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], call: Call) -> None:
        """Change the first sequence of this batch and see which states change: those are its states."""
        if any(type(parameter).__name__ == "DTensor" for parameter in module.parameters()):
            return  # a forward of its own would wait for the other ranks
        assert call.tokens is not None
        tokens = call.tokens[1]
        rows = tokens.shape[0]

        def run(replacement: Tensor) -> dict[str, Tensor]:
            return _states(module, self._modules, *_replaced(args, kwargs, tokens, replacement))

        try:
            with _unchanged(module):
                base = run(tokens)
                one_row = _changes(base, run(_changed(tokens, 0, 0)))
                own = {place: _own_axis(change, rows) for place, change in one_row.items()}
                if any(axis is not None for axis in own.values()):
                    inputs = False
                else:  # a row is not a sequence; so it is one token of each
                    inputs = True
                    if tokens.shape[1] > 1:
                        one_column = _changes(base, run(_changed(tokens, 1, 0)))
                        own = {place: _own_axis(change, tokens.shape[1]) for place, change in one_column.items()}
                    else:
                        own = {p: list(c.shape[:2]).index(1) if 1 in c.shape[:2] else None for p, c in one_row.items()}
        except SequencesError:
            raise
        except Exception as error:  # whatever the model raises
            if self._stated is not None:
                return
            raise SequencesError(
                f"it could not be determined which axis of the states of {type(module).__name__} holds the tokens: the "
                f"probing forward pass in evaluation mode failed ({type(error).__name__}: {error}). Pass "
                "tokens_first=False for blocks that return [batch, tokens, width], tokens_first=True for [tokens, "
                "batch, width]."
            ) from error
        if is_batch_first(call.tokens[0]) and inputs:
            return  # tokens of one sequence reach the others: nothing is settled
        if all(axis is None for axis in own.values()):
            return
        if not is_batch_first(call.tokens[0]):
            self._inputs = inputs
        for place, axis in own.items():
            if axis is not None and self._layout.setdefault(place, axis == 1) != (axis == 1):
                raise SequencesError(
                    f"tokens_first={axis != 1} was given, but in the states of the {place} the tokens lie along the "
                    f"other axis. Attach with tokens_first={axis == 1}."
                )


def hidden_state(output: Any) -> Tensor | None:
    """The hidden state in a module's output: the tensor itself, the named field, or the first entry; else None."""
    if isinstance(output, Tensor):
        return output
    named = output.get("last_hidden_state") if isinstance(output, dict) else getattr(output, "last_hidden_state", None)
    if isinstance(named, Tensor):
        return named
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    return None


def _of_torch(blocks: Sequence[nn.Module]) -> bool | None:
    """The layout of torch's own layers, which declare it; None for other blocks."""
    declared = set()
    for module in blocks:
        # a subclass with a forward of its own may transpose
        plain = any(isinstance(module, kind) and type(module).forward is kind.forward for kind in _TORCH_LAYERS)
        attention: Any = getattr(module, "self_attn", None)
        if not plain or not isinstance(getattr(attention, "batch_first", None), bool):
            return None
        declared.add(not attention.batch_first)
    return declared.pop() if len(declared) == 1 else None


def _reads_decoder(blocks: Blocks, core: nn.Module, names: Sequence[str]) -> bool:
    in_decoder = any(part.startswith("decoder") for part in blocks.path.split("."))
    if getattr(getattr(core, "config", None), "is_encoder_decoder", False):
        return "encoder" not in blocks.path.split(".")
    return in_decoder and any(name in ("tgt", "decoder_input_ids", "prev_output_tokens") for name in names)


def _of_transformers(blocks: Blocks, core: nn.Module) -> bool:
    parts = blocks.path.split(".")
    owners = [core, *(blocks.root.get_submodule(".".join(parts[:end])) for end in range(len(parts)))]
    return any(hasattr(getattr(owner, "config", None), "model_type") for owner in owners)


def _padding_id(core: nn.Module) -> int | None:
    ids = {m.padding_idx for m in core.modules() if isinstance(m, nn.Embedding) and m.padding_idx is not None}
    return ids.pop() if len(ids) == 1 else None


def _prompt_tuning(root: nn.Module) -> str | None:
    configs: Any = getattr(root, "peft_config", None)
    active = configs.get(getattr(root, "active_adapter", None)) if isinstance(configs, dict) else None
    return type(active).__name__ if getattr(active, "is_prompt_learning", False) else None


def why_other_tokens(given: tuple[int, int], expected: tuple[int, int], root: nn.Module) -> str:
    """What makes states of other tokens than (rows, positions) those of the input."""
    (rows, positions), (wanted, length) = given, expected
    if rows == wanted and positions > length:
        cause = _prompt_tuning(root) or "prompt tuning, class or image tokens, padding to a multiple"
        return f"the model adds {plural(positions - length, 'position')} to each sequence ({cause})"
    if rows == wanted:
        return "the model drops or merges positions (pooling, patches, image tokens)"
    if rows * positions == wanted * length:
        return "the model reshapes the batch"
    return "the model changes the number of sequences (padding removed, several choices or views)"


def why_not_three(dimensions: int) -> str:
    """Why states of another number of dimensions are refused."""
    wanted = "dispersion needs [batch, tokens, width]. "
    if dimensions == 2:
        return wanted + "A single vector per sequence, or a folded batch without sequence boundaries, has no pairs."
    if dimensions == 4:
        return wanted + (
            "Four dimensions are image maps or several residual streams (hyper-connections), so a token has no single "
            "state. Name other blocks: blocks='dotted.path'."
        )
    return wanted + "Name other blocks: blocks='dotted.path'."


@contextlib.contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    """:func:`decondense.seeding.undisturbed`, without compiled code, and buffers as before too."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    eager: Any = contextlib.nullcontext()
    if hasattr(torch.compiler, "set_stance"):
        eager = torch.compiler.set_stance("force_eager")
    with undisturbed(module), eager:
        try:
            yield
        finally:
            for buffer, before in buffers:
                buffer.copy_(before)


def _states(
    module: nn.Module, places: Mapping[str, nn.Module], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Tensor]:
    kept: dict[str, Tensor] = {}

    def keep(place: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            state = hidden_state(output)
            if state is not None and state.ndim == 3 and not state.is_nested:
                kept[place] = state.detach()

        return hook

    hooks = [inner.register_forward_hook(keep(place)) for place, inner in places.items()]
    try:
        module(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return kept


def _replaced(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], old: Tensor, new: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def exchange(value: Any) -> Any:
        if isinstance(value, Mapping):
            other: Any = copy.copy(value)
            for key, entry in value.items():
                if entry is old:
                    other[key] = new
            return other
        return new if value is old else value

    return tuple(exchange(value) for value in args), {name: exchange(value) for name, value in kwargs.items()}


def _changed(tokens: Tensor, axis: int, place: int) -> Tensor:
    """The tokens with one row (or column) changed; ids stay between those that the batch holds."""
    other = tokens.detach().clone()
    part = other.select(axis, place)
    if tokens.is_floating_point():
        # fixed numbers, unlike those of any model: nothing is drawn
        wave = torch.arange(part.numel(), device=part.device, dtype=torch.float32).mul(0.7).cos().reshape(part.shape)
        part.copy_(part * -0.5 + wave.to(part.dtype))
        return other
    low, high = tokens.amin(), tokens.amax()
    if int(low) == int(high):
        part.copy_(part - 1 if int(low) > 0 else part + 1)
    else:
        part.copy_(torch.where(low + high == 2 * part, low, low + high - part))
    return other


def _changes(base: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Squared change of each state [n, m]."""
    return {
        place: (other[place].double() - state.double()).square().sum(-1)
        if state.device.type != "mps"
        else (other[place].float() - state.float()).square().sum(-1)
        for place, state in base.items()
        if place in other and other[place].shape == state.shape
    }


def _own_axis(change: Tensor, size: int) -> int | None:
    """The axis, of ``size`` entries, of which only the first entry changed."""
    total = change.sum()
    for axis in (0, 1):
        if change.shape[axis] == size and size > 1:
            outside = change.narrow(axis, 1, size - 1).sum()
            if bool(total > 0) and bool(outside <= _LEAK * total):
                return axis
    return None
