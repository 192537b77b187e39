"""``python -m decondense`` and the script ``decondense``: the command line."""

from __future__ import annotations

import signal
import sys


def main() -> int:
    """Run the command line."""
    # Ctrl-C while the modules are imported ends the process as other signals do, without a traceback
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from decondense.cli import main as run

    signal.signal(signal.SIGINT, before)
    status = run()
    if status > 128:  # a signal ended it; a second one must not change the status that tells which
        # Python under -m ends by SIGINT itself, whatever its status, if a Ctrl-C met the last code run from a string
        # (an import of dataclasses, say), even though the exception was caught; this is now the last such code
        exec("")
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.SIG_IGN)
    return status


if __name__ == "__main__":
    sys.exit(main())
