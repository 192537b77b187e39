"""Measuring condensation: exact per-layer statistics of a model's token geometry, in one streaming pass.

``measure`` runs the passages and returns a ``Profile``; ``METRICS`` lists the side metrics.
"""

from __future__ import annotations

from decondense.measuring.metrics import METRICS
from decondense.measuring.profile import Profile
from decondense.measuring.running import MeasureError, measure
from decondense.measuring.statistics import NotFiniteError

__all__ = ["METRICS", "MeasureError", "NotFiniteError", "Profile", "measure"]
