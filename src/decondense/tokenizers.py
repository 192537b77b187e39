"""Loads every tokenizer, and tells how large a vocabulary it needs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from decondense.checkpoints import ADAPTER, ModelError, locate, reason_of
from decondense.gguf_files import alone, is_gguf, only_gguf, remedy
from decondense.gguf_loading import gguf_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_tokenizer(source: str | Path, *, trust_remote_code: bool = False, **options: Any) -> PreTrainedTokenizerBase:
    """``AutoTokenizer.from_pretrained`` that never asks whether code may run; its errors are raised as they come.

    Args:
        source: Directory, hub id or GGUF file (``ID:FILE.gguf`` on the hub; or the directory of one).
        trust_remote_code: Run code that comes with the tokenizer; a GGUF file brings none.
        options: ``revision``, ``local_files_only``, ...
    """
    import transformers

    folder = Path(source).expanduser()
    alone_there = folder.is_dir() and not (folder / ADAPTER).is_file() and len(only_gguf(folder)) == 1
    if is_gguf(source) or alone_there:
        return _from_gguf(*locate(source, options.get("revision")), options.get("local_files_only", False))
    loaded: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(
        str(source), trust_remote_code=trust_remote_code, **options
    )
    return loaded


def _from_gguf(name: str, revision: str | None, local_files_only: bool) -> PreTrainedTokenizerBase:
    import transformers

    path = gguf_path(name, revision=revision, local_files_only=local_files_only)
    with alone(path) as there:
        try:
            loaded: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(
                **there, trust_remote_code=False
            )
        except Exception as error:  # a damaged file shows as whatever the first reader that trips over it raises
            if isinstance(error, KeyError):
                raise ModelError(
                    f"{name} holds no tokenizer; give its directory or hub id (--tokenizer, tokenizer=)."
                ) from error
            raise ModelError(f"the tokenizer in {name} cannot be loaded: {remedy(path, error)}") from error
    loaded.name_or_path = name
    return loaded


def load_tokenizer(
    source: str | Path,
    *,
    revision: str | None = None,
    required: bool = True,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a directory or hub model; None when there is none and it is not ``required``.

    Raises:
        ModelError: there is none and it is ``required``; or the directory has tokenizer files that do not load, or only
            load by running custom code.
    """
    remedy = "Give the directory or hub id of the tokenizer (--tokenizer, tokenizer=)."
    try:
        loaded = read_tokenizer(source, revision=revision, trust_remote_code=trust_remote_code)
        # a wrong type in its configuration shows when it is first used
        ids = loaded("A text of five words.")["input_ids"]
    except ModelError:
        raise
    except Exception as error:  # a missing tokenizer shows as half a dozen types
        folder = Path(source).expanduser()
        broken = (folder / "tokenizer.json").is_file() or "trust_remote_code" in str(error)
        if required or broken:
            what = f"the tokenizer in {source} cannot be loaded" if broken else f"no tokenizer at {source}"
            raise ModelError(f"{what}: {reason_of(error)}. {remedy}") from error
        return None
    # without tokenizer files transformers may build an empty tokenizer, which turns every text into nothing
    if not ids:
        if required:
            raise ModelError(f"no tokenizer at {source}: it has no vocabulary. {remedy}")
        return None
    return loaded


def has_tokenizer(folder: Path) -> bool:
    """Whether a directory contains a tokenizer; for an adapter without one, that of its base is used."""
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    return any((folder / name).is_file() for name in names)


def vocabulary_of(tokenizer: Any) -> int:
    """Rows that an embedding needs for a tokenizer: one more than its largest id, which may lie beyond ``len``.

    Ids may have holes (a vocabulary that was cut, special tokens with numbers of their own): ``len`` counts entries.
    """
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))
