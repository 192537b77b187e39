"""Scores of a checkpoint: held-out loss document by document, and the benchmarks of the lm-evaluation-harness.

:func:`held_out_loss` runs where it is called. :func:`evaluate` runs the harness in a process of its own, because the
harness seeds the global generators; neither torch nor the harness is imported for it here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from decondense.evaluate.catalogue import SETS, SHOTS, TASKS, EvaluationError, TaskInfo
from decondense.evaluate.harness import EvaluationStopped, benchmark_rows, check_benchmarks, evaluate
from decondense.evaluate.results import Evaluation, Score, TaskResult

if TYPE_CHECKING:
    from decondense.evaluate.held_out import DocumentLoss as DocumentLoss
    from decondense.evaluate.held_out import HeldOutLoss as HeldOutLoss
    from decondense.evaluate.held_out import held_out_loss as held_out_loss

__all__ = [
    "SETS",
    "SHOTS",
    "TASKS",
    "DocumentLoss",
    "Evaluation",
    "EvaluationError",
    "EvaluationStopped",
    "HeldOutLoss",
    "Score",
    "TaskInfo",
    "TaskResult",
    "benchmark_rows",
    "check_benchmarks",
    "evaluate",
    "held_out_loss",
]


def __getattr__(name: str) -> Any:
    # these need torch, which takes seconds to load and which the benchmarks' own process loads for itself
    if name in ("DocumentLoss", "HeldOutLoss", "held_out_loss"):
        from decondense.evaluate import held_out

        return getattr(held_out, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
