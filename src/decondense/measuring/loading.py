"""Load a model and its tokenizer from a directory or a hub, with errors that say what to do."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from decondense.config import one_of
from decondense.corpora.hub import commit_of, offline
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
        ValueError: no such directory, no model in it, an unreachable hub, weights that do not load or are not
            complete.
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
    with _asked_once(name, tokenizer):
        try:
            config = transformers.AutoConfig.from_pretrained(name, revision=revision)
            loader = _loader(config)
            model, found = loader.from_pretrained(
                name, revision=revision, config=config, output_loading_info=True, **options
            )
        except Exception as error:  # a broken file shows as whatever the first thing that trips over it raises
            raise MeasureError(why_not(name, revision, error)) from error
        check_complete(name, model, found["missing_keys"])
        model.eval()
        where, at = (name, revision) if tokenizer is None else (tokenizer, None)
        return model, _tokenizer(where, revision=at, required=tokenizer is not None)


def check_complete(name: str, model: Any, missing: Iterable[str], *, head: bool = False) -> None:
    """Refuse weights that lack a part of what is used: transformers draws it at random, with a warning only.

    Poolers, which come and go between tasks, are never used, and heads are not when states are measured.

    Args:
        name: what the message calls the model.
        model: a transformers model.
        missing: names of its parameters that were not in the weights.
        head: the head is used too.

    Raises:
        ValueError: parameters that are used are missing.
    """
    inside = "" if head or model.base_model is model else f"{model.base_model_prefix}."
    lacking = sorted(key for key in missing if key.startswith(inside) and "pooler" not in key.split("."))
    if lacking:
        first = ", ".join(lacking[:3]) + (", ..." if len(lacking) > 3 else "")
        raise MeasureError(
            f"the model in {name} cannot be used: its weights lack {len(lacking):,} of the tensors that its "
            f"config.json asks for ({first}). They would be random: give config.json and weights that belong together."
        )


@contextmanager
def _asked_once(*names: str | Path | None) -> Iterator[None]:
    """In the block the hub is not asked again when one of ``names`` is not here and it does not answer now.

    The libraries try for half a minute, for every file anew.
    """
    remote = [str(name) for name in names if name is not None and not Path(name).expanduser().exists()]
    away = any(commit_of(name, "model")[1] is not None for name in remote)
    with offline() if away else nullcontext():
        yield


def check_source(source: str | Path) -> None:
    """Refuse at once what can be neither a model directory nor a hub id; nothing is loaded.

    Raises:
        ValueError: no such directory, no ``config.json`` in it, no form of a hub id.
    """
    _where(source, None)


def load_tokenizer(
    source: str | Path, *, revision: str | None = None, required: bool = True
) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a directory or hub model; None when there is none and it is not ``required``.

    Raises:
        ValueError: there is none and it is ``required``; the directory has a tokenizer's files, but they do not load.
    """
    with _asked_once(source):
        return _tokenizer(source, revision=revision, required=required)


def _tokenizer(source: str | Path, *, revision: str | None, required: bool) -> PreTrainedTokenizerBase | None:
    import transformers

    remedy = "Name the directory or the hub id of the right one: --tokenizer."
    try:
        loaded: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(str(source), revision=revision)
    except Exception as error:  # a missing tokenizer shows as half a dozen types
        broken = (Path(source).expanduser() / "tokenizer.json").is_file()
        if required or broken:
            what = f"the tokenizer in {source} cannot be loaded" if broken else f"no tokenizer at {source}"
            raise MeasureError(f"{what}: {_first_line(error)}. {remedy}") from error
        return None
    # without tokenizer files transformers may build an empty tokenizer, which turns every text into nothing
    if not loaded("A text of five words.")["input_ids"]:
        if required:
            raise MeasureError(f"no tokenizer at {source}: it has no vocabulary. {remedy}")
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
    """The first line that says something: not a heading that ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return said.rstrip(".:!")


def why_not(name: str, revision: str | None, error: Exception) -> str:
    """What to tell a user whose model, a directory or a hub id, could not be loaded because of ``error``."""
    at = f" (revision {revision})" if revision else ""
    if Path(name).is_dir():
        said = _first_line(error)
        if "ignore_mismatched_sizes" in said:
            said = "the weights have other sizes than its config.json says"
        elif isinstance(error, ValueError) and hasattr(error, "lineno"):  # of the json module
            said = f"one of its JSON files is cut off or damaged ({said})"
        elif "safetensor" in type(error).__name__.lower():
            said = f"its weights are damaged ({said}); copy or download them again"
        elif "trust_remote_code" in str(error):
            said = "it comes with code of its own, which is not run here"
        return f"the model in {name} cannot be loaded: {said}."
    return (
        f"no model {name!r}{at}: there is no such directory, and the hub cannot be reached or does not have it "
        f"({_first_line(error)}). Without network, give the path of a downloaded model, or fill the cache where there "
        f"is one (hf download {name}) and set HF_HOME to it."
    )
