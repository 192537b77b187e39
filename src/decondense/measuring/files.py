"""The files of a profile: a readable summary, and all arrays beside it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from decondense.layers import parse
from decondense.measuring.sides import Sides
from decondense.measuring.sinks import Sinks
from decondense.records import atomic_path, atomic_write

if TYPE_CHECKING:
    from decondense.measuring.profile import Profile

_FORMAT = 1


def _stem(path: str | Path) -> Path:
    stem = Path(path)
    return stem.with_suffix("") if stem.suffix in (".json", ".npz") else stem


def write(profile: Profile, path: str | Path, *, sums: bool) -> Path:
    """Write ``PATH.json`` and ``PATH.npz`` (:meth:`Profile.save`); the path of the JSON file."""
    stem = _stem(path)
    arrays: dict[str, Any] = {
        "lengths": profile.lengths,
        "cosine": profile.cosine,
        "cosine_others": profile.cosine_others,
        "norm": profile.norm,
        "norm_sd": profile.norm_sd,
        "norm_max": profile.norm_max,
    }
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
        head = json.loads(readable.read_text(encoding="utf-8"))
        if head["format"] == _FORMAT:
            with np.load(arrays_path, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
            return dict(
                states=tuple(parse(label) for label in head["all_layers"]),
                metrics={n.removeprefix("metric:"): arrays.pop(n) for n in list(arrays) if n.startswith("metric:")},
                sides=Sides.taken(arrays, len(head["all_layers"])),
                no_averaged=head["no_averaged"],
                final=head["final"],
                last_block=head.get("last_block", True),
                sinks=Sinks.taken(arrays),
                info=head["summary"]["info"],
                **arrays,
            )
    except Exception as error:  # damage shows as whatever the first thing that trips over it raises
        raise ValueError(f"{readable} and its .npz are not a readable profile ({error!r}).") from error
    raise ValueError(f"{readable} has format {head['format']}, but this version reads format {_FORMAT}; measure again.")
