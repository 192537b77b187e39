"""The loss as functions of hidden states: :func:`dispersion_loss` and :func:`sum_and_count`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from decondense.config import CallOptions, LossConfig
from decondense.geometry import statistics_dtype
from decondense.losses import engine, world
from decondense.losses.pair_mask import PairMask, gather_rows, to_device

if TYPE_CHECKING:
    from typing_extensions import Unpack

F = TypeVar("F", bound=Callable[..., Any])


def show_options(function: F, options: type[Any]) -> F:
    """List the keywords of ``**options`` in ``help()``, with types and defaults of :class:`LossConfig`.

    Type checkers and editors read ``Unpack[...]`` themselves.
    """
    signature = inspect.signature(function)
    named = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    fields = LossConfig.model_fields
    keywords = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=fields[name].default, annotation=fields[name].annotation
        )
        for name in fields
        if name in options.__annotations__
    ]
    function.__signature__ = signature.replace(parameters=[*named, *keywords])  # type: ignore[attr-defined]
    return function


def _configure(options: Mapping[str, Any], where: str) -> LossConfig:
    if "seed" in options:
        raise ValueError(
            f"{where} has no state that a seed could initialise: pass generator=, or use DispersionLoss(seed=...)."
        )
    return LossConfig.parse(dict(options), where=where)


def sum_and_count(
    z_BTD: Tensor,
    mask_BT: Tensor | None = None,
    *,
    segments_BT: Tensor | None = None,
    teacher_BTE: Tensor | None = None,
    generator: torch.Generator | None = None,
    **options: Unpack[CallOptions],
) -> tuple[Tensor, Tensor]:
    """Sum of the segment losses and number of segments with at least two real tokens: two 0-dim tensors.

    Use it to divide by a count over micro-batches or ranks. The arguments are those of :func:`dispersion_loss`.
    """
    s = _configure(options, "sum_and_count()")
    return configured_sum_and_count(s, z_BTD, mask_BT, segments_BT, generator, teacher_BTE)


def dispersion_loss(
    z_BTD: Tensor,
    mask_BT: Tensor | None = None,
    *,
    segments_BT: Tensor | None = None,
    teacher_BTE: Tensor | None = None,
    generator: torch.Generator | None = None,
    **options: Unpack[CallOptions],
) -> Tensor:
    r"""Mean dispersion loss over the sequences (or documents) that have at least two real tokens, a 0-dim tensor.

    The default is the paper's angular form (Liu et al. 2026, arXiv:2602.00217), over all pairs of a sequence's tokens:

    .. math:: \frac1B \sum_b \log \frac{1}{n_b (n_b - 1)} \sum_{i \ne j} \exp(-\theta_{ij}/(\pi\tau)), \qquad
              \theta = \arccos\big(c/\sqrt{1+\delta^2}\big)

    with the mean instead of the paper's sum inside the logarithm: the gradient is the same, and the value does not grow
    with the number of tokens. The value goes from 0 (all tokens equal) to about -1/(2 tau) (orthogonal) and a little
    below. If no sequence has two real tokens, the loss is 0 with zero gradients. Inside
    ``torch.compile(fullgraph=True)`` use :class:`DispersionLoss`, which validates its options beforehand.

    Args:
        z_BTD: hidden states ``[B, T, D]``, floating point, D at least 2. The only argument that is differentiated.
        mask_BT: true (or 1) for real tokens; other tokens never change value or gradient, even if NaN.
        segments_BT: integer number of the document of each token of a packed sequence. Pairs stay within a document,
            and each document counts as a sequence.
        teacher_BTE: ``form="gram"``: the teacher's states of the same tokens, of any width; not differentiated.
        generator: source of all random choices (groups, subsets, directions). The global generator is never used.
        **options: the fields of :class:`decondense.config.LossConfig` except ``seed``, with its defaults: ``form`` (a
            key of :data:`decondense.losses.FORMS`), ``tau``, ``delta``, ``impl``, ``pairs``, ``within``, ``compat``,
            ...

    Raises:
        ValueError: for an unknown name (with the closest known one), an option out of range, a combination that cannot
            be computed, hidden states that are not ``[B, T, D]`` floating point with D at least 2, a mask or segments
            of another shape or device, and random choices without a generator.
        RuntimeError: on a second derivative, except with ``impl="reference"``.
    """
    s = _configure(options, "dispersion_loss()")
    total, count = configured_sum_and_count(s, z_BTD, mask_BT, segments_BT, generator, teacher_BTE)
    return total / count.clamp(min=1)


def configured_sum_and_count(
    s: LossConfig,
    z: Tensor,
    mask: Tensor | None,
    segments: Tensor | None,
    generator: torch.Generator | None,
    teacher: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`sum_and_count` of validated options."""
    _check_input(z, mask, segments)
    _check_teacher(s, z, teacher)
    if s.draws and generator is None:
        source = f"pairs={s.pairs!r}" if s.pairs != "all" else f"form {s.form!r}"
        raise ValueError(
            f"{source} draws random numbers and never uses the global generator: pass generator=torch.Generator(), or "
            "use DispersionLoss, which has its own."
        )
    chosen = engine.choose(s, z)
    width = z.shape[-1]
    if teacher is not None:  # side by side, so that every choice of tokens below is that of both
        z = torch.cat([z, teacher.detach().to(z.dtype)], dim=-1)
    if s.within != "sequence":
        if segments is not None:
            raise ValueError(
                f"segments keep pairs within a document, but within={s.within!r} does not; pass only one of them."
            )
        if s.within == "world":
            z, mask = world.gather(z, mask)
        else:
            z = z.reshape(1, -1, z.shape[-1])
            mask = None if mask is None else mask.reshape(1, -1)
    if s.pairs == "subset" and z.shape[1] > s.subset_size:
        assert generator is not None
        places = torch.rand(z.shape[1], generator=generator, device=generator.device).argsort()[: s.subset_size]
        places = to_device(places.sort().values, z.device)
        z = z[:, places]
        mask = None if mask is None else mask[:, places]
        segments = None if segments is None else segments[:, places]
    # inside autocast the products would be taken in half precision
    with torch.autocast(z.device.type, enabled=False):
        shape = (z.shape[0], z.shape[1])
        pairs = PairMask.of(shape, mask, segments, dtype=statistics_dtype(z.dtype), device=z.device)
        if s.pairs == "grouped" and z.shape[1] > s.group_size:
            assert generator is not None
            order, pairs = pairs.grouped(s.group_size, generator, z.device)
            z = gather_rows(z, order, pairs.row_size)
        value_U = engine.per_segment(z, pairs, s, chosen, generator, width)
        return value_U.sum(), pairs.count_U().sum()


def _check_input(z: Tensor, mask: Tensor | None, segments: Tensor | None) -> None:
    if not isinstance(z, Tensor):
        raise ValueError(f"hidden states must be a tensor, got {type(z).__name__}.")
    if z.dim() != 3:
        raise ValueError(
            f"hidden states must have shape [batch, tokens, features], got {list(z.shape)}; "
            "for a single sequence add the batch dimension with z.unsqueeze(0)."
        )
    if not z.is_floating_point():
        raise ValueError(f"hidden states must be floating point, got {z.dtype}; token ids are not hidden states.")
    if z.shape[-1] < 2:
        raise ValueError(f"hidden states have {z.shape[-1]} feature(s); an angle needs at least 2.")
    for name, other in (("mask", mask), ("segments", segments)):
        if other is None:
            continue
        if other.shape != z.shape[:2]:
            raise ValueError(
                f"{name} has shape {list(other.shape)}, hidden states have {list(z.shape)}; "
                f"{name} must have shape [batch, tokens] = {list(z.shape[:2])}."
            )
        if other.device != z.device:
            raise ValueError(f"{name} is on {other.device}, hidden states are on {z.device}; move it there.")
    if segments is not None and (segments.is_floating_point() or segments.dtype == torch.bool):
        raise ValueError(f"segments must be integers (the number of each token's document), got {segments.dtype}.")


def _check_teacher(s: LossConfig, z: Tensor, teacher: Tensor | None) -> None:
    if s.info.teacher != (teacher is not None):
        if teacher is None:
            raise ValueError(f"form {s.form!r} needs a teacher's states of the same tokens: pass teacher_BTE.")
        raise ValueError(f"form {s.form!r} does not use a teacher's states; omit teacher_BTE.")
    if teacher is not None and (teacher.shape[:-1] != z.shape[:2] or teacher.device != z.device):
        raise ValueError(
            f"the teacher's states have shape {list(teacher.shape)} on {teacher.device}, the hidden states "
            f"{list(z.shape)} on {z.device}; both must be states of the same tokens on one device."
        )


show_options(sum_and_count, CallOptions)
show_options(dispersion_loss, CallOptions)
