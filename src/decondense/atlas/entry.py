"""One model on one text: what an atlas file and a line of the shipped references hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from decondense.privacy import without_credentials, without_folder

_LARGEST = 1 << 26
"""Bytes of a file at most; a summary of a model of 200 layers has 1 MB."""


class EntryError(ValueError):
    """A profile, an entry or a reference that cannot be used; the message names the file and the remedy."""


def _line(text: str) -> str:
    if not text.isprintable():  # line ends and terminal sequences have no place in a name
        raise ValueError(f"{text!r} holds characters that cannot be printed")
    return text


Name = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_line)]
Words = Annotated[str, Field(max_length=400), AfterValidator(_line)]
Cosine = Annotated[float, Field(ge=-1.000001, le=1.000001)]


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
    parameters: int | None = Field(default=None, gt=0)
    text: Name
    text_hash: Words | None = None
    """Hash of the passages; None: the text is known only by its name."""
    passages: int | None = Field(default=None, gt=0)
    tokens: int | None = Field(default=None, gt=1)
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
        cls, summary: Mapping[str, Any], *, model: str = "", family: str = "", text: str = "", source: str = ""
    ) -> Entry:
        """The entry of :meth:`decondense.measuring.Profile.summary`; what is given replaces what the profile says.

        Names do not contain folders of this machine.
        """
        info = summary["info"]
        name = model or info.get("name") or without_folder(str(info.get("model") or "model"))
        if not model and info.get("step") is not None:
            name = f"{without_folder(str(info.get('model') or 'model'))} step {info['step']}"
        interval = summary.get("spearman_interval")
        return _validated(
            "this profile",
            {
                "model": _public(name),
                "family": family,
                "model_type": info.get("model_type"),
                "parameters": info.get("parameters"),
                "text": _public(text or info.get("source") or "unknown"),
                "text_hash": info.get("text_hash") if not text else None,
                "passages": summary["passages"],
                "tokens": summary["passage_tokens"],
                "final": summary["final"],
                "mean_cosine": summary["mean_cosine"],
                "deep_half": summary["last"]["half"],
                "last": summary["mean_cosine"][-1],
                "spearman": summary["spearman"],
                "kendall": summary["kendall"],
                "spearman_interval": interval if interval and None not in interval else None,
                "source": source or "measured with decondense",
            },
        )

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
            return cls.from_summary(_summary(document, path), **names)
        return _validated(str(path), {**document, **{name: value for name, value in names.items() if value}})

    def to_json(self) -> str:
        """The text of an entry file."""
        return json.dumps(self.model_dump(exclude_none=True), ensure_ascii=False, indent=1) + "\n"


def read_summary(path: str | Path) -> dict[str, Any]:
    """The summary in ``profile.json``; ``path``: the file, or the directory that holds it.

    Raises:
        EntryError: there is no profile, or it is damaged.
    """
    return _summary(_document(path), path)


def _summary(document: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    summary = document.get("summary")
    needed = ("layers", "mean_cosine", "last", "spearman", "kendall", "passages", "passage_tokens", "final", "info")
    if document.get("format") != 1 or not isinstance(summary, dict) or any(key not in summary for key in needed):
        raise EntryError(f"{path} is not a profile; decondense measure MODEL writes one (profile.json).")
    if summary["final"] == "all":
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


def _public(name: str) -> str:
    return without_credentials(without_folder(name))


def _validated(where: str, fields: Mapping[str, Any]) -> Entry:
    try:
        return Entry.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "entry"
        raise EntryError(f"{where}: {place}: {first['msg']}.") from error
