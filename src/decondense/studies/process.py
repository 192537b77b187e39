"""Starts a worker process of a study: tied to the process that starts it, with a log, on its own GPU."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from decondense.lifeline import Lifeline
from decondense.records import COMMAND, command_line


@dataclass
class WorkerProcess:
    """One worker."""

    process: subprocess.Popen[bytes]
    log: Path
    log_start: int
    """Bytes of the log that earlier runs wrote."""

    def last_words(self) -> str:
        """The last line that it printed."""
        with contextlib.suppress(OSError), self.log.open("rb") as handle:
            handle.seek(self.log_start)
            lines = [line for line in handle.read().decode(errors="replace").splitlines() if line.strip()]
            return lines[-1] if lines else ""
        return ""


def start_worker(
    out: Path, log: str, lifeline: Lifeline, *arguments: str, environment: Mapping[str, str] | None = None
) -> WorkerProcess:
    """Start ``decondense.studies.worker OUT ARGUMENT...``, which ends when ``lifeline`` does.

    Args:
        out: the study's directory.
        log: name of its log below ``out``/logs.
        lifeline: ties it to this process.
        arguments: what to run; none: the next free task.
        environment: additional variables.
    """
    path = out / "logs" / log
    path.parent.mkdir(exist_ok=True)
    # glibc returns every large block to the kernel and faults it in again at the next step; keeping them saves a
    # small model on a CPU about a seventh of its time
    keep = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
    asked = {COMMAND: os.environ.get(COMMAND) or command_line() or ""}
    with path.open("ab") as handle:
        process = subprocess.Popen(
            lifeline.command("decondense.studies.worker", str(out), *arguments),
            stdout=handle,
            stderr=handle,
            stdin=subprocess.DEVNULL,
            pass_fds=lifeline.pass_fds,
            env={**keep, **os.environ, **asked, **(environment or {})},
        )
        return WorkerProcess(process, path, os.fstat(handle.fileno()).st_size)
