"""The identity of a hidden state of a model, and the one place that defines its readable name.

The states over which depth is counted are, as in Liu et al. 2026 (arXiv:2602.00217): state 0, the embedding (what
enters the first block), and the states after block 1 to block L. What follows the blocks (final norm, output of the
whole stack, logits) has a kind of its own. Blocks are numbered from 1 for people everywhere: in keys of logs, rows,
tables and messages. Python arguments such as ``layers=(0, -1)`` are Python indices.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["embedding", "block", "final norm", "stack output", "logits"]

_KINDS: tuple[Kind, ...] = get_args(Kind)
_NUMBERED = re.compile(r"block[ _]0*([1-9]\d*)")


@dataclass(frozen=True)
class Layer:
    """One measured state: its kind, and for a block its number, from 1."""

    kind: Kind
    number: int = 0

    def __post_init__(self) -> None:
        assert self.kind in _KINDS, self.kind
        assert (self.number >= 1) == (self.kind == "block"), self.number

    def __str__(self) -> str:
        return self.label

    @property
    def label(self) -> str:
        """Readable name, also used in rows: ``"embedding"``, ``"block 3"``, ``"final norm"``."""
        return f"block {self.number}" if self.kind == "block" else self.kind

    def key(self, blocks: int = 0) -> str:
        """Key for logs, which sort keys: ``"block_03"``, ``"final_norm"``. ``blocks``: the model's number of blocks."""
        width = max(2, len(str(blocks)))
        return f"block_{self.number:0{width}d}" if self.kind == "block" else self.kind.replace(" ", "_")

    @property
    def counts_as_depth(self) -> bool:
        """Whether the state is the embedding or follows a block."""
        return self.kind in ("embedding", "block")

    @property
    def follows_blocks(self) -> bool:
        """Whether the state is the last block's, after everything that the model does to it before the head."""
        return self.kind in ("final norm", "stack output")


EMBEDDING = Layer("embedding")
FINAL_NORM = Layer("final norm")
STACK_OUTPUT = Layer("stack output")
LOGITS = Layer("logits")


def block(number: int) -> Layer:
    """The state after block ``number``, from 1."""
    return Layer("block", number)


def parse(text: str) -> Layer:
    """The state that a label or a key names, as in rows and logs.

    Raises:
        ValueError: the text names no state.
    """
    if match := _NUMBERED.fullmatch(text):
        return block(int(match[1]))
    name = text.replace("_", " ")
    for kind in _KINDS:
        if kind == name and kind != "block":
            return Layer(kind)
    known = ", ".join(kind for kind in _KINDS if kind != "block")
    raise ValueError(f"{text!r} is not a layer; expected 'block N' with N from 1, or one of: {known}.")


def deep_half(states: int) -> int:
    """Number of states in the deep half of the states 0 to L: L/2 rounded down, but at least one."""
    return max(1, (states - 1) // 2)
