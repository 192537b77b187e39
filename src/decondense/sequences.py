r"""Which tokens of a batch are real, and which belong to the same document, read off a model's ``forward`` arguments.

Two tokens form a pair only if both are real and both stand in the same document. What says so differs between
frameworks; the rules here are those of torch, transformers, TRL, Axolotl and LLaMA-Factory. The attached loss,
:func:`decondense.measure` and the watches read through this module and no other.

Shapes: B rows, T positions. ``mask_BT`` is True at real tokens; ``segments_BT`` numbers the documents of a packed row.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# arguments that hold the tokens, of shape [batch, tokens(, width)] by convention (transformers, nanoGPT and litgpt,
# torchtitan, fairseq)
_TOKENS = ("input_ids", "inputs_embeds", "idx", "tokens", "src_tokens")
_DECODER_TOKENS = ("decoder_input_ids", "decoder_inputs_embeds", "tgt", "prev_output_tokens")
_SURE_OF_BATCH_FIRST = frozenset({*_TOKENS, *_DECODER_TOKENS, "labels"} - {"tgt"})

# 1 or True = real (transformers)
_REAL = ("attention_mask",)
_DECODER_REAL = ("decoder_attention_mask",)
# True = padding (torch.nn.Transformer, fairseq); a float mask is added to the scores
_PADDING = ("key_padding_mask", "src_key_padding_mask", "encoder_padding_mask")
_DECODER_PADDING = ("tgt_key_padding_mask", "decoder_padding_mask")
# used with both meanings: settled once by what the masked places hold
_EITHER = ("padding_mask", "pad_mask", "mask", "src_mask", "attn_mask", "input_mask", "token_mask", "valid_mask")
# the document of each token
_DOCUMENTS = ("seq_idx", "document_ids", "doc_ids")
# where the documents of one packed row begin and end (variable-length attention kernels)
_BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens", "cu_seqlens_q", "cu_seqlens")
_POSITIONS = ("position_ids", "positions")
# an added mask is 0 at real tokens and -inf, or the least number of its type, at the others
_ADDED_AT_LEAST = -1e4


class SequencesError(ValueError):
    """The inputs do not fit the hidden states or contradict each other, so that pairs cannot be told."""


def argument_names(module: nn.Module, inner: nn.Module | None = None) -> tuple[str, ...]:
    """Names of the parameters of ``module.forward``; those of ``inner`` where it takes ``*args`` (PEFT)."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    if parameters and parameters[0].kind is inspect.Parameter.VAR_POSITIONAL:
        return argument_names(inner) if inner is not None and inner is not module else ("input",)
    return tuple(parameter.name for parameter in parameters)


def bind(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name; those of a batch that is given as one mapping are its entries."""
    if args and isinstance(args[0], Mapping):
        return {**args[0], **dict(zip(names[1:], args[1:], strict=False)), **kwargs}
    return {**dict(zip(names, args, strict=False)), **kwargs}


class SequenceReader:
    """Reads the batches of one model. Remembers what was settled by looking at data, so that it looks only once.

    Args:
        decoder: Read the decoder's inputs of an encoder-decoder.
        padding_id: Id that the model itself takes for padding (``nn.Embedding(padding_idx=...)``), where its
            ``forward`` takes no mask.
    """

    def __init__(self, *, decoder: bool = False, padding_id: int | None = None) -> None:
        self.decoder = decoder
        self.padding_id = padding_id
        self.looks_once: bool | None = None
        """Whether integer masks are looked at once only; None: away from the CPU, where a look waits for the device."""
        self._numbered: bool | None = None  # whether integer masks number documents
        self._overlooked: Tensor | None = None
        self._meaning: dict[str, str] = {}  # "real", "padding" or "added", of the masks that do not say it by name

    # ---- the tokens ------------------------------------------------------------------------------------------------

    def tokens(self, arguments: Mapping[str, Any], names: Sequence[str] = ()) -> tuple[str, Tensor] | None:
        """Name and value of the argument that holds the tokens: ids, or embedded tokens."""
        if self.decoder:
            for name in _DECODER_TOKENS:
                if isinstance(arguments.get(name), Tensor):
                    return name, arguments[name]
            # transformers shifts the labels into the decoder's inputs
            labels = arguments.get("labels")
            return ("labels", labels) if isinstance(labels, Tensor) else None
        for name in _TOKENS:
            if isinstance(arguments.get(name), Tensor):
                return name, arguments[name]
        first = arguments.get(names[0]) if names else None
        return (names[0], first) if isinstance(first, Tensor) else None

    # ---- real tokens, documents ------------------------------------------------------------------------------------

    def read(
        self,
        arguments: Mapping[str, Any],
        rows: int,
        positions: int,
        device: torch.device,
        *,
        tokens: tuple[str, Tensor] | None = None,
        tokens_first: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        """``(mask_BT, segments_BT)`` of a call; ``None`` stands for "all are real" and "one document per row".

        Real tokens: ``attention_mask`` (1 = real; with documents numbered 1, 2, ... as Axolotl and LLaMA-Factory do),
        torch's ``*key_padding_mask`` (True = padding), ``padding_mask``, ``mask`` and the like, whose meaning is
        settled once by the ids at the masked places (padding is one repeated id), ``lengths``.

        Documents: ``seq_idx`` or ``document_ids``, else ``cu_seq_lens_q``, else ``position_ids`` (or ``positions``)
        that start again at 0 with each document; of ``[4, B, T]`` (Qwen2.5-VL) the first row counts, of ``[3, B, T]``
        the places where all three are 0.

        Args:
            arguments: Arguments of ``forward`` by name.
            rows: B.
            positions: T.
            device: Device of the result.
            tokens: The entry that holds the tokens, where it is known.
            tokens_first: The model takes its inputs as [tokens, batch].

        Raises:
            SequencesError: a mask, positions or boundaries that do not fit B rows of T positions, or whose meaning
                cannot be told.
        """
        fit = _Fit(rows, positions, device, tokens_first)
        mask, numbered = self._real(arguments, tokens, fit)
        segments, inside = self._segments(arguments, fit)
        if inside is not None:
            mask = inside if mask is None else mask & inside
        if numbered is not None:
            segments = numbered if segments is None else _refine(segments, numbered)
        # Off the GPU one look costs nothing and saves the segment arithmetic for plain masks and plain positions; on
        # the GPU the look would wait for the device, and in a compiled graph it would break the graph.
        if segments is not None and fit.looking_is_free and not bool(segments.any()):
            segments = None
        return mask, segments

    def check(self) -> None:
        """Verify what was assumed without looking; waits for the device.

        Raises:
            SequencesError: masks of two kinds were mixed.
        """
        overlooked, self._overlooked = self._overlooked, None
        if overlooked is not None and bool(overlooked):
            raise SequencesError(
                "some attention masks number the documents of packed rows and the first one did not, so pairs were "
                "formed across documents since the last log. Pass masks of one kind, or position_ids."
            )

    def _real(
        self, arguments: Mapping[str, Any], tokens: tuple[str, Tensor] | None, fit: _Fit
    ) -> tuple[Tensor | None, Tensor | None]:
        """(real tokens, numbers of the documents where an integer mask numbers them)."""
        real: Tensor | None = None
        numbered: Tensor | None = None
        for name in _DECODER_REAL if self.decoder else _REAL:
            mask = arguments.get(name)
            if mask is None:
                continue
            if not isinstance(mask, Tensor):
                raise SequencesError(
                    f"the {name} is a {type(mask).__name__}; dispersion needs the two-dimensional mask of real tokens "
                    "(1 = real), which transformers models also take."
                )
            mask = fit.mask(name, mask)
            if mask.is_floating_point() and self._told(name, mask, tokens, fit, real=True) == "added":
                real = mask > _ADDED_AT_LEAST
                continue
            if mask.dtype in (torch.int64, torch.int32) and not self._is_plain(mask):
                numbered = (mask - 1).clamp(min=0).long()
            real = mask != 0
        for name in _DECODER_PADDING if self.decoder else _PADDING:
            mask = arguments.get(name)
            if isinstance(mask, Tensor):
                mask = fit.mask(name, mask, batch_first=name.endswith("key_padding_mask"))
                here = mask > _ADDED_AT_LEAST if mask.is_floating_point() else mask == 0
                real = here if real is None else real & here
        if real is not None or self.decoder:
            if real is None and tokens is not None and tokens[0] == "labels":
                real = fit.mask("labels", tokens[1]) != -100
            return real, numbered
        for name in _EITHER:
            mask = arguments.get(name)
            if isinstance(mask, Tensor) and not fit.is_attention_pattern(mask):
                mask = fit.mask(name, mask)
                meaning = self._told(name, mask, tokens, fit)
                return (mask > _ADDED_AT_LEAST if meaning == "added" else (mask != 0) == (meaning == "real")), None
        lengths = arguments.get("lengths")
        if isinstance(lengths, Tensor) and tuple(lengths.shape) == (fit.rows,):
            return torch.arange(fit.positions, device=fit.device) < lengths.to(fit.device)[:, None], None
        ids = tokens[1] if tokens is not None else None
        if self.padding_id is not None and ids is not None and not ids.is_floating_point():
            return fit.mask("tokens", ids) != self.padding_id, None
        return None, None

    def _is_plain(self, mask: Tensor) -> bool:
        """Away from the CPU: take an integer mask for a plain one if the first was, and verify that in :meth:`check`.

        An integer mask may number the documents of packed rows. To look at each would wait for the device each time; to
        treat each as if it did costs a third of the loss.
        """
        if torch.compiler.is_compiling():
            return False
        if not (mask.device.type != "cpu" if self.looks_once is None else self.looks_once) or self._numbered:
            return False
        numbers = (mask > 1).any()
        if self._numbered is None:
            self._numbered = bool(numbers)
            if self._numbered:
                return False
        self._overlooked = numbers if self._overlooked is None else self._overlooked | numbers
        return True

    def _told(
        self, name: str, mask: Tensor, tokens: tuple[str, Tensor] | None, fit: _Fit, *, real: bool = False
    ) -> str:
        """What a mask says that does not tell by its name: settled by the first batch."""
        meaning = self._meaning.get(name)
        if meaning is None:
            if torch.compiler.is_compiling():
                if real:
                    return "real"
                raise SequencesError(
                    f"whether {name} is True at real tokens or at padding is settled by the first batch, which cannot "
                    "be looked at inside a compiled graph. Pass attention_mask (1 = real) or key_padding_mask (True = "
                    "padding), or call the model once before compiling it."
                )
            if mask.is_floating_point() and bool((mask < 0).any()):
                meaning = "added"
            elif real:
                meaning = "real"
            else:
                meaning = _meaning(name, mask != 0, fit.tokens(tokens))
            self._meaning[name] = meaning
        return meaning

    def _segments(self, arguments: Mapping[str, Any], fit: _Fit) -> tuple[Tensor | None, Tensor | None]:
        """(numbers of the documents, places inside of the last boundary where there may be others)."""
        if self.decoder:
            return None, None
        for name in _DOCUMENTS:
            numbered = arguments.get(name)
            if isinstance(numbered, Tensor):
                numbers = fit.documents(name, numbered)
                return _refine(numbers, numbers), None  # any numbers will do, also those of a whole corpus
        for name in _BOUNDARIES:
            boundaries = arguments.get(name)
            if isinstance(boundaries, Tensor):
                return fit.between(name, boundaries)
        for name in _POSITIONS:
            position_ids = arguments.get(name)
            if isinstance(position_ids, Tensor):
                return fit.restarts(name, position_ids), None
        return None, None


def real_and_same(
    batch: Mapping[str, Any], rows: int, positions: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """``(mask_BT, segments_BT)`` of one batch by itself; see :meth:`SequenceReader.read`."""
    reader = SequenceReader()
    return reader.read(batch, rows, positions, device, tokens=reader.tokens(batch))


def count_sequences(mask_BT: Tensor | None, segments_BT: Tensor | None, rows: int, positions: int) -> Tensor | int:
    """Number of sequences that have a pair: at least two real tokens. The divisor of the mean over sequences."""
    if segments_BT is None:
        if mask_BT is None:
            return rows if positions >= 2 else 0
        return (mask_BT.sum(-1) >= 2).sum()
    real = torch.ones_like(segments_BT) if mask_BT is None else mask_BT.to(segments_BT.dtype)
    tokens = torch.zeros_like(segments_BT).scatter_add(1, segments_BT.clamp(max=positions - 1), real)
    return (tokens >= 2).sum()


def count_in_batch(batch: Mapping[str, Any], reader: SequenceReader | None = None) -> Tensor | int:
    """Number of sequences with a pair in a collated batch, before any model has seen it.

    ``reader``: that of the model which will see the batch, so that both read it alike.
    """
    reader = SequenceReader() if reader is None else reader
    entry = reader.tokens(batch)
    if entry is None and isinstance(batch.get("attention_mask"), Tensor):
        entry = ("attention_mask", batch["attention_mask"])
    if entry is None or entry[1].ndim < 2:
        raise SequencesError(
            f"the sequences of a batch with the entries {', '.join(sorted(map(str, batch)))} cannot be counted; "
            "dispersion needs 'input_ids' or 'inputs_embeds' of shape [rows, positions, ...]."
        )
    rows, positions = entry[1].shape[:2]
    return count_sequences(*reader.read(batch, rows, positions, entry[1].device, tokens=entry), rows, positions)


def is_batch_first(name: str) -> bool:
    """Whether an argument of this name is [batch, tokens] by convention; others are settled by the model."""
    return name in _SURE_OF_BATCH_FIRST


class _Fit:
    """Brings what describes a batch to [B, T], or refuses it."""

    def __init__(self, rows: int, positions: int, device: torch.device, tokens_first: bool) -> None:
        self.rows, self.positions, self.device, self.tokens_first = rows, positions, device, tokens_first

    @property
    def looking_is_free(self) -> bool:
        return self.device.type == "cpu" and not torch.compiler.is_compiling()

    def mask(self, name: str, mask: Tensor, *, batch_first: bool = False) -> Tensor:
        shape, wanted = tuple(mask.shape), (self.rows, self.positions)
        if len(shape) == 1 and self.rows == 1:
            mask, shape = mask[None], (1, *shape)
        if self.tokens_first and not batch_first and shape == (self.positions, self.rows):
            mask = mask.transpose(0, 1)
        elif shape != wanted:
            raise SequencesError(
                f"the {name} has shape {shape} and the hidden states {self.rows} rows of {self.positions} positions, "
                "so the real tokens cannot be told. Pass the two-dimensional mask of the same tokens."
            )
        return mask.to(self.device)

    def tokens(self, tokens: tuple[str, Tensor] | None) -> Tensor | None:
        if tokens is None:
            return None
        value = tokens[1].transpose(0, 1) if self.tokens_first else tokens[1]
        return value if tuple(value.shape[:2]) == (self.rows, self.positions) else None

    def is_attention_pattern(self, mask: Tensor) -> bool:
        """[T, T] (or one for each row or head): who attends to whom, not who is real."""
        square = mask.ndim >= 2 and mask.shape[-1] == mask.shape[-2] == self.positions
        if not square or mask.ndim > 2 or self.rows != self.positions:
            return square
        # as many rows as positions: only a triangle is surely not a mask of tokens
        if not self.looking_is_free:
            raise SequencesError(
                f"a mask of shape {tuple(mask.shape)} may be an attention pattern or mark padding, because the batch "
                "has as many sequences as tokens. Pass attention_mask (1 = real) or key_padding_mask (True = padding)."
            )
        return not bool(torch.equal(mask, mask[:, :1].expand_as(mask))) and bool(
            ((mask == mask[0, -1]) == torch.ones_like(mask, dtype=torch.bool).triu(1)).all()
        )

    def documents(self, name: str, values: Tensor) -> Tensor:
        values = values.to(self.device)
        if values.ndim == 1:
            values = values[None]
        if values.ndim == 2 and self.tokens_first and tuple(values.shape) == (self.positions, self.rows):
            values = values.transpose(0, 1)
        if values.ndim == 2 and values.shape[0] == 1 and values.numel() == self.rows * self.positions:
            values = values.reshape(self.rows, self.positions)  # the rows of the batch one after the other
        if values.ndim != 2 or values.shape[-1] != self.positions or values.shape[0] not in (1, self.rows):
            raise SequencesError(
                f"{name} has shape {tuple(values.shape)}; expected [{self.rows} or 1, {self.positions}] to tell the "
                "documents apart."
            )
        return values.expand(self.rows, self.positions).long()

    def restarts(self, name: str, values: Tensor) -> Tensor:
        if values.ndim != 3:
            starts = self.documents(name, values) == 0
        elif values.shape[0] == 4:  # positions in the text, then (time, height, width)
            starts = self.documents(name, values[0]) == 0
        else:
            starts = self.documents(name, values.abs().amax(0)) == 0
        return (starts.cumsum(-1) - 1).clamp(min=0)

    def between(self, name: str, boundaries: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.rows != 1:
            raise SequencesError(f"{name} describes one packed row; the batch has {self.rows}.")
        boundaries = boundaries.to(self.device).flatten()
        inside: Tensor | None = None
        places = torch.arange(self.positions, device=self.device)
        if self.looking_is_free:
            first, last = int(boundaries[0]), int(boundaries[-1])
            if first != 0 or last > self.positions or bool((boundaries.diff() < 0).any()):
                raise SequencesError(
                    f"{name} goes from {first} to {last} for a row of {self.positions} tokens; expected ascending "
                    "boundaries from 0."
                )
            inside = None if last == self.positions else (places < last)[None]
        else:
            inside = (places < boundaries[-1])[None]
        return torch.bucketize(places, boundaries[1:-1], right=True)[None], inside


def _meaning(name: str, mask_BT: Tensor, tokens: Tensor | None) -> str:
    """Which of the two places of a mask is the padding: the one that holds a single id, over and over."""
    if bool(mask_BT.all()):
        return "real"
    if not bool(mask_BT.any()):
        return "padding"
    if tokens is not None:
        flat = tokens.flatten(0, 1)
        marked = mask_BT.flatten().to(flat.device)
        one = [len(torch.unique(flat[places], dim=0)) == 1 for places in (marked, ~marked)]
        if one[0] != one[1]:
            return "padding" if one[0] else "real"
    raise SequencesError(
        f"whether {name} is True at real tokens or at padding cannot be told from the batch. Pass attention_mask (1 = "
        "real) or key_padding_mask (True = padding) instead."
    )


def _refine(first_BT: Tensor, second_BT: Tensor) -> Tensor:
    """Number the runs of tokens that have the same id in both."""
    new_BT = (first_BT.diff(dim=-1) != 0) | (second_BT.diff(dim=-1) != 0)
    return torch.nn.functional.pad(new_BT.cumsum(-1), (1, 0))
