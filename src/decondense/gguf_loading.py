"""The arguments with which transformers loads a GGUF file as a plain model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from decondense.gguf_files import alone, hub_parts, is_gguf


def gguf_path(name: str, *, revision: str | None = None, local_files_only: bool = False) -> Path:
    """The path of a GGUF file; a file on the hub is fetched into its cache. Errors of the hub client are raised
    unchanged."""
    parts = hub_parts(name)
    if parts is None:
        return Path(name).expanduser()
    from transformers.utils.hub import cached_file

    repository, at, file = parts
    return Path(str(cached_file(repository, file, revision=at or revision, local_files_only=local_files_only)))


@contextmanager
def files_of(name: str, revision: str | None, local_files_only: bool = False) -> Iterator[dict[str, Any]]:
    """Arguments of ``from_pretrained`` that say where the files are."""
    if not is_gguf(name):
        yield {"pretrained_model_name_or_path": name, "revision": revision}
        return
    with alone(gguf_path(name, revision=revision, local_files_only=local_files_only)) as files:
        yield files


def dequantised() -> dict[str, Any]:
    """Arguments that have the tensors of a GGUF file unpacked, which older transformers always does."""
    from transformers.utils import quantization_config

    packed = getattr(quantization_config, "GgufConfig", None)
    return {} if packed is None else {"quantization_config": packed(dequantize=True)}


def as_if_never_quantised(model: Any, name: str) -> None:
    """Forget that the weights were packed: they are plain now, and can be trained and saved as safetensors."""
    for owner, key in ((model, "hf_quantizer"), (model.config, "quantization_config")):
        if getattr(owner, key, None) is not None:
            delattr(owner, key)
    model.is_quantized = False
    model.config.name_or_path = name
    if not model.config.architectures:
        model.config.architectures = [type(model).__name__]
