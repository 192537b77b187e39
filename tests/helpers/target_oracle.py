"""Mean cosines and the rule of the controller, written out once more in float64."""

from __future__ import annotations

import math

import numpy as np
import torch

from decondense.attaching.target import BRAKE, HIGHEST, LOWEST, RATE, SMALLEST_SCALE, SMOOTHING


def mean_cosines(states: list[torch.Tensor], lengths: list[int]) -> list[float]:
    """Mean over sequences of the mean over pairs i != j of the cosine matrix, in float64."""
    found = []
    for z_BTD in states:
        values = []
        for z_TD, n in zip(z_BTD.double(), lengths, strict=True):
            if n > 1:
                unit = torch.nn.functional.normalize(z_TD[:n], dim=-1)
                values.append((unit @ unit.T)[~torch.eye(n, dtype=torch.bool)].mean().item())
        found.append(float(np.mean(values)))
    return found


def by_the_book(weight: float, targets: list[float], cosines: np.ndarray) -> np.ndarray:
    """Weights after each step of the published rule [steps + 1, layers], in numpy."""
    log, smooth = np.full(len(targets), math.log(weight)), None
    weights = [np.exp(log)]
    for c in cosines:
        if np.isfinite(c).all():
            before = c if smooth is None else smooth
            smooth = before + SMOOTHING * (c - before)
            now, then = (
                np.clip((x - targets) / np.maximum(np.abs(targets), SMALLEST_SCALE), -1, 1) for x in (smooth, before)
            )
            log = np.clip(
                log + RATE * now + BRAKE * (now - then), math.log(weight * LOWEST), math.log(weight * HIGHEST)
            )
        weights.append(np.exp(log))
    return np.array(weights)
