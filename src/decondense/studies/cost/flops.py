r"""Floating point operations of training, of the dispersion loss and of evaluations.

**Training.** A token costs :math:`6 N` operations for the :math:`N` parameters that it is multiplied with (2 forward,
4 backward; Kaplan et al. 2020, arXiv:2001.08361, section 2.1): the embedding tables are looked up and do not count,
the language model head does, tied or not; in a mixture of experts, only the experts that a token is routed to count.
Attention adds :math:`12 L D T` for L layers, D = heads x features per head and sequences of T tokens (Chowdhery et al.
2022, arXiv:2204.02311, appendix B), half of it because a causal mask needs half of the pairs. A forward pass alone is a
third. Gradient checkpointing adds one forward pass. With adapters (LoRA) the frozen weights need no gradient of their
own: 4 N instead of 6 N.

**Dispersion loss.** :math:`3 T^2 F` per sequence and layer for F features: the products of all pairs once, by symmetry
(:math:`T^2 F`), and the gradient that is computed from them in the same pass (:math:`2 T^2 F`; docs/math.md). It counts
for the layers that are dispersed and the steps in which its weight is not zero.
"""

from __future__ import annotations

import math

from decondense.config import DispersionConfig, EvaluateConfig
from decondense.forms import FORMS
from decondense.studies.cost.sizes import Size


def forward_flops(size: Size, tokens: float, length: int, *, causal: bool = True) -> float:
    """Operations of a forward pass over ``tokens`` tokens in sequences of ``length``; nan for an unknown model."""
    if size.computing is None:
        return math.nan
    weights = 2 * (size.computing + (size.adapters or 0.0)) * tokens
    return weights + _attention(size, tokens, length, causal)


def training_flops(
    size: Size, tokens: float, length: int, *, causal: bool = True, checkpointing: bool = False
) -> float:
    """Operations of forward and backward passes over ``tokens`` tokens in sequences of ``length``.

    Args:
        size: the model.
        tokens: total number of tokens.
        length: tokens per sequence.
        causal: count the half of attention that a causal mask needs; False: what dense kernels execute.
        checkpointing: activations are computed a second time.
    """
    if size.computing is None:
        return math.nan
    backward = 4 * size.computing if size.adapters is None else 2 * size.computing + 4 * size.adapters
    total = forward_flops(size, tokens, length, causal=causal) * (2 if checkpointing else 1)
    return total + backward * tokens + 2 * _attention(size, tokens, length, causal)


def _attention(size: Size, tokens: float, length: int, causal: bool) -> float:
    return 4.0 * size.layers * size.attention * length * tokens * (0.5 if causal else 1.0)


def dispersion_flops(
    dispersion: DispersionConfig, size: Size, sequences: float, length: int, together: int = 1
) -> float:
    """Operations of the dispersion loss over ``sequences`` sequences of ``length`` tokens, gradient included.

    Args:
        dispersion: layers and loss.
        size: the model.
        sequences: total number of sequences.
        length: tokens per sequence.
        together: sequences whose tokens are paired with each other (``within`` other than ``sequence``).
    """
    if not size.layers:
        return 0.0
    from decondense.blocks import resolve_layers

    loss = dispersion.loss
    layers = len(resolve_layers(dispersion.layers, size.layers)) + dispersion.embedding
    partners: float = length * (1 if loss.within == "sequence" else together)
    cost = FORMS[loss.form].cost
    if cost == "mean":
        each = 6.0 * length * size.features
    elif cost == "gram":
        each = 6.0 * length * size.features * min(length, size.features)
    elif cost == "slices":
        each = 6.0 * length * size.features * loss.slices
    else:
        rows: float = length
        if loss.pairs == "grouped":
            partners = min(partners, loss.group_size)
        elif loss.pairs == "subset":
            rows = partners = min(length, loss.subset_size)
        passes = 1.0 if dispersion.weight == 0 else 4.0 if loss.gradient == "recompute" else 3.0
        each = passes * rows * partners * size.features
    return each * layers * sequences


def share_of_steps(dispersion: DispersionConfig, steps: int) -> float:
    """Share of the optimizer steps in which the loss is computed; with a weight of 0 all of them, for the log."""
    if steps < 1:
        return 0.0
    if dispersion.weight == 0 or dispersion.schedule.is_constant:
        return 1.0
    looked = min(steps, 2000)
    places = [int(index * steps / looked) for index in range(looked)]
    return sum(dispersion.schedule.factor(step, steps) > 0 for step in places) / looked


def evaluation_flops(evaluate: EvaluateConfig, size: Size, length: int, evaluations: int) -> float:
    """Operations of scoring the held-out text and measuring the passages, ``evaluations`` times."""
    if not evaluations:
        return 0.0
    scored = forward_flops(size, evaluate.validation_tokens, length)
    measured = forward_flops(size, evaluate.passages * evaluate.passage_tokens, evaluate.passage_tokens)
    return evaluations * (scored + measured)
