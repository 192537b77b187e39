"""The lm-evaluation-harness by itself: its packaged tasks, with ``datasets.load_dataset`` answered from local files.

Nothing of decondense is imported. ``python oracle.py SPEC`` writes, for every run, the harness's results and the
metrics of every sample.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import datasets

spec = json.loads(Path(sys.argv[1]).read_text())
served = {(path, name): files for path, name, files in spec["served"]}
original, loaded = datasets.load_dataset, {}


def load_dataset(path, name=None, **kwargs):
    if (path, name) not in served:
        raise FileNotFoundError(f"no local copy of {path}/{name}")
    if (path, name) not in loaded:
        loaded[path, name] = original("json", data_files=served[path, name])
    return loaded[path, name]


datasets.load_dataset = load_dataset

import lm_eval  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

lm = HFLM(pretrained=spec["model"], device="cpu", batch_size=spec.get("batch_size", 16))
base = Path(lm_eval.__file__).parent / "tasks"
folders = spec.get("folders")
manager = (
    TaskManager(include_defaults=False, include_path=[str(base / f) for f in folders]) if folders else TaskManager()
)
found = {}
for run in spec["runs"]:
    task = run["task"]
    if run.get("override"):
        task = {"group": "overridden", "task": [{"task": run["task"], **run["override"]}]}
    result = lm_eval.simple_evaluate(
        model=lm,
        tasks=[task],
        num_fewshot=run["shots"],
        limit=run.get("limit"),
        # analytic errors of means come with any positive number; perplexities are bootstrapped, which takes long
        bootstrap_iters=0 if run["task"] in ("lambada_openai", "paloma_wikitext_103") else 2,
        task_manager=manager,
    )
    members = result["group_subtasks"].get(run["task"])
    found[run["label"]] = {
        "results": result["results"][run["task"]],
        "samples": [
            {name: sample[name] for name in sample["metrics"]}
            for name, samples in result["samples"].items()
            for sample in samples
        ],
        "shots": result["n-shot"].get(run["task"]),
        "members": members,
    }
Path(spec["out"]).write_text(json.dumps(found, default=str))
