"""The terminal, whose reader may leave before the command ends (``decondense study ... | head``)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Any

import rich.console
from rich.segment import Segment

__all__ = ["Console"]

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Console(rich.console.Console):
    """rich's console; if nobody reads its output any more, the command goes on without it.

    Control characters of names and texts are shown as their escape: a file of rows must not steer the terminal.
    """

    def render(self, *arguments: Any, **keywords: Any) -> Iterable[Segment]:
        """The segments of what is printed."""
        for segment in super().render(*arguments, **keywords):
            shown = segment.text if segment.control else _CONTROL.sub(lambda c: ascii(c[0])[1:-1], segment.text)
            yield segment._replace(text=shown)

    def on_broken_pipe(self) -> None:
        """Discard what is still to be printed; rich's own ends the process, and with it a study, with status 1."""
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.file.fileno())
        os.close(nowhere)
