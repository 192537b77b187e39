"""Events that the worker reports to the process that started it."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

from decondense.records import append_rows

_REPORT_SECONDS = 0.5


class Events:
    """A file of events, one line each. When the parent process has ended, this process ends too."""

    def __init__(self, path: Path, parent: int) -> None:
        self.path, self.parent, self.last = path, parent, 0.0
        threading.Thread(target=self._follow, daemon=True).start()

    def _follow(self) -> None:
        while os.getppid() == self.parent:
            time.sleep(_REPORT_SECONDS)
        os._exit(1)

    def tell(self, event: str, **fields: Any) -> None:
        """Append an event."""
        append_rows(self.path, [{"event": event, **fields}])

    def running(self, task: str, done: int, total: int | None) -> None:
        """Report the progress of a task, at most twice a second."""
        if time.monotonic() - self.last > _REPORT_SECONDS:
            self.last = time.monotonic()
            self.tell("running", task=task, done=done, total=total)
