"""The kernels' tests are collected where kernels run: on a GPU, or in the interpreter's process (test_fused.py)."""

from __future__ import annotations

import importlib.util
import os

import torch

_here = os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available()
collect_ignore = [] if _here and importlib.util.find_spec("triton") else ["test_fused_kernels.py"]
