"""Ranks of a world as processes: all are started, waited for and ended together."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).parent


def run(
    worker: str,
    ranks: Sequence[Sequence[object]],
    *,
    environments: Sequence[Mapping[str, str]] | None = None,
    timeout: float = 200,
) -> list[str]:
    """What each process printed, errors included; a rank that fails fails the test with the end of its output.

    Args:
        worker: file name of a script beside this one.
        ranks: arguments of each process.
        environments: variables of each, beside those of this process.
        timeout: seconds for all of them.
    """
    plain = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / worker), *map(str, arguments)],
            env={**plain, **own},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for arguments, own in zip(ranks, environments or [{}] * len(ranks), strict=True)
    ]
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-4000:]
    return outputs
