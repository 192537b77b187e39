"""Sizes of a study's models, from building them on the meta device; never over the network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from decondense.config import ConfigError, ModelConfig, StudyConfig
from decondense.studies.cost.runs import runs_of

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Size:
    """The sizes of a model that determine its cost."""

    total: float | None
    """Parameters, tied ones once; None: unknown."""
    without_embeddings: float | None
    """Parameters without embedding tables and head."""
    computing: float | None
    """Parameters that multiply every token: without embedding tables, with the head."""
    layers: int = 0
    features: int = 0
    """Width of a hidden state."""
    attention: int = 0
    """Heads times features per head."""
    adapters: float | None = None
    """Parameters of the adapters, the only ones that are trained; None: all are trained."""
    note: str = ""
    """Why the count is not exact."""

    @property
    def trained(self) -> float | None:
        """Parameters that get a gradient."""
        return self.total if self.adapters is None else self.adapters


UNKNOWN = Size(None, None, None, note="unknown")


def size_of_module(model: nn.Module, config: ModelConfig | None = None) -> Size:
    """Count the parameters of a Hugging Face model, which may be on the meta device.

    Args:
        model: with ``config`` and ``get_output_embeddings``.
        config: how the study describes it; adapters are counted from there.
    """
    from torch import nn as modules
    from transformers.pytorch_utils import Conv1D

    described: Any = model
    settings = described.config.get_text_config()
    head = described.get_output_embeddings()
    tables = {
        id(module.weight): module.weight.numel() for module in model.modules() if isinstance(module, modules.Embedding)
    }
    head_weight = None if head is None else head.weight
    total = sum(p.numel() for p in model.parameters())
    outside = sum(tables.values())
    if head_weight is not None and id(head_weight) not in tables:
        outside += head_weight.numel()
    experts = next(
        (
            int(getattr(settings, name))
            for name in ("num_experts", "num_local_experts", "n_routed_experts")
            if isinstance(getattr(settings, name, None), int)
        ),
        0,
    )
    chosen = getattr(settings, "num_experts_per_tok", None)
    computing = 0.0 if head_weight is None else float(head_weight.numel())
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or id(parameter) in tables or parameter is head_weight:
            continue  # norms and biases are added, not multiplied
        share = chosen / experts if experts and chosen and ".experts." in name else 1.0
        computing += share * parameter.numel()
    heads = getattr(settings, "num_attention_heads", None) or 0
    width = int(settings.hidden_size)
    per_head = getattr(settings, "head_dim", None) or (width // heads if heads else 0)
    adapters = None
    if config is not None and config.lora is not None:
        targets = config.lora.targets
        adapters = float(
            sum(
                config.lora.rank * sum(module.weight.shape)
                for name, module in model.named_modules()
                if isinstance(module, (modules.Linear, Conv1D))
                and module is not head
                and (targets == "all-linear" or any(name == t or name.endswith(f".{t}") for t in targets))
            )
        )
    return Size(
        float(total),
        float(total - outside),
        computing,
        layers=int(settings.num_hidden_layers),
        features=width,
        attention=heads * per_head,
        adapters=adapters,
    )


class Models:
    """The distinct models of a study, each built once on the meta device and never over the network."""

    def __init__(self, study: StudyConfig) -> None:
        self.study = study
        self.notes: list[str] = []
        self.sizes: dict[str, Size] = {}
        self.vocabulary = self._vocabulary()

    def resolved(self, model: ModelConfig) -> ModelConfig:
        """``prepared:NAME`` followed to what it is prepared from."""
        name = model.prepared
        return model if name is None else self.study.prepared[name].model.model_copy(update={"lora": model.lora})

    def size(self, model: ModelConfig, positions: int) -> Size:
        """The size of a model, from its architecture, its files, the hub's cache or the study."""
        model = self.resolved(model)
        key = f"{model.model_dump_json()} {positions}"
        if key not in self.sizes:
            self.sizes[key] = self._size(model, positions)
        return self.sizes[key]

    def _size(self, model: ModelConfig, positions: int) -> Size:
        import torch

        from decondense.limits import model_positions

        with torch.device("meta"):
            built = self.build(model, positions)
        if built is not None:
            longest = model_positions(built)
            if self.study.measure is None and longest is not None and longest < positions:
                raise ConfigError(
                    f"model.pretrained {model.pretrained!r} has {longest} positions, fewer than "
                    f"train.max_seq_length {positions}; lower train.max_seq_length."
                )
            return size_of_module(built, model)
        if model.parameters is not None:
            note = (
                f"{model.pretrained}: parameters as stated in the study; attention and the pairs of the dispersion "
                "loss are not counted"
            )
            return Size(model.parameters, None, model.parameters, note=note)
        return Size(None, None, None, note=f"{model.pretrained}: not on this machine, so its size and cost are unknown")

    def build(self, model: ModelConfig, positions: int) -> nn.Module | None:
        """The model with random weights on the current default device; None: no configuration on this machine."""
        from transformers import AutoConfig

        from decondense.models import build_model, empty_model, load_config

        if model.pretrained is None:
            vocabulary = self.vocabulary
            if vocabulary is None:
                try:
                    vocabulary = int(AutoConfig.for_model(model.architecture).get_text_config().vocab_size)
                except ValueError:
                    vocabulary = self.study.corpus.vocab_size  # build_model explains what is wrong with the name
            return build_model(model.model_copy(update={"lora": None}), vocabulary, positions, 0)
        try:
            return empty_model(load_config(model.pretrained, revision=model.revision, local_files_only=True))
        except (OSError, ValueError, KeyError, ImportError, AttributeError):
            return None

    def _vocabulary(self) -> int | None:
        name = self.study.corpus.tokenizer
        if name is None:
            return self.study.corpus.vocab_size
        if all(self.resolved(run.model).pretrained is not None for run in runs_of(self.study)):
            return None  # nobody asks
        from decondense.tokenizers import read_tokenizer, vocabulary_of

        try:
            return vocabulary_of(read_tokenizer(name, local_files_only=True))
        except (OSError, ValueError, KeyError, ImportError, AttributeError):
            self.notes.append(
                f"The tokenizer {name} is not on this machine; the architecture's own vocabulary is used."
            )
            return None
