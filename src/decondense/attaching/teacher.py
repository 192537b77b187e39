"""The states of a live teacher on the tokens that the attached model reads: what ``form="gram"`` compares with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from decondense.attaching.checks import AttachError
from decondense.blocks import Blocks, find_blocks, find_final_norm
from decondense.layers import EMBEDDING, FINAL_NORM, Layer
from decondense.layout import Call, StateReader, hidden_state
from decondense.limits import vocabulary_size
from decondense.seeding import undisturbed

_PADDING = 1024
"""Rows by which models of one tokenizer differ at most: they pad their embeddings to multiples of up to this."""
_INPUTS = ("input_ids", "attention_mask", "position_ids")


class Teacher:
    """A model that is not trained, and its states at the relative depth of the attached model's.

    The state of block n of L is compared with that of the teacher's block nearest to n / L of its depth.
    """

    def __init__(self, teacher: nn.Module, model: Blocks, layers: Sequence[Layer]) -> None:
        if any(module is model.root for module in teacher.modules()):
            raise AttachError("the teacher is the attached model itself; pass a different model.")
        rows, own = vocabulary_size(teacher), vocabulary_size(model.root)
        if rows is not None and own is not None and abs(rows - own) > _PADDING:
            raise AttachError(
                f"the teacher's embedding has {rows:,} rows and the model's has {own:,}: they do not share a "
                "tokenizer, so the teacher would read different text. Use a teacher with the model's tokenizer."
            )
        found = find_blocks(teacher)
        self.model = teacher
        self._reader = StateReader(found)
        theirs = len(found)
        self._places: list[tuple[nn.Module, bool]] = []  # a module, and whether its input is meant
        for layer in layers:
            if layer == EMBEDDING:
                self._places.append((found.modules[0], True))
            elif layer == FINAL_NORM:
                self._places.append((find_final_norm(found), False))
            else:
                number = max(1, int(layer.number * theirs / len(model) + 0.5))
                self._places.append((found.modules[number - 1], False))
        self._names = [str(layer) for layer in layers]

    def __deepcopy__(self, memo: Any) -> Teacher:
        return self  # a copied model keeps its teacher

    def states(self, call: Call) -> list[Tensor]:
        """One [batch, tokens, width'] per layer, without gradients, in evaluation mode.

        Raises:
            AttachError: inside a compiled graph, or a call without token ids.
        """
        if torch.compiler.is_compiling():
            raise AttachError(
                "a teacher cannot run inside a compiled graph; compile the teacher instead of this model."
            )
        inputs = {name: call.arguments[name] for name in _INPUTS if call.arguments.get(name) is not None}
        if "input_ids" not in inputs:
            raise AttachError("the teacher needs token ids, and this call has no input_ids; pass input_ids.")
        device = inputs["input_ids"].device
        if next(self.model.parameters()).device != device:
            self.model.to(device)
        kept: dict[int, Tensor] = {}

        def keep(place: int, found: Any) -> None:
            state = hidden_state(found)
            assert state is not None, self._names[place]
            kept[place] = state

        hooks = []
        for place, (module, of_input) in enumerate(self._places):
            if of_input:
                hooks.append(
                    module.register_forward_pre_hook(
                        lambda m, args, kw, p=place: keep(p, args[0] if args else kw["hidden_states"]), with_kwargs=True
                    )
                )
            else:
                hooks.append(module.register_forward_hook(lambda m, args, out, p=place: keep(p, out)))
        try:
            with undisturbed(self.model):
                theirs = self._reader.begin(self.model, (), inputs)
                self.model(**inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return [self._reader.states(theirs, kept[place], f"the teacher at {n}") for place, n in enumerate(self._names)]
