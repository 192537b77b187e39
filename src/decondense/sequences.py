r"""Which tokens of a batch are real, and which belong to the same document, read from a model's ``forward`` arguments.

Two tokens form a pair only if both are real and both are in the same document. The arguments that say so differ between
frameworks; the rules here are those of torch, transformers, TRL, Axolotl and LLaMA-Factory. The attached loss,
:func:`decondense.measure` and the watches all use this module.

Shapes: B rows, T positions. ``mask_BT`` is True at real tokens; ``segments_BT`` numbers the documents of a packed row.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
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
# used with both meanings: settled once by what the masked places hold; any other name with "pad" in it is read alike
_EITHER = ("mask", "src_mask", "attn_mask", "input_mask", "token_mask", "valid_mask", "block_mask")
_PAD_IN_NAME = ("pad", "padding", "padded")
# tokens of each row, or of each document of one packed row
_LENGTHS = (
    *(
        "lengths",
        "src_lengths",
        "input_lengths",
        "seq_lengths",
        "sequence_lengths",
        "seq_lens",
        "seqlens",
        "valid_lens",
    ),
)
# the document of each token; negative: padding
_DOCUMENTS = ("seq_idx", "document_ids", "document_id", "doc_ids", "doc_idx", "sequence_ids", "sequence_id")
# documents of a packed row, or sentences of a pair
_EITHER_SEGMENTS = ("segment_ids", "segment_id")
# where the documents of one packed row begin and end (variable-length attention kernels)
_BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens", "cu_seqlens_q", "cu_seqlens")
_POSITIONS = ("position_ids", "positions", "input_pos", "pos_ids")
# an added mask is 0 at real tokens and -inf, or the least number of its type, at the others
_ADDED_AT_LEAST = -1e4


class SequencesError(ValueError):
    """The inputs do not fit the hidden states or contradict each other, so the pairs cannot be determined."""


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
    """Reads the batches of one model. Remembers what it determined from data, so that it looks only once.

    Args:
        decoder: Read the decoder inputs of an encoder-decoder model.
        padding_id: Id that the model itself takes for padding (``nn.Embedding(padding_idx=...)``); used where no
            argument marks the real tokens.
        embeds_segments: The model embeds ``segment_ids``: they are the sentences of a pair, not documents.
    """

    def __init__(self, *, decoder: bool = False, padding_id: int | None = None, embeds_segments: bool = False) -> None:
        self.decoder = decoder
        self.padding_id = padding_id
        self.embeds_segments = embeds_segments
        self.looks_once: bool | None = None
        """Whether integer masks are inspected only once; None: only off the CPU, where inspecting one synchronizes."""
        self._numbered: bool | None = None  # whether integer masks number documents
        self._overlooked: dict[str, Tensor] = {}  # what was not looked at -> whether it was not as assumed
        self._meaning: dict[str, str] = {}  # "real", "padding" or "pattern", of the masks that do not say it by name

    # ---- the tokens ------------------------------------------------------------------------------------------------

    def tokens(self, arguments: Mapping[str, Any], names: Sequence[str] = ()) -> tuple[str, Tensor] | None:
        """Name and value of the argument that holds the tokens: ids, or embedded tokens."""
        # transformers shifts the labels into the decoder's inputs
        for name in (*_DECODER_TOKENS, "labels") if self.decoder else (*_TOKENS, *names[:1]):
            value = arguments.get(name)
            if isinstance(value, Tensor):
                return name, value
        return None

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

        Real tokens: ``attention_mask`` (1 = real; with documents numbered 1, 2, ... as Axolotl and LLaMA-Factory do; of
        a float mask without a positive number, 0 = real), torch's ``*key_padding_mask`` (True = padding),
        ``padding_mask``, ``mask`` and the like, whose meaning is determined once from the ids at the masked positions
        (padding is one repeated id at the ends of the rows), ``lengths`` and the like, else the embedding's
        ``padding_idx``. An attention pattern passed as ``mask`` is ignored if it depends on distance alone; otherwise
        it is refused unless another argument marks the real tokens or the documents.

        Documents: ``seq_idx``, ``document_ids`` and the like, else ``cu_seq_lens_q``, else lengths that are more than
        the rows, else ``position_ids`` (or ``positions``, ``input_pos``) that start again; of ``[4, B, T]``
        (Qwen2.5-VL) the first row counts, of ``[3, B, T]`` the places where all three are 0.

        Args:
            arguments: Arguments of ``forward`` by name.
            rows: B.
            positions: T.
            device: Device of the result.
            tokens: The entry that holds the tokens, where it is known.
            tokens_first: The model takes its inputs as [tokens, batch].

        Raises:
            SequencesError: a mask, positions or boundaries that do not fit B rows of T positions, or whose meaning
                cannot be determined.
        """
        fit = _Fit(rows, positions, device, tokens_first)
        mask, numbered, unread = self._real(arguments, tokens, fit)
        segments, inside = self._segments(arguments, fit)
        told = segments is not None and not isinstance(arguments.get(unread or ""), Tensor)
        if inside is not None:
            mask = inside if mask is None else mask & inside
        if numbered is not None:
            segments = numbered if segments is None else _refine(segments, numbered)
        # Off the GPU one look costs nothing and saves the segment arithmetic for plain masks and plain positions; on
        # the GPU the look would wait for the device, and in a compiled graph it would break the graph.
        if segments is not None and fit.looking_is_free and not bool(segments.any()):
            segments = None
        if unread is not None and mask is None and segments is None and not told:
            raise SequencesError(
                f"the {unread} is an attention pattern that may hold padding or documents, and no other argument "
                "identifies them. Pass attention_mask (1 = real) or key_padding_mask (True = padding) as well; for "
                "packed rows document_ids, or position_ids that start again with each document."
            )
        return mask, segments

    def check(self) -> None:
        """Verify what was assumed without looking; synchronizes with the device. Raises if masks of two kinds were
        mixed."""
        overlooked, self._overlooked = self._overlooked, {}
        for what, flag in overlooked.items():
            if bool(flag):
                raise SequencesError(
                    f"{what}, so pairs were formed across documents or with padding since the last log. Pass masks of "
                    "one kind, or position_ids."
                )

    def _overlook(self, what: str, flag: Tensor) -> None:
        before = self._overlooked.get(what)
        self._overlooked[what] = flag if before is None else before | flag

    def _real(
        self, arguments: Mapping[str, Any], tokens: tuple[str, Tensor] | None, fit: _Fit
    ) -> tuple[Tensor | None, Tensor | None, str | None]:
        """(real tokens, numbers of the documents where an integer mask numbers them, name of a mask not understood)."""
        real: Tensor | None = None
        numbered: Tensor | None = None
        unread: str | None = None
        decoder_only = not self.decoder and tokens is not None and tokens[0] in _DECODER_TOKENS
        encoder, decoder = not self.decoder, self.decoder or decoder_only
        for name in _REAL * encoder + _DECODER_REAL * decoder:
            mask = arguments.get(name)
            if mask is None:
                continue
            if not isinstance(mask, Tensor):
                raise SequencesError(
                    f"the {name} is a {type(mask).__name__}; pass the two-dimensional mask of real tokens (1 = real)."
                )
            mask = fit.mask(name, mask)
            if mask.is_floating_point():  # added to the scores where nothing in it is positive
                real = torch.where(mask.amax() > 0, mask > 0, _unpadded(mask))
                continue
            if mask.dtype in (torch.int64, torch.int32) and not self._is_plain(mask):
                numbered = (mask - 1).clamp(min=0).long()
            real = mask != 0
        for name in _PADDING * encoder + _DECODER_PADDING * decoder:
            mask = arguments.get(name)
            if isinstance(mask, Tensor):
                here = _unpadded(fit.mask(name, mask, batch_first=name.endswith("key_padding_mask")))
                real = here if real is None else real & here
        if real is not None:
            return real, numbered, None
        for name in self._either(arguments, decoder_only):
            mask = arguments[name]
            if not isinstance(mask, Tensor):
                unread = name
            elif fit.is_attention_pattern(mask):
                unread = unread if self._is_plain_pattern(name, mask, fit) else name
            else:
                mask = fit.mask(name, mask)
                here = _unpadded(mask) if self._told(name, mask, tokens, fit) == "padding" else mask != 0
                real = here if real is None else real & here
        if real is None and self.decoder and tokens is not None and tokens[0] == "labels":
            real = fit.mask("labels", tokens[1]) != -100
        if real is not None or self.decoder:
            return real, None, unread
        for name in _LENGTHS:
            lengths = fit.numbers(arguments.get(name))
            if lengths is not None and (fit.rows > 1 or len(lengths) == 1):  # else of the documents of a packed row
                return fit.up_to(name, lengths), None, unread
        if self.padding_id is not None and tokens is not None and not tokens[1].is_floating_point():
            real = fit.mask("tokens", tokens[1]) != self.padding_id
        return real, None, unread

    def _either(self, arguments: Mapping[str, Any], decoder_only: bool) -> Iterator[str]:
        """Names of the masks whose meaning the name does not tell."""
        for name, value in arguments.items():
            plain = name.removeprefix("tgt_").removeprefix("decoder_")
            if ((plain != name) != self.decoder and not decoder_only) or name in (*_PADDING, *_DECODER_PADDING):
                continue
            parts = plain.split("_")
            tells = plain in _EITHER or ("memory" not in parts and any(part in _PAD_IN_NAME for part in parts))
            single = isinstance(value, (bool, int, float, str)) or getattr(value, "ndim", 1) == 0
            if tells and value is not None and not single:
                yield name

    def _is_plain_pattern(self, name: str, mask: Tensor, fit: _Fit) -> bool:
        """Whether an attention pattern depends on distance alone (all, causal, a window): no padding, no documents."""
        if mask.ndim == 2 and fit.rows > 1:
            return True  # one pattern for all rows
        if torch.compiler.is_compiling():
            return self._meaning.get(name) == "pattern"
        plain = (mask[..., 1:, 1:] == mask[..., :-1, :-1]).all()
        if fit.looking_is_free or self._meaning.get(name) != "pattern":
            if not bool(plain):
                return False
            self._meaning[name] = "pattern"
        else:
            self._overlook(f"some {name}s hold padding or documents and the first one did not", ~plain)
        return True

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
        self._overlook("some attention masks number the documents of packed rows and the first one did not", numbers)
        return True

    def _told(self, name: str, mask: Tensor, tokens: tuple[str, Tensor] | None, fit: _Fit) -> str:
        """What a mask with an ambiguous name marks, "real" or "padding": determined from the first batch."""
        meaning = self._meaning.get(name)
        if meaning is None:
            if torch.compiler.is_compiling():
                raise SequencesError(
                    f"whether {name} is True at real tokens or at padding is determined from the first batch, which a "
                    "compiled graph cannot do. Pass attention_mask (1 = real), or call the model once before "
                    "compiling it."
                )
            added = mask.is_floating_point() and bool((mask < 0).any())
            meaning = self._meaning[name] = "padding" if added else _meaning(name, mask != 0, fit.tokens(tokens))
        return meaning

    def _segments(self, arguments: Mapping[str, Any], fit: _Fit) -> tuple[Tensor | None, Tensor | None]:
        """(numbers of the documents, places inside of the last boundary where there may be others)."""
        if self.decoder:
            return None, None
        for name in _DOCUMENTS:
            numbered = arguments.get(name)
            if isinstance(numbered, Tensor):
                numbers = fit.documents(name, numbered)
                inside = None if fit.looking_is_free and not bool((numbers < 0).any()) else numbers >= 0
                return _refine(numbers, numbers), inside
        for name in () if self.embeds_segments else _EITHER_SEGMENTS:
            if isinstance(arguments.get(name), Tensor):
                raise SequencesError(
                    f"{name} marks the documents of a packed row in some models and the sentences of a pair in others. "
                    "Name the argument document_ids (negative = padding) or token_type_ids."
                )
        for name in _BOUNDARIES:
            boundaries = fit.numbers(arguments.get(name))
            if boundaries is not None:
                return fit.between(name, boundaries)
        for name in _LENGTHS:
            lengths = fit.numbers(arguments.get(name))
            if lengths is not None and fit.rows == 1 and len(lengths) > 1:
                return fit.between(name, torch.nn.functional.pad(lengths.cumsum(0), (1, 0)))
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

    ``reader``: the reader of the model that will see the batch, so that both read it in the same way.
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
    """Whether an argument of this name is [batch, tokens] by convention; for other names the model decides."""
    return name in _SURE_OF_BATCH_FIRST


class _Fit:
    """Brings what describes a batch to [B, T], or refuses it."""

    def __init__(self, rows: int, positions: int, device: torch.device, tokens_first: bool) -> None:
        self.rows, self.positions, self.device, self.tokens_first = rows, positions, device, tokens_first

    @property
    def looking_is_free(self) -> bool:
        return self.device.type == "cpu" and not torch.compiler.is_compiling()

    def numbers(self, value: Any) -> Tensor | None:
        """A list of integers, or a tensor of them, as a flat tensor; None for anything else."""
        if isinstance(value, (list, tuple)) and value and all(isinstance(number, int) for number in value):
            value = torch.tensor(value)
        if not isinstance(value, Tensor) or value.is_floating_point():
            return None
        return value.to(self.device).flatten()

    def up_to(self, name: str, lengths: Tensor) -> Tensor:
        if len(lengths) != self.rows or (self.looking_is_free and int(lengths.max()) > self.positions):
            raise SequencesError(
                f"{name} holds {len(lengths)} lengths, up to {int(lengths.max())}, for {self.rows} rows of "
                f"{self.positions} tokens, so the real tokens cannot be determined. Pass one length per row."
            )
        return torch.arange(self.positions, device=self.device) < lengths[:, None]

    def mask(self, name: str, mask: Tensor, *, batch_first: bool = False) -> Tensor:
        if mask.ndim > 2 and all(size == 1 for size in mask.shape[1:-1]):
            mask = mask.flatten(0, -2)  # [B, 1, 1, T], to be broadcast over heads and queries
        shape, wanted = tuple(mask.shape), (self.rows, self.positions)
        if len(shape) == 1 and self.rows == 1:
            mask, shape = mask[None], (1, *shape)
        if self.tokens_first and not batch_first and shape == (self.positions, self.rows):
            mask = mask.transpose(0, 1)
        elif shape != wanted:
            raise SequencesError(
                f"the {name} has shape {shape}, but the hidden states have {self.rows} rows of {self.positions} "
                "positions, so the real tokens cannot be determined. Pass the two-dimensional mask of these tokens."
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
        if values.ndim == 3 and values.shape[0] != 4:
            starts = self.documents(name, values.abs().amax(0)) == 0
        else:  # of four, positions in the text come before (time, height, width)
            places = self.documents(name, values[0] if values.ndim == 3 else values)
            starts = places == places.amin(-1, keepdim=True)  # 0; RoBERTa counts from 2
            starts[:, 1:] |= places.diff(dim=-1) < 0
        starts[:, 0] = False  # a row may begin within a document
        return starts.cumsum(-1)

    def between(self, name: str, boundaries: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.rows != 1:
            raise SequencesError(f"{name} describes one packed row, but the batch has {self.rows} rows.")
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


def _unpadded(mask: Tensor) -> Tensor:
    """Real tokens by a mask that is True, or added to the scores, at padding."""
    return (mask <= 0) & (mask > _ADDED_AT_LEAST) if mask.is_floating_point() else mask == 0


def _meaning(name: str, mask_BT: Tensor, tokens: Tensor | None) -> str:
    """Which of the two places of a mask is the padding: the ends of the rows, where they hold a single id."""
    if bool(mask_BT.all()):
        return "real"
    if not bool(mask_BT.any()):
        return "padding"
    if tokens is not None:
        padding = [
            _may_be_padding(places, tokens) for places in (mask_BT.to(tokens.device), ~mask_BT.to(tokens.device))
        ]
        if padding[0] != padding[1]:
            return "padding" if padding[0] else "real"
    raise SequencesError(
        f"whether {name} is True at real tokens or at padding cannot be determined from the batch. Pass attention_mask "
        "(1 = real) or key_padding_mask (True = padding) instead."
    )


def _may_be_padding(places_BT: Tensor, tokens: Tensor) -> bool:
    runs_of_others = torch.nn.functional.pad(~places_BT, (1, 0)).int().diff(dim=-1).clamp(min=0).sum(-1)
    return bool(runs_of_others.max() <= 1) and len(torch.unique(tokens[places_BT], dim=0)) == 1


def _refine(first_BT: Tensor, second_BT: Tensor) -> Tensor:
    """Number the runs of tokens that have the same id in both."""
    new_BT = (first_BT.diff(dim=-1) != 0) | (second_BT.diff(dim=-1) != 0)
    return torch.nn.functional.pad(new_BT.cumsum(-1), (1, 0))
