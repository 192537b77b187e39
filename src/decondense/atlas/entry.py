"""One model on one text: what an atlas file and a line of the shipped references hold."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from decondense.layers import parse
from decondense.privacy import without_credentials, without_folder

_LARGEST = 1 << 26
"""Bytes of a file at most; a summary of a model of 200 layers has 1 MB."""

_MOST = 10**18
"""Parameters, passages, tokens and counts at most: a figure cannot show every number that JSON can hold."""

_AGAIN = "Measure again (decondense measure MODEL), or give another file."
_RENAME = "Choose another name (--model, --text-name, --family, --source)."


class EntryError(ValueError):
    """A profile, an entry or a reference that cannot be used; the message names the file and the remedy."""


def _line(text: str) -> str:
    if not text.isprintable():  # line ends and terminal sequences have no place in a name
        raise ValueError(f"{text!r} holds characters that cannot be printed")
    return text


Name = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_line)]
Words = Annotated[str, Field(max_length=400), AfterValidator(_line)]
Cosine = Annotated[float, Field(ge=-1.000001, le=1.000001)]
Count = Annotated[int, Field(gt=0, le=_MOST)]
M = TypeVar("M", bound=BaseModel)


class Entry(BaseModel):
    """One model measured on one text.

    Cosines and rank correlations are those of :class:`decondense.measuring.Profile`; None: not known.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format: Literal[1] = 1
    model: Name
    family: Words = ""
    """Name of the models that differ in size only: ``Qwen2.5``."""
    model_type: Words | None = None
    """Architecture as transformers calls it: ``qwen2``."""
    parameters: Count | None = None
    text: Name
    text_hash: Words | None = None
    """Hash of the passages; None: the text is known only by its name."""
    passages: Count | None = None
    tokens: int | None = Field(default=None, gt=1, le=_MOST)
    """Tokens of the longest passage."""
    final: Literal["after", "before"] = "after"
    """Whether the last state is taken after or before the final norm."""
    mean_cosine: tuple[Cosine, ...] | None = Field(default=None, min_length=2)
    """Mean cosine of the states 0 to L."""
    deep_half: Cosine | None = None
    """Mean of the last L/2 of them."""
    last: Cosine | None = None
    """The last of them."""
    spearman: Cosine | None = None
    kendall: Cosine | None = None
    spearman_interval: tuple[Cosine, Cosine] | None = None
    source: Words = ""
    """Where the numbers come from."""
    approximate: bool = False
    """Whether they were read off a figure."""

    @property
    def blocks(self) -> int | None:
        """Number of blocks L."""
        return None if self.mean_cosine is None else len(self.mean_cosine) - 1

    @classmethod
    def from_summary(
        cls,
        summary: Mapping[str, Any],
        *,
        model: str = "",
        family: str = "",
        text: str = "",
        source: str = "",
        where: str = "this profile",
    ) -> Entry:
        """The entry of :meth:`decondense.measuring.Profile.summary`; what is given replaces what the profile says.

        Names do not contain folders of this machine. ``where``: what messages call the profile.

        Raises:
            EntryError: the summary is damaged, or a name cannot be printed or is too long.
        """
        found = _validated(_Summary, where, summary, _AGAIN)
        info, interval = found.info, found.spearman_interval
        name = model or info.name or without_folder(info.model or "model")
        if not model and info.step is not None:
            name = f"{without_folder(info.model or 'model')} step {info.step}"
        fields = {
            "model": public_name(name),
            "family": family,
            "model_type": info.model_type,
            "parameters": info.parameters,
            "text": public_name(text or info.source or "unknown"),
            "text_hash": info.text_hash if not text else None,
            "passages": found.passages,
            "tokens": found.passage_tokens,
            "final": found.final,
            "mean_cosine": found.mean_cosine,
            "deep_half": found.last.half,
            "last": found.mean_cosine[-1],
            "spearman": found.spearman,
            "kendall": found.kendall,
            "spearman_interval": interval if interval and None not in interval else None,
            "source": source or "measured with decondense",
        }
        return _validated(cls, where, fields, _RENAME)

    @classmethod
    def read(cls, path: str | Path, **names: str) -> Entry:
        """An entry file, or the entry of a profile.

        Args:
            path: the file, or the directory of a profile.
            names: ``model``, ``family``, ``text`` or ``source``, to replace what the file says.

        Raises:
            EntryError: the file is neither an entry nor a profile.
        """
        document = _document(path)
        if "summary" in document:
            return cls.from_summary(_summary(document, path), where=str(path), **names)
        given = {name: value for name, value in names.items() if value}
        return _validated(cls, str(path), {**document, **given}, "Correct the file, or add its profile again.")

    def to_json(self) -> str:
        """The text of an entry file."""
        return json.dumps(self.model_dump(exclude_none=True), ensure_ascii=False, indent=1) + "\n"


class _Part(BaseModel):
    """A part of a summary: values of the wrong type are refused, and keys that nothing here reads are ignored."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)


class _Info(_Part):
    name: str | None = None
    model: str | None = None
    step: int | None = None
    model_type: Words | None = None
    parameters: Annotated[Count, Field(strict=False)] | None = None
    source: str | None = None
    text_hash: Words | None = None


class _Last(_Part):
    half: Cosine


class _State(_Part):
    mean_cosine: Cosine


Label = Annotated[str, AfterValidator(lambda label: parse(label).label)]


class _Summary(_Part):
    """What verdicts, cards, atlases and targets read of a profile's summary."""

    layers: list[Label]
    mean_cosine: list[Cosine] = Field(min_length=2)
    mean_cosine_others: list[Cosine] | None = None
    last: _Last
    spearman: Cosine | None
    kendall: Cosine | None
    spearman_interval: Annotated[list[Cosine | None], Field(min_length=2, max_length=2)] | None = None
    passages: Count
    passage_tokens: int = Field(gt=1, le=_MOST)
    final: Literal["after", "before"]
    histogram: list[list[Annotated[int, Field(ge=0, le=_MOST)]]] | None = None
    quantiles: list[Annotated[list[Cosine], Field(min_length=1)]] | None = None
    metrics: dict[str, list[float | None]] | None = None
    all_layers: dict[Label, _State] | None = None
    info: _Info

    @model_validator(mode="after")
    def _fits(self) -> _Summary:
        for name in ("mean_cosine", "mean_cosine_others", "histogram", "quantiles"):
            rows = getattr(self, name)
            if rows is not None and len(rows) != len(self.layers):
                raise ValueError(f"{name} has {len(rows)} values, but there are {len(self.layers)} layers")
        if self.histogram and (len({len(row) for row in self.histogram}) > 1 or not all(map(any, self.histogram))):
            raise ValueError("histogram has rows of different lengths, or without counts")
        return self


def read_summary(path: str | Path) -> dict[str, Any]:
    """The summary in ``profile.json``; ``path``: the file, or the directory that holds it.

    Raises:
        EntryError: there is no profile, or it is damaged.
    """
    summary = _summary(_document(path), path)
    Entry.from_summary(summary, where=str(path))
    return summary


def _summary(document: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    summary = document.get("summary")
    if document.get("format") != 1 or not isinstance(summary, dict):
        raise EntryError(f"{path} is not a profile; decondense measure MODEL writes one (profile.json).")
    if summary.get("final") == "all":
        raise EntryError(
            f"{path} lists every state, so the last layer is ambiguous; save profile.at('after') or "
            "profile.at('before')."
        )
    return summary


def _document(path: str | Path) -> dict[str, Any]:
    file = Path(path)
    file = file / "profile.json" if file.is_dir() else file
    file = file.with_suffix(".json") if file.suffix == ".npz" else file
    if not file.is_file():
        raise EntryError(f"no file {file}; expected profile.json, the directory that holds it, or an atlas entry.")
    if file.stat().st_size > _LARGEST:
        raise EntryError(
            f"{file} is larger than {_LARGEST >> 20} MiB; a profile or an entry is far smaller. Check the path."
        )
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise EntryError(f"{file} is not readable JSON ({error}).") from error
    if not isinstance(document, dict):
        raise EntryError(f"{file} holds a {type(document).__name__}; expected an object: a profile or an atlas entry.")
    return document


def public_name(name: str) -> str:
    """A name without folders of this machine and without credentials."""
    return without_credentials(without_folder(name))


def check_names(where: str, *, model: str, text: str, remedy: str) -> None:
    """Refuse names of a model and a text that no entry can have, before they are measured.

    Raises:
        EntryError: a name is too long or cannot be printed; the message begins with ``where``.
    """
    _validated(Entry, where, {"model": public_name(model), "text": public_name(text)}, remedy)


def _validated(kind: type[M], where: str, fields: Mapping[str, Any], remedy: str) -> M:
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        message = re.sub(r"^Value error, | or instance of \w+", "", first["msg"]).rstrip(".")
        raise EntryError(f"{where}: {place + ': ' if place else ''}{message}. {remedy}") from error
