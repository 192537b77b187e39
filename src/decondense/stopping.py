"""Signals that ask a run to stop: SIGTERM and SIGHUP end it as Ctrl-C does, SIGUSR1 saves a checkpoint first.

Slurm, Docker and ``kill`` send SIGTERM, a closed terminal sends SIGHUP, and a Slurm job gets SIGUSR1 before its time
limit if it asks for it with ``--signal=B:USR1@120``. Standard library only.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


class Stopped(SystemExit):
    """A signal asked this process to stop. If uncaught, the process exits with status 128 + signal."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number)


_AT_ONCE = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
SAVE_FIRST: int | None = getattr(signal, "SIGUSR1", None)
"""The signal that asks for a checkpoint before the end; None where the platform has no such signal."""

_warned: list[int] = []
_ends: set[object] = set()
"""Handlers of this module that stop the process at once on SIGUSR1."""


def save_requested() -> bool:
    """Whether SIGUSR1 was received: the run saves at its next logged step and then raises :class:`Stopped`."""
    return bool(_warned)


def stop_if_requested() -> None:
    """Raise :class:`Stopped` if SIGUSR1 was received; for work that has no checkpoint to save."""
    if _warned:
        raise Stopped(_warned[0])


@contextlib.contextmanager
def stop_on_signals(
    *, at_once: bool = True, save_first: bool = True, forward: Callable[[int], None] | None = None
) -> Iterator[None]:
    """While the block runs, SIGTERM and SIGHUP raise :class:`Stopped`, and SIGUSR1 sets :func:`save_requested`.

    A signal that the process ignores (``nohup``) stays ignored, and a handler set by the caller is kept. Blocks may be
    nested. Outside the main thread, where Python handles no signals, nothing changes.

    Args:
        at_once: raise on SIGTERM and SIGHUP; False: keep their default, which ends the process.
        save_first: False: SIGUSR1 raises too, because there is nothing to save yet.
        forward: called with the number of SIGUSR1, to pass it on to workers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        # a second signal must not interrupt what the first one has begun
        for other in [*_AT_ONCE, *([] if SAVE_FIRST is None or save_first else [SAVE_FIRST])]:
            signal.signal(other, signal.SIG_IGN)
        raise Stopped(number)

    def save(number: int, frame: FrameType | None) -> None:
        _warned.append(number)
        if forward is not None:
            forward(number)

    replaced: dict[int, Any] = {}
    _warned.clear()
    for number in _AT_ONCE if at_once else []:
        if signal.getsignal(number) is signal.SIG_DFL:
            replaced[number] = signal.signal(number, stop)
    if SAVE_FIRST is not None:
        before = signal.getsignal(SAVE_FIRST)
        if before is signal.SIG_DFL or before in _ends:
            replaced[SAVE_FIRST] = signal.signal(SAVE_FIRST, save if save_first else stop)
            if not save_first:
                _ends.add(stop)
    try:
        yield
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)
        _ends.discard(stop)
        _warned.clear()
