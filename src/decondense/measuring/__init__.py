"""Measuring condensation: exact per-layer statistics of a model's token geometry, in one streaming pass.

``measure`` runs the passages and returns a ``Profile``, ``measure_states`` takes states that another engine produced;
``METRICS`` lists the side metrics; ``CondensationCallback``, ``CondensationWatch`` and ``lightning_callback`` follow a
model while it trains, and raise an ``Alarm``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from decondense.measuring.alarm import Alarm, Alert, CondensationWarning
from decondense.measuring.metrics import METRICS
from decondense.measuring.profile import Profile
from decondense.measuring.running import MeasureError, measure
from decondense.measuring.statistics import NotFiniteError
from decondense.measuring.supplied import measure_states

if TYPE_CHECKING:
    from decondense.measuring.watching import CondensationCallback, CondensationWatch, lightning_callback

__all__ = [
    "METRICS",
    "Alarm",
    "Alert",
    "CondensationCallback",
    "CondensationWarning",
    "CondensationWatch",
    "MeasureError",
    "NotFiniteError",
    "Profile",
    "lightning_callback",
    "measure",
    "measure_states",
]


def __getattr__(name: str) -> Any:
    # the callback is a transformers class, and importing that is slow
    if name in ("CondensationCallback", "CondensationWatch", "lightning_callback"):
        from decondense.measuring import watching

        return getattr(watching, name)
    raise AttributeError(f"module 'decondense.measuring' has no attribute {name!r}")
