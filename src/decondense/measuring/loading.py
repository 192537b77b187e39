"""Load a model and its tokenizer from a directory or a hub, with errors that say what to do."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from decondense.config import one_of
from decondense.measuring.running import MeasureError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_model(
    source: str | Path,
    *,
    revision: str | None = None,
    tokenizer: str | Path | None = None,
    dtype: str = "auto",
    device_map: str | Mapping[str, Any] | None = None,
    max_memory: Mapping[Any, Any] | None = None,
    offload_folder: str | Path | None = None,
    eight_bit: bool = False,
) -> tuple[nn.Module, PreTrainedTokenizerBase | None]:
    """A Hugging Face model (with its head, if it has one) and its tokenizer.

    Args:
        source: Directory with ``config.json`` and weights, or a hub id; ``ID@REVISION`` is a revision too.
        revision: Branch, tag or commit of a hub model.
        tokenizer: Where the tokenizer is, when not with the model.
        dtype: ``"auto"`` (that of the checkpoint), ``"float32"``, ``"bfloat16"``, ``"float16"``.
        device_map: As in transformers, for example ``"auto"``: layers that do not fit go to the CPU and to disk.
        max_memory: Memory budget a device, for ``device_map``.
        offload_folder: Where layers go that fit in no memory.
        eight_bit: 8-bit weights (needs ``bitsandbytes``).

    Raises:
        ValueError: no such directory, no model in it, an unreachable hub, weights that do not load.
    """
    import torch
    import transformers

    one_of("dtype", dtype, DTYPES)
    name, revision = _where(source, revision)
    options: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    if device_map is not None:
        options["device_map"] = device_map
    if max_memory is not None:
        options["max_memory"] = dict(max_memory)
    if offload_folder is not None:
        Path(offload_folder).mkdir(parents=True, exist_ok=True)
        options["offload_folder"] = str(offload_folder)
    if eight_bit:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise MeasureError("8-bit weights need bitsandbytes: pip install bitsandbytes, or leave --8bit out.")
        quantised: Any = transformers.BitsAndBytesConfig
        options["quantization_config"] = quantised(load_in_8bit=True)
    try:
        config = transformers.AutoConfig.from_pretrained(name, revision=revision)
        loader = _loader(config)
        model = loader.from_pretrained(name, revision=revision, config=config, **options)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise MeasureError(_why(name, revision, error)) from error
    model.eval()
    return model, load_tokenizer(tokenizer or name, revision=None if tokenizer else revision, required=bool(tokenizer))


def load_tokenizer(
    source: str | Path, *, revision: str | None = None, required: bool = True
) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a directory or hub model; None when there is none and it is not ``required``."""
    import transformers

    try:
        loaded: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(str(source), revision=revision)
    except Exception as error:  # a missing tokenizer shows as half a dozen types
        if required:
            raise MeasureError(f"no tokenizer at {source}: {_first_line(error)}.") from error
        return None
    # without tokenizer files transformers may build an empty tokenizer, which turns every text into nothing
    if not loaded("A text of five words.")["input_ids"]:
        if required:
            raise MeasureError(f"no tokenizer at {source}: it has no vocabulary.")
        return None
    return loaded


def _where(source: str | Path, revision: str | None) -> tuple[str, str | None]:
    name = str(source)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            inner = sorted(p.parent.name for p in path.glob("*/config.json"))
            hint = f" There are models below it: {', '.join(inner[:5])}." if inner else ""
            raise MeasureError(f"{name} is no model: it has no config.json.{hint}")
        return str(path), revision
    if path.is_file():
        raise MeasureError(f"{name} is a file; give the directory that holds config.json and the weights.")
    if "@" in name and revision is None:
        name, _, revision = name.partition("@")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise MeasureError(f"there is no model directory {name}, and it is no hub id (OWNER/NAME) either.")
    return name, revision


def _loader(config: Any) -> Any:
    import transformers

    architecture = next(iter(getattr(config, "architectures", None) or []), "")
    for suffix, loader in (
        ("ForCausalLM", transformers.AutoModelForCausalLM),
        ("LMHeadModel", transformers.AutoModelForCausalLM),
        ("ForMaskedLM", transformers.AutoModelForMaskedLM),
        ("ForConditionalGeneration", transformers.AutoModelForSeq2SeqLM),
    ):
        if architecture.endswith(suffix) and type(config) in loader._model_mapping:
            return loader
    return transformers.AutoModel


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _why(name: str, revision: str | None, error: Exception) -> str:
    at = f" (revision {revision})" if revision else ""
    if Path(name).is_dir():
        return f"the model in {name} cannot be loaded: {_first_line(error)}."
    return (
        f"no model {name!r}{at}: there is no such directory, and the hub cannot be reached or does not have it "
        f"({_first_line(error)}). Without network, give the path of a downloaded model, or fill the cache where there "
        f"is one (hf download {name}) and set HF_HOME to it."
    )
