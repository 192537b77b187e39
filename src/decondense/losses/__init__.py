r"""Dispersion objectives: one function, one module, every form (:data:`FORMS`).

>>> import torch
>>> from decondense import dispersion_loss
>>> z_BTD = torch.eye(4, 8).unsqueeze(0)  # one sequence of four orthogonal tokens: theta = pi/2, so -1/(2 tau)
>>> round(float(dispersion_loss(z_BTD, tau=1.0)), 4)
-0.5

Shape suffixes: ``B`` sequences, ``T`` tokens, ``D`` features; ``U`` units, that is sequences, or the documents of
packed sequences.

Every loss is a mean over the units that have at least two real tokens; :func:`sum_and_count` returns the two halves of
that mean for whoever has to divide by a global count. Only ``z_BTD`` is differentiated, once (``impl="reference"``: any
number of times); its gradient has the dtype of ``z_BTD``. All statistics are float32 (float64 for float64 input)
whatever comes in, inside autocast too.
"""

from __future__ import annotations

import importlib.util
import warnings
from functools import cache, lru_cache, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from decondense.config import LossConfig, one_of
from decondense.geometry import statistics_dtype
from decondense.losses import chunked, features, operator, reference, world
from decondense.losses.forms import COMPAT, FORMS, FormInfo, Settings, form_info
from decondense.losses.scope import Scope, gather_rows
from decondense.seeding import generator as named_generator

__all__ = ["COMPAT", "FORMS", "DispersionLoss", "FormInfo", "dispersion_loss", "form_info", "sum_and_count"]

_D = LossConfig()

Impl = Literal["auto", "reference", "chunked", "fused"]
Pairs = Literal["all", "grouped", "subset"]
Within = Literal["sequence", "batch", "world"]
Gradient = Literal["forward", "recompute"]

_PARAMETERS = tuple(name for name in Settings.__dataclass_fields__ if name not in ("form", "clamp"))


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


@lru_cache(maxsize=1)
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _kernels_agree(device: str, dtype: torch.dtype) -> bool:
    """Whether the compiled kernels give the tiled engine's value and gradient on this device: asked once for each.

    Kernels are compiled on the user's machine, by whatever triton and driver it has, so ``impl="auto"`` tries them on
    a small input before it trusts them. No random number is drawn.
    """
    return _kernels_agree_once(device, dtype)


@cache
def _kernels_agree_once(device: str, dtype: torch.dtype) -> bool:
    try:
        angles = torch.arange(2 * 70 * 40, device=device, dtype=torch.float32).reshape(2, 70, 40)
        z = (angles.sin() + 0.3 * (angles * 0.37).cos() + 0.5).to(dtype)  # condensed, T and D divided by no tile
        mask = torch.ones(2, 70, dtype=torch.bool, device=device)
        mask[0, 61:] = False
        found = {}
        for impl in ("fused", "chunked"):
            with torch.enable_grad():
                leaf = z.detach().clone().requires_grad_()
                value = dispersion_loss(leaf, mask, impl=impl)
                (gradient,) = torch.autograd.grad(value, leaf)
            found[impl] = (value.detach().float(), gradient.float())
        (value, gradient), (expected, exact) = found["fused"], found["chunked"]
        agree = bool((value - expected).abs() < 1e-3) and bool((gradient - exact).norm() < 3e-2 * exact.norm())
        reason = "they do not agree with the tiled engine"
    except Exception as error:  # whatever a compiler, a driver or a kernel can raise
        agree, reason = False, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if not agree:
        warnings.warn(
            f"the Triton kernels are not used on {device} in {dtype}: {reason}. impl='auto' takes the tiled engine "
            "instead, which is exact but slower; impl='fused' insists on the kernels.",
            RuntimeWarning,
            stacklevel=2,
        )
    return agree


def _engine(impl: str, z: Tensor, s: Settings) -> str:
    """Which implementation a call gets: ``reference``, ``chunked`` or ``fused``."""
    covered = s.info.fused and s.clamp is None and z.dtype != torch.float64
    if impl == "auto":
        able = covered and z.device.type == "cuda" and _triton_installed()
        return "fused" if able and _kernels_agree(str(z.device), z.dtype) else "chunked"
    if impl != "fused":
        return impl
    if not covered:
        names = ", ".join(name for name, info in FORMS.items() if info.fused)
        raise ValueError(
            f"impl='fused' covers {names} without compat, in bfloat16, float16 and float32; got form {s.form!r}"
            f"{', compat' if s.clamp is not None else ''}, {z.dtype}. Use impl='auto' or 'chunked'."
        )
    if not _triton_installed():
        raise ValueError("impl='fused' needs triton, which is not installed: pip install 'decondense[kernels]'.")
    from decondense.losses import fused

    if not fused.available(z.device):
        raise ValueError(f"impl='fused' needs a CUDA tensor, got one on {z.device}; use impl='auto' or 'chunked'.")
    return impl


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
    engine = _engine(impl, z, settings)
    if within != "sequence":
        if segments is not None:
            raise ValueError(f"segments keep pairs within a document, within={within!r} does not; give only one.")
        if within == "world":
            z, mask = world.gather(z, mask)
        else:
            z = z.reshape(1, -1, z.shape[-1])
            mask = None if mask is None else mask.reshape(1, -1)
    if pairs == "subset" and z.shape[1] > subset_size:
        assert generator is not None
        chosen = torch.rand(z.shape[1], generator=generator, device=generator.device).argsort()[:subset_size]
        chosen = chosen.sort().values.to(z.device)
        z = z[:, chosen]
        mask = None if mask is None else mask[:, chosen]
        segments = None if segments is None else segments[:, chosen]
    # inside autocast the products would be taken in half precision
    with torch.autocast(z.device.type, enabled=False):
        scope = Scope.of((z.shape[0], z.shape[1]), mask, segments, dtype=statistics_dtype(z.dtype), device=z.device)
        if pairs == "grouped" and z.shape[1] > group_size:
            assert generator is not None
            order, scope = scope.grouped(group_size, generator, z.device)
            z = gather_rows(z, order, scope.row_size)
        value_U = _per_unit(z, scope, settings, engine, gradient, generator)
        return value_U.sum(), scope.count_U().sum()


def _per_unit(
    z: Tensor, scope: Scope, settings: Settings, engine: str, gradient: str, generator: torch.Generator | None
) -> Tensor:
    directions = None
    if settings.info.random:
        assert generator is not None
        directions = features.draw_directions(z.shape[-1], settings, generator, z)
    if engine == "reference":
        return reference.per_unit(z, scope, settings, directions)
    if settings.info.kind == "features":
        return features.per_unit(z, scope, settings, directions)
    sums = None
    if engine == "fused" or (torch.compiler.is_compiling() and settings.info.kind == "pairs"):
        sums = partial(operator.pair_sums, engine=engine)
    return chunked.per_unit(z, scope, settings, gradient=gradient, sums=sums)


def _resolve(config: dict[str, Any]) -> Settings:
    """Check the choices that a call or a module makes; the error names the argument, the value and the remedy."""
    for name, known in (
        ("impl", ("auto", "reference", "chunked", "fused")),
        ("pairs", ("all", "grouped", "subset")),
        ("within", ("sequence", "batch", "world")),
        ("gradient", ("forward", "recompute")),
    ):
        one_of(name, config[name], known)
    for name in ("group_size", "subset_size"):
        if config[name] < 2:
            raise ValueError(f"{name} is {config[name]}; a pair needs at least 2 tokens.")
    settings = Settings.of(config["form"], compat=config["compat"], **{name: config[name] for name in _PARAMETERS})
    if config["pairs"] == "grouped" and settings.info.kind == "features":
        raise ValueError(f"form {config['form']!r} has no pairs to group; use pairs='all' or 'subset'.")
    return settings


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
    gradient: Gradient = _D.gradient,
    margin: float = _D.margin,
    norm_weight: float = _D.norm_weight,
    variance_weight: float = _D.variance_weight,
    covariance_weight: float = _D.covariance_weight,
    target_std: float = _D.target_std,
    slices: int = _D.slices,
    knots: int = _D.knots,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of the unit losses and number of units with at least two real tokens: two 0-dim tensors.

    For whoever divides by a count over micro-batches or ranks; arguments as of :func:`dispersion_loss`.
    """
    choices: dict[str, Any] = {
        "form": form,
        "impl": impl,
        "pairs": pairs,
        "group_size": group_size,
        "subset_size": subset_size,
        "within": within,
        "compat": compat,
        "gradient": gradient,
        "tau": tau,
        "delta": delta,
        "margin": margin,
        "norm_weight": norm_weight,
        "variance_weight": variance_weight,
        "covariance_weight": covariance_weight,
        "target_std": target_std,
        "slices": slices,
        "knots": knots,
    }
    settings = _resolve(choices)
    if generator is None and (pairs != "all" or settings.info.random):
        what = f"pairs={pairs!r}" if pairs != "all" else f"form {form!r}"
        raise ValueError(
            f"{what} draws at random and never from the global generator: pass generator=torch.Generator(), "
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


def dispersion_loss(
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
    gradient: Gradient = _D.gradient,
    margin: float = _D.margin,
    norm_weight: float = _D.norm_weight,
    variance_weight: float = _D.variance_weight,
    covariance_weight: float = _D.covariance_weight,
    target_std: float = _D.target_std,
    slices: int = _D.slices,
    knots: int = _D.knots,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Mean dispersion loss over the sequences (or documents) that have at least two real tokens, a 0-dim tensor.

    The default is the paper's angular form (Liu et al. 2026, arXiv:2602.00217), over all pairs of a sequence's tokens:

    .. math:: \frac1B \sum_b \log \frac{1}{n_b (n_b - 1)} \sum_{i \ne j} \exp(-\theta_{ij}/(\pi\tau)), \qquad
              \theta = \arccos\big(c/\sqrt{1+\delta^2}\big)

    with the mean instead of the paper's sum inside the logarithm: the same gradient, a value that does not grow with
    the number of tokens. 0 (all tokens equal) to about -1/(2 tau) (orthogonal) and a little below. No sequence with
    two real tokens: 0, with zero gradients.

    Args:
        z_BTD: hidden states ``[B, T, D]``, floating point, D at least 2. The only argument that is differentiated.
        mask_BT: true (or 1) for real tokens; the rest has no part in value or gradient, whatever it holds.
        segments_BT: integer number of the document of each token of a packed sequence. Pairs stay within a document,
            and a document counts as a sequence does.
        form: a key of :data:`FORMS`, which tells equation, source, parameters and extremes.
        tau: temperature. To 0: the closest pair alone; to infinity: the mean over pairs.
        delta: smoothing of the angle in radians; value within ``delta / (pi tau)``. 0 is the exact angle, whose slope
            at equal tokens is infinite.
        impl: ``reference`` (dense, any derivative), ``chunked`` (memory linear in T, any device), ``fused`` (Triton,
            CUDA) or ``auto``: ``fused`` where it can run and agrees with ``chunked`` on a small trial, else
            ``chunked``. All agree within rounding.
        pairs: ``all``; ``grouped``: random groups of ``group_size`` tokens, pairs within a group; ``subset``: one
            random subset of ``subset_size`` positions for all sequences, as the authors' code does.
        group_size: tokens of a group.
        subset_size: tokens of the subset.
        within: ``sequence``; ``batch``: all tokens of the call are one set; ``world``: the tokens of all ranks are one
            set (every rank must call; the loss is the same on every rank, and averaging gradients over ranks gives its
            gradient).
        compat: a key of :data:`COMPAT`: what the authors' research code computes instead (clamped cosines with a frozen
            slope, epsilons, ...); ``delta`` then has no effect.
        gradient: ``forward`` makes the gradient in the forward sweep and keeps it until backward (one tensor like
            ``z_BTD``); ``recompute`` keeps nothing and sweeps again. In either case nothing of size T x T.
        margin: the hinge's epsilon.
        norm_weight: l2_repel's weight of the mean squared element.
        variance_weight: VICReg's weight of the variance term.
        covariance_weight: VICReg's weight of the covariance term.
        target_std: VICReg's target standard deviation.
        slices: SIGReg's number of random directions.
        knots: SIGReg's number of quadrature points.
        generator: source of all random choices (groups, subsets, directions). The global generator is never used.

    Raises:
        ValueError: for an unknown name (with the closest known one), a parameter out of range, hidden states that are
            not ``[B, T, D]`` floating point with D at least 2, a mask or segments of another shape or device, and
            random choices without a generator.
        RuntimeError: on a second derivative, except with ``impl="reference"``.
    """
    total, count = sum_and_count(
        z_BTD,
        mask_BT,
        segments_BT=segments_BT,
        form=form,
        tau=tau,
        delta=delta,
        impl=impl,
        pairs=pairs,
        group_size=group_size,
        subset_size=subset_size,
        within=within,
        compat=compat,
        gradient=gradient,
        margin=margin,
        norm_weight=norm_weight,
        variance_weight=variance_weight,
        covariance_weight=covariance_weight,
        target_std=target_std,
        slices=slices,
        knots=knots,
        generator=generator,
    )
    return total / count.clamp(min=1)


class DispersionLoss(nn.Module):
    """:func:`dispersion_loss` as a module without parameters: ``loss = DispersionLoss(tau=0.3); loss(z_BTD, mask_BT)``.

    Takes the keywords of :class:`decondense.config.LossConfig`, checks them once, and has a generator of its own for
    random pairs and directions, seeded with ``seed``.
    """

    def __init__(self, **keywords: Any) -> None:
        super().__init__()
        form_info(keywords.get("form", _D.form))  # before the configuration: its message can name the closest form
        self.config = LossConfig.parse(keywords, where="DispersionLoss")
        self.settings = _resolve(self.config.model_dump())
        self._generator: torch.Generator | None = None

    @classmethod
    def from_config(cls, config: LossConfig) -> DispersionLoss:
        """Build the module that a configuration describes."""
        return cls(**config.model_dump())

    @property
    def generator(self) -> torch.Generator:
        """The module's own generator, drawn from by random pairs and directions only."""
        if self._generator is None:
            self._generator = named_generator(self.config.seed, "dispersion loss")
        return self._generator

    def sum_and_count(
        self, z_BTD: Tensor, mask_BT: Tensor | None = None, segments_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Sum of the unit losses and number of units with at least two real tokens: two 0-dim tensors."""
        c = self.config
        draws = c.pairs != "all" or self.settings.info.random
        return _sum_and_count(
            z_BTD,
            mask_BT,
            segments_BT,
            self.settings,
            impl=c.impl,
            pairs=c.pairs,
            group_size=c.group_size,
            subset_size=c.subset_size,
            within=c.within,
            gradient=c.gradient,
            generator=self.generator if draws else None,
        )

    def forward(self, z_BTD: Tensor, mask_BT: Tensor | None = None, segments_BT: Tensor | None = None) -> Tensor:
        """Mean over the units that have at least two real tokens, a 0-dim tensor; see :func:`dispersion_loss`."""
        total, count = self.sum_and_count(z_BTD, mask_BT, segments_BT)
        return total / count.clamp(min=1)

    def extra_repr(self) -> str:
        """The form, its parameters, and every other choice that is not the default."""
        c = self.config
        used = ["form", *self.settings.info.uses]
        changed = [name for name in LossConfig.model_fields if getattr(c, name) != getattr(_D, name)]
        return ", ".join(f"{name}={getattr(c, name)!r}" for name in dict.fromkeys([*used, *changed]))

    def __getstate__(self) -> dict[str, Any]:
        # a torch.Generator cannot be pickled or deep-copied; its state can
        state = self.__dict__.copy()
        own = state.pop("_generator")
        state["_generator_state"] = None if own is None else own.get_state()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        own = state.pop("_generator_state")
        super().__setstate__({**state, "_generator": None})  # type: ignore[no-untyped-call]
        if own is not None:
            self.generator.set_state(own)
