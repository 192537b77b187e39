"""A dispersion configuration as the flat section of torchtitan's command line, and back; needs no torchtitan."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from decondense.config.attach import DispersionConfig, WeightSchedule
from decondense.config.loss import LossConfig

_D = DispersionConfig()


@dataclass(kw_only=True, slots=True)
class Dispersion:
    """Every field of :class:`DispersionConfig`, its :class:`LossConfig` and its :class:`WeightSchedule`, flattened.

    One name differs: ``schedule`` is the schedule's ``kind``.
    """

    weight: float = _D.weight
    """lambda; 0 logs the dispersion loss without adding it: the control arm."""
    target: str | None = None
    """A mean cosine, several separated by commas, a profile or a reference; refused by torchtitan's trainer."""
    layers: str = "all"
    """all, deep, shallow, last, or block numbers: 0,5,-1."""
    blocks: str | None = _D.blocks
    final_norm: bool = _D.final_norm
    embedding: bool = _D.embedding
    gradient_ratio_every: int | None = _D.gradient_ratio_every
    tokens_first: bool | None = _D.tokens_first

    form: str = _D.loss.form
    tau: float = _D.loss.tau
    delta: float = _D.loss.delta
    impl: str = _D.loss.impl
    pairs: str = _D.loss.pairs
    group_size: int = _D.loss.group_size
    subset_size: int = _D.loss.subset_size
    within: str = _D.loss.within
    compat: str | None = _D.loss.compat
    gradient: str = _D.loss.gradient
    margin: float = _D.loss.margin
    norm_weight: float = _D.loss.norm_weight
    variance_weight: float = _D.loss.variance_weight
    covariance_weight: float = _D.loss.covariance_weight
    target_std: float = _D.loss.target_std
    target_cosine: float = _D.loss.target_cosine
    slices: int = _D.loss.slices
    knots: int = _D.loss.knots
    seed: int = _D.loss.seed

    schedule: str = _D.schedule.kind
    """constant, linear or cosine."""
    warmup: float = _D.schedule.warmup
    """Fraction of training over which the weight rises."""
    until: float = _D.schedule.until
    """Fraction of training at which the weight reaches ``final``."""
    final: float = _D.schedule.final
    warmup_steps: int | None = _D.schedule.warmup_steps
    until_step: int | None = _D.schedule.until_step

    @classmethod
    def of(cls, config: DispersionConfig) -> Dispersion:
        """The section for a configuration; :meth:`config` is the inverse."""
        values: dict[str, Any] = {flag: getattr(config, name) for name, flag in _OWN.items()}
        values.update({flag: getattr(config.loss, name) for name, flag in _LOSS.items()})
        values.update({flag: getattr(config.schedule, name) for name, flag in _SCHEDULE.items()})
        for name in ("layers", "target"):
            if isinstance(values[name], tuple):
                values[name] = ",".join(map(str, values[name]))
        if isinstance(config.target, float):
            values["target"] = str(config.target)
        return cls(**values)

    def config(self) -> DispersionConfig:
        """The section as a validated :class:`DispersionConfig`."""
        numbers = self.layers.replace(",", "").replace("-", "").replace(" ", "")
        layers: Any = [int(part) for part in self.layers.split(",")] if numbers.isdigit() else self.layers
        settings: dict[str, Any] = {name: getattr(self, flag) for name, flag in _OWN.items()}
        settings["target"] = _numbers(self.target)
        loss = {name: getattr(self, flag) for name, flag in _LOSS.items()}
        schedule = {name: getattr(self, flag) for name, flag in _SCHEDULE.items()}
        return DispersionConfig.parse(
            {**settings, "layers": layers, "loss": loss, "schedule": schedule}, where="dispersion"
        )

    def words(self) -> list[str]:
        """The command-line arguments for this section: values that differ from the defaults, weight and layers."""
        found = []
        for item in fields(self):
            value = getattr(self, item.name)
            if value == item.default and item.name not in ("weight", "layers"):
                continue
            if value is True and item.default is False:
                found.append(f"--dispersion.{item.name}")
            else:
                # with "=", because a list of block numbers may begin with a minus
                found.append(f"--dispersion.{item.name}={value}")
        return found


def _numbers(text: str | None) -> Any:
    """Parse a command-line value: a number, several separated by commas, or a name."""
    try:
        numbers = [float(part) for part in (text or "").split(",")]
    except ValueError:
        return text
    return numbers[0] if len(numbers) == 1 else numbers


_OWN = {name: name for name in DispersionConfig.model_fields if name not in ("loss", "schedule")}
_LOSS = {name: name for name in LossConfig.model_fields}
_SCHEDULE = {name: "schedule" if name == "kind" else name for name in WeightSchedule.model_fields}
