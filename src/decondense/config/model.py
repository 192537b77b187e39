"""The model that an arm starts from."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from decondense.config.base import Config, formerly

PREPARED = "prepared:"
"""Prefix of a model that the study trains for itself first: ``prepared:NAME``, NAME a key of ``prepared``."""

Overrides = dict[str, int | float | str | bool | None]


class LoraConfig(Config):
    """Train low-rank adapters instead of the weights (Hu et al. 2022, arXiv:2106.09685); needs the package peft."""

    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0)
    """The adapters' output is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names of the modules that get adapters; ``all-linear``: every linear layer except the language model head."""


class ModelConfig(Config):
    """The model that every arm starts from."""

    architecture: str = "gpt2"
    """A Hugging Face ``model_type`` with a causal language model head, initialised from scratch."""
    overrides: Overrides = Field(default_factory=dict)
    """Fields of the architecture's configuration. The vocabulary size always follows the tokenizer."""
    pretrained: str | None = Field(default=None, **formerly("start", "pretrained"))
    """Directory or hub id of a pretrained model to train further (mid-training) instead of ``architecture``, or
    ``prepared:NAME``."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    lora: LoraConfig | None = None
    parameters: float | None = Field(default=None, gt=0)
    """Number of parameters of the start, used only to estimate the cost without loading the model."""

    @property
    def prepared(self) -> str | None:
        """NAME when the start is ``prepared:NAME``."""
        return prepared_name(self.pretrained)


class ArmModelConfig(Config):
    """Settings of an arm's own model; settings that are left out are the study's.

    Runs of such an arm start from other weights than the baseline's, so they are compared by seed and data order only.
    """

    architecture: str | None = None
    overrides: Overrides = Field(default_factory=dict)
    """Merged into the study's overrides, or used instead of them when the arm names an architecture."""
    pretrained: str | None = Field(default=None, **formerly("start", "pretrained"))
    revision: str | None = None
    lora: LoraConfig | None = None
    parameters: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _one_origin(self) -> ArmModelConfig:
        if self.pretrained is not None and (self.architecture is not None or self.overrides):
            raise ValueError(
                f"pretrained {self.pretrained!r} brings its own architecture; omit architecture and overrides."
            )
        return self

    def over(self, base: ModelConfig) -> ModelConfig:
        """The arm's whole model."""
        lora = base.lora if self.lora is None else self.lora
        if self.pretrained is not None:
            return ModelConfig(
                pretrained=self.pretrained, revision=self.revision, lora=lora, parameters=self.parameters
            )
        if self.architecture is not None:
            return ModelConfig(architecture=self.architecture, overrides=self.overrides, lora=lora)
        overrides = {**base.overrides, **self.overrides}
        return base.model_copy(update={"overrides": overrides, "lora": lora})


def prepared_name(start: str | None) -> str | None:
    """NAME of ``prepared:NAME``; None for any other start."""
    return start[len(PREPARED) :] if start is not None and start.startswith(PREPARED) else None
