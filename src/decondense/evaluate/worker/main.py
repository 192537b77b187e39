"""The work of the process: load the tasks, then the model, then score task by task."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any, Literal

import datasets
import huggingface_hub.constants
import lm_eval
import torch

from decondense.checkpoints import first_line
from decondense.corpora.hub import commit_of
from decondense.corpora.passages import PassageError
from decondense.evaluate.catalogue import TASKS, EvaluationError
from decondense.evaluate.worker.events import Events
from decondense.evaluate.worker.model import Model, load_model
from decondense.evaluate.worker.scores import gold_of, notes_of, scores_of
from decondense.evaluate.worker.tasks import LoadedTask, Tasks, is_about_data, scores_text_alone
from decondense.records import atomic_write, provenance


def main(folder: Path) -> int:
    """Carry out ``folder/.request.json``."""
    request = json.loads((folder / ".request.json").read_text(encoding="utf-8"))
    events = Events(folder / ".events.jsonl")
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", level=logging.WARNING)
    # the harness's warnings do not help a reader of the log
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    events.tell("loading")
    if _is_out_of_reach(request):
        _stay_offline()
    try:
        source = Tasks([task["name"] for task in request["tasks"]])
        loaded = _load_tasks(request["tasks"], source, events)
        if loaded:
            lm = load_model(request, events)
    except EvaluationError as error:
        events.tell("failed", message=str(error))
        loaded = {}
    requests = {task["name"]: task for task in request["tasks"] if task["name"] in loaded}
    # all tasks are checked before the first is scored, which may take hours
    for name in list(loaded):
        if reason := _lacks_token(lm, loaded[name], requests[name]["key"]["shots"]):
            events.tell("failed", task=name, message=f"{name}: {reason}")
            del requests[name]
    for name, task in requests.items():
        events.tell("running", task=name, done=0, total=None)
        try:
            result = _with_less_memory(lm, source, loaded.pop(name), task)
        except EvaluationError as error:
            events.tell("failed", task=name, message=f"{name}: {error}")
        else:
            atomic_write(folder / "tasks" / f"{name}.json", json.dumps(result, allow_nan=False))
            events.tell("done", task=name, done=result["items"], total=result["items"])
    events.tell("ended")
    return 0


def _load_tasks(requests: list[dict[str, Any]], source: Tasks, events: Events) -> dict[str, LoadedTask]:
    """Name -> task, without those whose rows cannot be loaded or scored."""
    loaded = {}
    for task in requests:
        name, key = task["name"], task["key"]
        try:
            loaded[name] = source.load(name, task["local"], key["shots"], key["limit"])
        except EvaluationError as error:
            events.tell("failed", task=name, message=f"{name}: {error}")
        except Exception as error:
            if task["local"] is not None or not is_about_data(error):
                raise
            events.tell("failed", task=name, **_no_data(name, error))
            if isinstance(error, ConnectionError):
                _stay_offline()
    return loaded


def _lacks_token(lm: Model, loaded: LoadedTask, shots: int | None) -> str | None:
    """Why the task cannot be scored with a tokenizer that lacks a token; None: nothing is missing."""
    if lm.prefix_token_id is None and scores_text_alone(loaded, shots):
        missing = "neither bos_token nor eos_token"
        use = "needs one of them to score the first token of a text"
    elif lm.eot_token_id is None and any(task.OUTPUT_TYPE == "generate_until" for task in loaded.parts):
        missing, use = "no eos_token", "needs it to end generated text"
    else:
        return None
    return (
        f"the tokenizer of {lm.source} has {missing}, and the task {use}. Set it in tokenizer_config.json to "
        "the token that separated texts in training, give another tokenizer with --tokenizer, or omit the task with "
        "--tasks."
    )


def _run(lm: Model, source: Tasks, loaded: LoadedTask, task: dict[str, Any]) -> dict[str, Any]:
    """Score one task and return the content of its file."""
    name, shots, limit = loaded.name, task["key"]["shots"], task["key"]["limit"]
    examples = None
    if shots and hasattr(loaded.parts[0], "sampler"):
        examples = sum(len(part.sampler.df) for part in loaded.parts)
    group, samples = source.group(name), None
    if group is not None:
        samples = {}
        for part, count in zip(loaded.parts, loaded.counts, strict=True):
            if count:
                samples[part.task_name] = list(range(count))
                group.add(part)
    began = time.perf_counter()
    lm.begin(name)
    output = lm_eval.simple_evaluate(
        model=lm,
        tasks=[loaded.parts[0] if group is None else group],
        num_fewshot=shots,
        limit=limit if group is None else None,
        samples=samples,
        # bootstrapped errors cost more than the scores; scores_of has closed forms
        bootstrap_iters=0,
        task_manager=source.manager,
    )
    wall = time.perf_counter() - began
    logged = {part: entries for part, entries in output["samples"].items() if entries}
    scored = len({(part, entry["doc_id"]) for part, entries in logged.items() for entry in entries})
    shots = int(max((output["n-shot"].get(part) or 0 for part in logged), default=0))
    scores, per_item = scores_of(name, output, logged, group is not None)
    split = task["local"]["few_shot_split"] if task["local"] else None
    return {
        "key": task["key"],
        "task": name,
        "scores": scores,
        "shots": shots,
        "items": scored,
        "official": TASKS[name].rows if name in TASKS else None,
        "limit": limit,
        "notes": notes_of(loaded, lm, split, scored=scored, limit=limit, shots=shots, examples=examples),
        "per_item": per_item,
        "gold": gold_of(loaded, logged),
        "parts": {
            part: {key.split(",")[0]: value for key, value in output["results"][part].items() if key.endswith(",none")}
            for part in (logged if group is not None else ())
        },
        "version": output["versions"].get(name),
        "timing": {"wall_s": wall},
        "provenance": provenance(
            device=torch.cuda.get_device_name(lm.device) if lm.device.type == "cuda" else lm.device.type,
            dtype=str(next(lm.model.parameters()).dtype).removeprefix("torch."),
            harness=lm_eval.__version__,
            batch_size=lm.batch_size,
            max_length=lm.max_length,
        ),
    }


def _no_data(name: str, error: Exception) -> dict[str, str]:
    source = TASKS[name].source if name in TASKS else "its data set"
    return {
        "message": f"{name}: {source} cannot be read from the hub ({type(error).__name__}: {first_line(error)}).",
        "remedy": "Without network access, give the rows in local files (--data-dir DIR), or fill a cache on a machine "
        "with network access and set HF_HOME to it. For a gated data set, request access and run `hf auth login`.",
    }


def _stay_offline() -> None:
    """Look for data sets only in the cache: each failed request takes half a minute."""
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    datasets.config.HF_HUB_OFFLINE = True


def _is_out_of_reach(request: dict[str, Any]) -> bool:
    """Whether the hub is needed and does not answer."""
    needed: list[tuple[str, Literal["dataset", "model"]]] = [
        (str(name).partition("@")[0], "model")
        for name in (request["model"], request["settings"]["tokenizer"])
        if name is not None and not Path(name).expanduser().exists()
    ]
    needed += [
        (TASKS[task["name"]].source, "dataset")
        for task in request["tasks"]
        if task["local"] is None and task["name"] in TASKS
    ]
    try:
        return bool(needed) and commit_of(*needed[0])[1] is not None
    except PassageError:  # the hub answers that it does not have it; the libraries' own error follows
        return False


def _with_less_memory(lm: Model, source: Tasks, loaded: LoadedTask, task: dict[str, Any]) -> dict[str, Any]:
    """:func:`_run`, with half the batch size each time that the memory runs out."""
    while True:
        try:
            return _run(lm, source, loaded, task)
        except torch.OutOfMemoryError:
            if lm.batch_size_per_gpu <= 1:
                raise EvaluationError(
                    f"one request alone is too large for the memory of {lm.device}; use --max-length, --dtype bfloat16 "
                    "or --device cpu."
                ) from None
            lm.batch_size_per_gpu = max(1, lm.batch_size_per_gpu // 2)
        torch.cuda.empty_cache()
