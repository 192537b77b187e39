"""Turns the harness's output into scores with standard errors, items and notes."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from decondense.evaluate.catalogue import TASKS

if TYPE_CHECKING:
    from decondense.evaluate.worker.model import Model
    from decondense.evaluate.worker.tasks import LoadedTask


def scores_of(
    name: str, output: dict[str, Any], logged: dict[str, Any], is_group: bool
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The harness's values with standard errors, and the items of every metric that is a mean of items.

    Perplexities are the exponential of such a mean, which is added as a metric of its own, in nats per word or answer,
    so that two models can be compared item by item.
    """
    values = {key: value for key, value in output["results"][name].items() if "," in key and "_stderr," not in key}
    identities = _identities(logged)
    scores: list[dict[str, Any]] = []
    per_item: dict[str, dict[str, tuple[float, float]]] = {}
    headline = TASKS[name].metric if name in TASKS else None
    better = {metric: up for task in logged for metric, up in output["higher_is_better"].get(task, {}).items()}
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        metric, _, which = key.partition(",")
        label = metric if which == "none" else f"{metric} [{which}]"
        entries = [
            (identities[task, entry["doc_id"]], entry[metric])
            for task, members in logged.items()
            for entry in members
            if entry["filter"] == which and metric in entry
        ]
        pairs = [(item, *pair) for item, entry in entries if (pair := _pair(entry)) is not None]
        stderr = None
        if pairs and len(pairs) == len(entries):
            total = math.fsum(weight for _, _, weight in pairs)
            mean = math.fsum(x * weight for _, x, weight in pairs) / total if total else math.nan
            error = _standard_error([x for _, x, _ in pairs], [w for _, _, w in pairs], mean)
            if is_group:
                error = _pooled_error(metric, which, logged) or error
            if math.isclose(mean, value, rel_tol=1e-9, abs_tol=1e-12):
                stderr = error
                per_item[label] = {item: (x, weight) for item, x, weight in pairs}
            elif math.isclose(-mean / math.log(2), value, rel_tol=1e-9):
                stderr = None if error is None else error / math.log(2)
                per_item[label] = {item: (-x / math.log(2), weight) for item, x, weight in pairs}
            elif mean < 0 and math.isclose(math.exp(-mean), value, rel_tol=1e-9):
                stderr = None if error is None else error * value
                loss = {"perplexity": "loss", "word_perplexity": "word_loss", "byte_perplexity": "byte_loss"}
                extra = loss.get(metric, f"log {metric}")
                if extra != "byte_loss":  # a constant times the bits per byte
                    per_item[extra] = {item: (-x, weight) for item, x, weight in pairs}
                    scores.append(_score(extra, -mean, error, False, headline == metric))
        scores.append(
            _score(label, float(value), stderr, bool(better.get(metric, True)), metric == (headline or metric))
        )
    if headline is None and scores:
        scores = [{**score, "headline": number == 0} for number, score in enumerate(scores)]
    # what the paper reports comes first
    scores.sort(key=lambda score: (not score["headline"], score["metric"] != headline))
    return scores, per_item


def _score(metric: str, value: float, stderr: float | None, up: bool, headline: bool) -> dict[str, Any]:
    return {"metric": metric, "value": value, "stderr": stderr, "higher_is_better": up, "headline": headline}


def _pair(entry: Any) -> tuple[float, float] | None:
    """(value, weight) of an item: a number counts once; (log-likelihood, count) is the mean of ``count`` units."""
    if isinstance(entry, (tuple, list)) and len(entry) == 2 and entry[1]:
        return float(entry[0]) / float(entry[1]), float(entry[1])
    try:
        return float(entry), 1.0
    except (TypeError, ValueError):
        return None


def _standard_error(values: Sequence[float], weights: Sequence[float], mean: float) -> float | None:
    r"""Error of a weighted mean of I items: sqrt(I / (I - 1) \sum w_i^2 (x_i - mean)^2) / \sum w_i; or s / sqrt(I)."""
    n = len(values)
    if n < 2:
        return None
    squares = math.fsum((w * (x - mean)) ** 2 for x, w in zip(values, weights, strict=True))
    return math.sqrt(n / (n - 1) * squares) / math.fsum(weights)


def _pooled_error(metric: str, which: str, logged: dict[str, Any]) -> float | None:
    """The harness's error of a group's mean, from the pooled variance within the parts; None with parts of one item."""
    squares, items = 0.0, 0
    for members in logged.values():
        values = [float(entry[metric]) for entry in members if entry["filter"] == which and metric in entry]
        if len(values) < 2:
            return None
        mean = fmean(values)
        squares += math.fsum((x - mean) ** 2 for x in values)
        items += len(values)
    return math.sqrt(squares / (items - len(logged)) / items)


def _identities(logged: dict[str, Any]) -> dict[tuple[str, int], str]:
    """(task, document) -> hash of the requests that the model received for it and of the right answer.

    It is not the hash of the row, because names of columns differ between copies of a benchmark. Repeated items are
    numbered.
    """
    identities: dict[tuple[str, int], str] = {}
    seen: Counter[str] = Counter()
    for task, members in logged.items():
        for entry in members:
            if (task, entry["doc_id"]) in identities:
                continue  # the same item under another filter
            content = json.dumps([task, entry["arguments"], entry["target"]], ensure_ascii=False, default=str)
            digest = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]
            seen[digest] += 1
            identities[task, entry["doc_id"]] = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
    return identities


def gold_of(loaded: LoadedTask, logged: dict[str, Any]) -> dict[str, tuple[float, float | None]]:
    r"""Item -> likelihood of the right answer, from the requests that the harness made for its own scores.

    With log p(c) the log-likelihood of answer c after the prompt and b(c) the bytes of its scored text (with the
    leading space that the harness adds),

        bits per byte = -log2 p(gold) / b(gold),        margin = log2 p(gold) - max_{c wrong} log2 p(c)   in bits,

    for the likeliest right answer where there are several. The margin is positive where ``acc`` counts the item as
    right, and None where there is no other answer (LAMBADA). Tasks with their own scoring function have no items here.
    """
    tasks = {task.task_name: task for task in loaded.parts}
    identities = _identities(logged)
    gold_of_item: dict[str, tuple[float, float | None]] = {}
    for name, entries in logged.items():
        task = tasks[name]
        own_rules = callable(task.config.process_results) and loaded.name != "truthfulqa_mc2"
        if own_rules or task.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood"):
            continue
        for entry in entries:
            answers = [
                (value / math.log(2), len(str(text).encode("utf-8", "surrogatepass")))
                for (value, _), (_, text, *_) in zip(entry["filtered_resps"], entry["arguments"], strict=True)
            ]
            right = _right(task, loaded.name, entry["doc"]) if task.OUTPUT_TYPE == "multiple_choice" else {0}
            gold = max((answers[k] for k in right), default=(-math.inf, 0))
            best_wrong = max((value for k, (value, _) in enumerate(answers) if k not in right), default=-math.inf)
            if math.isfinite(gold[0]) and gold[1]:
                margin = gold[0] - best_wrong if math.isfinite(best_wrong) else None
                gold_of_item[identities[name, entry["doc_id"]]] = (-gold[0] / gold[1], margin)
    return gold_of_item


def _right(task: Any, name: str, doc: Any) -> set[int]:
    """The right choices of an item by their position."""
    if name == "truthfulqa_mc2":
        return {k for k, label in enumerate(doc["mc2_targets"]["labels"]) if label == 1}
    given = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    golds = given if isinstance(given, (list, tuple)) else [given]
    return {gold if isinstance(gold, int) else task.doc_to_choice(doc).index(gold) for gold in golds}


def notes_of(
    loaded: LoadedTask,
    lm: Model,
    few_shot_split: str | None,
    *,
    scored: int,
    limit: int | None,
    shots: int,
    examples: int | None,
) -> list[str]:
    """Qualifications of the scores of a task, as sentences for its tables."""
    info, name = TASKS.get(loaded.name), loaded.name
    present = sum(loaded.sizes)
    notes = list(loaded.notes)
    if limit is not None and scored < present:
        # the same words for every task, so that a table says it once
        notes.append(
            f"limited to {limit:,} items, the first of each part in turn"
            if loaded.grouped
            else f"limited to the first {limit:,} items"
        )
    if info is not None and info.rows not in (None, present):
        notes.append(f"the data have {present:,} items, the official {info.split} split of {name} has {info.rows:,}")
    if info is not None and shots and few_shot_split:
        notes.append(
            f"examples come from the split {few_shot_split}, for want of {info.few_shot_split}: the hub's "
            f"{name} has others"
        )
    elif info is not None and shots and info.few_shot_rows is not None and examples not in (None, info.few_shot_rows):
        notes.append(
            f"examples come from {examples:,} rows, the official {info.few_shot_split} split of {name} has "
            f"{info.few_shot_rows:,}"
        )
    if lm.cut:
        notes.append(
            f"{lm.cut:,} of {lm.requests:,} prompts with answers exceed the context of {lm.max_length:,} tokens and "
            "were cut from the left"
        )
    if lm.windowed:
        notes.append(f"{lm.windowed:,} answers alone exceed the context and were scored in windows")
    return notes
