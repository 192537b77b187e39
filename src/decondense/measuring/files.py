"""The files of a profile: a readable summary, and all arrays beside it."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from decondense.layers import parse
from decondense.measuring.sides import Sides
from decondense.measuring.sinks import Sinks
from decondense.records import atomic_path, atomic_write

if TYPE_CHECKING:
    from decondense.measuring.profile import Profile

_FORMAT = 1
_BY_PASSAGE = ("cosine", "cosine_others", "norm", "norm_sd", "norm_max")
_UNPACKED = 1 << 26
"""Bytes to which every archive may unpack."""
_RATIO = 100
"""How many times its own size a larger archive may unpack to. Measured numbers hardly compress; zeros, by 1000."""


class _Origin(BaseModel):
    info: dict[str, Any]


class _Head(BaseModel):
    """What the readable file says about the arrays."""

    model_config = ConfigDict(strict=True)

    all_layers: list[str]
    no_averaged: str
    final: Literal["after", "before", "all"]
    last_block: bool = True
    summary: _Origin


def _stem(path: str | Path) -> Path:
    stem = Path(path)
    return stem.with_suffix("") if stem.suffix in (".json", ".npz") else stem


def write(profile: Profile, path: str | Path, *, sums: bool) -> Path:
    """Write ``PATH.json`` and ``PATH.npz`` (:meth:`Profile.save`); the path of the JSON file."""
    stem = _stem(path)
    arrays: dict[str, Any] = {name: getattr(profile, name) for name in ("lengths", *_BY_PASSAGE)}
    arrays.update({f"metric:{name}": values for name, values in profile.metrics.items()})
    arrays |= profile.sides.arrays(sums=sums) | (profile.sinks.arrays() if profile.sinks else {})
    if profile.pooled is not None:
        arrays["pooled"] = profile.pooled
    if profile.summed is not None and sums:
        arrays["summed"] = profile.summed
    head = {
        "format": _FORMAT,
        "all_layers": list(profile.all_layers),
        "no_averaged": profile.no_averaged
        if sums or profile.summed is None
        else "the sums were not saved (sums=False).",
        "final": profile.final,
        "last_block": profile.last_block,
        "summary": profile.summary(),
    }
    stem.parent.mkdir(parents=True, exist_ok=True)
    target = stem.with_name(stem.name + ".npz")
    with atomic_path(target) as temporary:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        temporary.write_bytes(buffer.getvalue())
    readable = stem.with_name(stem.name + ".json")
    atomic_write(readable, json.dumps(head, ensure_ascii=False, indent=1) + "\n")
    return readable


def read(path: str | Path) -> dict[str, Any]:
    """The fields of the profile that :func:`write` wrote (:meth:`Profile.load`).

    Raises:
        ValueError: a file is missing or damaged, or has another format.
    """
    stem = _stem(Path(path) / "profile" if Path(path).is_dir() else path)
    readable, arrays_path = stem.with_name(stem.name + ".json"), stem.with_name(stem.name + ".npz")
    for wanted in (readable, arrays_path):
        if not wanted.is_file():
            raise ValueError(f"no profile at {path}: {wanted} is missing. A profile is a .json and a .npz file.")
    try:
        document = json.loads(readable.read_text(encoding="utf-8"))
        if document["format"] == _FORMAT:
            head = _Head.model_validate(document)
            states = tuple(parse(label) for label in head.all_layers)
            if not any(state.counts_as_depth for state in states):
                raise ValueError("it has neither the embedding nor a block")
            arrays = _arrays(arrays_path, len(states))
            return dict(
                states=states,
                metrics={n.removeprefix("metric:"): arrays.pop(n) for n in list(arrays) if n.startswith("metric:")},
                sides=Sides.taken(arrays, len(states)),
                no_averaged=head.no_averaged,
                final=head.final,
                last_block=head.last_block,
                sinks=Sinks.taken(arrays),
                info=head.summary.info,
                **arrays,
            )
    except Exception as error:  # damage shows as whatever the first thing that trips over it raises
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise ValueError(f"{readable} and its .npz are not a readable profile ({reason}); measure again.") from error
    raise ValueError(
        f"{readable} has format {document['format']}, but this version reads format {_FORMAT}; measure again."
    )


def _arrays(path: Path, states: int) -> dict[str, Any]:
    """The arrays of a profile of this many states: all that it needs, no others, and of shapes that fit each other."""
    with zipfile.ZipFile(path) as archive:
        unpacked, packed = sum(member.file_size for member in archive.infolist()), path.stat().st_size
    if unpacked > max(_UNPACKED, _RATIO * packed):
        raise ValueError(f"{path.name} of {packed:,} bytes unpacks to {unpacked:,}, more than a profile does")
    with np.load(path, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    if missing := [name for name in ("lengths", *_BY_PASSAGE) if name not in arrays]:
        raise ValueError(f"{path.name} lacks {', '.join(missing)}")
    lengths = arrays["lengths"]
    if lengths.ndim != 1 or lengths.dtype.kind not in "iu" or not len(lengths) or lengths.min() < 1:
        raise ValueError(f"lengths in {path.name} are not the numbers of tokens of passages")
    for name, values in arrays.items():
        shape = _shape(name, arrays, states, len(lengths), int(lengths.max()))
        fits = shape is not None and len(shape) == values.ndim
        if not fits or any(n not in (None, held) for n, held in zip(shape or (), values.shape, strict=True)):
            raise ValueError(f"{path.name} has {name} of shape {list(values.shape)}, which does not fit")
        if values.dtype.kind not in "iuf":
            raise ValueError(f"{name} in {path.name} holds {values.dtype}, not numbers")
    return arrays


def _shape(
    name: str, arrays: Mapping[str, Any], states: int, passages: int, tokens: int
) -> tuple[int | None, ...] | None:
    """The shape of an array by its name, None for a free length; None: no profile has such an array."""
    kind, _, rest = name.partition(":")
    if kind == "moments":
        number, _, part = rest.partition(":")
        width = np.size(arrays.get(f"moments:{number}:mean_D", ()))
        parts = {
            "count": (),
            "scatter_DD": (width * (width + 1) // 2,),
            "means_PD": (passages, width),
            **dict.fromkeys(("mean_D", "unit_D"), (width,)),
        }
        return parts.get(part) if number in map(str, range(states)) else None
    shapes: dict[str, tuple[int | None, ...]] = {
        "lengths": (passages,),
        **dict.fromkeys((*_BY_PASSAGE, "metric", "sink"), (states, passages)),
        **dict.fromkeys(("pooled", "sink:positions"), (states, None)),
        "summed": (states, tokens * (tokens + 1) // 2),
        "corpus": (states,),
        "between": (states, states, passages),
    }
    return shapes.get(name, shapes.get(kind))
