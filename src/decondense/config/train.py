"""The text, one training run, and what is evaluated."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from decondense.config.base import Config, formerly
from decondense.privacy import without_credentials


class CorpusConfig(Config):
    """The text for training and for held-out evaluation."""

    source: str = "python_docs"
    """``python_docs`` (embedded default), the path of a file or directory of text, or the hub id of a data set
    (``OWNER/NAME``). User, password and query of a URL are removed."""
    subset: str | None = None
    """Data sets only: configuration to read."""
    split: str = "train"
    """Directories and data sets only: split to read; the held-out documents come from it too."""
    text_field: str | None = None
    """Field that holds the text; None: ``text``, or the only field of strings that is not an id, a URL or a date."""
    streaming: bool = False
    """Hub only: read the rows one by one over the network instead of downloading the data set first."""
    max_characters: int | None = Field(default=None, ge=1, **formerly("most_characters", "max_characters"))
    """Maximum number of characters, taken in the order of the source; None: all of them."""
    documents: Literal["standard_library", "scientific", "all"] = "all"
    """``python_docs`` only: the documentation of the standard library alone, with numpy, scipy and matplotlib, or of
    every dependency too."""
    tokenizer: str | None = None
    """Directory or hub id of a tokenizer to use; None: a byte-level BPE is trained on the training split."""
    vocab_size: int = Field(default=4096, ge=300, le=65_536, **formerly("vocabulary", "vocab_size"))
    """Vocabulary size of the trained BPE; not used when ``tokenizer`` is given."""
    held_out: float = Field(default=0.05, gt=0, lt=0.5)
    """Fraction of the documents to hold out, chosen by the hash of their text."""

    # here, so that no message, study file or row ever holds them
    @field_validator("source")
    @classmethod
    def _no_credentials(cls, value: str) -> str:
        return without_credentials(value)


class TrainConfig(Config):
    """One training run. Defaults are those of the embedded study; the paper's values are given where they differ."""

    later: ClassVar[frozenset[str]] = frozenset({"optimizer", "muon_learning_rate"})

    steps: int = Field(default=300, ge=1)
    batch_size: int = Field(default=16, ge=1, **formerly("batch_sequences", "batch_size"))
    """Sequences per optimizer step (over all ranks and accumulation steps)."""
    micro_batch_size: int | None = Field(default=None, ge=1, **formerly("micro_batch_sequences", "micro_batch_size"))
    """Sequences per forward pass on one rank; None: as many as in the step."""
    max_seq_length: int = Field(default=128, ge=2, **formerly("sequence_tokens", "max_seq_length"))
    """Tokens per training sequence."""
    learning_rate: float = Field(default=3e-3, gt=0)
    """Peak learning rate of AdamW. Paper: 5e-5 in mid-training."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """``muon``: torch's Muon (:mod:`decondense.training.muon`) for the matrices of the blocks, AdamW for embeddings,
    head, norms and biases."""
    muon_learning_rate: float | None = Field(default=None, gt=0)
    """Peak rate of the matrices with ``muon``; None: ``learning_rate``. In either case the update of an A x B
    matrix is scaled by 0.2 sqrt(max(A, B)), which makes it about as large as an AdamW update (arXiv:2502.16982): a rate
    that suits AdamW is a reasonable start. A sweep varies ``learning_rate``."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(default=0.1, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0, **formerly("gradient_clip", "max_grad_norm"))
    """Gradients are clipped to this global L2 norm."""
    warmup: float = Field(default=0.1, ge=0, lt=1)
    """Fraction of the steps over which the learning rate rises linearly. Paper: 0.2."""
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", **formerly("decay", "lr_scheduler_type")
    )
    """How the learning rate falls after the warm-up."""
    precision: Literal["fp32", "bf16"] = "fp32"
    gradient_checkpointing: bool = False
    fsdp: bool = False
    """Shard parameters, gradients and optimizer state over the ranks (FSDP2) instead of replicating them (DDP). Has
    no effect on a single process."""
    threads: int | None = Field(default=1, ge=1)
    """CPU threads of a run; fixed, because the number changes results in the last bits. None: torch's default."""
    log_every: int = Field(default=10, ge=1)
    """Optimizer steps between two logged rows."""
    checkpoint_every: int = Field(default=50, ge=1)
    """Optimizer steps between two checkpoints from which a killed run can resume."""

    @model_validator(mode="after")
    def _aligned(self) -> TrainConfig:
        if self.checkpoint_every % self.log_every:
            # a logged row averages since the previous one; a run that goes on between two could not know the first half
            raise ValueError(
                f"checkpoint_every {self.checkpoint_every} must be a multiple of log_every {self.log_every}."
            )
        if self.muon_learning_rate is not None and self.optimizer != "muon":
            raise ValueError("muon_learning_rate has no effect without optimizer: muon; omit it.")
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of micro_batch_size {self.micro_batch_size}."
            )
        return self


class EvaluateConfig(Config):
    """What is evaluated, and when. Comparisons use the final checkpoint, which is fixed in advance."""

    later: ClassVar[frozenset[str]] = frozenset({"document_tokens"})

    points: tuple[float, ...] = (0.0, 0.1, 0.25, 0.5, 1.0)
    """Fractions of training at which condensation and held-out loss are measured; 0 and 1 are always included."""
    validation_tokens: int = Field(default=32_768, ge=1)
    """Maximum number of held-out tokens, taken as whole documents in a fixed order."""
    document_tokens: int | None = Field(default=None, ge=2)
    """Maximum tokens per held-out document; None: all. Documents of similar length have similar weights, so that a few
    long ones do not dominate the mean (the interval depends on their effective number)."""
    passages: int = Field(default=32, ge=1)
    """Held-out passages on which condensation is measured."""
    passage_tokens: int = Field(default=128, ge=2)
    blocks: str | None = None
    """Dotted path of the list of transformer blocks to measure; None: found automatically."""
    tokens_first: bool | None = None
    """Whether the blocks return [tokens, batch, width]; None: inferred from the shapes."""
    held_out_part: Literal["validation", "tuning"] = "validation"
    """Which held-out documents are scored: ``validation``, the first ones, or ``tuning``, the ones at the end on which
    learning rates are chosen."""
    tasks: tuple[str, ...] = ()
    """Benchmarks of the final checkpoint (:func:`decondense.evaluate.evaluate`): ``paper``, ``ten``, harness tasks."""
    num_fewshot: Literal["gpt2", "qwen3"] | int = Field(default="gpt2", **formerly("shots", "num_fewshot"))
    """Few-shot examples in the prompts: the paper's for GPT2 or Qwen3, or a number for every task that takes any."""
    limit: int | None = Field(default=None, ge=1)
    """Maximum number of items per benchmark; None: all. Paper: 500 (GPT2), 200 (Qwen3)."""
    data_dir: str | None = None
    """Directory with local benchmark files; None: the hub."""
    task_batch: int = Field(default=16, ge=1)
    """Benchmark requests per forward pass."""

    @field_validator("points")
    @classmethod
    def _fractions(cls, points: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0 <= point <= 1 for point in points):
            raise ValueError(f"evaluation points must be fractions of training between 0 and 1, got {points}.")
        return tuple(sorted({0.0, 1.0, *points}))

    def steps(self, total: int) -> list[int]:
        """The optimizer steps after which to evaluate, in ascending order without repeats."""
        return sorted({round(point * total) for point in self.points})
