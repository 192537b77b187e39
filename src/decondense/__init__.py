"""Measure embedding condensation in language models, counter it with a dispersion loss, prove whether it helped.

Everything public is reachable from here; each name is imported on first use, so that ``import decondense`` costs
milliseconds, and the evidence side (``records``, ``compare``, ``figures``, ``report``) works without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name -> module that holds it
_PUBLIC = {
    "DispersionLoss": "decondense.losses",
    "dispersion_loss": "decondense.losses",
    "attach": "decondense.attaching",
    "attach_trainer": "decondense.integrations.huggingface",
    "DispersionCallback": "decondense.integrations.huggingface",
    "measure": "decondense.measuring",
    "measure_states": "decondense.measuring",
    "Profile": "decondense.measuring",
    "CondensationCallback": "decondense.measuring",
    "Metric": "decondense.metrics",
    "register_metric": "decondense.metrics",
    "metric_names": "decondense.metrics",
}

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from decondense.attaching import attach as attach
    from decondense.integrations.huggingface import DispersionCallback as DispersionCallback
    from decondense.integrations.huggingface import attach_trainer as attach_trainer
    from decondense.losses import DispersionLoss as DispersionLoss
    from decondense.losses import dispersion_loss as dispersion_loss
    from decondense.measuring import CondensationCallback as CondensationCallback
    from decondense.measuring import Profile as Profile
    from decondense.measuring import measure as measure
    from decondense.measuring import measure_states as measure_states
    from decondense.metrics import Metric as Metric
    from decondense.metrics import metric_names as metric_names
    from decondense.metrics import register_metric as register_metric


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'decondense' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
