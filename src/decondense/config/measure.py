"""How condensation is measured."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from decondense.config.base import Config, one_of
from decondense.metrics import BUILT_IN, metric_names

METRIC_NAMES = BUILT_IN
"""This package's side metrics; :func:`decondense.metrics.metric_names` also knows those of other packages."""


class MeasureConfig(Config):
    """How condensation is measured (:func:`decondense.measure`)."""

    tokens: int = Field(default=512, ge=2)
    """Length in tokens to which a passage is truncated. Paper: 512."""
    bins: int = Field(default=128, ge=2, le=2048)
    """Bins of the cosine histogram on [-1, 1], a power of two. Paper: 128."""
    histograms: tuple[Literal["pooled", "averaged"], ...] = ("pooled", "averaged")
    """``pooled``: all pairs of all passages. ``averaged``: the mean cosine matrix over passages, as in the paper."""
    metrics: tuple[str, ...] = ()
    """Side metrics by name (:func:`decondense.metrics.metric_names`), or ``("all",)``; they cost more than the means.
    """
    logits: bool = False
    """Measure the logits as one more state, which the authors' code also offers."""
    blocks: str | None = None
    """Dotted path of the list of transformer blocks; None: found by :func:`decondense.blocks.find_blocks`."""
    tokens_first: bool | None = None
    """Whether the blocks return [tokens, batch, width]; None: inferred from the shapes. A given value is checked."""
    dataset: str = "embedded"
    """Source of the passages: ``embedded``, ``wikitext``, ``pubmed_qa``, ``imdb``, ``squad``, or a hub id."""
    passages: int = Field(default=100, ge=1)
    """Number of passages. Paper: 100."""
    passage_words: tuple[int, int] = (1024, 1280)
    """Minimum and maximum words in a passage, before truncation to ``tokens``. Paper: 1024 to 1280."""
    passage_seed: int = 0
    """Seed for drawing the passages."""
    batch_size: int | None = Field(default=None, ge=1)
    """Passages per forward pass; None: chosen from the free memory. Results do not depend on it."""
    resamples: int = Field(default=2000, ge=100)
    """Number of bootstrap resamples of the passages."""
    confidence: float = Field(default=0.95, gt=0, lt=1)
    """Confidence level of the intervals."""

    @field_validator("bins")
    @classmethod
    def _power_of_two(cls, bins: int) -> int:
        if bins & (bins - 1):
            raise ValueError(f"bins must be a power of two from 2 to 2048, got {bins}; the paper uses 128.")
        return bins

    @field_validator("metrics")
    @classmethod
    def _known_metrics(cls, metrics: tuple[str, ...]) -> tuple[str, ...]:
        known = (*metric_names(), "all") if metrics else ()
        return tuple(one_of("metric", name, known) for name in metrics)

    @field_validator("passage_words")
    @classmethod
    def _ordered_words(cls, words: tuple[int, int]) -> tuple[int, int]:
        if not 2 <= words[0] <= words[1]:
            raise ValueError(f"passage_words must be (fewest, most) with 2 <= fewest <= most, got {words}.")
        return words


def first_passage(settings: MeasureConfig, seed: int) -> int:
    """The seed of the first passage of run ``seed`` of a measured study; passage r draws with this seed + r."""
    return settings.passage_seed + seed * settings.passages
