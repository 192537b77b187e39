"""A child process that ends when the process that started it ends, at any moment, however that happens.

The parent keeps one end of a pipe and hands the other to its children::

    with Lifeline() as lifeline:
        subprocess.Popen(lifeline.command("package.module", "argument"), pass_fds=lifeline.pass_fds)

A child starts here, before it imports anything heavy: on Linux the kernel kills it when its parent ends
(``PR_SET_PDEATHSIG``), and everywhere a thread waits for the end of the pipe. The pipe also tells what a child cannot
ask the kernel: that its parent was already gone when it started. A kill is safe at every moment for whoever writes
files as :mod:`decondense.records` does. Standard library only.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import select
import signal
import sys
import threading

_LOOK_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1


class Lifeline:
    """The parent's end: while it is open the children live. The system closes it when the parent dies."""

    def __init__(self) -> None:
        self.child_end, self._own = os.pipe()
        self.pass_fds = (self.child_end,)
        """For ``subprocess.Popen(pass_fds=...)``."""

    def command(self, module: str, *arguments: str) -> list[str]:
        """The command of a child that runs ``module.main()`` with ``sys.argv[1:] == arguments``."""
        return [sys.executable, "-m", "decondense.lifeline", str(self.child_end), module, *arguments]

    def close(self) -> None:
        """End the children."""
        for descriptor in (self._own, self.child_end):
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def __enter__(self) -> Lifeline:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def hold(descriptor: int) -> None:
    """In a child: end with the parent that holds the other end of ``descriptor``."""
    os.set_inheritable(descriptor, False)  # children of this process are tied to it, not to its parent
    if sys.platform == "linux":
        import ctypes

        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_wait, args=(descriptor,), daemon=True).start()


class HeldFolder:
    """A directory that this process works in; :meth:`is_there` is false once it was removed or replaced."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        # kept open, so that no other directory can get its number
        self._descriptor = os.open(self.path, os.O_RDONLY)

    def is_there(self) -> bool:
        """Whether the path still leads to the directory that it led to at first."""
        try:
            now, first = os.stat(self.path), os.fstat(self._descriptor)
        except OSError:
            return False
        return (now.st_dev, now.st_ino) == (first.st_dev, first.st_ino)

    def __del__(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            os.close(self._descriptor)


def end_without(folder: str | os.PathLike[str]) -> None:
    """End this process within seconds when ``folder`` is removed or replaced, so that nothing recreates it."""
    held = HeldFolder(folder)

    def look() -> None:
        pause = threading.Event()
        while not pause.wait(_LOOK_SECONDS):
            if not held.is_there():
                _end(f"{held.path} was removed")

    threading.Thread(target=look, daemon=True).start()


def _wait(descriptor: int) -> None:
    with contextlib.suppress(OSError):
        while True:
            # select, so that a signal's retry cannot be taken for the end
            if select.select([descriptor], [], [], 60.0)[0] and not os.read(descriptor, 1):
                break
    _end("the process that started this worker has ended")


def _end(reason: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"{reason}; this worker stops, and the run can be resumed.\n".encode(errors="replace"))
    os._exit(1)


def main() -> int:
    """Entry point of ``python -m decondense.lifeline DESCRIPTOR MODULE ARGUMENT...``."""
    _, descriptor, module, *arguments = sys.argv
    # Ctrl-C reaches the whole group; the parent alone decides what it means, and ends its children
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    hold(int(descriptor))
    sys.argv = [module, *arguments]
    return int(importlib.import_module(module).main())


if __name__ == "__main__":
    sys.exit(main())
