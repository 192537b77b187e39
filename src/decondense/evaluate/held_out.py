r"""Loss of a checkpoint on text that it was not trained on.

The held-out loss is the cross-entropy in nats of every token of a document except the first of each window,

    loss = - (1 / M) \sum_d \sum_{t \in d} log p(x_t | x_{<t} in the window),

over the M scored tokens of all documents. It is reported per document, because a comparison pairs the documents that
every arm is scored on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from decondense.measuring.statistics import NotFiniteError
from decondense.seeding import undisturbed


@dataclass(frozen=True)
class DocumentLoss:
    """Held-out loss of one document: the sum of its scored tokens' losses in nats, and their number."""

    identity: str
    total: float
    tokens: int

    @property
    def mean(self) -> float:
        """Nats per token."""
        return self.total / self.tokens


@dataclass(frozen=True)
class HeldOutLoss:
    """Held-out loss of a checkpoint, document by document."""

    documents: tuple[DocumentLoss, ...]

    @property
    def tokens(self) -> int:
        """Scored tokens."""
        return sum(item.tokens for item in self.documents)

    @property
    def mean(self) -> float:
        """Nats per token over all scored tokens; perplexity is its exponential."""
        return math.fsum(item.total for item in self.documents) / self.tokens


def held_out_loss(
    model: nn.Module,
    documents: Sequence[tuple[str, np.ndarray[Any, Any]]],
    *,
    window: int,
    batch_windows: int = 32,
    device: torch.device | str | None = None,
) -> HeldOutLoss:
    """Cross-entropy of each document in non-overlapping windows of ``window`` tokens.

    Args:
        model: a causal language model that returns ``logits`` [B, T, V]; the mode of every submodule and every random
            state are restored afterwards.
        documents: (identity, token ids [n]); windows of a single token contain nothing to predict and are skipped.
        window: tokens per window, at most the model's context length.
        batch_windows: windows per forward pass; it changes the result only by rounding.
        device: device of the batches; None: that of the model's parameters.

    Raises:
        ValueError: no document has two tokens.
        NotFiniteError: the loss of a document is NaN or infinite; the message names the document.
    """
    pieces = [
        (number, ids[first : first + window])
        for number, (_, ids) in enumerate(documents)
        for first in range(0, len(ids), window)
        if len(ids[first : first + window]) >= 2
    ]
    if not pieces:
        raise ValueError("no held-out document has two tokens, so there is nothing to predict; give more text.")
    # windows of similar length share a batch, which saves padding; a stable sort keeps the order reproducible
    pieces.sort(key=lambda piece: -len(piece[1]))
    device = device or next(model.parameters()).device
    totals = [0.0] * len(documents)
    counts = [0] * len(documents)
    with undisturbed(model), torch.inference_mode():
        for first in range(0, len(pieces), batch_windows):
            chunk = pieces[first : first + batch_windows]
            length = len(chunk[0][1])
            ids_BT = torch.zeros(len(chunk), length, dtype=torch.long)
            mask_BT = torch.zeros(len(chunk), length, dtype=torch.long)
            for row, (_, ids) in enumerate(chunk):
                ids_BT[row, : len(ids)] = torch.from_numpy(np.asarray(ids, dtype=np.int64))
                mask_BT[row, : len(ids)] = 1
            ids_BT, mask_BT = ids_BT.to(device), mask_BT.to(device)
            logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT).logits
            loss_BT = nn.functional.cross_entropy(
                logits_BTV[:, :-1].float().transpose(1, 2), ids_BT[:, 1:], reduction="none"
            )
            sums = (loss_BT * mask_BT[:, 1:]).double().sum(1).tolist()
            for (number, ids), value in zip(chunk, sums, strict=True):
                totals[number] += value
                counts[number] += len(ids) - 1
    scored = []
    for (identity, _), total, count in zip(documents, totals, counts, strict=True):
        if count:
            if not math.isfinite(total):
                raise NotFiniteError(
                    f"the held-out loss of document {identity} is {total}: the model's logits are NaN or infinite."
                )
            scored.append(DocumentLoss(identity, total, count))
    return HeldOutLoss(tuple(scored))
