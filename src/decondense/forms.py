r"""The registry of the objectives: what each form is, where it comes from, what its options do. Without torch.

:data:`FORMS` is the only list of them. Configuration, documentation and cost estimates read it; the form itself, its
definition and its engine, is the file ``losses/forms/<name>.py``. All forms are *minimised*, and spread the hidden
states of a sequence apart, except the controls ``centring`` and ``straightness``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

__all__ = ["COMPAT", "COMPAT_EPSILON", "FORMS", "FormInfo"]

_PAPER = "Liu et al. 2026, arXiv:2602.00217"
_PARENT = "Wang & He 2025 (Diffuse and Disperse), arXiv:2506.09027"

Kind = Literal["pairs", "rows", "features"]
Cost = Literal["pairs", "gram", "mean", "slices"]


@dataclass(frozen=True)
class FormInfo:
    """What a form is. ``equation`` is LaTeX over the real tokens i, j of one segment (n of them, D features).

    A segment is a sequence, or a document of a packed sequence.
    """

    name: str
    equation: str
    """Loss of one segment."""
    source: str
    kind: Kind
    """``pairs``: a sum over pairs; ``rows``: a statistic of each token against the others; ``features``: no pairs."""
    extremes: str
    """The value when all tokens are equal, and the minimum."""
    uses: tuple[str, ...] = ()
    """Options of :class:`decondense.config.LossConfig` that change this form."""
    defaults: Mapping[str, float] = field(default_factory=dict)
    """Published values where they differ from this package's defaults (to be passed explicitly)."""
    euclidean: bool = False
    """True if the lengths of the states matter, not only their directions: not scale invariant."""
    diagonal: Literal["no", "yes", "compat"] = "no"
    """Whether the pairs i = j belong to the mean; ``compat``: only with ``compat=``."""
    compat: bool = False
    """True if ``compat=`` reproduces what the research code does for it."""
    tiled: bool = True
    """True if ``impl="chunked"`` covers it; else ``auto`` takes the dense reference."""
    fused: bool = False
    """True if ``impl="fused"`` covers it."""
    random: bool = False
    """True if the form itself draws random numbers (and therefore needs a generator)."""
    teacher: bool = False
    """True if it compares with the states of a teacher (``teacher=``)."""
    ordered: bool = False
    """True if the order of the tokens matters, so that only tokens of one sequence can be combined."""
    held: str = ""
    """What is held constant in the gradient, which then differs from the gradient of the value; empty: nothing."""
    cost: Cost = "pairs"
    """Products per token: with its partners (``pairs``), the smaller of n and D (``gram``), one (``mean``), ``slices``.
    """

    @property
    def implementations(self) -> tuple[str, ...]:
        """What ``impl=`` can be for this form, besides ``auto``."""
        return ("reference", *(("chunked",) if self.tiled else ()), *(("fused",) if self.fused else ()))


def _forms() -> dict[str, FormInfo]:
    angle = r"\theta_{ij} = \arccos\big(c_{ij}/\sqrt{1+\delta^2}\big)"
    forms = [
        FormInfo(
            "angular",
            rf"\log \frac{{1}}{{n(n-1)}} \sum_{{i \ne j}} \exp(-\theta_{{ij}} / (\pi\tau)), \quad {angle}",
            f"{_PAPER}, the paper's choice (mean instead of sum: the same gradient, a value that does not grow with n)",
            "pairs",
            uses=("tau", "delta"),
            extremes="all equal: about 0 (-arctan(delta)/(pi tau)); orthogonal: -1/(2 tau); minimum: a regular simplex",
            fused=True,
            compat=True,
        ),
        FormInfo(
            "orthogonalization",
            rf"\frac{{1}}{{n(n-1)}} \sum_{{i \ne j}} \max(0, \tfrac12 - \theta_{{ij}}/\pi)^2, \quad {angle}",
            f"{_PAPER}, rival form",
            "pairs",
            uses=("delta",),
            extremes="all equal: about 1/4; minimum 0, when no cosine is above 0",
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
            diagonal="compat",
            extremes="all equal: the norm term alone; without that term there is no minimum",
            euclidean=True,
            compat=True,
        ),
        FormInfo(
            "decorrelation",
            r"\frac{1}{D(D-1)} \sum_{a \ne b} r_{ab}^2, \quad r = \mathrm{corr}(Z)",
            f"{_PAPER}, rival form (the paper sums over a != b; here the mean, so that a weight carries over "
            "between widths)",
            "features",
            cost="gram",
            extremes="perfectly correlated features: 1; minimum 0",
            compat=True,
        ),
        FormInfo(
            "perplexity_entropy",
            r"-\frac1n \sum_i H_i, \quad H_i = -\sum_{j \ne i} P_{ij} \log P_{ij}, \quad "
            r"P_{i\cdot} = \mathrm{softmax}_{j \ne i}(-|z_i - z_j|^2/\tau)",
            f"research code of {_PAPER}, not in the paper (tau is its sigma squared)",
            "rows",
            uses=("tau",),
            tiled=False,
            extremes="all distances equal (so also all tokens equal): -log(n-1), the minimum; maximum 0",
            euclidean=True,
        ),
        FormInfo(
            "cosine_infonce",
            r"\log \frac{1}{n^2} \sum_{i, j} \exp(c_{ij}/\tau)",
            f"{_PARENT}, InfoNCE with D = -cosine, diagonal included",
            "pairs",
            uses=("tau",),
            defaults={"tau": 0.5},
            diagonal="yes",
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
            diagonal="yes",
            extremes="all equal: 0; minimum -log n, at infinite distances",
            euclidean=True,
        ),
        FormInfo(
            "hinge",
            r"\frac{1}{n^2} \sum_{i, j} \max(0, \epsilon + c_{ij})^2",
            f"{_PARENT}, hinge with D = -cosine, diagonal included (margin is the paper's epsilon)",
            "pairs",
            uses=("margin",),
            diagonal="yes",
            extremes="all equal: (1 + margin)^2; minimum (1 + margin)^2 / n, from the diagonal",
            fused=True,
        ),
        FormInfo(
            "covariance",
            r"\frac{1}{D} \sum_{a \ne b} \mathrm{Cov}_{ab}^2, "
            r"\quad \mathrm{Cov} = D \cdot \mathrm{cov}(\hat z_1 \dots \hat z_n)",
            f"{_PARENT}, covariance (unit vectors scaled to length sqrt(D): the value depends on no norm, nor on D)",
            "features",
            cost="gram",
            extremes="all equal: 0, the minimum (a covariance does not change with a common direction)",
        ),
        FormInfo(
            "mean_cosine",
            r"\frac{1}{n(n-1)} \sum_{i \ne j} c_{ij} = \frac{|\sum_i \hat z_i|^2 - \sum_i |\hat z_i|^2}{n(n-1)}",
            "Gao et al. 2019 (Representation Degeneration), the cosine regulariser, on tokens",
            "features",
            cost="mean",
            extremes="all equal: 1; minimum -1/(n-1), when the unit vectors sum to 0",
        ),
        FormInfo(
            "profile",
            r"\big(\frac{1}{n(n-1)} \sum_{i \ne j} c_{ij} - c^*\big)^2",
            "this package: the mean cosine of a measured layer as the target of each sequence",
            "features",
            cost="mean",
            uses=("target_cosine",),
            extremes="all equal: (1 - c*)^2; minimum 0, at a mean cosine of c*",
        ),
        FormInfo(
            "centring",
            r"|\bar z|^2 / q, \quad \bar z = \frac1n \sum_i z_i, "
            r"\quad q = \frac1n \sum_i |z_i|^2 \text{ held constant}",
            "this package, a control: one shift of all tokens removes the common direction and repels no pair",
            "features",
            cost="mean",
            held="q",
            extremes="all equal: 1; minimum 0, when the mean state is 0",
        ),
        FormInfo(
            "gram",
            r"\frac{1}{n(n-1)} \sum_{i \ne j} (c_{ij} - c'_{ij})^2",
            "this package: the cosines c' of a teacher of any width, on the same tokens",
            "rows",
            extremes="the teacher's cosines: 0, the minimum; maximum 4",
            teacher=True,
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
            cost="gram",
            uses=("variance_weight", "covariance_weight", "target_std"),
            extremes="all equal: about lambda_var * gamma; minimum 0",
            euclidean=True,
        ),
        FormInfo(
            "barlow",
            r"\frac1D \sum_{a \ne b} r_{ab}^2, \quad r = \mathrm{corr}(Z)",
            "Zbontar et al. 2021 (Barlow Twins), arXiv:2103.03230, the redundancy term of one view: "
            "(D - 1) times `decorrelation`",
            "features",
            cost="gram",
            extremes="perfectly correlated features: D - 1; minimum 0",
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
            cost="slices",
            uses=("slices", "knots"),
            extremes="minimum 0, for an isotropic standard normal cloud",
            euclidean=True,
            random=True,
        ),
        FormInfo(
            "visreg",
            r"\frac1D \sum_a (1 - \sigma_a)^2 "
            r"+ \frac{1}{Mn} \sum_{m,i} \big(y_{m(i)} - \Phi^{-1}(\tfrac{i - 1/2}{n})\big)^2 "
            r"+ \frac1D \sum_a \bar z_a^2, \quad y_m = \langle a_m, (z - \bar z)/\sigma \rangle \text{ in order}",
            "Wu et al. 2026 (VISReg), arXiv:2606.02572: scale, sliced Wasserstein shape on M random unit directions "
            "(sigma held constant there) and centre, over tokens",
            "features",
            cost="slices",
            uses=("slices",),
            extremes="minimum about 0, for an isotropic standard normal cloud",
            euclidean=True,
            random=True,
            held="sigma in y",
        ),
        FormInfo(
            "straightness",
            r"\frac{1}{n-2} \sum_i \big(1 - \cos(z_i - z_{i-1}, z_{i+1} - z_i)\big)",
            "Huang et al. 2026 (Semantic Tube Prediction), arXiv:2602.22617, on all neighbouring triples, not on one "
            "random triple: locally straight trajectories, the opposite prior",
            "features",
            cost="mean",
            ordered=True,
            extremes="a straight line: 0, the minimum; back and forth: 2; all equal: 1 (a step of 0 has the cosine 0)",
        ),
    ]
    return {form.name: form for form in forms}


FORMS: Mapping[str, FormInfo] = MappingProxyType(_forms())
"""All forms by name."""

COMPAT: Mapping[str, float] = MappingProxyType({"lm-dispersion:t=0.25": 0.25, "lm-dispersion:t=0.1": 0.1})
"""The research code's published versions: name to the clamp t of the cosines (class default; training script)."""

COMPAT_EPSILON = 1e-2
"""What the research code adds inside its log-sum-exp and to the norms."""
