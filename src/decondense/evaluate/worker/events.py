"""Events that the worker reports to the process that started it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from decondense.records import append_rows

_REPORT_SECONDS = 0.5


class Events:
    """A file of events, one line each."""

    def __init__(self, path: Path) -> None:
        self.path, self.last = path, 0.0

    def tell(self, event: str, **fields: Any) -> None:
        """Append an event."""
        append_rows(self.path, [{"event": event, **fields}])

    def running(self, task: str, done: int, total: int | None) -> None:
        """Report the progress of a task, at most twice a second."""
        if time.monotonic() - self.last > _REPORT_SECONDS:
            self.last = time.monotonic()
            self.tell("running", task=task, done=done, total=total)
