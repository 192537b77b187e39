"""The base of every configuration: frozen, validated, named by a fingerprint; YAML in and out."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import AliasChoices, BaseModel, ConfigDict, ValidationError, model_validator

C = TypeVar("C", bound="Config")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the place, the value and the remedy."""


def suggest(name: str, choices: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the closest of ``choices``, or an empty string when none is close."""
    close = difflib.get_close_matches(str(name), [str(choice) for choice in choices], n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def one_of(what: str, name: str, choices: Iterable[str]) -> str:
    """Return ``name`` if it is one of ``choices``, else raise a ValueError that lists them."""
    known = list(choices)
    if name in known:
        return name
    raise ConfigError(f"unknown {what} {name!r}.{suggest(name, known)} Known: {', '.join(known)}.")


class _UniqueKeys(yaml.SafeLoader):
    """PyYAML's safe loader, except that a key given twice is refused: its first value would be lost silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in _own_keys(node):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is given twice; remove one of them", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        # where this mapping is merged into another, PyYAML 6.0.4 takes the first of two values of a key of one letter
        own = {id(key): key.value for key in _own_keys(node)}
        values = set(own.values())
        node.value = [
            (key, value)
            for key, value in node.value
            if id(key) in own or not (isinstance(key, yaml.ScalarNode) and key.value in values)
        ]


def _own_keys(node: yaml.MappingNode) -> list[yaml.ScalarNode]:
    """The keys that are written in the mapping itself, not merged in with <<."""
    span = range(node.start_mark.index, node.end_mark.index)
    return [key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.start_mark.index in span]


_MOST_NODES = 200_000
_DEEPEST = 60


def _check_size(node: yaml.Node | None, where: str) -> None:
    """Refuse a text whose aliases expand to very much, contain themselves, or that is nested without end."""
    sizes: dict[int, int] = {}
    inside: set[int] = set()

    def size(node: yaml.Node, depth: int) -> int:
        if id(node) in sizes:
            return sizes[id(node)]
        if id(node) in inside:
            raise ConfigError(f"{where}: not valid YAML: an alias contains itself ({str(node.start_mark).strip()}).")
        if depth > _DEEPEST:
            raise ConfigError(f"{where}: nested more than {_DEEPEST} levels deep ({str(node.start_mark).strip()}).")
        inside.add(id(node))
        total = 1
        if isinstance(node, yaml.SequenceNode):
            total += sum(size(item, depth + 1) for item in node.value)
        elif isinstance(node, yaml.MappingNode):
            total += sum(size(key, depth + 1) + size(value, depth + 1) for key, value in node.value)
        inside.discard(id(node))
        if total > _MOST_NODES:
            raise ConfigError(f"{where}: its aliases expand to more than {_MOST_NODES} values.")
        sizes[id(node)] = total
        return total

    if node is not None:
        size(node, 0)


def parse_yaml(text: str, where: str) -> Any:
    """The data of a YAML text; text that cannot be parsed raises :class:`ConfigError` naming ``where``."""
    try:
        loader = _UniqueKeys(text)
        node = loader.get_single_node()
        _check_size(node, where)
        return None if node is None else loader.construct_document(node)
    except ConfigError:
        raise
    except Exception as error:  # numbers, dates and tags that cannot be constructed raise half a dozen other types
        raise ConfigError(f"{where}: not valid YAML ({error}).") from error


def formerly(old: str, new: str) -> dict[str, Any]:
    """For ``Field(**formerly("old", "new"))``: a renamed key; files and rows with the old name can still be read.

    The fingerprint keeps the old name, so that existing rows still belong to their study.
    """
    return {"validation_alias": AliasChoices(new, old), "serialization_alias": old}


def _omit_later(value: Any, data: Any) -> None:
    """Remove from ``data``, the dump of ``value``, the fields of :attr:`Config.later` that have their default."""
    if isinstance(value, Config):
        for name, field in type(value).model_fields.items():
            inner, key = getattr(value, name), field.serialization_alias or name
            if name in value.later and inner == field.default:
                data.pop(key, None)
            elif key in data:
                _omit_later(inner, data[key])
    elif isinstance(value, (tuple, list)):
        for inner, part in zip(value, data, strict=True):
            _omit_later(inner, part)
    elif isinstance(value, dict):
        for key, inner in value.items():
            _omit_later(inner, data[key])


class Config(BaseModel):
    """Base of all configurations: frozen, keyword-only, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    not_identity: ClassVar[frozenset[str]] = frozenset()
    """Fields that the fingerprint leaves out, because they change how the runs are reported, not the runs."""
    later: ClassVar[frozenset[str]] = frozenset()
    """Fields that earlier versions did not have: the fingerprint leaves them out while they have their default, so
    that existing rows still belong to their study."""

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_keys(cls, data: Any) -> Any:
        # pydantic's own message for an extra key does not say which key may have been meant
        if isinstance(data, dict):
            old = {field.serialization_alias: name for name, field in cls.model_fields.items()}
            for key in data:
                if key in old and old[key] in data:
                    raise ValueError(f"{key} is the former name of {old[key]}; give one of them.")
                if key not in cls.model_fields and key not in old:
                    raise ValueError(
                        f"unknown key {key!r} in {cls.__name__}.{suggest(key, cls.model_fields)} "
                        f"Known: {', '.join(cls.model_fields)}."
                    )
        return data

    def fingerprint(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of the canonical JSON of this configuration."""
        data = self.model_dump(mode="json", exclude=set(self.not_identity), by_alias=True)
        _omit_later(self, data)
        text = json.dumps(data, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        """The configuration as YAML, every default spelled out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    @classmethod
    def parse(cls: type[C], data: Any, *, where: str) -> C:
        """Validate plain data; a :class:`ConfigError` names ``where``, the key and the remedy."""
        if not isinstance(data, dict):
            raise ConfigError(f"{where}: expected a mapping of keys to values, got {type(data).__name__}.")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            lines = []
            for item in error.errors():
                place = ".".join(str(part) for part in item["loc"])
                message = item["msg"].removeprefix("Value error, ")
                shown = ""
                if item["type"] != "value_error" and item["type"] != "missing":
                    shown = f" (got {item['input']!r})"
                if item["type"] == "literal_error":
                    shown += suggest(item["input"], re.findall(r"'([^']*)'", item["ctx"]["expected"]))
                lines.append(f"{where}: {place + ': ' if place else ''}{message}{shown}")
            raise ConfigError("\n".join(lines)) from None

    @classmethod
    def from_yaml(cls: type[C], path: str | Path) -> C:
        """Read a YAML file; unreadable or malformed files raise :class:`ConfigError` naming the file."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read ({error}).") from error
        return cls.parse(parse_yaml(text, str(path)), where=str(path))
