"""The benchmarks of the paper: their names in the harness, official sizes, shots and fields.

Section 3 of Liu et al. 2026 (arXiv:2602.00217) names ten benchmarks scored by ``acc`` and the word perplexity of
Paloma's WikiText-103. Prompts and scoring are those of the lm-evaluation-harness; this module holds only what must be
known before the harness starts. Any other task of the harness can be requested by its name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from decondense.config import suggest


class EvaluationError(ValueError):
    """An evaluation that cannot be run; the message names the thing, the value and the remedy."""


@dataclass(frozen=True)
class TaskInfo:
    """One benchmark, as the lm-evaluation-harness 0.4.13 defines it."""

    name: str
    """The harness's name."""
    source: str
    """Data set on the hub."""
    harness_folder: str
    """Folder of the definition, below the harness's folder of tasks."""
    split: str
    """The split that is scored."""
    rows: int | None
    """Official rows of that split; None: no number is published."""
    fields: tuple[str, ...]
    """Columns that prompts and scoring read; a dot separates a column from its subfield."""
    metric: str = "acc"
    """The metric that the paper reports."""
    few_shot_split: str | None = None
    """The split that few-shot examples come from; None: the task takes none."""
    few_shot_rows: int | None = None
    """Official rows of that split."""
    stand_in: str | None = None
    """Replaces ``few_shot_split`` where local data lack it; every table then says so."""
    folders: tuple[str, ...] = ()
    """Alternative names of a folder of local data."""
    optional: bool = False
    """Gated on the hub: a set of tasks omits it where local data have no folder for it."""


_ARC = ("question", "choices.text", "choices.label", "answerKey")

# fmt: off
_INFOS = (
    TaskInfo("anli_r2", "facebook/anli", "anli", "test_r2", 1000, ("premise", "hypothesis", "label"),
             few_shot_split="train_r2", few_shot_rows=45_460, stand_in="dev_r2"),
    TaskInfo("lambada_openai", "EleutherAI/lambada_openai", "lambada", "test", 5153, ("text",), folders=("lambada",)),
    TaskInfo("openbookqa", "allenai/openbookqa", "openbookqa", "test", 500,
             ("question_stem", "choices.text", "choices.label", "answerKey"),
             few_shot_split="train", few_shot_rows=4957, stand_in="validation"),
    TaskInfo("piqa", "baber/piqa", "piqa", "validation", 1838, ("goal", "sol1", "sol2", "label"),
             few_shot_split="train", few_shot_rows=16_113, stand_in="validation"),
    TaskInfo("truthfulqa_mc2", "truthfulqa/truthful_qa", "truthfulqa", "validation", 817,
             ("question", "mc2_targets.choices", "mc2_targets.labels"),
             folders=("truthfulqa_mc", "truthfulqa", "truthful_qa")),
    TaskInfo("winogrande", "allenai/winogrande", "winogrande", "validation", 1267,
             ("sentence", "option1", "option2", "answer"),
             few_shot_split="train", few_shot_rows=40_398, stand_in="validation", folders=("winogrande_xl",)),
    TaskInfo("arc_easy", "allenai/ai2_arc", "arc", "test", 2376, _ARC,
             few_shot_split="train", few_shot_rows=2251, folders=("ARC-Easy",)),
    TaskInfo("arc_challenge", "allenai/ai2_arc", "arc", "test", 1172, _ARC,
             few_shot_split="train", few_shot_rows=1119, folders=("ARC-Challenge",)),
    TaskInfo("medmcqa", "openlifescienceai/medmcqa", "medmcqa", "validation", 4183,
             ("question", "opa", "opb", "opc", "opd", "cop"),
             few_shot_split="train", few_shot_rows=182_822, stand_in="validation"),
    TaskInfo("mmlu", "cais/mmlu", "mmlu/default", "test", 14_042, ("question", "subject", "choices", "answer"),
             few_shot_split="dev", few_shot_rows=285),
    TaskInfo("paloma_wikitext_103", "allenai/paloma", "paloma", "test", None, ("text",),
             metric="word_perplexity", folders=("paloma", "wikitext_103"), optional=True),
)
# fmt: on

TASKS: dict[str, TaskInfo] = {info.name: info for info in _INFOS}
"""The benchmarks by the harness's name, in the paper's order."""

TEN: tuple[str, ...] = tuple(name for name in TASKS if name != "paloma_wikitext_103")

SETS: dict[str, tuple[str, ...]] = {"paper": tuple(TASKS), "ten": TEN}
"""``paper``: the ten and Paloma's WikiText-103. ``ten``: the ten that are scored by ``acc``."""

_WITH_EXAMPLES = ("arc_easy", "arc_challenge", "medmcqa", "mmlu")

SHOTS: dict[str, dict[str, int]] = {
    "gpt2": {name: 1 if name in _WITH_EXAMPLES else 0 for name in TASKS},
    "qwen3": {name: 5 if name in _WITH_EXAMPLES else 0 for name in TASKS},
}
"""Few-shot examples of the paper: one for GPT2 and five for Qwen3 on ARC, MedMCQA and MMLU, none elsewhere."""

FIXED_PROMPT = ("truthfulqa_mc2", "paloma_wikitext_103")
"""Tasks with a fixed prompt, which take no examples."""


def resolve_tasks(tasks: str | Iterable[str]) -> tuple[list[str], set[str]]:
    """The names of the tasks in order without repeats, and those that came as part of a set.

    Args:
        tasks: ``paper``, ``ten``, names of harness tasks, separated by commas or as a sequence.
    """
    entries = [tasks] if isinstance(tasks, str) else list(tasks)
    names = [name.strip() for entry in entries for name in entry.split(",") if name.strip()]
    if not names:
        raise EvaluationError("no tasks named: give --tasks paper, --tasks ten, or names separated by commas.")
    members = list(dict.fromkeys(member for name in names for member in SETS.get(name, (name,))))
    for name in members:
        if not re.fullmatch(r"[\w.-]*[^\W_][\w.-]*", name):
            raise EvaluationError(f"{name!r} is not a valid task name.{suggest(name, [*TASKS, *SETS])}")
    return members, set(members) - set(names)


def resolve_shots(shots: str | int, task: str) -> int | None:
    """Examples in the prompt of ``task``; None: the harness's default (tasks that are not the paper's).

    Args:
        shots: ``gpt2`` or ``qwen3`` (the paper's), or a number for every task that takes examples.
    """
    if isinstance(shots, str) and shots in SHOTS:
        return SHOTS[shots].get(task)
    try:
        number = int(shots)
    except ValueError:
        number = -1
    if number < 0 or isinstance(shots, bool):
        raise EvaluationError(
            f"shots {shots!r} is neither {' nor '.join(map(repr, SHOTS))} nor a non-negative number."
            f"{suggest(str(shots), SHOTS)}"
        )
    return 0 if task in FIXED_PROMPT else number


def spread(limit: int, sizes: Sequence[int]) -> list[int]:
    """Split ``limit`` items over the parts of a task: one in turn from each part that has items left."""
    taken = [0] * len(sizes)
    left = min(limit, sum(sizes))
    while left:
        for part, size in enumerate(sizes):
            if left and taken[part] < size:
                taken[part] += 1
                left -= 1
    return taken
