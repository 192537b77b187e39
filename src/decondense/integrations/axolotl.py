"""Axolotl: ``decondense.integrations.axolotl.DispersionPlugin`` under ``plugins``, settings under ``dispersion``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field

from decondense.config import DispersionConfig

if TYPE_CHECKING:
    BasePlugin: type = object
else:
    try:
        from axolotl.integrations.base import BasePlugin
    except ImportError as error:
        raise ImportError("the Axolotl plugin needs axolotl: pip install axolotl") from error


class DispersionArgs(BaseModel):
    """Fields that the plugin adds to Axolotl's configuration."""

    dispersion: dict[str, Any] = Field(default_factory=dict)
    """Fields of :class:`decondense.config.DispersionConfig`: weight, layers, loss, schedule, ..."""


class DispersionPlugin(BasePlugin):  # type: ignore[misc]
    """Attaches the dispersion loss to the trainer that Axolotl builds (SFT and pre-training)."""

    def get_input_args(self) -> str:
        """Dotted path of the class that defines the fields."""
        return f"{__name__}.DispersionArgs"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Attach, after the trainer is created."""
        from decondense.integrations.huggingface import attach_trainer

        # Axolotl passes nested dictionaries of its own class, which return None for a missing key
        settings = dict(cfg["dispersion"] or {})
        for name in ("loss", "schedule"):
            if settings.get(name) is not None:
                settings[name] = dict(settings[name])
        attach_trainer(trainer, config=DispersionConfig.parse(settings, where="dispersion"))
