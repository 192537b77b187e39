"""Definitions written out: all pairs, float64, numpy. Independent of the code under test."""

from __future__ import annotations

from typing import Any

import numpy as np


def cosines(states: Any) -> np.ndarray:
    """[N, N] cosine matrix of the rows of [N, D], in float64."""
    z = np.asarray(states, dtype=np.float64)
    length = np.sqrt((z * z).sum(axis=1))
    result = np.zeros((len(z), len(z)))
    for i, row in enumerate(z):
        scale = length[i] * length
        result[i] = np.divide((z * row).sum(axis=1), scale, out=np.zeros(len(z)), where=scale > 0)
    return result


def mean_cosine(states: Any) -> tuple[float, float]:
    """Mean over all pairs, and over pairs of different tokens."""
    matrix = cosines(states)
    n = len(matrix)
    return matrix.mean(), (matrix.sum() - np.trace(matrix)) / (n * (n - 1))


def hidden_states(model: Any, ids: Any) -> list[np.ndarray]:
    """What the model itself lists for one passage: arrays [N, D] for layers 0 to L."""
    import torch

    with torch.no_grad():
        batch = torch.as_tensor(ids)[None]
        inputs = {"input_ids": batch}
        if getattr(model.config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = batch
        output = model(**inputs, output_hidden_states=True)
    listed = output.decoder_hidden_states if "decoder_input_ids" in inputs else output.hidden_states
    return [state[0].double().numpy() for state in listed]
