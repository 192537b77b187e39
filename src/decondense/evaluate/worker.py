"""The process in which the lm-evaluation-harness runs: ``python -m decondense.evaluate.worker OUT``.

It reads ``OUT/.request.json``, writes one line an event to ``OUT/.events.jsonl`` and one file a finished task to
``OUT/tasks``. Prompts, scoring and aggregation are the harness's own, local data or not: only the rows of the data set
and, where local files have no training split, the split of the examples are put in their place.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import datasets
import huggingface_hub.constants
import lm_eval
import lm_eval.tasks
import torch
from lm_eval.api.group import Group
from lm_eval.models.huggingface import HFLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from decondense.checkpoints import CODE, ModelError, locate
from decondense.config import suggest
from decondense.corpora.hub import commit_of
from decondense.corpora.passages import PassageError
from decondense.evaluate.catalogue import TASKS, EvaluationError, spread
from decondense.evaluate.local import read_rows
from decondense.limits import model_positions
from decondense.models import load_config, load_model
from decondense.records import append_rows, atomic_write, provenance

_REPORT_SECONDS = 0.5
_UNLIMITED = HFLM._DEFAULT_MAX_LENGTH
"""Context in tokens of a model that declares no limit: the harness's own choice."""


class _Events:
    """Lines to whoever started this process; when that process has gone, this one goes too."""

    def __init__(self, path: Path, parent: int) -> None:
        self.path, self.parent, self.last = path, parent, 0.0
        threading.Thread(target=self._follow, daemon=True).start()

    def _follow(self) -> None:
        while os.getppid() == self.parent:
            time.sleep(_REPORT_SECONDS)
        os._exit(1)

    def tell(self, event: str, **fields: Any) -> None:
        append_rows(self.path, [{"event": event, **fields}])

    def running(self, task: str, done: int, total: int | None) -> None:
        if time.monotonic() - self.last > _REPORT_SECONDS:
            self.last = time.monotonic()
            self.tell("running", task=task, done=done, total=total)


class _Model(HFLM):  # type: ignore[misc]
    """The harness's model, which tells how far it is and what it had to cut.

    The harness cuts a prompt that does not fit from the left, with a warning in the log, and stops at an answer that
    alone is longer than the context. Here both are counted, and such an answer is scored in windows: the sum of
    log p(window | what precedes it, as far as it fits), each window at most half a context long.
    """

    events: _Events
    task = ""
    cut = 0
    asked = 0
    expected = 0
    windowed = 0
    answered = 0
    rolling = False

    def _create_tokenizer(self, pretrained: Any, tokenizer: Any, **settings: Any) -> None:
        self.tokenizer = tokenizer  # loaded by the one loader, like the model

    def begin(self, task: str) -> None:
        self.task = task
        self.cut = self.asked = self.expected = self.windowed = self.answered = 0

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
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


# --------------------------------------------------------------------------------------------------------------------
# Tasks
# --------------------------------------------------------------------------------------------------------------------


class _Tasks:
    """The harness's tasks by name, on the hub's data or on local files."""

    def __init__(self, names: Sequence[str]) -> None:
        base = Path(lm_eval.tasks.__file__).parent
        folders = sorted({base / TASKS[name].harness_folder for name in names if name in TASKS})
        # reading every definition that comes with the harness takes seconds; the paper's live in a few folders
        narrow = all(name in TASKS for name in names) and all(folder.is_dir() for folder in folders)
        self.manager = (
            lm_eval.tasks.TaskManager(include_defaults=False, include_path=[str(folder) for folder in folders])
            if narrow
            else lm_eval.tasks.TaskManager()
        )
        for name in names:
            if name not in self.manager.task_index:
                raise EvaluationError(
                    f"the harness {lm_eval.__version__} has no task {name!r}.{suggest(name, self.manager.all_tasks)}"
                )

    def leaves(self, name: str) -> list[str]:
        """The tasks that a name stands for, in the harness's order."""
        entry = self.manager.task_index[name]
        if entry.kind.name == "TAG":
            return sorted(entry.tags)
        if entry.kind.name != "GROUP":
            return [name]
        members = entry.cfg["task"]
        found: list[str] = []
        for member in members if isinstance(members, list) else [members]:
            if not isinstance(member, str):
                raise EvaluationError(f"{name} is a group with definitions of its own; name its tasks one by one.")
            found += self.leaves(member)
        return found

    def load(self, name: str, local: dict[str, Any] | None, shots: int | None) -> tuple[list[Any], Any]:
        """The task objects behind a name, and the group that sums them up (None for a single task)."""
        entry = self.manager.task_index[name]
        if entry.kind.name == "TAG":
            raise EvaluationError(f"{name} is a label of several tasks; name them: {', '.join(self.leaves(name))}.")
        leaves = self.leaves(name)
        if local is None:
            tasks = self.manager.load([name])["tasks"]
        else:
            data = _LocalRows(local)
            overrides = [self._override(leaf, data, local, shots) for leaf in leaves if self._subject(leaf, data)]
            data.check_subjects([self.manager.task_index[leaf].cfg.get("dataset_name") for leaf in leaves])
            tasks = self.manager.load([{"group": "local", "task": overrides}])["tasks"]
        group = None
        if entry.kind.name == "GROUP":
            group = Group.from_config(
                {
                    "group": name,
                    "aggregate_metric_list": entry.cfg.get("aggregate_metric_list"),
                    "metadata": entry.cfg.get("metadata"),
                }
            )
        return list(tasks.values()), group

    def _subject(self, leaf: str, data: _LocalRows) -> bool:
        """Whether the local rows have anything for a part of a group."""
        return data.subjects is None or self.manager.task_index[leaf].cfg.get("dataset_name") in data.subjects

    def _override(self, leaf: str, data: _LocalRows, local: dict[str, Any], shots: int | None) -> dict[str, Any]:
        config = self.manager.task_index[leaf].cfg
        splits = set(local["splits"])
        scored = config.get("test_split") or config.get("validation_split")
        changed: dict[str, Any] = {"task": leaf, "custom_dataset": data.loader(config.get("dataset_name"))}
        if scored not in splits:
            raise EvaluationError(f"{leaf} is scored on the split {scored!r}; there are {', '.join(sorted(splits))}.")
        if config.get("training_split") not in splits:
            changed["training_split"] = None
        if config.get("validation_split") not in splits:
            changed["validation_split"] = None
        examples = (config.get("fewshot_split") or config.get("training_split")) if shots else None
        if config.get("fewshot_split") not in {None, *splits}:
            changed["fewshot_split"] = None
        if local["few_shot_split"]:
            # named, so that the harness never takes the question itself as its example
            changed["fewshot_split"] = local["few_shot_split"]
        elif examples and examples not in splits:
            raise EvaluationError(
                f"{leaf} takes its examples from {examples!r}; there are {', '.join(sorted(splits))}."
            )
        return changed


class _LocalRows:
    """Local rows as the data sets that the harness expects."""

    def __init__(self, local: dict[str, Any]) -> None:
        self.rows = {
            split: [row for path in files for row in read_rows(Path(path))] for split, files in local["splits"].items()
        }
        info = TASKS.get(local["task"])
        by_subject = info is not None and "subject" in info.fields
        self.subjects = {row["subject"] for rows in self.rows.values() for row in rows} if by_subject else None

    def check_subjects(self, known: Sequence[str | None]) -> None:
        """Rows of a subject that the harness does not know would be lost in silence."""
        strange = sorted(self.subjects - set(known)) if self.subjects is not None else []
        if strange:
            raise EvaluationError(
                f"rows of subjects that the harness does not know: {', '.join(map(repr, strange[:5]))}."
                f"{suggest(str(strange[0]), [str(name) for name in known])}"
            )

    def loader(self, subject: str | None) -> Callable[..., dict[str, Any]]:
        """What the harness calls instead of the hub."""

        def load(**_: Any) -> dict[str, Any]:
            return {
                split: datasets.Dataset.from_list(
                    rows if self.subjects is None else [row for row in rows if row["subject"] == subject]
                )
                for split, rows in self.rows.items()
            }

        return load


# --------------------------------------------------------------------------------------------------------------------
# One task
# --------------------------------------------------------------------------------------------------------------------


def _run(lm: _Model, source: _Tasks, asked: dict[str, Any]) -> dict[str, Any]:
    """Score one task and return the content of its file."""
    name, local = asked["name"], asked["local"]
    shots, limit = asked["key"]["shots"], asked["key"]["limit"]
    tasks, group = source.load(name, local, shots)
    sizes = [len(task.eval_docs) for task in tasks]
    examples = len(tasks[0].sampler.df) if shots and hasattr(tasks[0], "sampler") else None
    if examples is not None and group is not None:
        examples = sum(len(task.sampler.df) for task in tasks)
    samples = None
    if group is not None:
        counts = sizes if limit is None else spread(limit, sizes)
        samples = {task.task_name: list(range(k)) for task, k in zip(tasks, counts, strict=True) if k}
        for task in tasks:
            if task.task_name in samples:
                group.add(task)
    began = time.perf_counter()
    lm.begin(name)
    found = lm_eval.simple_evaluate(
        model=lm,
        tasks=[tasks[0] if group is None else group],
        num_fewshot=shots,
        limit=limit if group is None else None,
        samples=samples,
        # bootstrapped errors cost more than the scores; ours are in closed form
        bootstrap_iters=0,
        task_manager=source.manager,
    )
    wall = time.perf_counter() - began
    logged = {task: entries for task, entries in found["samples"].items() if entries}
    scored = len({(task, entry["doc_id"]) for task, entries in logged.items() for entry in entries})
    used = max((found["n-shot"].get(task) or 0 for task in logged), default=0)
    scores, per_item = _scores(name, found, logged, group is not None)
    return {
        "key": asked["key"],
        "task": name,
        "scores": scores,
        "shots": int(used),
        "items": scored,
        "official": TASKS[name].rows if name in TASKS else None,
        "limit": limit,
        "notes": _notes(name, lm, local, scored, sum(sizes), limit, group is not None, int(used), examples),
        "per_item": per_item,
        "parts": {
            task: {key.split(",")[0]: value for key, value in found["results"][task].items() if key.endswith(",none")}
            for task in (logged if group is not None else ())
        },
        "version": found["versions"].get(name),
        "timing": {"wall_s": wall},
        "provenance": provenance(
            device=torch.cuda.get_device_name(lm.device) if lm.device.type == "cuda" else lm.device.type,
            dtype=str(next(lm.model.parameters()).dtype).removeprefix("torch."),
            harness=lm_eval.__version__,
            batch_size=lm.batch_size,
            max_length=lm.max_length,
        ),
    }


def _notes(
    name: str,
    lm: _Model,
    local: dict[str, Any] | None,
    scored: int,
    present: int,
    limit: int | None,
    of_parts: bool,
    shots: int,
    examples: int | None,
) -> list[str]:
    info = TASKS.get(name)
    notes = []
    if limit is not None and scored < present:
        # the same words for every task, so that a table says it once
        notes.append(
            f"limited to {limit:,} items, the first of each part in turn"
            if of_parts
            else f"limited to the first {limit:,} items"
        )
    if info is not None and info.rows is not None and present != info.rows:
        notes.append(f"the data have {present:,} items, the official {info.split} split of {name} has {info.rows:,}")
    if info is not None and shots and local is not None and local["few_shot_split"]:
        notes.append(
            f"examples come from the split {local['few_shot_split']}, for want of {info.few_shot_split}: the hub's "
            f"{name} has others"
        )
    elif info is not None and shots and info.few_shot_rows is not None and examples not in (None, info.few_shot_rows):
        notes.append(
            f"examples come from {examples:,} rows, the official {info.few_shot_split} split of {name} has "
            f"{info.few_shot_rows:,}"
        )
    if lm.cut:
        notes.append(
            f"{lm.cut:,} of {lm.asked:,} prompts with answers exceed the context of {lm.max_length:,} tokens and were "
            "cut from the left"
        )
    if lm.windowed:
        notes.append(f"{lm.windowed:,} answers alone exceed the context and were scored in windows")
    return notes


def _scores(
    name: str, found: dict[str, Any], logged: dict[str, Any], is_group: bool
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The harness's values with standard errors, and the items of every metric that is a mean of items.

    Perplexities are the exponential of such a mean: it is added as a metric of its own, in nats a word or an answer, so
    that two models can be compared item by item.
    """
    values = {key: value for key, value in found["results"][name].items() if "," in key and "_stderr," not in key}
    identities = _identities(logged)
    scores: list[dict[str, Any]] = []
    per_item: dict[str, dict[str, tuple[float, float]]] = {}
    headline = TASKS[name].metric if name in TASKS else None
    better = {metric: up for task in logged for metric, up in found["higher_is_better"].get(task, {}).items()}
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
        pairs = [(item, *_pair(entry)) for item, entry in entries if _pair(entry) is not None]  # type: ignore[misc]
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
                if extra != "byte_loss":  # the same as bits a byte but for a constant
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
    r"""Of a weighted mean of I items: sqrt(I / (I - 1) \sum w_i^2 (x_i - mean)^2) / \sum w_i; s / sqrt(I) if equal."""
    n = len(values)
    if n < 2:
        return None
    squares = math.fsum((w * (x - mean)) ** 2 for x, w in zip(values, weights, strict=True))
    return math.sqrt(n / (n - 1) * squares) / math.fsum(weights)


def _pooled_error(metric: str, which: str, logged: dict[str, Any]) -> float | None:
    """The harness's error of a group's mean: of the pooled variance within the parts; None with parts of one item."""
    squares, items = 0.0, 0
    for members in logged.values():
        values = [float(entry[metric]) for entry in members if entry["filter"] == which and metric in entry]
        if len(values) < 2:
            return None
        mean = math.fsum(values) / len(values)
        squares += math.fsum((x - mean) ** 2 for x in values)
        items += len(values)
    return math.sqrt(squares / (items - len(logged)) / items)


def _identities(logged: dict[str, Any]) -> dict[tuple[str, int], str]:
    """(task, document) -> hash of all that the model was asked about it and of what counted as right.

    Not of the row: names of columns and of the row itself differ between copies of a benchmark, the questions do not.
    Repeated items are numbered.
    """
    found: dict[tuple[str, int], str] = {}
    seen: dict[str, int] = defaultdict(int)
    for task, members in logged.items():
        for entry in members:
            if (task, entry["doc_id"]) in found:
                continue  # the same item under another filter
            asked = json.dumps([task, entry["arguments"], entry["target"]], ensure_ascii=False, default=str)
            digest = hashlib.sha256(asked.encode("utf-8", "surrogatepass")).hexdigest()[:16]
            seen[digest] += 1
            found[task, entry["doc_id"]] = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
    return found


# --------------------------------------------------------------------------------------------------------------------
# The process
# --------------------------------------------------------------------------------------------------------------------


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


def _load_model(request: dict[str, Any], events: _Events) -> _Model:
    """The model that the request names, from the loader that all verbs share, in the harness's hands."""
    source, settings = request["model"], request["settings"]
    code = request["trust_remote_code"]
    device = _device(request["device"])
    try:
        name, revision = locate(source)
        config = load_config(name, revision=revision, trust_remote_code=code)
        known = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values()}
        heads = getattr(config, "architectures", None) or []
        if heads and not code and not known.intersection(heads):
            raise EvaluationError(
                f"{name} is a {', '.join(heads)}: benchmarks need a model that gives probabilities of text (a causal "
                "or sequence-to-sequence language model)."
            )
        model, tokenizer = load_model(
            name,
            revision=revision,
            tokenizer=settings["tokenizer"],
            head="text",
            dtype=settings["dtype"],
            trust_remote_code=code,
        )
        if tokenizer is None:
            raise EvaluationError(
                f"{name} comes without a tokenizer. If it is elsewhere: --tokenizer DIRECTORY_OR_HUB_ID."
            )
        longest = settings["max_length"]
        if longest is None and model_positions(model) is None:
            longest = _UNLIMITED  # the harness would take T5's n_positions for a limit
        lm = _Model(
            pretrained=model.to(device),
            tokenizer=tokenizer,
            max_length=longest,
            batch_size=request["batch_size"],
            trust_remote_code=code,
        )
    except ModelError as error:
        hint = " --trust-remote-code runs it, if you trust it." if CODE in str(error) else ""
        raise EvaluationError(str(error) + hint) from error
    lm.events = events
    return lm


def _no_data(name: str, error: Exception) -> dict[str, str]:
    said = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    source = TASKS[name].source if name in TASKS else "its data set"
    return {
        "message": f"{name}: {source} cannot be read from the hub ({type(error).__name__}: {said}).",
        "remedy": "Without network, give the rows in local files (--data-dir DIR), or fill the cache where there is "
        "one and set HF_HOME to it; a gated data set needs its form filled in and `hf auth login`.",
    }


def _stay_offline() -> None:
    """The data sets are only looked for in the cache: each vain attempt takes half a minute."""
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    datasets.config.HF_HUB_OFFLINE = True


def _is_out_of_reach(request: dict[str, Any]) -> bool:
    """Whether the hub is needed and does not answer."""
    asked: list[tuple[str, Literal["dataset", "model"]]] = [
        (str(name).partition("@")[0], "model")
        for name in (request["model"], request["settings"]["tokenizer"])
        if name is not None and not Path(name).expanduser().exists()
    ]
    asked += [
        (TASKS[task["name"]].source, "dataset")
        for task in request["tasks"]
        if task["local"] is None and task["name"] in TASKS
    ]
    try:
        return bool(asked) and commit_of(*asked[0])[1] is not None
    except PassageError:  # it answers that it has no such thing; the libraries say it in their way
        return False


_HUB_ERRORS = ("datasets", "huggingface_hub", "requests", "httpx", "urllib3", "fsspec")


def main(folder: Path) -> int:
    """Do what ``folder/.request.json`` asks for."""
    request = json.loads((folder / ".request.json").read_text(encoding="utf-8"))
    events = _Events(folder / ".events.jsonl", request["parent"])
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", level=logging.WARNING)
    # of the harness's warnings only what a reader of the log can use
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    events.tell("loading")
    if _is_out_of_reach(request):
        _stay_offline()
    try:
        source = _Tasks([task["name"] for task in request["tasks"]])
        lm = _load_model(request, events)
    except EvaluationError as error:
        events.tell("failed", message=str(error))
        events.tell("ended")
        return 0
    for asked in request["tasks"]:
        name = asked["name"]
        events.tell("running", task=name, done=0, total=None)
        try:
            result = _with_less_memory(lm, source, asked)
        except EvaluationError as error:
            events.tell("failed", task=name, message=f"{name}: {error}")
        except Exception as error:
            if asked["local"] is not None or not (
                isinstance(error, OSError) or type(error).__module__.split(".")[0] in _HUB_ERRORS
            ):
                raise
            events.tell("failed", task=name, **_no_data(name, error))
            if isinstance(error, ConnectionError):
                _stay_offline()
        else:
            atomic_write(folder / "tasks" / f"{name}.json", json.dumps(result, allow_nan=False))
            events.tell("done", task=name, done=result["items"], total=result["items"])
    events.tell("ended")
    return 0


def _with_less_memory(lm: _Model, source: _Tasks, asked: dict[str, Any]) -> dict[str, Any]:
    while True:
        try:
            return _run(lm, source, asked)
        except torch.OutOfMemoryError:
            if lm.batch_size_per_gpu <= 1:
                raise EvaluationError(
                    f"one request alone is too large for the memory of {lm.device}; use --max-length, --dtype bfloat16 "
                    "or --device cpu."
                ) from None
            lm.batch_size_per_gpu = max(1, lm.batch_size_per_gpu // 2)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
