"""The offline tasks against the harness's own packaged tasks on the same rows: equal to the last bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from evaluate_helpers import ask_harness, hub_of, needs_harness

from decondense.evaluate import SHOTS, TASKS, Evaluation, evaluate

pytestmark = needs_harness

# the tasks that never take examples, and MMLU's many parts, are asked once
ASKED = {
    "gpt2": tuple(TASKS),
    "2": tuple(name for name in TASKS if name not in ("mmlu", "truthfulqa_mc2", "paloma_wikitext_103")),
}
FOLDERS = sorted({info.harness_folder for info in TASKS.values()})


def shots_of(preset: str, task: str) -> int:
    return SHOTS[preset][task] if preset in SHOTS else int(preset)


@pytest.fixture(scope="module")
def made_up(
    tiny: Path, data: Path, whole: tuple[Evaluation, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, Evaluation]]:
    """Every task by the harness itself and by us, with the paper's examples; and with two examples wherever any go."""
    scratch = tmp_path_factory.mktemp("oracle")
    runs = [
        {"label": f"{task}/{preset}", "task": task, "shots": shots_of(preset, task)}
        for preset in ("gpt2", "2")
        for task in ASKED[preset]
    ]
    oracle = ask_harness(tiny, runs, hub_of(data, scratch / "mmlu"), scratch, folders=FOLDERS)
    return oracle, {"gpt2": whole[0], "2": evaluate(tiny, ASKED["2"], shots=2, data_dir=data)}


def check(ours: Any, oracle: dict[str, Any], *, errors: bool = True) -> None:
    """Every number that the harness reports, and every item's."""
    theirs = {
        key.split(",")[0]: value for key, value in oracle["results"].items() if "," in key and "_stderr" not in key
    }
    mine = {score.metric: score for score in ours.scores}
    assert theirs
    assert theirs.keys() <= mine.keys()
    for metric, value in theirs.items():
        assert mine[metric].value == value, metric
        stderr = oracle["results"].get(f"{metric}_stderr,none", "N/A")
        if errors and stderr != "N/A":
            assert mine[metric].stderr == pytest.approx(stderr, rel=1e-9, abs=1e-12), metric
    assert ours.items == len(oracle["samples"])
    for metric in ("acc", "acc_norm"):
        if metric in theirs:
            items = [value for value, _ in ours.per_item[metric].values()]
            assert items == [float(sample[metric]) for sample in oracle["samples"]]


@pytest.mark.parametrize(("preset", "task"), [(preset, task) for preset, tasks in ASKED.items() for task in tasks])
def test_made_up_rows_give_the_harness_own_numbers(made_up: Any, task: str, preset: str) -> None:
    oracle, ours = made_up
    check(ours[preset][task], oracle[f"{task}/{preset}"])


def test_the_number_of_examples_is_the_papers(made_up: Any) -> None:
    _, ours = made_up
    assert {r.task: r.shots for r in ours["gpt2"].results} == SHOTS["gpt2"]
    assert {r.task: r.shots for r in ours["2"].results} == dict.fromkeys(ASKED["2"], 2)
    # the examples matter to the model, or the comparison above would prove nothing about them
    for task in ("arc_easy", "arc_challenge", "medmcqa"):
        assert set(ours["gpt2"][task].per_item["acc"]).isdisjoint(ours["2"][task].per_item["acc"])


def test_perplexities_are_the_exponential_of_items_that_can_be_paired(made_up: Any) -> None:
    oracle, ours = made_up
    for task, metric, loss, samples in (
        ("paloma_wikitext_103", "word_perplexity", "word_loss", lambda s: (-s[0] / s[1], s[1])),
        ("lambada_openai", "perplexity", "loss", lambda s: (-s, 1.0)),
    ):
        result = ours["gpt2"][task]
        items = list(result.per_item[loss].values())
        assert items == [samples(sample[metric]) for sample in oracle[f"{task}/gpt2"]["samples"]]
        mean = math.fsum(x * w for x, w in items) / math.fsum(w for _, w in items)
        assert result.score(loss) == pytest.approx(mean, rel=1e-12)
        assert result.score(metric) == pytest.approx(math.exp(mean), rel=1e-12)
    assert ours["gpt2"]["paloma_wikitext_103"].scores[0].metric == "word_perplexity"


@pytest.mark.slow
def test_real_benchmarks_give_the_harness_own_numbers(shared_data: Path, tmp_path: Path) -> None:
    model, root = shared_data / "models" / "stories260K", shared_data / "benchmarks"
    limit = 6
    # the harness opens the training split even where it takes no examples from it
    copies = {
        "anli_r2": {"train_r2": "dev_r2"},
        "openbookqa": {"train": "validation"},
        "piqa": {"train": "validation"},
        "winogrande": {"train": "validation"},
    }
    runs: list[dict[str, Any]] = []
    for task in TASKS:
        if task != "paloma_wikitext_103":
            # the harness's limit counts each of MMLU's 57 subjects, ours the task
            runs.append(
                {"label": task, "task": task, "shots": SHOTS["gpt2"][task], "limit": 1 if task == "mmlu" else limit}
            )
        if task == "medmcqa":
            runs[-1]["override"] = {"training_split": None, "fewshot_split": "validation"}
    oracle = ask_harness(model, runs, hub_of(root, tmp_path / "mmlu", copies=copies), tmp_path)
    ours = evaluate(model, "ten", limit=limit, data_dir=root)
    for task in oracle:
        if task != "mmlu":
            check(ours[task], oracle[task])
    mmlu = evaluate(model, "mmlu", limit=57, data_dir=root)["mmlu"]
    assert len(oracle["mmlu"]["samples"]) == 57
    check(mmlu, oracle["mmlu"])
    # all ten are there in full, and the table says what was left out of them
    for result in ours.results:
        assert not [note for note in result.notes if "official" in note]
        assert any("limited to" in note for note in result.notes)
    assert any("for want of train" in note for note in ours["medmcqa"].notes)
