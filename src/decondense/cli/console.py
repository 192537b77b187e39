"""The terminal, whose reader may leave before the command ends (``decondense study ... | head``)."""

from __future__ import annotations

import os

import rich.console

__all__ = ["Console"]


class Console(rich.console.Console):
    """rich's console; if nobody reads its output any more, the command goes on without it."""

    def on_broken_pipe(self) -> None:
        """Discard what is still to be printed; rich's own ends the process, and with it a study, with status 1."""
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.file.fileno())
        os.close(nowhere)
