"""The only loader: every model that is measured, evaluated, trained or used as a teacher is loaded or built here.

It guarantees for all of them: custom code in a model repository never runs unless the caller allows it, and there is no
prompt; weights are safetensors, never pickles; a checkpoint that lacks tensors is refused instead of being filled with
random ones; a directory of adapters is loaded through PEFT on its base model; a GGUF file is dequantised.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch
from torch import nn

from decondense.checkpoints import ADAPTER, ADAPTER_WEIGHTS, Adapter, ModelError, adapter_of, locate, reason_of
from decondense.config import ConfigError, LoraConfig, ModelConfig, one_of, suggest
from decondense.corpora.hub import commit_of, offline
from decondense.gguf_files import hub_parts, is_gguf, remedy
from decondense.gguf_loading import as_if_never_quantised, dequantised, files_of
from decondense.limits import model_positions, vocabulary_size
from decondense.seeding import fence
from decondense.tokenizers import has_tokenizer, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from typing_extensions import Unpack

DTYPES = ("auto", "float32", "bfloat16", "float16")

Head = Literal["any", "causal", "text"]
"""``any``: the head that the checkpoint was saved with, if it has one; a head that lacks tensors is accepted.
``causal``: a causal language model. ``text``: that, or an encoder-decoder that generates text."""


class LoadOptions(TypedDict, total=False):
    """How a model is loaded."""

    head: Head
    """What the model has to be able to do."""
    dtype: str | torch.dtype
    """``"auto"`` (that of the checkpoint), ``"float32"``, ``"bfloat16"``, ``"float16"``, or torch's."""
    device_map: str | Mapping[str, Any] | None
    """As in transformers, for example ``"auto"``: layers that do not fit go to the CPU and to disk."""
    max_memory: Mapping[Any, Any] | None
    """Memory budget per device, for ``device_map``."""
    offload_folder: str | Path | None
    """Directory for layers that do not fit in memory."""
    eight_bit: bool
    """8-bit weights (needs ``bitsandbytes``)."""
    merge: bool
    """Merge an adapter into the weights of its base, so that the result is a plain model."""


# --------------------------------------------------------------------------------------------------------------------
# Loading
# --------------------------------------------------------------------------------------------------------------------


def load_model(
    source: str | Path,
    *,
    revision: str | None = None,
    tokenizer: str | Path | None = None,
    trust_remote_code: bool = False,
    **options: Unpack[LoadOptions],
) -> tuple[nn.Module, PreTrainedTokenizerBase | None]:
    """A Hugging Face model (with its head, if it has one) and its tokenizer.

    Args:
        source: Directory with ``config.json`` and weights, or with an adapter of PEFT, or a hub id;
            ``ID@REVISION`` is a revision too. Or a GGUF file, a directory with one, ``ID:FILE.gguf`` on the hub.
        revision: Branch, tag or commit of a hub model.
        tokenizer: Where the tokenizer is, when not with the model (or with the adapter's base).
        trust_remote_code: Run custom code that comes with the model and the tokenizer.
        options: See :class:`LoadOptions`.

    Raises:
        ValueError: there is no such directory or no model in it, the hub cannot be reached, the weights do not load or
            are incomplete, or custom code would have to run.
    """
    name, at = locate(source, revision)
    with _asked_once(name, tokenizer):
        model, adapter = _load(name, at, trust_remote_code=trust_remote_code, **options)
        if tokenizer is not None:
            return model, load_tokenizer(tokenizer, trust_remote_code=trust_remote_code)
        if adapter is not None and not has_tokenizer(adapter.folder):
            name, at = adapter.base, adapter.revision
        return model, load_tokenizer(name, revision=at, required=False, trust_remote_code=trust_remote_code)


def load_network(source: str | Path, *, revision: str | None = None, **options: Unpack[LoadOptions]) -> PreTrainedModel:
    """A Hugging Face model without its tokenizer, in evaluation mode.

    Args:
        source: As for :func:`load_model`.
        revision: Branch, tag or commit of a hub model.
        options: See :class:`LoadOptions`.

    Raises:
        ModelError: as for :func:`load_model`.
    """
    name, at = locate(source, revision)
    with _asked_once(name):
        return _load(name, at, **options)[0]


def _load(
    name: str,
    revision: str | None,
    *,
    head: Head = "any",
    dtype: str | torch.dtype = "auto",
    device_map: str | Mapping[str, Any] | None = None,
    max_memory: Mapping[Any, Any] | None = None,
    offload_folder: str | Path | None = None,
    eight_bit: bool = False,
    merge: bool = False,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, Adapter | None]:
    if isinstance(dtype, str):
        one_of("dtype", dtype, DTYPES)
        dtype = dtype if dtype == "auto" else getattr(torch, dtype)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if device_map is not None:
        options["device_map"] = device_map
    if max_memory is not None:
        options["max_memory"] = dict(max_memory)
    if offload_folder is not None:
        Path(offload_folder).mkdir(parents=True, exist_ok=True)
        options["offload_folder"] = str(offload_folder)
    if eight_bit:
        if is_gguf(name):
            raise ModelError(
                f"{name} is a GGUF file, which is dequantised when it is loaded: omit 8-bit weights (--8bit), or "
                "load it in bfloat16 to save memory (--dtype, dtype=)."
            )
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ModelError("8-bit weights (--8bit) need bitsandbytes: pip install bitsandbytes, or omit them.")
        import transformers

        quantised: Any = transformers.BitsAndBytesConfig
        options["quantization_config"] = quantised(load_in_8bit=True)
    adapter = adapter_of(name)
    if adapter is None:
        try:
            return _whole(name, revision, head, options), None
        except ModelError:
            adapter = None if is_gguf(name) else _adapter_on_the_hub(name, revision)
            if adapter is None:
                raise
    base, at = locate(adapter.base, adapter.revision)
    with _asked_once(base):
        model = _whole(base, at, head, options)
    return _adapted(model, adapter, merge), adapter


def load_config(
    source: str | Path,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
) -> Any:
    """The configuration of a model; of an adapter, that of its base.

    Raises:
        ModelError: as for :func:`load_model`.
    """
    import transformers

    name, revision = locate(source, revision)
    if (adapter := adapter_of(name)) is not None:
        name, revision = locate(adapter.base, adapter.revision)
    try:
        with files_of(name, revision, local_files_only) as files:
            config = transformers.AutoConfig.from_pretrained(
                **files, local_files_only=local_files_only, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # a broken file shows as whatever the first thing that trips over it raises
        raise ModelError(why_not(name, revision, error)) from error
    if not trust_remote_code:
        _refuse_kernels(name, config)
    return config


def empty_model(config: Any, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A causal language model with the weights that its configuration draws, on the current default device.

    For a configuration that cannot be built, the error of transformers is raised unchanged.
    """
    import transformers

    make: Any = transformers.AutoModelForCausalLM.from_config
    model: PreTrainedModel = make(config, trust_remote_code=False, **({} if dtype is None else {"dtype": dtype}))
    return model


def _whole(name: str, revision: str | None, head: Head, options: dict[str, Any]) -> PreTrainedModel:
    import transformers

    config = load_config(name, revision=revision, trust_remote_code=options["trust_remote_code"])
    if getattr(config, "auto_map", None) and not options["trust_remote_code"]:
        warnings.warn(
            f"{name} contains custom code, which is not run: the {type(config).__name__} of transformers is used "
            "instead.",
            stacklevel=2,
        )
    if is_gguf(name):
        options = {**options, **dequantised()}
        head = "causal" if type(config) in transformers.AutoModelForCausalLM._model_mapping else head
    try:
        with files_of(name, revision) as files:
            model, report = _loader(config, head).from_pretrained(
                **files, config=config, use_safetensors=True, output_loading_info=True, **options
            )
    except Exception as error:
        raise ModelError(why_not(name, revision, error)) from error
    if is_gguf(name):
        as_if_never_quantised(model, name)
    check_complete(name, model, report["missing_keys"], head=head != "any", unexpected=report["unexpected_keys"])
    model.eval()
    return model  # type: ignore[no-any-return]


def _refuse_kernels(name: str, config: Any) -> None:
    """Refuse a configuration that has compiled kernels fetched from the hub: that is code as well."""
    parts = [getattr(config, key, None) for key in getattr(config, "sub_configs", {})]
    for part in (config, *parts):
        for key in ("_attn_implementation_internal", "_experts_implementation_internal"):
            value = getattr(part, key, None)
            if isinstance(value, str) and "/" in value:
                raise ModelError(
                    f"the model in {name} cannot be loaded: its config.json requests kernels from {value}, and this "
                    f"code is not run here. Remove {key.removesuffix('_internal').lstrip('_')} from config.json."
                )


def _loader(config: Any, head: Head) -> Any:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

    if head != "any":
        generates = head == "text" and config.model_type in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
        return transformers.AutoModelForSeq2SeqLM if generates else transformers.AutoModelForCausalLM
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


@contextmanager
def _asked_once(*names: str | Path | None) -> Iterator[None]:
    """In the block the hub is not asked again when one of ``names`` is not here and it does not answer now.

    The libraries try for half a minute, for every file anew.
    """
    remote = [str(name) for name in names if name is not None and not Path(name).expanduser().exists()]
    remote = [name if (parts := hub_parts(name)) is None else parts[0] for name in remote]
    away = any(commit_of(name, "model")[1] is not None for name in remote)
    with offline() if away else nullcontext():
        yield


def check_complete(
    name: str, model: Any, missing: Iterable[str], *, head: bool = False, unexpected: Iterable[str] = ()
) -> None:
    """Refuse weights that lack parameters that are used: transformers initialises these randomly and only warns.

    Poolers, which come and go between tasks, are never used, and heads are not when states are measured.

    Args:
        name: what the message calls the model.
        model: a transformers model.
        missing: names of its parameters that were not in the weights.
        head: the head is used too.
        unexpected: names in the weights that no parameter has.

    Raises:
        ModelError: parameters that are used are missing.
    """
    inside = "" if head or model.base_model is model else f"{model.base_model_prefix}."
    lacking = sorted(key for key in missing if key.startswith(inside) and "pooler" not in key.split("."))
    if lacking:
        wrapper = next(
            (part for part in ("_orig_mod.", "module.") if any(key.startswith(part) for key in unexpected)), ""
        )
        raise ModelError(
            f"the model in {name} cannot be used: its weights lack {len(lacking):,} of the tensors that its "
            f"config.json requires ({_some(lacking)}), which would be initialised randomly. "
            + (
                f"The weight names begin with {wrapper!r}: save the model without its torch.compile or DDP wrapper."
                if wrapper
                else "Use a config.json and weights that belong together."
            )
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def why_not(name: str, revision: str | None, error: Exception) -> str:
    """What to tell a user whose model, a directory or a hub id, could not be loaded because of ``error``."""
    at = f" (revision {revision})" if revision else ""
    reason = reason_of(error)
    if is_gguf(name) and Path(name).is_file():
        return f"the model in {name} cannot be loaded: {remedy(Path(name), error)}"
    # an answer about code or about safetensors comes from files that were there
    if Path(name).is_dir() or "trust_remote_code" in str(error):
        return f"the model in {name} cannot be loaded: {reason}."
    if "safetensors" in str(error):
        return f"the model {name}{at} cannot be loaded: {reason}. Pickled weights are not loaded."
    return (
        f"no model {name!r}{at}: there is no such directory, and the hub cannot be reached or does not have it "
        f"({reason}). Without network access, give the path of a downloaded model, or download it on another machine "
        f"(hf download {name}) and set HF_HOME to that cache."
    )


# --------------------------------------------------------------------------------------------------------------------
# Adapters
# --------------------------------------------------------------------------------------------------------------------


def _adapter_on_the_hub(name: str, revision: str | None) -> Adapter | None:
    """A hub id that holds an adapter and no model: its files are fetched into the hub's cache."""
    if Path(name).is_dir():
        return None
    from transformers.utils.hub import cached_file

    try:
        places = [cached_file(name, file, revision=revision) for file in (ADAPTER, ADAPTER_WEIGHTS)]
    except Exception:  # there is none: the error of the model says why
        return None
    return adapter_of(Path(str(places[0])).parent)


def _peft(what: str) -> Any:
    try:
        import peft
    except ImportError as error:
        raise ModelError(f"{what} needs the package peft: pip install peft.") from error
    return peft


def _adapted(model: PreTrainedModel, adapter: Adapter, merge: bool) -> PreTrainedModel:
    """The model with an adapter on it, complete or refused; the random state is left as it was."""
    from safetensors import safe_open

    folder = adapter.folder
    peft = _peft(f"the adapter in {folder}")
    try:
        with fence(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of missing keys, which are refused below, and of names that change
            adapted = peft.PeftModel.from_pretrained(model, str(folder), is_trainable=False)
        wanted = set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
        with safe_open(str(folder / ADAPTER_WEIGHTS), "pt") as stored:
            saved = set(stored.keys())
    except Exception as error:
        raise ModelError(f"the adapter in {folder} cannot be loaded on {adapter.base}: {reason_of(error)}.") from error
    lacking, beyond = sorted(wanted - saved), sorted(name for name in saved - wanted if ".lora_" in name)
    if lacking or beyond:
        cause = f"it lacks {_some(lacking)}" if lacking else f"the base has no module for {_some(beyond)}"
        raise ModelError(
            f"the adapter in {folder} does not fit its base {adapter.base}: {cause}. Use an adapter_config.json, "
            "adapter weights and a base model that belong together."
        )
    if merge:
        try:
            plain: PreTrainedModel = adapted.merge_and_unload()
        except (AttributeError, ValueError, NotImplementedError) as error:
            raise ModelError(f"the adapter in {folder} cannot be merged into {adapter.base}: {error}") from error
        return plain
    adapted.eval()
    adapted.config.name_or_path = str(folder)  # what is loaded is the adapter's model, not its base
    return adapted  # type: ignore[no-any-return]


def _with_adapters(model: PreTrainedModel, lora: LoraConfig) -> PreTrainedModel:
    """New adapters on a model, drawn from the global generator."""
    peft = _peft("model.lora")
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out")  # GPT-2's layers; peft turns it round itself
            adapted: PreTrainedModel = peft.get_peft_model(model, settings)
    except ValueError as error:
        raise ConfigError(
            f"model.lora.targets {lora.targets!r} cannot be used: {str(error).splitlines()[0]}"
        ) from error
    return adapted


# --------------------------------------------------------------------------------------------------------------------
# The model that an arm starts from
# --------------------------------------------------------------------------------------------------------------------


def build_model(config: ModelConfig, vocabulary: int, positions: int, end_token: int) -> PreTrainedModel:
    """The model that an arm starts from; the caller seeds the global generators first.

    Args:
        config: architecture and overrides, or a pretrained start; with adapters if configured.
        vocabulary: rows of the embedding that the tokenizer needs (:func:`decondense.tokenizers.vocabulary_of`).
        positions: tokens of a training sequence.
        end_token: id of the end-of-text token.

    Raises:
        ConfigError: unknown architecture or field, a start that cannot be loaded or lacks tensors, too few positions,
            or a start whose vocabulary does not match the tokenizer.
    """
    if config.pretrained is not None:
        try:
            model = load_network(
                config.pretrained, revision=config.revision, head="causal", dtype=torch.float32, merge=True
            )
        except ModelError as error:
            raise ConfigError(f"model.pretrained {config.pretrained!r} cannot be loaded: {error}") from error
        longest = model_positions(model)
        if longest is not None and longest < positions:
            raise ConfigError(
                f"model.pretrained {config.pretrained!r} has {longest} positions, fewer than train.max_seq_length "
                f"{positions}. Set train.max_seq_length to {longest} or less."
            )
        rows = vocabulary_size(model)
        if rows is not None and rows < vocabulary:
            raise ConfigError(
                f"model.pretrained {config.pretrained!r} has a vocabulary of {rows}, but the corpus needs "
                f"{vocabulary}. Set corpus.tokenizer to the model's tokenizer."
            )
    else:
        model = _from_scratch(config, vocabulary, positions, end_token)
    # GPT-2 declares no loss type; the Trainer then counts the labels before the shift and scales the cross-entropy
    # by (T - 1) / T
    model.loss_type = "ForCausalLM"
    model.config.use_cache = False
    return model if config.lora is None else _with_adapters(model, config.lora)


def _from_scratch(config: ModelConfig, vocabulary: int, positions: int, end_token: int) -> PreTrainedModel:
    from transformers import CONFIG_MAPPING, AutoConfig

    try:
        blank = AutoConfig.for_model(config.architecture)
    except ValueError as error:
        raise ConfigError(
            f"model.architecture {config.architecture!r} is not a Hugging Face model type."
            f"{suggest(config.architecture, CONFIG_MAPPING)}"
        ) from error
    known = {*blank.to_dict(), *type(blank).attribute_map}
    for name in config.overrides:
        if name not in known:
            raise ConfigError(
                f"model.overrides: {config.architecture} has no field {name!r}.{suggest(name, sorted(known))}"
            )
    for name, value in config.overrides.items():
        count = name.startswith(("n_", "num_", "d_")) or name.endswith(("_size", "_dim", "_layers", "_heads"))
        if count and isinstance(value, (int, float)) and value < 0:
            raise ConfigError(f"model.overrides: {config.architecture} with {name}: {value} cannot be built.")
    values = {
        "vocab_size": vocabulary,
        "bos_token_id": end_token,
        "eos_token_id": end_token,
        "pad_token_id": end_token,
    }
    for name in ("n_positions", "max_position_embeddings"):
        if name in blank.to_dict() and name not in config.overrides:
            values[name] = positions
    try:
        settings = AutoConfig.for_model(config.architecture, **{**values, **config.overrides})
        return empty_model(settings, dtype=torch.float32)
    except Exception as error:  # wrong types and sizes show as whatever the first layer that trips over them raises
        raise ConfigError(f"model: {config.architecture} with {config.overrides} cannot be built: {error}") from error
