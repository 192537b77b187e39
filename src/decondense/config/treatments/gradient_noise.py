"""Control: noise with the norm of the dispersion loss's gradient, in its place."""

from __future__ import annotations

from typing import ClassVar

from decondense.config.treatment import Treatment


class GradientNoiseConfig(Treatment):
    """Control: the gradient of ``dispersion`` in the hidden states becomes isotropic noise of the same norm.

    Layers, weight and schedule are those of ``dispersion`` in the same arm; for the equation, see
    :mod:`decondense.training.treatments.gradient_noise`.
    """

    title: ClassVar[str] = "gradient noise"
