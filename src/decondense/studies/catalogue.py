"""Study files: YAML with the study's base and, under ``scales``, what differs at each scale."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from decondense.config import ConfigError, StudyConfig, one_of, suggest


def shipped_studies() -> list[str]:
    """Names of the studies in the package."""
    folder = resources.files("decondense.studies") / "shipped"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def load_study(name_or_path: str | Path, scale: str | None = None, **changes: Any) -> StudyConfig:
    """A study by the name of a shipped one or by the path of a YAML file.

    Args:
        name_or_path: ``"demo"`` or ``"path/to/study.yaml"``.
        scale: one of the file's scales; None: ``tiny``, or the only one.
        changes: top-level keys to replace (``seeds=(0, 1)``).

    Raises:
        ConfigError: no such study, file, scale or key; the message says where and what may have been meant.
    """
    text, where = _read(str(name_or_path))
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: is no valid YAML ({error}).") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected a mapping of keys to values, got {type(data).__name__}.")
    scales = data.pop("scales", None)
    if scales is not None:
        if not isinstance(scales, dict) or not all(isinstance(value or {}, dict) for value in scales.values()):
            raise ConfigError(f"{where}: scales: expected a mapping of scale names to the keys that differ.")
        chosen = scale or ("tiny" if "tiny" in scales else next(iter(scales)))
        one_of("scale", chosen, scales)
        data = _merge({**data, "scale": chosen}, scales[chosen] or {})
    elif scale is not None and scale != data.get("scale", "tiny"):
        raise ConfigError(f"{where}: has no scale {scale!r}; it has one scale only, {data.get('scale', 'tiny')!r}.")
    return StudyConfig.parse({**data, **changes}, where=where)


def _read(name: str) -> tuple[str, str]:
    if name in shipped_studies():
        return (resources.files("decondense.studies") / "shipped" / f"{name}.yaml").read_text(encoding="utf-8"), name
    path = Path(name)
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8"), name
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{name}: cannot be read ({error}).") from error
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise ConfigError(f"{name}: there is no such study file.")
    raise ConfigError(
        f"unknown study {name!r}.{suggest(name, shipped_studies())} Shipped: {', '.join(shipped_studies())}; "
        "or give the path of a YAML file."
    )


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes`` laid over it, mappings key by key."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged
