r"""Dispersion objectives: one public function, one module, every form (:data:`FORMS`).

    >>> import torch
    >>> from decondense import dispersion_loss
    >>> z_BTD = torch.eye(4, 8).unsqueeze(0)          # one sequence of four orthogonal tokens
    >>> round(dispersion_loss(z_BTD, tau=1.0).item(), 4)
    -0.5003

Shape suffixes: ``B`` sequences, ``T`` tokens, ``D`` features; ``U`` units, that is sequences, or the documents of packed
sequences. Every loss is a mean over units that have at least two real tokens; :func:`sum_and_count` returns the two halves
of that mean, for whoever has to normalise by a global count.

Differentiated: ``z_BTD`` alone. The gradient has the dtype of ``z_BTD``; all statistics are float32 (float64 for float64
input) whatever comes in.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from decondense.config import LossConfig, one_of
from decondense.geometry import statistics_dtype
from decondense.losses import chunked, features, reference
from decondense.losses.forms import COMPAT, FORMS, FormInfo, Settings, form_info
from decondense.losses.scope import Scope, gather_rows
from decondense.seeding import generator as named_generator

__all__ = ["COMPAT", "FORMS", "DispersionLoss", "FormInfo", "dispersion_loss", "form_info", "sum_and_count"]

_D = LossConfig()

Impl = Literal["auto", "reference", "chunked", "fused"]
Pairs = Literal["all", "grouped", "subset"]
Within = Literal["sequence", "batch", "world"]


def _check_input(z: Tensor, mask: Tensor | None, segments: Tensor | None) -> None:
    if not isinstance(z, Tensor):
        raise ValueError(f"hidden states must be a tensor, got {type(z).__name__}.")
    if z.dim() != 3:
        raise ValueError(
            f"hidden states must have shape [batch, tokens, features], got {tuple(z.shape)}; "
            "add the batch dimension with z.unsqueeze(0) for a single sequence."
        )
    if not z.is_floating_point():
        raise ValueError(f"hidden states must be floating point, got {z.dtype}; token ids are not hidden states.")
    if z.shape[-1] < 2:
        raise ValueError(f"hidden states have {z.shape[-1]} features; an angle needs at least 2.")
    for name, other in (("mask", mask), ("segments", segments)):
        if other is None:
            continue
        if tuple(other.shape) != tuple(z.shape[:2]):
            raise ValueError(
                f"{name} has shape {tuple(other.shape)}, hidden states have {tuple(z.shape)}; "
                f"{name} must have shape [batch, tokens] = {tuple(z.shape[:2])}."
            )
        if other.device != z.device:
            raise ValueError(f"{name} is on {other.device}, hidden states on {z.device}; move it with {name}.to(...).")
    if segments is not None and (segments.is_floating_point() or segments.is_complex()):
        raise ValueError(f"segments must be integers (the number of the document of each token), got {segments.dtype}.")


def _sum_and_count(
    z: Tensor,
    mask: Tensor | None,
    segments: Tensor | None,
    settings: Settings,
    *,
    impl: str,
    pairs: str,
    group_size: int,
    subset_size: int,
    within: str,
    gradient: str,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    _check_input(z, mask, segments)
    dtype = statistics_dtype(z.dtype)
    if within != "sequence":
        if segments is not None:
            raise ValueError(f"segments limit pairs to a document, within={within!r} pairs across; give one of the two.")
        z = z.reshape(1, -1, z.shape[-1])
        mask = None if mask is None else mask.reshape(1, -1)
    if pairs == "subset" and z.shape[1] > subset_size:
        assert generator is not None
        chosen = torch.rand(z.shape[1], generator=generator, device=generator.device).argsort()[:subset_size]
        chosen = chosen.sort().values.to(z.device)
        z = z[:, chosen]
        mask = None if mask is None else mask[:, chosen]
        segments = None if segments is None else segments[:, chosen]
    scope = Scope.of((z.shape[0], z.shape[1]), mask, segments, dtype=dtype, device=z.device)
    if pairs == "grouped" and z.shape[1] > group_size:
        assert generator is not None
        order, scope = scope.grouped(group_size, generator, z.device)
        z = gather_rows(z, order, scope.row_size)
    directions = None
    if settings.info.random:
        assert generator is not None
        directions = features.draw_directions(z.shape[-1], settings, generator, z)
    if impl == "reference":
        value_U = reference.per_unit(z, scope, settings, directions)
    elif settings.info.kind == "features":
        value_U = features.per_unit(z, scope, settings, directions)
    else:
        value_U = chunked.per_unit(z, scope, settings, gradient=gradient)
    return value_U.sum(), scope.count_U().sum()


def _resolve(
    form: str, impl: str, pairs: str, within: str, gradient: str, compat: str | None, group_size: int, subset_size: int,
    parameters: dict[str, Any],
) -> Settings:
    one_of("impl", impl, ("auto", "reference", "chunked", "fused"))
    one_of("pairs", pairs, ("all", "grouped", "subset"))
    one_of("within", within, ("sequence", "batch", "world"))
    one_of("gradient", gradient, ("forward", "recompute"))
    for name, value in (("group_size", group_size), ("subset_size", subset_size)):
        if value < 2:
            raise ValueError(f"{name} is {value}; a pair needs at least 2 tokens.")
    return Settings.of(form, compat=compat, **parameters)


def sum_and_count(
    z_BTD: Tensor,
    mask_BT: Tensor | None = None,
    *,
    segments_BT: Tensor | None = None,
    form: str = _D.form,
    tau: float = _D.tau,
    delta: float = _D.delta,
    impl: Impl = _D.impl,
    pairs: Pairs = _D.pairs,
    group_size: int = _D.group_size,
    subset_size: int = _D.subset_size,
    within: Within = _D.within,
    compat: str | None = _D.compat,
    gradient: Literal["forward", "recompute"] = _D.gradient,
    margin: float = _D.margin,
    norm_weight: float = _D.norm_weight,
    variance_weight: float = _D.variance_weight,
    covariance_weight: float = _D.covariance_weight,
    target_std: float = _D.target_std,
    slices: int = _D.slices,
    knots: int = _D.knots,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of the unit losses and number of units with at least two real tokens, two 0-dim tensors.

    See :func:`dispersion_loss` for the arguments.
    """
    parameters = dict(
        tau=tau,
        delta=delta,
        margin=margin,
        norm_weight=norm_weight,
        variance_weight=variance_weight,
        covariance_weight=covariance_weight,
        target_std=target_std,
        slices=slices,
        knots=knots,
    )
    settings = _resolve(form, impl, pairs, within, gradient, compat, group_size, subset_size, parameters)
    if generator is None and (pairs != "all" or settings.info.random):
        what = f"pairs={pairs!r}" if pairs != "all" else f"form {form!r}"
        raise ValueError(
            f"{what} draws at random and never from the global generator; pass generator=torch.Generator(), "
            "or use DispersionLoss, which has its own."
        )
    return _sum_and_count(
        z_BTD,
        mask_BT,
        segments_BT,
        settings,
        impl=impl,
        pairs=pairs,
        group_size=group_size,
        subset_size=subset_size,
        within=within,
        gradient=gradient,
        generator=generator,
    )


def dispersion_loss(z_BTD: Tensor, mask_BT: Tensor | None = None, **keywords: Any) -> Tensor:
    r"""Mean dispersion loss over the sequences (or documents) that have at least two real tokens, a 0-dim tensor."""
    total, count = sum_and_count(z_BTD, mask_BT, **keywords)
    return total / count.clamp(min=1)


class DispersionLoss(nn.Module):
    """:func:`dispersion_loss` as a module."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__()
        self.config = LossConfig(**keywords)
        c = self.config
        names = [name for name in Settings.__dataclass_fields__ if name not in ("form", "clamp")]
        self.settings = _resolve(
            c.form, c.impl, c.pairs, c.within, c.gradient, c.compat, c.group_size, c.subset_size,
            {name: getattr(c, name) for name in names},
        )
        self._generator: torch.Generator | None = None

    @classmethod
    def from_config(cls, config: LossConfig) -> DispersionLoss:
        """Build the module that a configuration describes."""
        return cls(**config.model_dump())

    @property
    def generator(self) -> torch.Generator:
        """The module's own generator, seeded with the configuration's seed; drawn from by random pairs only."""
        if self._generator is None:
            self._generator = named_generator(self.config.seed, "dispersion loss")
        return self._generator

    def sum_and_count(
        self, z_BTD: Tensor, mask_BT: Tensor | None = None, segments_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Sum of the unit losses and number of units with at least two real tokens, two 0-dim tensors."""
        c = self.config
        draws = c.pairs != "all" or self.settings.info.random
        return _sum_and_count(
            z_BTD, mask_BT, segments_BT, self.settings, impl=c.impl, pairs=c.pairs, group_size=c.group_size,
            subset_size=c.subset_size, within=c.within, gradient=c.gradient,
            generator=self.generator if draws else None,
        )

    def forward(self, z_BTD: Tensor, mask_BT: Tensor | None = None, segments_BT: Tensor | None = None) -> Tensor:
        """Mean over the units that have at least two real tokens, a 0-dim tensor."""
        total, count = self.sum_and_count(z_BTD, mask_BT, segments_BT)
        return total / count.clamp(min=1)
