"""Runs ``test_fused_kernels.py`` on a CPU in Triton's interpreter.

The interpreter has to be chosen before triton is imported, so it runs in a child pytest.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(
    "chosen",
    ["not lock_step and not fullgraph and not low_precision and not tf32", pytest.param("", marks=pytest.mark.slow)],
    ids=["the cheap ones", "all"],
)
def test_the_kernels_in_the_interpreter(chosen: str) -> None:
    """Run the kernels' tests with TRITON_INTERPRET=1."""
    kernels = Path(__file__).with_name("test_fused_kernels.py")
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            "-m",
            "not gpu",
            "-k",
            chosen,
            str(kernels),
        ],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
