"""The harness's model: it reports its progress, scores long answers in windows, and refuses what it cannot load."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from decondense.evaluate.catalogue import EvaluationError
from decondense.evaluate.worker.events import Events
from decondense.measuring.loading import check_complete, why_not
from decondense.measuring.running import MeasureError


class Model(HFLM):  # type: ignore[misc]
    """The harness's model, which tells how far it is and what it had to cut.

    The harness cuts a prompt that does not fit from the left, with a warning in the log, and stops at an answer that
    alone is longer than the context. Here both are counted, and such an answer is scored in windows: the sum of
    log p(window | what precedes it, as far as it fits), each window at most half a context long.
    """

    events: Events
    source = ""
    task = ""
    cut = 0
    asked = 0
    expected = 0
    windowed = 0
    answered = 0
    rolling = False

    def _create_model(self, pretrained: str, **settings: Any) -> None:
        super()._create_model(pretrained, output_loading_info=True, **settings)
        model, found = self.__dict__.pop("_model")
        check_complete(pretrained, model, found["missing_keys"], head=True)
        self._model = model

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **settings: Any) -> list[int]:
        """As the harness has it, also with a tokenizer that has neither ``bos_token`` nor ``eos_token``."""
        # the harness asks whether a prompt begins with the token that begins a text, also where there is none
        if self.prefix_token_id is None:
            add_special_tokens = False
        found: list[int] = super().tok_encode(string, add_special_tokens=add_special_tokens, **settings)
        return found

    def begin(self, task: str) -> None:
        """Count from zero for the next task."""
        self.task = task
        self.cut = self.asked = self.expected = self.windowed = self.answered = 0

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """As the harness has it; the windows of documents are no prompts that were cut."""
        self.rolling = True
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)
        finally:
            self.rolling = False

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if not self.rolling:
            self.asked += len(requests)
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
        found = super()._loglikelihood_tokens(pieces, disable_tqdm=True, override_bs=override_bs)
        totals = [[0.0, True] for _ in requests]
        for owner, (value, greedy) in zip(owners, found, strict=True):
            if math.isnan(value):
                raise EvaluationError("the model's log-likelihoods are no numbers: its weights or its logits are not.")
            totals[owner] = [totals[owner][0] + value, bool(totals[owner][1] and greedy)]
        return [(float(value), bool(greedy)) for value, greedy in totals]

    def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
        logits = super()._model_call(inps, *args, **kwargs)
        self.answered += len(inps)
        total = None if self.rolling else max(self.expected, self.answered)
        self.events.running(self.task, self.answered, total)
        return logits


def _device(asked: str | None) -> str:
    """The device to use. The harness takes another one in silence when it does not know the name."""
    if asked is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(asked)
    except RuntimeError as error:
        raise EvaluationError(f"there is no device {asked!r}: give cpu, cuda or cuda:1.") from error
    there = torch.cuda.device_count() if kind.type == "cuda" else 1
    if (kind.index or 0) >= there:
        raise EvaluationError(f"there is no device {asked!r} here: torch sees {there} GPUs; give --device cpu.")
    return asked


def load_model(request: dict[str, Any], events: Events) -> Model:
    """The model of a request; :class:`EvaluationError` says why one cannot be scored."""
    source, settings = request["model"], request["settings"]
    name, _, revision = (source, "", "") if Path(source).is_dir() else source.partition("@")
    code = request["trust_remote_code"]
    import transformers
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )

    try:
        config = transformers.AutoConfig.from_pretrained(name, revision=revision or "main", trust_remote_code=code)
        known = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values()}
        heads = getattr(config, "architectures", None) or []
        if heads and not code and not known.intersection(heads):
            raise EvaluationError(
                f"{name} is a {', '.join(heads)}: benchmarks need a model that gives probabilities of text (a causal "
                "or sequence-to-sequence language model)."
            )
        model = Model(
            pretrained=name,
            revision=revision or "main",
            tokenizer=settings["tokenizer"],
            device=_device(request["device"]),
            dtype=settings["dtype"],
            max_length=settings["max_length"],
            batch_size=request["batch_size"],
            trust_remote_code=code,
        )
    except (EvaluationError, MeasureError) as error:
        raise EvaluationError(str(error)) from error
    except Exception as error:  # a broken file shows as whatever the first thing that trips over it raises
        hint = ""
        if "trust_remote_code" in str(error):
            hint = " --trust-remote-code runs it, if you trust it."
        elif "okenizer" in str(error):
            hint = " If its tokenizer is elsewhere: --tokenizer DIRECTORY_OR_HUB_ID."
        raise EvaluationError(why_not(name, revision or None, error) + hint) from error
    model.events, model.source = events, source
    return model
