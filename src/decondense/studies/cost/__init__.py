"""What a study will cost, before it starts: its runs, parameters, tokens, floating point operations, time and disk.

A small training step is timed on this machine; for a large one the operations are divided by 40 % of a GPU's peak.
"""

from __future__ import annotations

from decondense.studies.cost.flops import (
    dispersion_flops,
    evaluation_flops,
    forward_flops,
    share_of_steps,
    training_flops,
)
from decondense.studies.cost.plan import Line, Plan, describe, plan_of, plan_table, time_of, totals
from decondense.studies.cost.runs import Run, runs_of, short_form
from decondense.studies.cost.sizes import Models, Size, size_of_module
from decondense.studies.cost.words import gpu_hours

__all__ = [
    "Line",
    "Models",
    "Plan",
    "Run",
    "Size",
    "describe",
    "dispersion_flops",
    "evaluation_flops",
    "forward_flops",
    "gpu_hours",
    "plan_of",
    "plan_table",
    "runs_of",
    "share_of_steps",
    "short_form",
    "size_of_module",
    "time_of",
    "totals",
    "training_flops",
]
