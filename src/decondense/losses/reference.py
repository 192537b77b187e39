"""Every form as it is written on paper: dense, plain autograd, never optimised. The oracle of the other engines.

The definitions are in the forms' own files (``losses/forms``); each takes a batch of segments and returns one loss per
segment. Memory is a few ``U x N x N`` matrices; that is the point of the other implementations.

Shape suffixes: ``R`` rows, ``U`` segments, ``N`` tokens of a row or segment, ``D`` features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from decondense.config import LossConfig
from decondense.losses.forms import form_of
from decondense.losses.pair_mask import PairMask


def per_segment(z_RND: Tensor, pairs: PairMask, s: LossConfig, *drawn: Any) -> Tensor:
    """Loss of each segment, ``[U]``; 0 for segments without a pair. Differentiable, twice too."""
    definition = form_of(s).definition
    z_RND = z_RND.to(pairs.pairs_U.dtype)
    device = z_RND.device
    valid_RN = pairs.valid_RN
    if valid_RN is None:
        valid_RN = torch.ones(pairs.rows, pairs.row_size, dtype=torch.bool, device=device)
    pairs_RNN = pairs.pairs_RNN(diagonal=s.diagonal, device=device)

    if pairs.segment_RN is None and pairs.rows_per_segment == 1 and pairs.valid_RN is None and pairs.row_size > 1:
        return definition(z_RND, pairs_RNN, valid_RN, s, *drawn)

    # the general case, one segment at a time: its tokens, which may lie in several rows, and the pairs within its rows
    segment_RN = pairs.segment_RN
    if segment_RN is None:
        segment_RN = torch.arange(pairs.rows, device=device).div(pairs.rows_per_segment, rounding_mode="floor")
        segment_RN = segment_RN.unsqueeze(1).expand(pairs.rows, pairs.row_size)
    row_RN = torch.arange(pairs.rows, device=device).unsqueeze(1).expand(pairs.rows, pairs.row_size)
    values = [z_RND.sum() * 0.0] * pairs.n_segments
    for u in sorted(set(segment_RN[valid_RN].tolist())):
        if pairs.pairs_U[u] == 0:
            continue
        member = valid_RN & (segment_RN == u)
        row, place = row_RN[member], member.nonzero()[:, 1]
        same_row = row.unsqueeze(1) == row.unsqueeze(0)
        together = same_row & pairs_RNN[row.unsqueeze(1), place.unsqueeze(1), place.unsqueeze(0)]
        one = torch.ones(1, len(row), dtype=torch.bool, device=device)
        values[u] = definition(z_RND[member].unsqueeze(0), together.unsqueeze(0), one, s, *drawn).squeeze(0)
    return torch.stack(values)
