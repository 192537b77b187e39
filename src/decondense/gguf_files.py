"""GGUF files (llama.cpp's format): told from other models, and read by transformers from a folder of their own.

No torch here. transformers dequantises the tensors and builds configuration and tokenizer from the file's own
metadata; nothing that lies beside the file (a tokenizer, an adapter, code) is looked at.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SUFFIX = ".gguf"
_ON_THE_HUB = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?:([\w./-]+\.gguf)", re.IGNORECASE)


def is_gguf(name: str | Path) -> bool:
    """Whether a name is that of a GGUF file: a path, or ``OWNER/NAME:FILE.gguf`` on the hub."""
    return str(name).lower().endswith(SUFFIX)


def hub_parts(name: str) -> tuple[str, str | None, str] | None:
    """Hub id, revision and file of ``OWNER/NAME[@REVISION]:FILE.gguf``; None: the name has no such form."""
    match = None if Path(name).expanduser().exists() else _ON_THE_HUB.fullmatch(name)
    return None if match is None else (match[1], match[2], match[3])


def only_gguf(folder: Path) -> list[Path]:
    """The GGUF files of a folder that holds no safetensors, which else are the model."""
    if any(folder.glob("*.safetensors")):
        return []
    return sorted(file for file in folder.iterdir() if is_gguf(file) and file.is_file())


def architecture(path: Path) -> str:
    """``general.architecture`` of a GGUF file, which stands at the beginning; ``"unknown"`` where it does not."""
    with path.open("rb") as handle:
        head = handle.read(1 << 16)
    match = re.search(rb"general\.architecture\x08\x00\x00\x00(.)\x00{7}", head, re.DOTALL)
    if match is None:
        return "unknown"
    return head[match.end() : match.end() + match[1][0]].decode("utf-8", "replace")


def fault(path: Path) -> str | None:
    """What is wrong with a GGUF file, judged by its first bytes and its name; None: nothing."""
    with path.open("rb") as handle:
        magic = handle.read(4)
    if magic != b"GGUF":
        return f"{path} is not a GGUF file: it begins with {magic!r} instead of b'GGUF'. Copy or download it again."
    part = re.search(r"-\d{5}-of-(\d{5})\.gguf$", path.name)
    if part and int(part[1]) > 1:
        merge = f"llama-gguf-split --merge {path} WHOLE.gguf"
        return f"{path} is one of {int(part[1])} parts; merge them first: {merge}."
    if importlib.util.find_spec("gguf") is None:
        return f'{path} needs the gguf package: pip install "decondense[gguf]".'
    return None


def remedy(path: Path, error: Exception) -> str:
    """Cause and remedy of a GGUF file that transformers does not read because of ``error``."""
    from importlib.metadata import version

    kind, text = architecture(path), str(error).strip().splitlines() or [type(error).__name__]
    if re.search(r"not supported|Cannot rebuild a config|Unknown gguf model_type|does not recognize", str(error)):
        return (
            f"transformers {version('transformers')} does not read the architecture {kind!r} or its tensor types from "
            f"GGUF ({text[0].rstrip('.')}). Use the original model's directory or hub id (safetensors), or a newer "
            "version of transformers."
        )
    return (
        f"architecture {kind!r}: {text[0].rstrip('.')}. The file seems truncated or damaged: compare its size with the "
        "original, and copy or download it again."
    )


@contextlib.contextmanager
def alone(path: Path) -> Iterator[dict[str, Any]]:
    """Arguments for ``from_pretrained`` that read one GGUF file, from a folder that holds nothing else."""
    with tempfile.TemporaryDirectory(prefix="decondense-gguf-") as folder:
        (Path(folder) / "model.gguf").symlink_to(path.resolve())
        yield {"pretrained_model_name_or_path": folder, "gguf_file": "model.gguf"}
