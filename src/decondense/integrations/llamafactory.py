"""LLaMA-Factory: its own command line plus a ``dispersion:`` section in the YAML.

``python -m decondense.integrations.llamafactory config.yaml`` is ``llamafactory-cli train config.yaml`` with the loss
attached, through the documented ``run_exp(args, callbacks=[...])``. In Python: ``run_exp(args,
callbacks=[dispersion_callback(...)])``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml

from decondense.config import ConfigError, DispersionConfig
from decondense.integrations.huggingface import DispersionCallback


def dispersion_callback(settings: dict[str, Any] | None = None, **keywords: Any) -> DispersionCallback:
    """A callback for ``run_exp``; ``settings`` are the fields of :class:`decondense.config.DispersionConfig`."""
    if settings is None:
        return DispersionCallback(**keywords)
    return DispersionCallback(config=DispersionConfig.parse(settings, where="dispersion"), **keywords)


def main(arguments: list[str]) -> None:
    """Run LLaMA-Factory's training, and attach the loss of the YAML file's ``dispersion`` section."""
    if len(arguments) != 1:
        raise ConfigError("usage: python -m decondense.integrations.llamafactory CONFIG.yaml")
    config = yaml.safe_load(Path(arguments[0]).read_text(encoding="utf-8"))
    if not isinstance(config, dict) or "dispersion" not in config:
        raise ConfigError(f"{arguments[0]} has no 'dispersion:' section; without one use llamafactory-cli train.")
    settings = config.pop("dispersion") or {}
    if config.get("stage", "sft") not in ("pt", "sft"):
        raise ConfigError(f"stage {config['stage']!r} runs the model twice for one loss; use pt or sft.")

    from llamafactory.train.tuner import run_exp

    run_exp(config, callbacks=[dispersion_callback(settings)])


if __name__ == "__main__":
    main(sys.argv[1:])
