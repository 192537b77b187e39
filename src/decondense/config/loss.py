"""The options of one dispersion objective: names, types, ranges, defaults and the combinations that are valid."""

from __future__ import annotations

from typing import ClassVar, Literal, TypedDict

from pydantic import Field, field_validator, model_validator

from decondense.config.base import Config, ConfigError, one_of
from decondense.forms import COMPAT, FORMS, FormInfo

FORM_NAMES = tuple(FORMS)
"""The objectives, described in ``decondense.losses.FORMS``."""
COMPAT_NAMES = tuple(COMPAT)
"""The published versions of the authors' code that can be reproduced (``decondense.losses.COMPAT``)."""

Impl = Literal["auto", "reference", "chunked", "fused"]
Pairs = Literal["all", "grouped", "subset"]
Within = Literal["sequence", "batch", "world"]
Gradient = Literal["forward", "recompute"]


class LossConfig(Config):
    """One dispersion objective (:func:`decondense.dispersion_loss`).

    Options that the form does not use have no effect. Combinations that cannot be computed are refused:
    ``pairs="grouped"`` for a form without pairs, a ``compat`` that does not cover the form, and an ``impl`` that the
    form does not have (:attr:`decondense.forms.FormInfo.implementations`).
    """

    later: ClassVar[frozenset[str]] = frozenset({"target_cosine"})

    form: str = "angular"
    """The objective; the names are the keys of ``decondense.losses.FORMS``."""
    tau: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Temperature of the log-mean-exp: towards 0 only the closest pair counts, towards infinity all pairs equally.
    Paper: 1."""
    delta: float = Field(default=1e-3, ge=0, lt=1)
    """Smoothing of the angle in radians, theta = arccos(c / sqrt(1 + delta^2)); the value changes by at most
    ``delta / (pi tau)``. 0 is the exact angle, whose slope at equal tokens is infinite."""
    impl: Impl = "auto"
    """``reference`` (dense, any derivative), ``chunked`` (memory linear in the number of tokens, any device), ``fused``
    (Triton, CUDA), or ``auto``: ``fused`` where it can run and agrees with ``chunked`` on a small trial, else
    ``chunked``, else (``perplexity_entropy``) ``reference``. All agree within rounding."""
    pairs: Pairs = "all"
    """``all``; ``grouped``: random groups of ``group_size`` tokens, pairs within a group; ``subset``: one random subset
    of ``subset_size`` positions for all sequences, as the authors' code does."""
    group_size: int = Field(default=128, ge=2)
    """Tokens in a random group when ``pairs="grouped"``."""
    subset_size: int = Field(default=256, ge=2)
    """Tokens of the random subset when ``pairs="subset"`` (the authors' 256)."""
    within: Within = "sequence"
    """Which tokens are paired: those of one ``sequence``, of the ``batch``, or of the batches of all ranks (``world``:
    every rank must call the loss; its value is the same on every rank, and the mean of the ranks' gradients is its
    gradient)."""
    compat: str | None = None
    """Reproduce a published version of the authors' code instead (clamped cosines with a frozen slope, epsilons); the
    names are the keys of ``decondense.losses.COMPAT``. ``delta`` then has no effect."""
    gradient: Gradient = "forward"
    """``forward`` computes the gradient in the forward pass and keeps it until backward, one tensor of the size of the
    hidden states; ``recompute`` keeps nothing and computes it in backward. Neither stores anything of size
    tokens x tokens."""
    margin: float = Field(default=0.5, ge=0, allow_inf_nan=False)
    """``hinge``: cosines above -margin are penalised."""
    norm_weight: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    """``l2_repel``: weight of the mean squared element of the hidden states."""
    variance_weight: float = Field(default=25.0, ge=0, allow_inf_nan=False)
    """``vicreg``: weight of the variance term. VICReg: 25."""
    covariance_weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """``vicreg``: weight of the covariance term. VICReg: 1."""
    target_std: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """``vicreg``: standard deviation below which a feature is penalised. VICReg: 1."""
    target_cosine: float = Field(default=0.0, ge=-1, le=1, allow_inf_nan=False)
    """``profile``: target for the mean cosine over pairs of different tokens."""
    slices: int = Field(default=256, ge=1)
    """``sigreg``, ``visreg``: number of random directions."""
    knots: int = Field(default=17, ge=2)
    """``sigreg``: points of the quadrature on [0, 3]."""
    seed: int = 0
    """Seed of the module's own generator (random groups, subsets, directions)."""

    @field_validator("form")
    @classmethod
    def _known_form(cls, form: str) -> str:
        return one_of("form", form, FORMS)

    @field_validator("compat")
    @classmethod
    def _known_compat(cls, compat: str | None) -> str | None:
        return compat if compat is None else one_of("compat", compat, COMPAT)

    @model_validator(mode="after")
    def _can_be_computed(self) -> LossConfig:
        info = self.info
        if self.pairs == "grouped" and info.kind == "features":
            raise ConfigError(f"form {self.form!r} has no pairs to group; use pairs='all' or 'subset'.")
        if info.ordered and self.within != "sequence":
            raise ConfigError(
                f"form {self.form!r} needs the tokens of one sequence in order; use within='sequence', not "
                f"{self.within!r}."
            )
        if self.compat is not None and not info.compat:
            known = ", ".join(name for name, other in FORMS.items() if other.compat)
            raise ConfigError(f"compat={self.compat!r} does not cover form {self.form!r}, only {known}; omit compat.")
        if self.impl == "fused" and self.compat is not None:
            raise ConfigError("impl='fused' does not cover compat; use impl='auto' or 'chunked'.")
        if self.impl not in ("auto", *info.implementations):
            known = ", ".join(name for name, other in FORMS.items() if self.impl in other.implementations)
            raise ConfigError(
                f"impl={self.impl!r} does not cover form {self.form!r}, only {known}; use impl='auto' or "
                f"{' or '.join(map(repr, info.implementations))}."
            )
        return self

    @property
    def info(self) -> FormInfo:
        """The form's entry in the registry."""
        return FORMS[self.form]

    @property
    def draws(self) -> bool:
        """Whether the loss draws at random: groups, a subset, or the form's own directions."""
        return self.pairs != "all" or self.info.random

    @property
    def clamp(self) -> float | None:
        """With ``compat``: cosines beyond 1 - clamp keep the value and the slope of the boundary."""
        return None if self.compat is None else COMPAT[self.compat]

    @property
    def diagonal(self) -> bool:
        """Whether the mean includes the pairs i = j."""
        return self.info.diagonal == "yes" or (self.info.diagonal == "compat" and self.compat is not None)


class CallOptions(TypedDict, total=False):
    """The keywords of :func:`decondense.dispersion_loss`: the fields of :class:`LossConfig` except ``seed``."""

    form: str
    tau: float
    delta: float
    impl: Impl
    pairs: Pairs
    group_size: int
    subset_size: int
    within: Within
    compat: str | None
    gradient: Gradient
    margin: float
    norm_weight: float
    variance_weight: float
    covariance_weight: float
    target_std: float
    target_cosine: float
    slices: int
    knots: int


class LossOptions(CallOptions, total=False):
    """The fields of :class:`LossConfig` as keywords, for type checkers and editors: ``**options: Unpack[LossOptions]``.

    :class:`decondense.DispersionLoss` and :func:`decondense.attach` take them.
    """

    seed: int
