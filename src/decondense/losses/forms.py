r"""The objectives by name: what each one is, where it comes from, what its parameters do (no torch in here).

:data:`FORMS` is the only list of them; :class:`Settings` is a validated choice of form and parameters that every
implementation takes. All forms are *minimised* to spread the hidden states of a sequence apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from decondense.config import LossConfig, suggest

__all__ = ["COMPAT", "FORMS", "FormInfo", "Settings", "form_info"]

_PAPER = "Liu et al. 2026, arXiv:2602.00217"
_PARENT = "Wang & He 2025 (Diffuse and Disperse), arXiv:2506.09027"

Kind = Literal["pairs", "rows", "features"]


@dataclass(frozen=True)
class FormInfo:
    """What a form is. ``equation`` is LaTeX over the real tokens i, j of one unit (n of them, D features)."""

    name: str
    equation: str
    """Loss of one unit (a sequence, or a document of a packed one)."""
    source: str
    kind: Kind
    """``pairs``: a sum over pairs; ``rows``: a statistic of each token against the others; ``features``: no pairs."""
    uses: tuple[str, ...] = ()
    """Keywords of :func:`decondense.dispersion_loss` that change this form."""
    defaults: Mapping[str, float] = field(default_factory=dict)
    """Published values where they differ from this package's defaults (to be passed explicitly)."""
    extremes: str = ""
    """What the value is when all tokens agree, and the least it can be."""
    euclidean: bool = False
    """True if lengths matter, not directions alone: not scale invariant."""
    fused: bool = False
    """True if ``impl="fused"`` covers it."""
    compat: bool = False
    """True if ``compat=`` knows what the research code does for it."""
    random: bool = False
    """True if the form itself draws (and therefore needs a generator)."""


def _forms() -> dict[str, FormInfo]:
    angle = r"\theta_{ij} = \arccos\big(c_{ij}/\sqrt{1+\delta^2}\big)"
    forms = [
        FormInfo(
            "angular",
            rf"\log \frac{{1}}{{n(n-1)}} \sum_{{i \ne j}} \exp(-\theta_{{ij}} / (\pi\tau)), \quad {angle}",
            f"{_PAPER}, the paper's choice (mean instead of sum: the same gradient, a value that does not grow with n)",
            "pairs",
            uses=("tau", "delta"),
            extremes="all equal: about 0 (-arctan(delta)/(pi tau)); orthogonal: -1/(2 tau); least: the simplex",
            fused=True,
            compat=True,
        ),
        FormInfo(
            "orthogonalization",
            rf"\frac{{1}}{{n(n-1)}} \sum_{{i \ne j}} \max(0, \tfrac12 - \theta_{{ij}}/\pi)^2, \quad {angle}",
            f"{_PAPER}, rival form",
            "pairs",
            uses=("delta",),
            extremes="all equal: about 1/4; least 0, at no cosine above 0",
            fused=True,
            compat=True,
        ),
        FormInfo(
            "l2_repel",
            r"\log \frac{1}{n(n-1)} \sum_{i \ne j} \exp(-|z_i - z_j|^2/\tau) "
            r"+ \frac{\lambda_{norm}}{n D} \sum_i |z_i|^2",
            f"{_PAPER}, rival form",
            "pairs",
            uses=("tau", "norm_weight"),
            defaults={"norm_weight": 0.1},
            extremes="all equal: the norm term alone; no least value without it",
            euclidean=True,
            compat=True,
        ),
        FormInfo(
            "decorrelation",
            r"\frac{1}{D(D-1)} \sum_{a \ne b} r_{ab}^2, \quad r = \mathrm{corr}(Z)",
            f"{_PAPER}, rival form (the paper sums over a != b; here the mean, so that a weight carries over "
            "between widths)",
            "features",
            extremes="perfectly correlated features: 1; least 0",
            compat=True,
        ),
        FormInfo(
            "perplexity_entropy",
            r"-\frac1n \sum_i H_i, \quad H_i = -\sum_{j \ne i} P_{ij} \log P_{ij}, \quad "
            r"P_{i\cdot} = \mathrm{softmax}_{j \ne i}(-|z_i - z_j|^2/\tau)",
            f"research code of {_PAPER}, not in the paper (tau is its sigma squared)",
            "rows",
            uses=("tau",),
            extremes="all distances equal (so also all tokens equal): -log(n-1), the least; greatest 0",
            euclidean=True,
        ),
        FormInfo(
            "cosine_infonce",
            r"\log \frac{1}{n^2} \sum_{i, j} \exp(c_{ij}/\tau)",
            f"{_PARENT}, InfoNCE with D = -cosine, diagonal included",
            "pairs",
            uses=("tau",),
            defaults={"tau": 0.5},
            extremes="all equal: 1/tau",
            fused=True,
        ),
        FormInfo(
            "l2_infonce",
            r"\log \frac{1}{n^2} \sum_{i, j} \exp(-|z_i - z_j|^2/\tau)",
            f"{_PARENT}, InfoNCE with the squared l2 distance, diagonal included",
            "pairs",
            uses=("tau",),
            defaults={"tau": 0.5},
            extremes="all equal: 0; least -log n, at infinite distances",
            euclidean=True,
        ),
        FormInfo(
            "hinge",
            r"\frac{1}{n^2} \sum_{i, j} \max(0, \epsilon + c_{ij})^2",
            f"{_PARENT}, hinge with D = -cosine, diagonal included (margin is the paper's epsilon)",
            "pairs",
            uses=("margin",),
            extremes="all equal: (1 + margin)^2; least (1 + margin)^2 / n, from the diagonal",
            fused=True,
        ),
        FormInfo(
            "covariance",
            r"\frac{1}{D} \sum_{a \ne b} \mathrm{Cov}_{ab}^2, "
            r"\quad \mathrm{Cov} = D \cdot \mathrm{cov}(\hat z_1 \dots \hat z_n)",
            f"{_PARENT}, covariance (unit vectors scaled to length sqrt(D): the value depends on no norm, nor on D)",
            "features",
            extremes="all equal: 0 (a covariance cannot see a common direction); least 0",
        ),
        FormInfo(
            "mean_cosine",
            r"\frac{1}{n(n-1)} \sum_{i \ne j} c_{ij} = \frac{|\sum_i \hat z_i|^2 - \sum_i |\hat z_i|^2}{n(n-1)}",
            "Gao et al. 2019 (Representation Degeneration), the cosine regulariser, on tokens",
            "features",
            extremes="all equal: 1; least -1/(n-1), when the unit vectors sum to 0",
        ),
        FormInfo(
            "uniformity",
            r"\log \frac{1}{n(n-1)} \sum_{i \ne j} \exp(-2 |\hat z_i - \hat z_j|^2/\tau)",
            "Wang & Isola 2020, arXiv:2005.10242 (their t = 2/tau: the default tau = 1 is the published t = 2)",
            "pairs",
            uses=("tau",),
            extremes="all equal: 0; orthogonal: -4/tau",
            fused=True,
        ),
        FormInfo(
            "vicreg",
            r"\lambda_{var} \frac1D \sum_a \max(0, \gamma - \sqrt{\mathrm{Var}_a + 10^{-4}}) + "
            r"\lambda_{cov} \frac1D \sum_{a \ne b} \mathrm{Cov}_{ab}^2",
            "Bardes et al. 2022 (VICReg), arXiv:2105.04906, the variance and covariance terms, over tokens",
            "features",
            uses=("variance_weight", "covariance_weight", "target_std"),
            extremes="all equal: about lambda_var * gamma; least 0",
            euclidean=True,
        ),
        FormInfo(
            "barlow",
            r"\frac1D \sum_{a \ne b} r_{ab}^2, \quad r = \mathrm{corr}(Z)",
            "Zbontar et al. 2021 (Barlow Twins), arXiv:2103.03230, the redundancy term of one view: "
            "(D - 1) times `decorrelation`",
            "features",
            extremes="perfectly correlated features: D - 1; least 0",
        ),
        FormInfo(
            "koleo",
            r"-\frac1n \sum_i \log \min_{j \ne i} \sqrt{2 - 2 c_{ij}/\sqrt{1+\delta^2}}",
            "Sablayrolles et al. 2019, arXiv:1806.03198 (as in DINOv2), with the chord of the smoothed angle",
            "rows",
            uses=("delta",),
            extremes="all equal: about -log(delta)",
        ),
        FormInfo(
            "sigreg",
            r"\frac{1}{M} \sum_m n \int |\varphi_n(t; \langle a_m, z\rangle) - e^{-t^2/2}|^2 e^{-t^2/2}\,dt",
            "Balestriero & LeCun 2025 (LeJEPA), arXiv:2511.08544: Epps-Pulley statistic on M random unit "
            "directions a_m, trapezoidal rule on t in [-3, 3]",
            "features",
            uses=("slices", "knots"),
            extremes="least 0: an isotropic standard normal cloud",
            euclidean=True,
            random=True,
        ),
    ]
    return {form.name: form for form in forms}


FORMS: Mapping[str, FormInfo] = MappingProxyType(_forms())
"""All forms by name."""

COMPAT: Mapping[str, float] = MappingProxyType({"lm-dispersion:t=0.25": 0.25, "lm-dispersion:t=0.1": 0.1})
"""The research code's published versions: name to the clamp t of the cosines (class default; training script)."""

COMPAT_EPSILON = 1e-2
"""What the research code adds inside its log-sum-exp and to the norms."""


def form_info(name: str) -> FormInfo:
    """Return the :class:`FormInfo` of a name, or raise a ValueError that lists the names."""
    info = FORMS.get(name)
    if info is None:
        raise ValueError(f"unknown form {name!r}.{suggest(name, FORMS)} Known forms: {', '.join(FORMS)}.")
    return info


@dataclass(frozen=True)
class Settings:
    """A form and its parameters, validated; what every implementation takes."""

    form: str
    tau: float
    delta: float
    margin: float
    norm_weight: float
    variance_weight: float
    covariance_weight: float
    target_std: float
    slices: int
    knots: int
    clamp: float | None
    """Compatibility: cosines beyond 1 - clamp keep the value and the slope of the boundary."""

    @property
    def info(self) -> FormInfo:
        """The form."""
        return FORMS[self.form]

    @property
    def epsilon(self) -> float:
        """What is added to a norm before dividing by it (0 but in compatibility mode)."""
        return 0.0 if self.clamp is None else COMPAT_EPSILON

    @property
    def shrink(self) -> float:
        """The factor on the cosine inside the smoothed angle (1 in compatibility mode, where the clamp protects)."""
        return 1.0 / math.sqrt(1.0 + self.delta**2) if self.clamp is None else 1.0

    @property
    def diagonal(self) -> bool:
        """True if the pairs i = j belong to the mean."""
        if self.form in ("cosine_infonce", "l2_infonce", "hinge"):
            return True
        return self.form == "l2_repel" and self.clamp is not None

    @classmethod
    def of(cls, form: str, *, compat: str | None = None, **given: Any) -> Settings:
        """Validate a form's name and parameters; missing parameters take the defaults of ``LossConfig``."""
        info = form_info(form)
        defaults = LossConfig()
        names = [name for name in cls.__dataclass_fields__ if name not in ("form", "clamp")]
        unknown = set(given) - set(names)
        assert not unknown, unknown
        values = {name: given.get(name, getattr(defaults, name)) for name in names}
        for name in ("tau", "target_std"):
            if not (math.isfinite(values[name]) and values[name] > 0):
                raise ValueError(f"{name} is {values[name]!r}; it must be a positive number.")
        if not 0 <= values["delta"] < 1:
            raise ValueError(f"delta is {values['delta']!r}; it must lie in [0, 1) (1e-3 is a good choice).")
        for name in ("margin", "norm_weight", "variance_weight", "covariance_weight"):
            if not (math.isfinite(values[name]) and values[name] >= 0):
                raise ValueError(f"{name} is {values[name]!r}; it must be a number of at least 0.")
        for name, least in (("slices", 1), ("knots", 2)):
            if values[name] < least:
                raise ValueError(f"{name} is {values[name]!r}; it must be at least {least}.")
        clamp = None
        if compat is not None:
            if compat not in COMPAT:
                raise ValueError(f"unknown compat {compat!r}.{suggest(compat, COMPAT)} Known: {', '.join(COMPAT)}.")
            if not info.compat:
                known = ", ".join(name for name, other in FORMS.items() if other.compat)
                raise ValueError(f"compat={compat!r} does not cover form {form!r}, only {known}; leave compat out.")
            clamp = COMPAT[compat]
        return cls(form=form, clamp=clamp, **values)
