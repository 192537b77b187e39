"""When to raise an alarm about condensation during training, and whom to notify."""

from __future__ import annotations

import contextlib
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from decondense.config import one_of

PATIENCE = 3
GRACE = 100
PREFIX = "condensation"


class CondensationWarning(UserWarning):
    """An alarm of a watch."""


@dataclass(frozen=True)
class Alert:
    """One alarm: the number ``metric`` was at or above ``threshold`` in ``readings`` readings in a row."""

    metric: str
    value: float
    threshold: float
    step: int
    readings: int

    def __str__(self) -> str:
        return (
            f"condensation: {self.metric} is {self.value:.3f} at step {self.step:,}, at or above {self.threshold:g} in "
            f"{self.readings} readings in a row."
        )


Action = Literal["warn", "stop"] | Callable[[Alert], Any]


class Alarm:
    """The rule of an alarm.

    A number raises an alarm when it is at or above its threshold in ``patience`` consecutive readings, all of them
    after optimizer step ``grace``; each number does so only once. A reading below the threshold, or NaN, resets the
    count. ``patience`` and ``grace`` exist because a model condenses and spreads out again during its warm-up.

    Args:
        thresholds: by name: ``"mean_cosine"`` (mean over all blocks), ``"deep_half"`` (mean over the last L/2 blocks),
            ``"spearman"``, ``"mean_cosine/block_03"``, ``"norm/block_03"``: the logged keys without ``condensation/``.
        action: ``"warn"``: a :class:`CondensationWarning`; ``"stop"``: also :attr:`should_stop`; or a function that is
            called with the :class:`Alert` instead. All of them send an alert to an active trackio or W&B run.
        patience: consecutive readings.
        grace: optimizer steps that do not count.

    Raises:
        ValueError: no threshold, one that is not a number or that no cosine can reach, an unknown action.
    """

    def __init__(
        self, thresholds: Mapping[str, float], action: Action = "warn", *, patience: int = PATIENCE, grace: int = GRACE
    ) -> None:
        if not isinstance(thresholds, Mapping) or not thresholds:
            raise ValueError(
                f"alarm must map names to thresholds, for example {{'mean_cosine': 0.9}}; got {thresholds!r}."
            )
        for name, value in thresholds.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"alarm: the threshold of {name!r} must be a finite number, got {value!r}.")
            if not str(name).startswith("norm") and not -1 <= value <= 1:
                raise ValueError(f"alarm: {name!r} lies between -1 and 1, so it never reaches the threshold {value!r}.")
        if not callable(action):
            one_of("action of an alarm", action, ("warn", "stop"))
        if patience < 1 or grace < 0:
            raise ValueError(f"alarm: patience must be at least 1 and grace at least 0, got {patience} and {grace}.")
        self.thresholds = {str(name): float(value) for name, value in thresholds.items()}
        self.action, self.patience, self.grace = action, patience, grace
        self.should_stop = False
        """Whether an alarm with the action ``"stop"`` was raised."""
        self._count = dict.fromkeys(self.thresholds, 0)

    def check(self, names: Iterable[str]) -> None:
        """Refuse thresholds of numbers that the watched model does not have."""
        known = [name.removeprefix(f"{PREFIX}/") for name in names]
        for name in self.thresholds:
            one_of("number of an alarm", name, known)

    def read(self, step: int, numbers: Mapping[str, float]) -> list[Alert]:
        """The alarms that the reading of an optimizer step raises; nobody is notified."""
        alerts = []
        for name, threshold in self.thresholds.items():
            value = numbers.get(f"{PREFIX}/{name}", math.nan)
            if step <= self.grace or self._count[name] >= self.patience:
                continue
            self._count[name] = self._count[name] + 1 if value >= threshold else 0
            if self._count[name] == self.patience:
                alerts.append(Alert(name, value, threshold, step, self.patience))
        return alerts

    def act(self, step: int, numbers: dict[str, float]) -> None:
        """Apply the rule, notify, act; ``numbers`` gets ``condensation/alarm`` = 1 when an alarm is raised."""
        for alert in self.read(step, numbers):
            numbers[f"{PREFIX}/alarm"] = 1.0
            tell_trackers(alert)
            if callable(self.action):
                self.action(alert)
                continue
            self.should_stop |= self.action == "stop"
            stops = " Training stops." if self.action == "stop" else ""
            warnings.warn(f"{alert}{stops}", CondensationWarning, stacklevel=4)


def tell_trackers(alert: Alert) -> None:
    """An alert of trackio and of W&B, where a run of theirs is active in this process."""
    title, text = f"Condensation: {alert.metric}"[:63], str(alert)  # W&B: less than 64 characters
    trackio, wandb = sys.modules.get("trackio"), sys.modules.get("wandb")
    if trackio is not None and hasattr(trackio, "alert"):
        with contextlib.suppress(RuntimeError):  # how trackio says that no run is active
            trackio.alert(title=title, text=text, level=trackio.AlertLevel.WARN)
    if wandb is not None and getattr(wandb, "run", None) is not None:
        wandb.run.alert(title=title, text=text, level=wandb.AlertLevel.WARN)
