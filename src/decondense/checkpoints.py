"""What a model directory or a hub id is, determined from names and files alone: nothing is loaded and nothing is run.

No torch here: the process that asks for benchmarks checks a model's directory before it starts the one that loads it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from decondense.config import ConfigError
from decondense.gguf_files import fault, hub_parts, is_gguf, only_gguf
from decondense.records import RecordError, read_json

ADAPTER = "adapter_config.json"
"""The file that makes a directory an adapter of PEFT (LoRA and its relatives)."""
ADAPTER_WEIGHTS = "adapter_model.safetensors"
CODE = "it contains custom code, which is not run here"

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class ModelError(ConfigError):
    """A model or tokenizer that cannot be used; the message names it, the cause and the remedy."""


@dataclass(frozen=True)
class Adapter:
    """A directory of adapter weights, and the model that they were trained on."""

    folder: Path
    base: str
    """Directory or hub id."""
    revision: str | None
    """Branch, tag or commit of a base on the hub."""


def locate(source: str | Path, revision: str | None = None) -> tuple[str, str | None]:
    """The directory, GGUF file or hub id that ``source`` names, and its revision (``ID@REVISION`` is one too).

    A directory whose weights are one GGUF file is that file. ``ID:FILE.gguf`` is a file on the hub.

    Raises:
        ModelError: no such directory, no model or adapter in it, weights only as pickles, a file that is not GGUF, or a
            name that is not a hub id.
    """
    name = str(source)
    path = Path(name).expanduser()
    if path.is_dir():
        files = [] if (path / ADAPTER).is_file() else only_gguf(path)
        if len(files) > 1:
            raise ModelError(
                f"{path} holds {len(files)} GGUF files; name one of them: {', '.join(file.name for file in files[:5])}."
            )
        if not files:
            check_folder(path)
            return str(path), revision
        path = files[0]
    if path.is_file():
        if not is_gguf(path):
            raise ModelError(f"{name} is a file; give the directory that holds config.json and the weights.")
        if (wrong := fault(path)) is not None:
            raise ModelError(wrong)
        return str(path), None
    if (parts := hub_parts(name)) is not None:
        return f"{parts[0]}:{parts[2]}", parts[1] or revision
    if is_gguf(name):
        raise ModelError(f"there is no file {name}; on the hub a GGUF file is OWNER/NAME:FILE.gguf.")
    if "@" in name and revision is None:
        name, _, revision = name.partition("@")
    if not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise ModelError(f"there is no model directory {name}, and it is not a hub id (OWNER/NAME) either.")
    return name, revision


def check_folder(path: Path) -> None:
    """Refuse a directory that holds neither a model nor an adapter, or has its weights only as pickles.

    Raises:
        ModelError: the directory is refused.
    """
    adapter = (path / ADAPTER).is_file()
    if not adapter and not (path / "config.json").is_file():
        inner = sorted(folder.name for folder in checkpoint_folders(path))
        hint = f" There are models below it: {', '.join(inner[:5])}." if inner else ""
        raise ModelError(f"{path} is not a model: it has no config.json.{hint}")
    whole = [*path.glob("model*.safetensors"), *path.glob("model*.safetensors.index.json")]
    if adapter and whole:
        raise ModelError(
            f"{path} holds a whole model ({whole[0].name}) and an adapter ({ADAPTER}): it is not clear which one to "
            "load. Move one of them to its own directory."
        )
    if adapter and not (path / ADAPTER_WEIGHTS).is_file():
        cause, remedy = "", "Copy or download it again."
        if (path / "adapter_model.bin").is_file():
            cause = ", only a pickle (adapter_model.bin), which is not loaded because reading it can run code"
            remedy = "Save the adapter again with a current version of peft."
        raise ModelError(f"the adapter in {path} has no {ADAPTER_WEIGHTS}{cause}. {remedy}")
    pickles = sorted([*path.glob("pytorch_model*.bin"), *path.glob("*.ckpt"), *path.glob("*.pt"), *path.glob("*.pth")])
    pickles = [file for file in pickles if file.name not in _OF_THE_TRAINER and not file.name.startswith("rng_state")]
    if not adapter and not [*path.glob("*.safetensors")] and pickles:
        raise ModelError(
            f"{path} has its weights only as a pickle ({pickles[0].name}), which is not loaded because reading it can "
            "run code. Save the model again as safetensors (save_pretrained of a current transformers)."
        )


_OF_THE_TRAINER = ("optimizer.pt", "scheduler.pt", "scaler.pt")


def checkpoint_folders(root: Path) -> list[Path]:
    """The directories right below ``root`` that hold a model or an adapter."""
    return sorted({file.parent for name in ("config.json", ADAPTER) for file in root.glob(f"*/{name}")})


def adapter_of(folder: str | Path) -> Adapter | None:
    """The adapter in a directory; None where the directory holds a model of its own (or is no directory).

    A base given as a path is looked for as it stands, then from the adapter's directory on.

    Raises:
        ModelError: the file names no base, a base that is not there, or an adapter that brings code or other adapters.
    """
    folder = Path(folder)
    path = folder / ADAPTER
    if not path.is_file():
        return None
    try:
        settings = read_json(path)
    except RecordError as error:
        raise ModelError(f"{error} Copy or download the adapter again.") from error
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ModelError(f"{path} does not name the base model; add it as base_model_name_or_path.")
    if settings.get("megatron_config") is not None:
        raise ModelError(f"{path}: adapters with megatron_config are not loaded, because it imports a module by name.")
    if str(settings.get("peft_type")).upper() == "XLORA":
        raise ModelError(f"{path}: X-LoRA adapters, which load further adapters, are not supported.")
    revision = settings.get("revision")
    for place in (Path(base).expanduser(), folder / base):
        if place.is_dir():
            if (place / ADAPTER).is_file():
                raise ModelError(f"{path}: its base model {base} is also an adapter; merge that one first.")
            return Adapter(folder, str(place), None)
    if not _HUB_ID.fullmatch(base) or base.startswith("."):
        raise ModelError(
            f"the adapter in {folder} needs its base model, and there is no directory {base}. Set "
            f"base_model_name_or_path in {path.name} to a directory or a hub id."
        )
    return Adapter(folder, base, revision if isinstance(revision, str) else None)


def first_line(error: Exception) -> str:
    """The first informative line of an error's message: not a heading that ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return text.rstrip(".:!")


def reason_of(error: Exception) -> str:
    """Why something could not be loaded, in a few words without a full stop."""
    text = first_line(error)
    if "trust_remote_code" in str(error):
        return CODE
    if "ignore_mismatched_sizes" in text:
        return "the shapes of its weights do not match its config.json"
    if isinstance(error, ValueError) and hasattr(error, "lineno"):  # of the json module
        return f"one of its JSON files is truncated or damaged ({text})"
    if "safetensor" in type(error).__name__.lower():
        return f"its weights are damaged ({text}); copy or download them again"
    return text
