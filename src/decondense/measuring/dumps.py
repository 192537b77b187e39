"""Directories of hidden states that an engine wrote, with a manifest that describes them. Nothing is unpickled.

    vllm        NAME.safetensors a request: ``hidden_states`` [tokens, layers, width], ``token_ids`` [tokens] (vLLM's
                hidden-state extraction: docs.vllm.ai, features/speculative_decoding/extract_hidden_states; its layer k
                is the state after block k, never after the final norm)
    passages    NAME.npy a passage: [layers, tokens, width]
    layers      NAME.npy a layer: [passages, tokens, width]

Files are read in the order of their names, numbers in them counted as numbers, or as ``files`` lists them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator

from decondense.atlas.entry import Count, Name, public_name
from decondense.config import Config
from decondense.measuring.running import MeasureError
from decondense.measuring.supplied import named, readable

MANIFEST = "manifest.json"
Layout = Literal["vllm", "passages", "layers"]
Public = Annotated[Name, AfterValidator(public_name)]


class Manifest(Config):
    """What a directory of states holds: ``manifest.json`` in it."""

    layout: Layout
    """How the files hold the states; see :mod:`decondense.measuring.dumps`."""
    layers: tuple[int | str, ...]
    """What the states are, in order: 0 for the embedding, k for the state after block k, or labels."""
    final_norm: bool
    """Whether the last state is after the model's final norm."""
    model: Public
    """Name of the model, without folders of this machine and credentials."""
    source: Public
    """What text was read, without the same."""
    parameters: Count | None = None
    """Parameters of the model, for tables and figures."""
    files: tuple[str, ...] = ()
    """Names of the files in their order. Default: all, sorted."""


_EXAMPLE = (
    '{"layout": "vllm", "layers": [0, 1, 2], "final_norm": false, "model": "OWNER/NAME", '
    '"source": "what text was read"}'
)


class StateFiles:
    """The passages of a directory, one at a time; iterate over it as often as needed.

    Raises:
        MeasureError: there is no directory; the manifest is missing or incomplete, or names missing files; or the files
            hold something else.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise MeasureError(f"{folder} is not a directory; --states takes a directory of states.")
        path = self.folder / MANIFEST
        if not path.is_file():
            raise MeasureError(f"{folder} has no {MANIFEST}, which says what the states are. For example: {_EXAMPLE}")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError, OSError) as error:
            raise MeasureError(f"{path} cannot be read ({error}). A complete one: {_EXAMPLE}") from error
        try:
            self.manifest = Manifest.parse(data, where=str(path))
        except ValueError as error:
            raise MeasureError(f"{str(error).rstrip('.')}. A complete one: {_EXAMPLE}") from error
        try:
            named(self.manifest.layers, len(self.manifest.layers), self.manifest.final_norm)
        except ValueError as error:
            raise MeasureError(f"{path}: layers: {error}") from error
        self._files = self._listed()
        per_layer = self.manifest.layout == "layers"
        self._arrays = [_array(file) for file in self._files] if per_layer else []
        if per_layer:
            self._check_layers()

    def __len__(self) -> int:
        return len(self._arrays[0]) if self._arrays else len(self._files)

    def __iter__(self) -> Iterator[Any]:
        if self._arrays:
            for passage in range(len(self)):
                yield [array[passage] for array in self._arrays]
            return
        count = len(self.manifest.layers)
        for file in self._files:
            states = _request(file, count) if self.manifest.layout == "vllm" else _array(file)
            if len(states) != count:
                raise MeasureError(f"{file} holds states of {len(states)} layers, but {MANIFEST} names {count}.")
            yield states

    @property
    def info(self) -> dict[str, Any]:
        """What the profile says about the origin of its states."""
        kept = self.manifest.model_dump(include={"model", "source", "parameters"})
        return {**kept, "states": self.manifest.layout}

    def _listed(self) -> list[Path]:
        suffix = ".safetensors" if self.manifest.layout == "vllm" else ".npy"
        if self.manifest.files:
            files = [self.folder / name for name in self.manifest.files]
            for name, file in zip(self.manifest.files, files, strict=True):
                if Path(name).name != name or file.suffix != suffix or not file.is_file():
                    raise MeasureError(
                        f"{self.folder / MANIFEST}: there is no {suffix} file {name!r} in its directory."
                    )
        else:
            files = sorted(self.folder.glob(f"*{suffix}"), key=lambda file: _natural(file.name))
        for file in files:
            if not file.is_file():
                raise MeasureError(f"{file} is not a file; move it elsewhere, or name the files in {MANIFEST} (files).")
        if not files:
            raise MeasureError(f"{self.folder} holds no {suffix} files, which layout {self.manifest.layout!r} needs.")
        return files

    def _check_layers(self) -> None:
        if len(self._arrays) != len(self.manifest.layers):
            raise MeasureError(
                f"{self.folder} holds {len(self._arrays)} files, one per layer, but {MANIFEST} names "
                f"{len(self.manifest.layers)} layers."
            )
        for file, array in zip(self._files, self._arrays, strict=True):
            if array.shape[:2] != self._arrays[0].shape[:2]:
                raise MeasureError(
                    f"{file} has {list(array.shape[:2])} passages and tokens, but {self._files[0].name} has "
                    f"{list(self._arrays[0].shape[:2])}."
                )


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _array(file: Path) -> np.ndarray[Any, Any]:
    try:
        array: np.ndarray[Any, Any] = np.lib.format.open_memmap(file, mode="r")  # maps no pickles and no archives
    except Exception as error:  # a damaged header shows as whatever the first thing that trips over it raises
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise MeasureError(f"{file} cannot be read: {reason}. Object arrays (pickles) are not loaded.") from error
    if array.ndim != 3 or not readable(array.dtype):
        raise MeasureError(
            f"{file} holds {array.dtype} of shape {list(array.shape)}; expected floating-point numbers (float16, "
            "float32 or float64) with three dimensions."
        )
    return array


def _request(file: Path, layers: int) -> Any:
    """The states of one request, [layers, tokens, width]."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), "pt") as stored:
            names = set(stored.keys())
            states = stored.get_tensor("hidden_states") if "hidden_states" in names else None
            ids = stored.get_tensor("token_ids") if "token_ids" in names else None
    except (SafetensorError, OSError, ValueError) as error:
        reason = re.sub(r" *\(os error \d+\)", "", str(error)).rstrip(".")
        raise MeasureError(f"{file} cannot be read: {reason}. Extract it again.") from error
    if states is None:
        raise MeasureError(f"{file} has no tensor hidden_states; it holds {', '.join(sorted(names)) or 'nothing'}.")
    if states.ndim != 3 or states.shape[1] != layers:
        raise MeasureError(
            f"{file} has hidden_states of shape {list(states.shape)}; expected [tokens, {layers}, width], because "
            f"{MANIFEST} names {layers} layers."
        )
    if ids is not None and ids.shape != states.shape[:1]:
        raise MeasureError(f"{file} has {list(ids.shape)} token_ids for states of {len(states)} tokens.")
    return states.transpose(0, 1)
