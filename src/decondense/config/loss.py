"""The options of one dispersion objective."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from decondense.config.base import Config, one_of

FORM_NAMES = (
    "angular",
    "orthogonalization",
    "l2_repel",
    "decorrelation",
    "perplexity_entropy",
    "cosine_infonce",
    "l2_infonce",
    "hinge",
    "covariance",
    "mean_cosine",
    "uniformity",
    "vicreg",
    "barlow",
    "koleo",
    "sigreg",
)
"""The objectives, described in ``decondense.losses.FORMS``; here, so that a study file is checked without torch."""
COMPAT_NAMES = ("lm-dispersion:t=0.25", "lm-dispersion:t=0.1")
"""The published versions of the authors' code that can be reproduced (``decondense.losses.COMPAT``)."""


class LossConfig(Config):
    """One dispersion objective (:func:`decondense.dispersion_loss`)."""

    form: str = "angular"
    """Which objective; the names are the keys of ``decondense.losses.FORMS``."""
    tau: float = Field(default=1.0, gt=0)
    """Temperature of the log-mean-exp. Paper: 1."""
    delta: float = Field(default=1e-3, ge=0, lt=1)
    """Smoothing of the angle, theta = arccos(c / sqrt(1 + delta^2)); bounds the slope at c = 1."""
    impl: Literal["auto", "reference", "chunked", "fused"] = "auto"
    pairs: Literal["all", "grouped", "subset"] = "all"
    group_size: int = Field(default=128, ge=2)
    """Tokens in a random group when ``pairs="grouped"``."""
    subset_size: int = Field(default=256, ge=2)
    """Tokens of the random subset when ``pairs="subset"`` (the authors' 256)."""
    within: Literal["sequence", "batch", "world"] = "sequence"
    """Whose tokens are paired: those of one sequence, of the batch, of the batches of all ranks."""
    compat: str | None = None
    """Reproduce a published version of the authors' code; the names are the keys of ``decondense.losses.COMPAT``."""
    gradient: Literal["forward", "recompute"] = "forward"
    """Produce the gradient in the forward sweep (fast), or sweep again in backward (nothing is kept in between)."""
    margin: float = Field(default=0.5, ge=0)
    """``hinge``: cosines above -margin are pushed."""
    norm_weight: float = Field(default=0.1, ge=0)
    """``l2_repel``: weight of the mean squared element of the hidden states."""
    variance_weight: float = Field(default=25.0, ge=0)
    """``vicreg``: weight of the variance term. VICReg: 25."""
    covariance_weight: float = Field(default=1.0, ge=0)
    """``vicreg``: weight of the covariance term. VICReg: 1."""
    target_std: float = Field(default=1.0, gt=0)
    """``vicreg``: standard deviation below which a feature is pushed. VICReg: 1."""
    slices: int = Field(default=256, ge=1)
    """``sigreg``: number of random directions."""
    knots: int = Field(default=17, ge=2)
    """``sigreg``: points of the quadrature on [0, 3]."""
    seed: int = 0
    """Seed of the module's own generator (random groups, subsets, directions)."""

    @field_validator("form")
    @classmethod
    def _known_form(cls, form: str) -> str:
        return one_of("form", form, FORM_NAMES)

    @field_validator("compat")
    @classmethod
    def _known_compat(cls, compat: str | None) -> str | None:
        return compat if compat is None else one_of("compat", compat, COMPAT_NAMES)
