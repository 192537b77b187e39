"""Study files: YAML with the study's base and, under ``scales``, what differs at each scale."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from decondense.config import ConfigError, StudyConfig, one_of, parse_yaml, suggest
from decondense.privacy import has_credentials, strings, without_credentials


def shipped_studies() -> list[str]:
    """Names of the studies in the package."""
    folder = resources.files("decondense.studies") / "shipped"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def load_study(
    name_or_path: str | Path, scale: str | None = None, *, laid_over: Mapping[str, Any] | None = None, **changes: Any
) -> StudyConfig:
    """Load a study by the name of a shipped study or by the path of a YAML file.

    Args:
        name_or_path: ``"demo"`` or ``"path/to/study.yaml"``.
        scale: one of the file's scales; None: ``tiny``, or the only one.
        laid_over: keys to change, nested as in the file (``{"train": {"steps": 10}}``); all other keys are kept.
            Arms are given by name: ``{"arms": {"dispersion": {"learning_rate": 1e-3}}}``.
        changes: top-level keys to replace (``seeds=(0, 1)``).

    Raises:
        ConfigError: no such study, file, scale or key; the message names the place and suggests a close match.
    """
    data, scales, where = _file(str(name_or_path))
    if scales is not None:
        chosen = scale or ("tiny" if "tiny" in scales else next(iter(scales)))
        one_of("scale", chosen, scales)
        data = merged({**data, "scale": chosen}, scales[chosen] or {}, where)
    elif scale is not None and scale != data.get("scale", "tiny"):
        raise ConfigError(f"{where}: has no scale {scale!r}; its only scale is {data.get('scale', 'tiny')!r}.")
    study = StudyConfig.parse(merged({**data, **changes}, laid_over or {}, where), where=where)
    refuse_credentials(study)
    return study


def refuse_credentials(study: StudyConfig) -> None:
    """Refuse a study that holds a credential, or a URL for its text, before it is written or printed.

    Raises:
        ConfigError: the message names the key, with the credential removed.
    """
    if "://" in study.corpus.source:  # its credentials are gone, but not those of the command that would be printed
        raise ConfigError(
            f"corpus.source {study.corpus.source!r} is a URL, but only local files can be read; download it and give "
            "its path."
        )
    for place, text in strings(study.model_dump(mode="json")):
        if has_credentials(text):
            raise ConfigError(
                f"{'.'.join(place)} {without_credentials(text)!r} is given with a user, password, query or token, "
                "which would be written into the study's files. Give it without them, and set credentials in the "
                "environment (HF_TOKEN, ~/.netrc, the variables of your cloud provider)."
            )


def committed_rows(study: StudyConfig) -> Path | None:
    """The committed rows of a shipped study at its scale, if this is a checkout of a repository that has them."""
    results = Path(__file__).parents[3] / "benchmarks" / "results"
    if study.name not in shipped_studies():
        return None
    places = [results / "studies" / f"{study.name}-{study.scale}.jsonl.gz"]
    if (study.name, study.scale) == ("demo", "tiny"):
        places.append(results / "demo.jsonl")
    return next((path for path in places if path.is_file()), None)


def scales_of(name_or_path: str | Path) -> list[str]:
    """The scales of a study file, in its order."""
    data, scales, _ = _file(str(name_or_path))
    return [str(data.get("scale", "tiny"))] if scales is None else list(scales)


def assigned(assignments: Iterable[str]) -> dict[str, Any]:
    """``["train.steps=10", "arms.dispersion.dispersion.weight=0.3"]`` as nested keys for :func:`load_study`.

    Values are YAML. A name with a dot in it is quoted: ``prepared."a.b".seed=1``.

    Raises:
        ConfigError: an entry is not ``KEY.PATH=VALUE``; the message shows it.
    """
    nested: dict[str, Any] = {}
    for entry in assignments:
        path, equals, text = entry.partition("=")
        keys = [key.strip('"') for key in re.findall(r'"[^"]+"|[^."]+', path.strip())]
        if not equals or not keys or not re.fullmatch(r'("[^"]+"|[^."]+)(\.("[^"]+"|[^."]+))*', path.strip()):
            raise ConfigError(f"--set {entry!r}: expected KEY.PATH=VALUE, for example train.steps=100.")
        value = parse_yaml(text, f"--set {entry!r}: the value of {path.strip()}")
        # YAML takes 1e-4, without a point, for text
        if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
            value = float(value)
        inner: Any = value
        for key in reversed(keys):
            inner = {key: inner}
        nested = merged(nested, inner, "--set")
    return nested


def _file(name: str) -> tuple[dict[str, Any], dict[str, Any] | None, str]:
    """The base of a study file, its scales if it has any, and how messages call it."""
    text, where = _read(name)
    data = parse_yaml(text, where)
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected a mapping of keys to values, got {type(data).__name__}.")
    scales = data.pop("scales", None)
    if scales is not None and (
        not isinstance(scales, dict)
        or not scales
        or not all(isinstance(value or {}, dict) for value in scales.values())
    ):
        raise ConfigError(f"{where}: scales: expected a mapping of scale names to the keys that differ.")
    return data, scales, where


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
        raise ConfigError(f"{name}: there is no such study file; check the path.")
    raise ConfigError(
        f"unknown study {name!r}.{suggest(name, shipped_studies())} Shipped: {', '.join(shipped_studies())}; "
        "or give the path of a YAML file."
    )


def merged(base: Mapping[str, Any], changes: Mapping[str, Any], where: str = "arms") -> dict[str, Any]:
    """``base`` with ``changes`` laid over it: mappings key by key, a list of arms name by name."""
    result = dict(base)
    for key, value in changes.items():
        old = result.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            result[key] = merged(old, value, where)
        elif key == "arms" and isinstance(value, dict) and isinstance(old, (list, tuple)):
            result[key] = _merged_arms(old, value, where)
        else:
            result[key] = value
    return result


def _merged_arms(arms: Iterable[Any], changes: Mapping[str, Any], where: str) -> list[Any]:
    entries = list(arms)
    names = [str(entry.get("name")) if isinstance(entry, dict) else "" for entry in entries]
    for name, change in changes.items():
        try:
            one_of("arm", name, names)
        except ConfigError as error:
            raise ConfigError(f"{where}: arms: {error}") from None
        if not isinstance(change, dict):
            raise ConfigError(f"{where}: arms.{name}: expected a mapping of keys to values (got {change!r}).")
        entries[names.index(name)] = merged(entries[names.index(name)], change, where)
    return entries
