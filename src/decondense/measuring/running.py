"""``measure``: run the passages through a model and reduce every layer's states as they are computed."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from decondense.blocks import Blocks, base_model, find_blocks, unwrap
from decondense.config import MeasureConfig, one_of
from decondense.formatting import plural
from decondense.layers import LOGITS, Layer
from decondense.layout import StateReader, why_not_three, why_other_tokens
from decondense.limits import model_positions, text_config, vocabulary_size
from decondense.measuring.metrics import LayerPairs, resolve_metrics
from decondense.measuring.profile import Profile, unequal
from decondense.measuring.sides import Sides
from decondense.measuring.sinks import Sinks
from decondense.measuring.states import StateTap, accepts
from decondense.measuring.statistics import LayerStatistics
from decondense.metrics import Metric
from decondense.seeding import undisturbed
from decondense.sequences import SequencesError, is_batch_first

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_D = MeasureConfig()

Progress = Callable[[str, int, int], None]


class MeasureError(ValueError):
    """A measurement that cannot be made; the message names the cause and the remedy."""


def measure(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None = None,
    texts: Sequence[str] | None = None,
    *,
    input_ids: Tensor | Sequence[Any] | None = None,
    attention_mask: Tensor | None = None,
    tokens: int | None = None,
    skip_tokens: int = 0,
    histograms: Sequence[str] = _D.histograms,
    metrics: str | Iterable[str] = _D.metrics,
    logits: bool = _D.logits,
    blocks: str | None = _D.blocks,
    tokens_first: bool | None = _D.tokens_first,
    batch_size: int | None = _D.batch_size,
    progress: Progress | None = None,
) -> Profile:
    r"""Measure the token geometry of a model, layer by layer, in one pass over the passages.

    For each layer l and passage of N tokens, with :math:`c_{ij} = \langle z_i, z_j \rangle / \lvert z_i \rvert \lvert
    z_j \rvert`, the mean cosine :math:`\mu^{(l)} = N^{-2} \sum_{ij} c_{ij}` (Liu et al. 2026, arXiv:2602.00217), the
    distribution of the cosines, and token norms. Every state is reduced as soon as it is computed, so the memory is
    that of the forward pass. Padding never counts. The model keeps its mode, and the random state does not change.

    Args:
        model: Any Hugging Face decoder, encoder or encoder-decoder (whose decoder is measured, reading the same passage
            as the encoder), or any ``nn.Module`` that takes token ids and has a list of blocks.
        tokenizer: Its tokenizer; needed for ``texts``.
        texts: Passages. None (and no ``input_ids``): 100 passages of the embedded corpus.
        input_ids: Instead of texts: a tensor [P, T] or a list of lists of token ids.
        attention_mask: [P, T], for a tensor of ``input_ids``: 1 marks a token, 0 padding on either side.
        tokens: Length to which passages are truncated. None: 512, or the model's positions if it has fewer.
        skip_tokens: Leave the first tokens of each passage out of every statistic; the model still reads them.
        histograms: ``"pooled"`` (all pairs of all passages) and/or ``"averaged"`` (of the matrix averaged over
            passages, as published; needs passages of equal length). ``()``: means only.
        metrics: Names of side metrics (``decondense.metric_names()``), or ``"all"``.
        logits: Measure the logits as one more state (needs a model with a head).
        blocks: Dotted path of the list of blocks, if it is not found automatically.
        tokens_first: Whether the blocks return [tokens, batch, width]. None: determined from the shapes; a given value
            is checked.
        batch_size: Passages of one forward pass; None: chosen from the free memory. The statistics do not depend on it,
            but the model's own rounding may.
        progress: Called with ("measuring", passages done, total passages).

    Returns:
        The :class:`Profile`.

    Raises:
        ValueError: no tokenizer, no or too short passages, more tokens than the model has positions, token ids outside
            its vocabulary, NaN or infinite states (named by layer and passage), blocks that cannot be determined.
    """
    for kind in histograms:
        one_of("histogram", kind, ("pooled", "averaged"))
    chosen = resolve_metrics(metrics)
    found = find_blocks(model, blocks)
    passages = _passages(model, tokenizer, texts, input_ids, attention_mask, tokens)
    for number, ids in enumerate(passages):
        check_length(number, len(ids), skip_tokens)
    lengths = np.array([len(ids) for ids in passages], dtype=np.int64)
    averaged = "averaged" in histograms
    no_averaged = ""
    if averaged and len(set(lengths.tolist())) > 1:
        averaged, no_averaged = False, unequal(lengths - skip_tokens)
        if tuple(histograms) == ("averaged",):
            raise MeasureError(no_averaged)

    def attempt(size: int | None) -> tuple[dict[Layer, LayerStatistics], LayerPairs, int]:
        return _run(
            found, tokens_first, passages, lengths, size, chosen, "pooled" in histograms, averaged, logits, progress,
            skip_tokens,
        )  # fmt: skip

    with undisturbed(model):
        size = batch_size
        while True:
            try:
                layers, between, size = attempt(size)
                break
            except torch.cuda.OutOfMemoryError:
                # a clean restart: half a batch may have been counted already
                if batch_size is not None or size == 1:
                    raise
                size = max(1, (size or 64) // 2)
                torch.cuda.empty_cache()

    info = _info(model) | ({"skip_tokens": skip_tokens} if skip_tokens else {})
    return assembled(layers, lengths - skip_tokens, chosen, between, no_averaged=no_averaged, info=info)


def assembled(
    layers: dict[Layer, LayerStatistics],
    lengths: np.ndarray[Any, Any],
    metrics: Mapping[str, Metric],
    between: LayerPairs,
    *,
    no_averaged: str,
    info: dict[str, Any],
    last_block: bool = True,
) -> Profile:
    """The profile of what the layers took in; ``lengths``: the tokens that were counted of each passage [P]."""
    rows = list(layers.values())
    pooled = [row.pairs.pooled_counts() for row in rows if row.pairs is not None]
    summed = [row.pairs.packed_sum() for row in rows if row.pairs is not None]
    moments = [None if row.moments is None else row.moments.moments() for row in rows]
    positions = np.zeros((len(rows), max(len(row.sink_positions_N) for row in rows)), dtype=np.int64)
    for number, row in enumerate(rows):
        positions[number, : len(row.sink_positions_N)] = row.sink_positions_N
    return Profile(
        states=tuple(layers),
        lengths=lengths,
        cosine=np.stack([row.cosine_P for row in rows]),
        cosine_others=np.stack([row.cosine_others_P for row in rows]),
        norm=np.stack([row.norm_P for row in rows]),
        norm_sd=np.stack([row.norm_sd_P for row in rows]),
        norm_max=np.stack([row.norm_max_P for row in rows]),
        metrics={name: np.stack([row.metric_P[name] for row in rows]) for name in rows[0].metric_P},
        sides=Sides.collected(metrics, moments, between),
        pooled=np.stack([c for c in pooled if c is not None]) if pooled and pooled[0] is not None else None,
        summed=np.stack([s for s in summed if s is not None]) if summed and summed[0] is not None else None,
        no_averaged=no_averaged,
        sinks=Sinks(
            count=np.stack([row.sinks_P for row in rows]).astype(np.int64),
            cosine=np.stack([row.kept_P for row in rows]),
            norm=np.stack([row.kept_norm_P for row in rows]),
            positions=positions,
        ),
        last_block=last_block,
        info=info,
    )


def check_length(number: int, tokens: int, skipped: int) -> None:
    """Refuse a passage that has fewer than two tokens to measure.

    Raises:
        MeasureError: the passage is too short, or ``skipped`` is negative.
    """
    if skipped < 0:
        raise MeasureError(f"skip_tokens={skipped}: give the number of tokens to leave out, 0 or more.")
    if tokens - skipped < 2:
        after = f" after the first {skipped}" if skipped else ""
        raise MeasureError(
            f"passage {number} has {plural(max(tokens - skipped, 0), 'token')}{after}; a cosine needs two. Omit it, "
            "or give a longer text."
        )


# ---- passages --------------------------------------------------------------------------------------------------------


def _passages(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: Sequence[str] | None,
    input_ids: Tensor | Sequence[Any] | None,
    attention_mask: Tensor | None,
    tokens: int | None,
) -> list[Tensor]:
    """The passages as 1-D tensors of real tokens, checked against the model."""
    positions = model_positions(model)
    if tokens is not None and tokens < 2:
        raise MeasureError(f"tokens must be at least 2, got {tokens}: one token has no pairs.")
    if tokens is not None and positions is not None and tokens > positions:
        raise MeasureError(
            f"tokens={tokens} is longer than the {positions} positions of {type(unwrap(model)).__name__}; "
            f"use tokens={positions} or fewer."
        )
    limit = tokens if tokens is not None else min(_D.tokens, positions or _D.tokens)
    if input_ids is not None:
        if texts is not None:
            raise MeasureError("give either texts or input_ids, not both.")
        passages = [ids[:limit] for ids in _from_ids(input_ids, attention_mask)]
    else:
        if attention_mask is not None:
            raise MeasureError("attention_mask belongs to input_ids; for texts the tokenizer creates it, so omit it.")
        if tokenizer is None:
            raise MeasureError(
                "texts need a tokenizer: call measure(model, tokenizer, ...), or pass token ids as input_ids=."
            )
        if isinstance(texts, str):
            raise MeasureError("texts is one string; give a list of passages: texts=[...].")
        if texts is None:
            from decondense.corpora.passages import sample_passages

            texts = sample_passages(_D.dataset, count=_D.passages, words=_D.passage_words, seed=_D.passage_seed)
        passages = [_tokenise(tokenizer, text, number, limit) for number, text in enumerate(texts)]
    if not passages:
        raise MeasureError("there are no passages to measure; give at least one text.")
    vocabulary = vocabulary_size(model)
    for number, ids in enumerate(passages):
        check_length(number, len(ids), 0)
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or (vocabulary is not None and high >= vocabulary):
            bad = low if low < 0 else high
            raise MeasureError(
                f"passage {number} holds token id {bad}, but the model's vocabulary is 0 to {(vocabulary or 0) - 1}: "
                "the tokenizer belongs to another model. Load both from the same source, or resize the embeddings."
            )
    return passages


def _tokenise(tokenizer: PreTrainedTokenizerBase, text: Any, number: int, limit: int) -> Tensor:
    if not isinstance(text, str):
        raise MeasureError(f"text {number} is a {type(text).__name__}; expected a string.")
    ids = tokenizer(text, truncation=True, max_length=limit, padding=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def _from_ids(input_ids: Tensor | Sequence[Any], attention_mask: Tensor | None) -> Iterator[Tensor]:
    if isinstance(input_ids, Tensor):
        if input_ids.ndim != 2:
            raise MeasureError(f"input_ids must be [passages, tokens], got shape {tuple(input_ids.shape)}.")
        if input_ids.is_floating_point():
            raise MeasureError(f"input_ids must be integers, got {input_ids.dtype}.")
        if attention_mask is None:
            yield from input_ids.detach().cpu().long()
            return
        if attention_mask.shape != input_ids.shape:
            raise MeasureError(
                f"attention_mask {tuple(attention_mask.shape)} does not fit input_ids {tuple(input_ids.shape)}."
            )
        for number, (ids, mask) in enumerate(zip(input_ids.cpu().long(), attention_mask.cpu().bool(), strict=True)):
            real = mask.nonzero()[:, 0]
            if len(real) and len(real) != int(real[-1] - real[0]) + 1:
                raise MeasureError(
                    f"the attention mask of passage {number} has a gap; padding is allowed only on the left or on the "
                    "right."
                )
            yield ids[mask]
        return
    if attention_mask is not None:
        raise MeasureError("attention_mask needs input_ids as a tensor; lists of ids need no mask, so omit it.")
    for number, ids in enumerate(input_ids):
        row = torch.as_tensor(ids)
        if row.ndim != 1 or (row.numel() and row.is_floating_point()):
            raise MeasureError(f"input_ids[{number}] must be one flat list of token ids.")
        yield row.detach().cpu().long()


# ---- the pass --------------------------------------------------------------------------------------------------------


def _run(
    found: Blocks,
    tokens_first: bool | None,
    passages: list[Tensor],
    lengths: np.ndarray[Any, Any],
    batch_size: int | None,
    metrics: dict[str, Metric],
    pooled: bool,
    averaged: bool,
    logits: bool,
    progress: Progress | None,
    skipped: int,
) -> tuple[dict[Layer, LayerStatistics], LayerPairs, int]:
    root = found.root
    target = _forward_module(root, logits)
    layers: dict[Layer, LayerStatistics] = {}
    between = LayerPairs(metrics)
    batch: list[int] = []
    longest = int(lengths.max())

    def orient(state: Tensor) -> Tensor:
        # a batch never has as many passages as tokens, so the shape tells
        return state.transpose(0, 1) if tuple(state.shape[:2]) == (int(lengths[batch[0]]), len(batch)) else state

    def observe(layer: Layer, state: Tensor) -> None:
        wanted = (len(batch), int(lengths[batch[0]]))
        if state.ndim != 3 or tuple(state.shape[:2]) != wanted:
            shape = tuple(state.shape)
            why = (
                why_not_three(len(shape))
                if len(shape) != 3
                else why_other_tokens((shape[0], shape[1]), wanted, root) + "."
            )
            raise MeasureError(
                f"{layer} has states of shape {shape} for {wanted[0]} passages of {plural(wanted[1], 'token')}: {why}"
            )
        if layer not in layers:
            layers[layer] = LayerStatistics(
                layer.label,
                passages=len(passages),
                device=state.device,
                pooled=pooled,
                averaged=averaged,
                tokens=longest - skipped,
                metrics=metrics,
                first=skipped,
            )
        kept = state[:, skipped:]
        layers[layer].add(kept, batch)
        between.take(kept)

    device = _input_device(root)
    size = batch_size or _batch_size(root, found, longest, logits, device)
    # Only passages of one length share a batch. With padding, a sliding window leaves padded rows without any key,
    # which some models turn into NaN that spreads; without padding nothing of that kind can happen.
    order = np.argsort(-lengths, kind="stable").tolist()
    done = 0
    transposed = _takes_tokens_first(found, tokens_first, target, passages[order[0]].to(device))
    tap = StateTap(found, observe, orient)
    with tap.attached():
        while done < len(order):
            batch = [p for p in order[done : done + size] if lengths[p] == lengths[order[done]]]
            if len(batch) == lengths[batch[0]]:
                batch.pop()  # as many passages as tokens: no shape would tell which axis is which
            tap.start()
            output = target(**_inputs(target, [passages[p] for p in batch], device, transposed))
            tap.finish()
            if tokens_first is not None and tap.tokens_first != tokens_first:
                raise MeasureError(
                    f"tokens_first={tokens_first} was given, but the blocks of {found.path!r} return "
                    f"{'[tokens, batch, width]' if tap.tokens_first else '[batch, tokens, width]'}; use "
                    f"tokens_first={not tokens_first}."
                )
            if logits:
                observe(LOGITS, orient(_logits(output, root)))
            between.reduce(batch)
            del output
            done += len(batch)
            if progress is not None:
                progress("measuring", done, len(order))
    if any(np.isnan(row.cosine_P).any() for row in layers.values()):
        raise MeasureError(
            "the model did not run the same layers for every passage, so they have no common profile: switch off early "
            "exit, layer dropping and depth routing."
        )
    return layers, between, size


def _is_peft(root: nn.Module) -> bool:
    return callable(getattr(root, "get_base_model", None))


def _forward_module(root: nn.Module, logits: bool) -> nn.Module:
    """What to call: without logits the language-model head is a waste (a third of a small model's time)."""
    if logits or _is_peft(root):
        return root
    base = getattr(root, "base_model", None)
    sharded = any(type(module).__name__.startswith("FSDP") for module in (root, base))
    if isinstance(base, nn.Module) and hasattr(root, "config") and not sharded:
        return base
    return root


def _takes_tokens_first(found: Blocks, tokens_first: bool | None, target: nn.Module, ids: Tensor) -> bool:
    """Whether the model takes [tokens, passages]: unless its argument says otherwise by name, settled by a probe."""
    name = _ids_name(target)
    if is_batch_first(name):
        return False
    ids = ids[:5]
    try:
        return StateReader(found, tokens_first).input_layout(target, {name: ids.expand(3 if len(ids) == 2 else 2, -1)})
    except SequencesError as error:
        raise MeasureError(str(error)) from error


def _inputs(target: nn.Module, passages: list[Tensor], device: torch.device, tokens_first: bool) -> dict[str, Any]:
    # token ids alone: what else a tokenizer returns may change the states (GPT-2 adds token types as embeddings)
    ids = torch.stack(passages, dim=1 if tokens_first else 0).to(device)
    inputs: dict[str, Any] = {_ids_name(target): ids}
    if getattr(getattr(target, "config", None), "is_encoder_decoder", False) and accepts(target, "decoder_input_ids"):
        inputs["decoder_input_ids"] = ids
    if accepts(target, "use_cache"):  # keys and values of all layers would be kept for nothing
        inputs["use_cache"] = False
    return inputs


def _ids_name(target: nn.Module) -> str:
    import inspect

    parameters = inspect.signature(target.forward).parameters
    if "input_ids" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return "input_ids"
    first = next(iter(parameters), None)
    if first is None:
        raise MeasureError(f"{type(target).__name__}.forward takes no arguments; expected token ids first.")
    return first


def _input_device(root: nn.Module) -> torch.device:
    for tensor in root.parameters():
        if tensor.device.type != "meta":
            return tensor.device
    return torch.device("cpu")  # everything is offloaded: accelerate's hooks move the inputs


def _logits(output: Any, root: nn.Module) -> Tensor:
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, dict):
        found = output.get("logits")
    if found is None and isinstance(output, Tensor):
        found = output
    if found is None and isinstance(output, (tuple, list)):
        found = next((item for item in output if isinstance(item, Tensor) and item.ndim == 3), None)
    if not isinstance(found, Tensor):
        raise MeasureError(
            f"{type(root).__name__} returns no logits; load it with its head (AutoModelForCausalLM), or omit "
            "logits=True."
        )
    return found


# ---- memory ----------------------------------------------------------------------------------------------------------


def _batch_size(root: nn.Module, found: Blocks, tokens: int, logits: bool, device: torch.device) -> int:
    """Passages of one pass, from a rough count of one block's activations and the memory that is free."""
    config = text_config(root)
    width = getattr(config, "hidden_size", None) or max(
        (p.shape[-1] for p in found.modules[0].parameters() if p.ndim == 2), default=1024
    )
    inner = max((max(p.shape) for p in found.modules[0].parameters() if p.ndim >= 2), default=4 * width)
    heads = getattr(config, "num_attention_heads", None) or 1
    vocabulary = (getattr(config, "vocab_size", None) or 0) if logits else 0
    a_token = 4 * (12 * width + 2 * inner + heads * tokens + 3 * vocabulary)
    offloaded = any(p.device.type == "meta" for p in root.parameters())
    if device.type == "cuda":
        budget = int(0.4 * torch.cuda.mem_get_info(device)[0])
    else:
        # more than fills the cores costs memory and gains nothing, unless every pass reads the weights from disk
        budget = min(_free_bytes() // 4, (1 << 30) if offloaded else (64 << 20))
    return max(1, min(64, budget // (a_token * tokens)))


def _free_bytes() -> int:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 1 << 30


def _info(model: nn.Module) -> dict[str, Any]:
    root = unwrap(model)
    config = getattr(base_model(root), "config", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parameters = sum(p.numel() for p in root.parameters())
    return {
        "model": str(getattr(config, "name_or_path", "") or type(root).__name__),
        "architecture": type(root).__name__,
        "model_type": getattr(config, "model_type", None),
        "parameters": parameters,
        "placement": sorted(
            {str(place) for place in getattr(root, "hf_device_map", {"": _input_device(root)}).values()}
        ),
        "dtype": str(next((p.dtype for p in root.parameters() if p.is_floating_point()), "")).removeprefix("torch."),
    }
