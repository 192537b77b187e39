"""What a row is: its kinds, their fields, and the checks when one is made or read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from decondense.privacy import publishable, without_credentials

SCHEMA_VERSION = 1
VOLATILE = ("timing", "provenance")

Row = dict[str, Any]


class RecordError(ValueError):
    """A row or a file of rows that cannot be used; the message names the file and the line."""


_MAX_GRAD_NORM = AliasChoices("max_grad_norm", "gradient_clip")
"""The field and its name in rows of earlier releases."""


class _Base(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    kind: str
    schema_version: int = SCHEMA_VERSION

    @field_validator("schema_version")
    @classmethod
    def _readable(cls, version: int) -> int:
        if version > SCHEMA_VERSION:
            raise ValueError(
                f"written by a newer decondense (schema {version}, this one reads up to {SCHEMA_VERSION}); update "
                "decondense"
            )
        return version


class _CellRow(_Base):
    study: str
    study_fingerprint: str
    arm: str
    seed: int


class RunRow(_CellRow):
    """The life of one cell (arm x seed). Only a row with a terminal status makes a cell done."""

    kind: Literal["run"]
    status: Literal["started", "resumed", "finished", "failed"]
    config: dict[str, Any]
    """Configuration of the whole study."""
    init_hash: str | None = None
    """Hash of the weights that training started from."""
    order_hash: str | None = None
    """Hash of the token sequences in the order in which training reads them."""
    corpus_hash: str | None = None
    parameters: int | None = None
    steps: int | None = None
    tokens: int | None = None
    final_hash: str | None = None
    """Hash of the trained weights."""
    learning_rate: float | None = None
    """Peak learning rate of the run: the study's, the arm's, or the one that the sweep chose."""
    warmup: float | None = None
    """Fraction of the run's steps over which that learning rate rises; None in rows of earlier releases."""
    max_grad_norm: float | None = Field(default=None, validation_alias=_MAX_GRAD_NORM)
    """Norm to which the run's gradient is clipped."""
    rows_hash: str | None = None
    """Of a terminal row: hash of the run's other rows (``records.rows_hash``); None in rows of earlier releases."""
    error: str | None = None
    timing: dict[str, Any] = {}
    provenance: dict[str, Any] = {}


class TrialRow(_CellRow):
    """One setting (learning rate, warm-up, clipping) tried for an arm, with its own seed, before anything is
    compared. A setting tried with several seeds has one row per seed."""

    kind: Literal["trial"]
    status: Literal["finished", "failed"]
    learning_rate: float
    steps: int
    value: float | None = None
    """Loss on the held-out documents that are set aside for this choice, in nats per token."""
    warmup: float | None = None
    """Warm-up as a fraction of the *run's* steps (the trial has that number of steps); None: not swept."""
    max_grad_norm: float | None = Field(default=None, validation_alias=_MAX_GRAD_NORM)
    """Norm to which the gradient is clipped; None: not swept."""
    chosen: bool = False
    """Whether the arm's runs use this setting: it has the lowest mean loss over the trial seeds."""
    edge: dict[str, Literal["smallest", "largest"]] = {}
    """For a chosen setting: the swept knobs whose chosen value is at the edge of the grid, so that the best value may
    lie outside. A warm-up of 0 has nothing below it and is not an edge."""
    error: str | None = None
    timing: dict[str, Any] = {}
    provenance: dict[str, Any] = {}


class StepRow(_CellRow):
    """Training metrics at an optimizer step, averaged since the previous such row."""

    kind: Literal["step"]
    step: int
    tokens: int
    loss: float
    """Cross-entropy in nats per token, without the auxiliary term."""
    learning_rate: float
    gradient_norm: float | None = None
    dispersion: float | None = None
    """Value of the dispersion loss (before its weight), mean over layers."""
    dispersion_weight: float | None = None
    """Weight of the dispersion loss; with a target, the mean over layers of the weights in the last step."""
    dispersion_weights: dict[str, float] | None = None
    """With a target: these weights, by layer."""
    dispersion_cosines: dict[str, float] | None = None
    """With a target: mean cosine of different tokens of the training sequences, by layer; the weights adapt to it."""
    distillation: float | None = None
    """Value of the distillation loss (before its weight)."""
    timing: dict[str, Any] = {}


class ProfileRow(_CellRow):
    """Condensation of a checkpoint: see ``decondense.Profile``."""

    kind: Literal["profile"]
    step: int
    tokens: int
    layers: list[str]
    mean_cosine: list[float]
    spearman: float | None
    kendall: float | None
    passages: int
    passage_tokens: int
    norms: list[float] | None = None
    histogram: list[list[int]] | None = None
    """Pooled pair counts, one list per layer, equal bins on [-1, 1]."""
    timing: dict[str, Any] = {}

    @model_validator(mode="after")
    def _one_value_a_layer(self) -> ProfileRow:
        if not self.layers:
            raise ValueError("a profile needs at least one layer")
        for name in ("mean_cosine", "norms", "histogram"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.layers):
                raise ValueError(f"{name} has {len(values)} values for {len(self.layers)} layers")
        bins = {len(counts) for counts in self.histogram or ()}
        if len(bins) > 1 or 0 in bins or any(count < 0 for counts in self.histogram or () for count in counts):
            raise ValueError("histogram needs counts of 0 or more in the same number of bins for each layer")
        if any(abs(cosine) > 1.001 for cosine in self.mean_cosine):
            raise ValueError("mean_cosine needs values from -1 to 1")
        return self


class EvalRow(_CellRow):
    """One score of a checkpoint."""

    kind: Literal["eval"]
    step: int
    tokens: int
    task: str
    metric: str
    value: float
    higher_is_better: bool
    items: int
    stderr: float | None = None
    """Standard error over the items."""
    official_items: int | None = None
    """Official number of items of the benchmark; None: not a benchmark, or unknown."""
    limit: int | None = None
    """Requested maximum number of items; None: all."""
    shots: int | None = None
    """Number of few-shot examples in the prompt."""
    notes: list[str] = []
    """Sentences that qualify the value; every table shows them."""
    timing: dict[str, Any] = {}


class EvalItemRow(_CellRow):
    """One item's score of the final checkpoint, so that arms can be paired item by item."""

    kind: Literal["eval_item"]
    step: int
    task: str
    metric: str
    item: str
    """Hash of the item's content: equal items have equal names in every run."""
    value: float
    weight: float = 1.0
    """Weight of the item in the task's mean (tokens of a document, 1 for a question)."""
    bits_per_byte: float | None = None
    """Minus log2 of the right answer's probability over its bytes; None: not known, or not the task's first metric."""
    margin_bits: float | None = None
    """log2 of the right answer's probability less that of the best wrong one; positive if the item is correct."""


class BenchmarkRow(_Base):
    """One measurement of a benchmark program."""

    kind: Literal["benchmark"]
    name: str
    variant: str
    params: dict[str, Any]
    metrics: dict[str, Any]
    provenance: dict[str, Any]


_KINDS: dict[str, type[_Base]] = {
    "run": RunRow,
    "trial": TrialRow,
    "step": StepRow,
    "profile": ProfileRow,
    "eval": EvalRow,
    "eval_item": EvalItemRow,
    "benchmark": BenchmarkRow,
}


def _plain(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null, so that any reader can open a file of rows."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def make_row(kind: str, **fields: Any) -> Row:
    """A validated row as a plain dictionary; a wrong field raises :class:`RecordError` naming it.

    Folders of this machine and credentials are removed from a configuration, credentials from an error's text
    (:mod:`decondense.provenance`).
    """
    if isinstance(fields.get("config"), Mapping):
        fields["config"] = publishable(fields["config"])
    if isinstance(fields.get("error"), str):
        fields["error"] = without_credentials(fields["error"])
    # floats that JSON cannot hold are only allowed where the schema allows null
    return _validated(kind, _plain(fields))


def _validated(kind: Any, fields: Mapping[str, Any]) -> Row:
    if not isinstance(kind, str) or kind not in _KINDS:
        raise RecordError(f"unknown row kind {kind!r}; known: {', '.join(_KINDS)}.")
    try:
        return _KINDS[kind].model_validate({**fields, "kind": kind}).model_dump(mode="json")
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"{part}: " for part in first["loc"])
        # our own messages say what they need of the value, which may be the whole row
        got = "" if first["type"] == "value_error" else f" (got {_short(first['input'])})"
        raise RecordError(f"{kind} row: {place}{first['msg'].removeprefix('Value error, ')}{got}.") from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def check_row(row: Mapping[str, Any], *, where: object = "row") -> Row:
    """Validate a row that was read; the message names ``where``."""
    try:
        return _validated(row.get("kind"), row)
    except RecordError as error:
        raise RecordError(f"{where}: {error}") from error
    except RecursionError as error:
        raise RecordError(f"{where}: nested too deeply to be a row.") from error


def stable(row: Mapping[str, Any]) -> Row:
    """The row without what differs between two executions of the same run (clock readings, machine)."""
    return {key: value for key, value in row.items() if key not in VOLATILE}


def terminal_row(rows: Iterable[Row]) -> Row | None:
    """The row that ends a cell (finished or failed), or None while there is work left."""
    ended = [row for row in rows if row["kind"] == "run" and row["status"] in ("finished", "failed")]
    return ended[-1] if ended else None
