"""The harness's model: reports progress, scores long answers in windows, and refuses models that it cannot score."""

from __future__ import annotations

import math
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from decondense import models
from decondense.checkpoints import CODE, ModelError, locate
from decondense.evaluate.catalogue import EvaluationError
from decondense.evaluate.worker.events import Events
from decondense.limits import model_positions

_UNLIMITED = HFLM._DEFAULT_MAX_LENGTH
"""Context length of a model that declares no limit, as in the harness."""


class Model(HFLM):  # type: ignore[misc]
    """The harness's model with progress and counts of truncated prompts.

    The harness truncates a prompt that does not fit from the left, with a warning in the log, and stops at an answer
    that alone is longer than the context. This class counts both, and scores such an answer in windows: the sum of
    log p(window | preceding tokens that fit), each window at most half a context long.
    """

    events: Events
    source = ""
    task = ""
    cut = 0
    requests = 0
    expected = 0
    windowed = 0
    answered = 0
    rolling = False

    def _create_tokenizer(self, pretrained: Any, tokenizer: Any, **settings: Any) -> None:
        self.tokenizer = tokenizer  # loaded by the one loader, like the model

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **settings: Any) -> list[int]:
        """As in the harness; also for a tokenizer that has neither ``bos_token`` nor ``eos_token``."""
        # the harness compares the first token with the prefix token without checking that there is one
        if self.prefix_token_id is None:
            add_special_tokens = False
        ids: list[int] = super().tok_encode(string, add_special_tokens=add_special_tokens, **settings)
        return ids

    def begin(self, task: str) -> None:
        """Reset the counts for the next task."""
        self.task = task
        self.cut = self.requests = self.expected = self.windowed = self.answered = 0

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """As in the harness; the windows of documents do not count as truncated prompts."""
        self.rolling = True
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)
        finally:
            self.rolling = False

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if not self.rolling:
            self.requests += len(requests)
            # answers of one token to the same prompt share a row of a forward pass
            self.expected += len({hash((*context, *answer[:-1])) for _, context, answer in requests})
            self.cut += sum(len(context) + len(answer) > self.max_length + 1 for _, context, answer in requests)
        pieces: list[Any] = []
        owners: list[int] = []
        half = max(1, self.max_length // 2)
        for number, (text, context, answer) in enumerate(requests):
            if len(answer) <= self.max_length:
                pieces.append((text, context, answer))
                owners.append(number)
                continue
            self.windowed += 1
            for first in range(0, len(answer), half):
                pieces.append((None, context + answer[:first], answer[first : first + half]))
                owners.append(number)
        values = [0.0] * len(requests)
        greedy = [True] * len(requests)
        scored = super()._loglikelihood_tokens(pieces, disable_tqdm=True, override_bs=override_bs)
        for owner, (value, is_greedy) in zip(owners, scored, strict=True):
            if math.isnan(value):
                raise EvaluationError(
                    "the model's log-likelihoods are NaN, because its weights or logits are NaN. Check the "
                    "checkpoint, or try --dtype float32."
                )
            values[owner] += float(value)
            greedy[owner] &= bool(is_greedy)
        return list(zip(values, greedy, strict=True))

    def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
        logits = super()._model_call(inps, *args, **kwargs)
        self.answered += len(inps)
        total = None if self.rolling else max(self.expected, self.answered)
        self.events.running(self.task, self.answered, total)
        return logits


def _device(name: str | None) -> str:
    """The device to use. The harness silently takes another one for an unknown name."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise EvaluationError(f"there is no device {name!r}: give cpu, cuda or cuda:1.") from error
    available = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= available:
        raise EvaluationError(f"there is no device {name!r} here: torch sees {available} GPUs; give --device cpu.")
    return name


def load_model(request: dict[str, Any], events: Events) -> Model:
    """Load the model of a request with the package's loader and hand it to the harness."""
    source, settings = request["model"], request["settings"]
    code = request["trust_remote_code"]
    device = _device(request["device"])
    try:
        name, revision = locate(source)
        config = models.load_config(name, revision=revision, trust_remote_code=code)
        known = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values()}
        heads = getattr(config, "architectures", None) or []
        if heads and not code and not known.intersection(heads):
            raise EvaluationError(
                f"{name} is a {', '.join(heads)}: benchmarks need a model that gives probabilities of text (a causal "
                "or sequence-to-sequence language model)."
            )
        model, tokenizer = models.load_model(
            name,
            revision=revision,
            tokenizer=settings["tokenizer"],
            head="text",
            dtype=settings["dtype"],
            trust_remote_code=code,
        )
        if tokenizer is None:
            raise EvaluationError(f"{name} comes without a tokenizer; give one with --tokenizer DIRECTORY_OR_HUB_ID.")
        max_length = settings["max_length"]
        if max_length is None and model_positions(model) is None:
            max_length = _UNLIMITED  # the harness would take T5's n_positions for a limit
        lm = Model(
            pretrained=model.to(device),
            tokenizer=tokenizer,
            max_length=max_length,
            batch_size=request["batch_size"],
            trust_remote_code=code,
        )
    except ModelError as error:
        hint = " --trust-remote-code runs it, if you trust it." if CODE in str(error) else ""
        raise EvaluationError(str(error) + hint) from error
    lm.events, lm.source = events, source
    return lm
