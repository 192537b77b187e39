"""The process around the harness: what it keeps, what it says, what it refuses, and that it leaves its caller alone."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluate_helpers import make_model, needs_harness, read, write

from decondense import report
from decondense.cli import main
from decondense.compare import compare
from decondense.config import EvaluateConfig
from decondense.evaluate import (
    TASKS,
    Evaluation,
    EvaluationError,
    benchmark_rows,
    check_benchmarks,
    evaluate,
)
from decondense.evaluate.catalogue import TEN, resolve_shots, resolve_tasks, spread
from decondense.evaluate.local import find_tasks
from decondense.records import check_row, make_row, read_rows, write_rows

pytestmark = needs_harness


# ---- what is asked for -----------------------------------------------------------------------------------------------


def test_sets_and_names_of_tasks() -> None:
    assert resolve_tasks("paper") == (list(TASKS), set(TASKS))
    assert resolve_tasks("ten")[0] == list(TEN)
    assert len(TEN) == 10
    assert resolve_tasks("piqa, ten")[0][0] == "piqa"
    assert "piqa" not in resolve_tasks("piqa,ten")[1], "asked for by name, so it must be there"
    assert resolve_tasks(["hellaswag", "piqa"]) == (["hellaswag", "piqa"], set())
    with pytest.raises(EvaluationError, match="no tasks named"):
        resolve_tasks(" , ")


def test_shots_are_the_papers_or_a_number() -> None:
    assert [resolve_shots("gpt2", task) for task in ("piqa", "arc_easy", "mmlu")] == [0, 1, 1]
    assert [resolve_shots("qwen3", task) for task in ("piqa", "arc_easy", "mmlu")] == [0, 5, 5]
    assert resolve_shots("gpt2", "hellaswag") is None, "the harness's own number"
    assert [resolve_shots(3, "piqa"), resolve_shots("3", "piqa"), resolve_shots(3, "truthfulqa_mc2")] == [3, 3, 0]
    for wrong in ("gpt-2", -1, "many"):
        with pytest.raises(EvaluationError, match="neither 'gpt2' nor 'qwen3' nor a non-negative number"):
            resolve_shots(wrong, "piqa")


@pytest.mark.parametrize("limit", [0, 1, 5, 8, 100])
def test_a_limit_is_spread_over_the_parts_in_turn(limit: int) -> None:
    sizes = [3, 0, 1, 4]
    taken = spread(limit, sizes)
    assert sum(taken) == min(limit, sum(sizes))
    assert all(k <= size for k, size in zip(taken, sizes, strict=True))
    # no part gives two more than another that still has some
    assert all(k >= max(taken) - 1 for k, size in zip(taken, sizes, strict=True) if k < size)


# ---- what comes out --------------------------------------------------------------------------------------------------


def test_rows_are_valid_and_items_average_to_their_score(whole: tuple[Evaluation, Path]) -> None:
    evaluation, out = whole
    rows = read_rows(out / "rows.jsonl")
    assert rows == evaluation.rows()
    scores = {(row["task"], row["metric"]): row for row in rows if row["kind"] == "eval"}
    assert {task for task, _ in scores} == set(TASKS)
    with_items = set()
    for key, row in scores.items():
        items = [r for r in rows if r["kind"] == "eval_item" and (r["task"], r["metric"]) == key]
        if items:
            with_items.add(key)
            assert len(items) == row["items"] == len({item["item"] for item in items})
            mean = math.fsum(r["value"] * r["weight"] for r in items) / math.fsum(r["weight"] for r in items)
            assert mean == pytest.approx(row["value"], rel=1e-9, abs=1e-12)
    assert {(task, "acc") for task in TEN} <= with_items
    assert ("paloma_wikitext_103", "word_loss") in with_items
    headline = {(row["task"], row["metric"]) for row in evaluation.rows("headline") if row["kind"] == "eval"}
    assert headline == {(task, "acc") for task in TEN} | {
        ("paloma_wikitext_103", "word_perplexity"),
        ("paloma_wikitext_103", "word_loss"),
    }


def test_standard_errors_are_those_of_the_items(whole: tuple[Evaluation, Path]) -> None:
    evaluation, _ = whole
    piqa = evaluation["piqa"]
    values = np.array([value for value, _ in piqa.per_item["acc"].values()])
    assert piqa.scores[0].stderr == pytest.approx(values.std(ddof=1) / math.sqrt(len(values)))
    # a perplexity's error follows its mean loss, d exp(x) = exp(x) dx; the loss weighs documents by words
    paloma = {score.metric: score for score in evaluation["paloma_wikitext_103"].scores}
    x, w = np.array(list(evaluation["paloma_wikitext_103"].per_item["word_loss"].values())).T
    mean = (x * w).sum() / w.sum()
    error = math.sqrt(len(x) / (len(x) - 1) * ((w * (x - mean)) ** 2).sum()) / w.sum()
    assert paloma["word_loss"].stderr == pytest.approx(error)
    assert paloma["word_perplexity"].stderr == pytest.approx(error * math.exp(mean))
    # the mean of the ten: independent tasks
    value, stderr = evaluation.mean or (math.nan, None)
    scores = [next(s for s in evaluation[task].scores if s.metric == "acc") for task in TEN]
    assert value == pytest.approx(np.mean([score.value for score in scores]))
    assert stderr == pytest.approx(math.sqrt(sum((score.stderr or 0) ** 2 for score in scores)) / 10)


def test_the_right_answers_likelihood_stands_beside_acc(whole: tuple[Evaluation, Path]) -> None:
    evaluation, _ = whole
    rows = [row for row in evaluation.rows() if row["kind"] == "eval_item"]
    for task in TEN:
        beside = [row for row in rows if row["task"] == task and row["metric"] == "acc"]
        assert all(row["bits_per_byte"] > 0 for row in beside)
        if task == "lambada_openai":
            assert {row["margin_bits"] for row in beside} == {None}
        elif task == "truthfulqa_mc2":  # acc is a probability: at least a half goes with a right answer at the top
            assert all(row["margin_bits"] > 0 for row in beside if row["value"] > 0.99)
        else:
            apart = [row for row in beside if row["margin_bits"] != 0]  # two choices may have the same text
            assert len(apart) >= len(beside) - 2
            assert [row["margin_bits"] > 0 for row in apart] == [row["value"] == 1 for row in apart]
    assert all(row["bits_per_byte"] is None for row in rows if row["metric"] != "acc")


def test_every_table_flags_counts_that_are_not_the_official_ones(whole: tuple[Evaluation, Path]) -> None:
    evaluation, out = whole
    markdown, rows = (out / "table.md").read_text(), read_rows(out / "rows.jsonl")
    table = {row["task"]: row for row in csv.DictReader(io.StringIO((out / "table.csv").read_text()))}
    for task in TEN:
        official = TASKS[task].rows
        said = f"the data have {evaluation[task].items:,} items, the official {TASKS[task].split} split"
        for where in (markdown, table[task]["notes"]):
            assert said in where
        row = next(row for row in rows if row["task"] == task)
        assert any(said in note for note in row["notes"])
        assert row["official_items"] == official
        assert f"{evaluation[task].items:,} of {official:,}" in markdown
    assert "examples come from 9 rows, the official train split of arc_easy has 2,251" in markdown
    assert "limited" not in markdown


def test_the_caller_stays_as_it_was(whole_and_states) -> None:
    (evaluation, _), before, after = whole_and_states
    assert len(evaluation.results) == len(TASKS)
    assert before == after
    assert "lm_eval" not in sys.modules


def test_asking_needs_neither_torch_nor_the_harness(tiny: Path, data: Path, tmp_path: Path, whole) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole[1], out)
    code = (
        "import sys; from decondense.evaluate import evaluate\n"
        f"evaluate({str(tiny)!r}, 'ten', data_dir={str(data)!r}, out={str(out)!r})\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'lm_eval') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_command_says_what_was_limited(tiny: Path, data: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")
    arguments = ["evaluate", str(tiny), "--data-dir", str(data), "--out", "out", "--limit", "3"]
    assert main([*arguments, "--tasks", "arc_easy,mmlu"]) == 0
    said = capsys.readouterr().out
    assert "3 of 2,376" in said
    assert "limited to the first 3 items" in said
    assert "limited to 3 items, the first of each part in turn" in said
    notes = [row["notes"] for row in read_rows(tmp_path / "out" / "rows.jsonl") if row["kind"] == "eval"]
    assert all(any("limited to" in note for note in entry) for entry in notes)
    assert {row["limit"] for row in read_rows(tmp_path / "out" / "rows.jsonl") if row["kind"] == "eval"} == {3}
    for table in ("table.md", "table.csv"):
        assert "limited to the first 3 items" in (tmp_path / "out" / table).read_text()
    # the same command again finds all done; another model is refused there
    stamp = (tmp_path / "out" / "tasks" / "mmlu.json").stat().st_mtime_ns
    assert main([*arguments, "--tasks", "arc_easy,mmlu", "--json"]) == 0
    shown = capsys.readouterr()
    assert "mmlu: kept from before" in shown.err
    printed = json.loads(shown.out)
    assert (printed["command"], {score["task"] for score in printed["scores"]}) == ("evaluate", {"arc_easy", "mmlu"})
    assert (tmp_path / "out" / "tasks" / "mmlu.json").stat().st_mtime_ns == stamp
    assert main([*arguments, "--tasks", "arc_easy", "--dtype", "bfloat16"]) == 2
    assert "holds the results of" in capsys.readouterr().err


def test_two_models_are_paired_item_by_item(whole: tuple[Evaluation, Path], data: Path, tmp_path: Path) -> None:
    names = ("lambada_openai", "piqa", "arc_easy")
    other = evaluate(make_model(tmp_path / "other", seed=1), names, data_dir=data)
    mine = dataclasses.replace(whole[0], results=tuple(whole[0][name] for name in names))
    rows = []
    for arm, evaluation in (("cross-entropy", mine), ("dispersion", other)):
        for seed in (0, 1):
            who = {"study": "s", "study_fingerprint": "f", "arm": arm, "seed": seed}
            hashes = {key: f"{key}{seed}" for key in ("init_hash", "order_hash", "corpus_hash")}
            rows.append(make_row("run", **who, status="finished", config={}, steps=5, tokens=50, **hashes))
            rows += dataclasses.replace(evaluation, identity={**who, "step": 5, "tokens": 50}).rows("headline")
    found = compare(rows, baseline="cross-entropy")
    assert {task.metric for task in found.tasks} == {"acc", "bits_per_byte", "margin_bits"}
    for task in found.tasks:
        (difference,) = task.differences
        assert difference.items == 7, (task.task, difference.interval_reason)
        if task.metric != "acc":
            continue
        assert difference.mean == pytest.approx(other[task.task].score("acc") - mine[task.task].score("acc"))
    assert not [note for note in found.notes if "approximate" in note]
    # what qualifies the scores is said under every table of the comparison that shows them
    said = "piqa: the data have 7 items, the official validation split of piqa has 1,838"
    assert said in found.task_notes
    for table in (report.task_table(found), report.headline(found), report.difference_table(found)):
        assert table is not None
        assert said in table.to_markdown()


@pytest.mark.slow
def test_the_final_checkpoint_of_a_study_is_known_and_long_answers_are_scored(tmp_path: Path) -> None:
    """Rows carry the run's identity; an answer longer than the context is the sum of its windows, by plain torch."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = make_model(tmp_path / "cell" / "final", positions=32)
    who = {"study": "mine", "study_fingerprint": "abc", "arm": "dispersion", "seed": 2}
    run = make_row("run", **who, status="finished", config={}, steps=7, tokens=700)
    write_rows(tmp_path / "cell" / "rows.jsonl", [run])
    texts = ["river stone " + "abcdefgh" * 8, "quiet paper " * 12 + "xyz" * 25, "seven under bright lamp"]
    write(tmp_path / "data" / "lambada" / "test.jsonl", [{"text": text} for text in texts])
    found = evaluate(model, "lambada_openai", data_dir=tmp_path / "data", batch_size=1)
    for row in found.rows():
        assert {key: row[key] for key in who} == who
        assert row["step"] == 7
    tokenizer, network = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model).eval()
    expected = []
    for text in texts:
        context, answer = text.rsplit(" ", 1)
        ids = tokenizer(text).input_ids
        start = len(tokenizer(context).input_ids)
        assert tokenizer.decode(ids[start:]) == f" {answer}"
        size = 16 if len(ids) - start > 32 else 32
        total = 0.0
        for first in range(start, len(ids), size):
            last = min(first + size, len(ids))
            window = torch.tensor(ids[:last][-33:])
            with torch.inference_mode():
                logits = network(window[None, :-1]).logits[0].double()
            wanted = window[-(last - first) :]
            total += float(logits.log_softmax(-1)[-(last - first) :].gather(1, wanted[:, None]).sum())
        expected.append(-total)
    values = [value for value, _ in found["lambada_openai"].per_item["loss"].values()]
    assert values == pytest.approx(expected, rel=1e-5)
    size = [len(" " + text.rsplit(" ", 1)[1]) for text in texts]
    gold = list(found["lambada_openai"].gold.values())
    bits = [loss / math.log(2) / count for loss, count in zip(expected, size, strict=True)]
    assert [value for value, _ in gold] == pytest.approx(bits, rel=1e-5)
    assert {margin for _, margin in gold} == {None}
    notes = " ".join(found["lambada_openai"].notes)
    assert "2 of 3 prompts with answers exceed the context of 32 tokens and were cut from the left" in notes
    assert "2 answers alone exceed the context and were scored in windows" in notes


@pytest.mark.slow
def test_a_study_gets_its_rows_also_under_a_launcher(tiny: Path, data: Path, tmp_path: Path, monkeypatch) -> None:
    """One rank of several asks: the worker is one process all the same, and finished tasks are not scored again."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "1")
    settings = EvaluateConfig(tasks=("piqa", "lambada_openai"), limit=4, data_dir=str(data))
    check_benchmarks(settings)
    who = {"study": "s", "study_fingerprint": "f", "arm": "a", "seed": 1, "step": 5, "tokens": 50}
    rows = benchmark_rows(tiny, settings, who, tmp_path / "tasks", threads=1)
    assert [(row["kind"], row["task"], row["metric"]) for row in rows] == [
        line for task in settings.tasks for line in [("eval", task, "acc"), *[("eval_item", task, "acc")] * 4]
    ]
    assert all(row[key] == value for row in rows for key, value in who.items() if key != "tokens")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "tasks" / "tasks").iterdir()}
    assert benchmark_rows(tiny, settings, who, tmp_path / "tasks", threads=1) == rows
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "tasks" / "tasks").iterdir()}
    assert benchmark_rows(tiny, EvaluateConfig(), who, tmp_path / "none") == []
    check_benchmarks(EvaluateConfig(data_dir=str(tmp_path / "nowhere")))
    with pytest.raises(EvaluationError, match="is not a directory"):
        check_benchmarks(EvaluateConfig(tasks=("ten",), data_dir=str(tmp_path / "nowhere")))


# ---- interruption ----------------------------------------------------------------------------------------------------


def _start(tiny: Path, data: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "decondense", "evaluate", str(tiny), "--data-dir", str(data), "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _wait_for_tasks(out: Path, process: subprocess.Popen[str], count: int) -> dict[str, int]:
    until = time.monotonic() + 240
    while time.monotonic() < until and process.poll() is None:
        done = {path.name: path.stat().st_mtime_ns for path in (out / "tasks").glob("[!.]*.json")}
        if len(done) >= count:
            return done
        time.sleep(0.02)
    raise AssertionError(f"ended too early: {process.communicate()}")


@pytest.mark.slow
def test_kill_9_keeps_finished_tasks_and_going_on_gives_the_same(
    tiny: Path, data: Path, whole: tuple[Evaluation, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = _start(tiny, data, out)
    done = _wait_for_tasks(out, process, 2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (out / "tasks" / "paloma_wikitext_103.json").exists(), "killed too late to prove anything"
    # a torn file of a task that was being written counts as nothing
    (out / "tasks" / "paloma_wikitext_103.json").write_text('{"task": "paloma_wiki')
    seen: list[tuple[str, str]] = []
    found = evaluate(tiny, "paper", data_dir=data, out=out, progress=lambda task, what, *_: seen.append((task, what)))
    for name, stamp in done.items():
        assert (out / "tasks" / name).stat().st_mtime_ns == stamp
        assert (name.removesuffix(".json"), "kept") in seen
    assert found.to_csv() == whole[0].to_csv()
    assert [r.per_item for r in found.results] == [r.per_item for r in whole[0].results]


@pytest.mark.slow
def test_a_killed_worker_is_reported_with_its_log(tiny: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = _start(tiny, data, out)
    _wait_for_tasks(out, process, 1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in children:
        os.kill(int(child), signal.SIGKILL)
    _, said = process.communicate()
    assert process.returncode == 1
    said = re.sub(r"\s+", " ", said)
    assert "the evaluation stopped (exit status -9" in said
    assert "the same command resumes with the next" in said
    assert "Traceback" not in said


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_missing_files_are_listed_all_at_once(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    for gone in ("piqa/validation.jsonl", "arc_easy/train.jsonl", "mmlu/all_dev.jsonl", "medmcqa/train.jsonl"):
        (tmp_path / "data" / gone).unlink()
    shutil.rmtree(tmp_path / "data" / "winogrande")
    shutil.rmtree(tmp_path / "data" / "paloma_wikitext_103")
    names, of_a_set = resolve_tasks("paper")
    shots = {name: resolve_shots("gpt2", name) for name in names}
    with pytest.raises(EvaluationError) as refused:
        find_tasks(tmp_path / "data", shots, of_a_set)
    said = str(refused.value)
    listed = [line.strip() for line in said.splitlines() if line.startswith("  ")]
    assert len(listed) == 4, listed
    for part in ("piqa/validation.jsonl", "arc_easy/train.jsonl", "mmlu/dev.jsonl", "winogrande/validation.jsonl"):
        assert any(part in line for line in listed)
    # MedMCQA's training split is large: another split may stand in, and Paloma is behind a form
    assert "medmcqa" not in said.split("Folders there")[0]
    assert "paloma" not in said
    with pytest.raises(EvaluationError, match="paloma_wikitext_103"):
        find_tasks(tmp_path / "data", {"paloma_wikitext_103": 0}, set())
    # nobody asks for examples: nobody needs the files
    found, absent = find_tasks(tmp_path / "data", {"arc_easy": 0, "mmlu": 0, "paloma_wikitext_103": 0}, of_a_set)
    assert sorted(found) == ["arc_easy", "mmlu"]
    assert absent == ["paloma_wikitext_103"]


def test_bad_rows_are_named(data: Path, tmp_path: Path) -> None:
    rows = read(data / "piqa" / "validation.jsonl")
    rows[3] = {"goal": "a", "solution1": "b", "sol2": "c", "label": 0}
    write(tmp_path / "piqa" / "validation.jsonl", rows)
    with pytest.raises(
        EvaluationError,
        match=r"validation.jsonl, row 4: piqa needs the field 'sol1'; there are goal, solution1, sol2, label",
    ):
        find_tasks(tmp_path, {"piqa": 0})
    (tmp_path / "piqa" / "validation.jsonl").write_text('{"goal": "a"\n')
    with pytest.raises(EvaluationError, match="line 1: not valid JSON"):
        find_tasks(tmp_path, {"piqa": 0})
    (tmp_path / "piqa" / "validation.jsonl").write_text("")
    with pytest.raises(EvaluationError, match="no rows"):
        find_tasks(tmp_path, {"piqa": 0})
    with pytest.raises(EvaluationError, match="is not a directory"):
        find_tasks(tmp_path / "nowhere", {"piqa": 0})


def test_parquet_files_hold_the_same_rows(data: Path, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    from decondense.evaluate.local import read_rows as read_local

    rows = read(data / "arc_easy" / "test.jsonl")
    (tmp_path / "ARC-Easy").mkdir()
    for part, chunk in enumerate((rows[:4], rows[4:])):
        parquet.write_table(
            pyarrow.Table.from_pylist(chunk), tmp_path / "ARC-Easy" / f"test-0000{part}-of-00002.parquet"
        )
    found, _ = find_tasks(tmp_path, {"arc_easy": 0})
    assert [row for file in found["arc_easy"].splits["test"] for row in read_local(Path(file))] == rows


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (lambda folder: None, "there is no model directory"),
        (lambda folder: folder.mkdir(), "it has no config.json"),
        (lambda folder: (folder.mkdir(), (folder / "config.json").write_text('{"a": 1}')), "names no model_type"),
        (
            lambda folder: (folder.mkdir(), (folder / "config.json").write_text('{"model_type": "gpt2"}')),
            "but no weights",
        ),
        (lambda folder: folder.write_text("x"), "is a file"),
    ],
)
def test_what_is_no_model_is_refused_at_once(data: Path, tmp_path: Path, prepare, said: str, capsys) -> None:
    prepare(tmp_path / "model")
    began = time.process_time()
    assert main(["evaluate", str(tmp_path / "model"), "--data-dir", str(data)]) == 2
    assert said in capsys.readouterr().err
    assert time.process_time() - began < 5


def test_a_model_below_is_pointed_at(tiny: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "run" / "checkpoint-5")
    with pytest.raises(EvaluationError, match="There are models below it: checkpoint-5"):
        evaluate(tmp_path / "run", "piqa", data_dir=data)


def test_without_the_harness_the_command_says_what_to_install(tiny: Path, data: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["evaluate", str(tiny), "--data-dir", str(data)]) == 2
    assert 'pip install "decondense[eval]"' in capsys.readouterr().err


def test_an_encoder_and_an_unknown_task_are_refused(tiny: Path, data: Path, tmp_path: Path) -> None:
    encoder = make_model(tmp_path / "encoder", head="masked")
    with pytest.raises(EvaluationError, match="is a BertForMaskedLM: benchmarks need a model that gives probabilities"):
        evaluate(encoder, "piqa", data_dir=data)
    with pytest.raises(EvaluationError, match=r"piqqa/ \(a folder for the task Did you mean 'piqa'\?\)"):
        evaluate(tiny, "piqqa", data_dir=data)


@pytest.mark.slow
def test_a_device_that_is_not_there_is_refused(tiny: Path, data: Path) -> None:
    with pytest.raises(EvaluationError, match="there is no device 'cuda:99' here"):
        evaluate(tiny, "piqa", data_dir=data, device="cuda:99")


@pytest.mark.slow
def test_numbers_that_are_none_are_an_error(tiny: Path, data: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["transformer.ln_f.weight"][:] = math.nan
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EvaluationError, match="piqa: the model's log-likelihoods are NaN"):
        evaluate(tmp_path / "model", "piqa", data_dir=data)


def test_without_the_hub_the_way_out_is_named(tiny: Path, tmp_path: Path, monkeypatch) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    with pytest.raises(EvaluationError) as refused:
        evaluate(tiny, "piqa,lambada_openai", limit=2)
    said = str(refused.value)
    assert "piqa: baber/piqa cannot be read from the hub" in said
    assert "lambada_openai: EleutherAI/lambada_openai cannot be read" in said
    assert said.count("--data-dir DIR") == 1, "the way out is said once"


@pytest.mark.slow
def test_data_of_the_hub_give_what_local_files_give(
    whole: tuple[Evaluation, Path], tiny: Path, data: Path, tmp_path: Path, monkeypatch
) -> None:
    """The hub's loader reads a directory of the data set's name where there is one: the path without --data-dir."""
    for task, source in (("piqa", "baber/piqa"), ("lambada_openai", "EleutherAI/lambada_openai")):
        shutil.copytree(data / task, tmp_path / source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    found = evaluate(tiny, "piqa,lambada_openai")
    for result in found.results:
        local = whole[0][result.task]
        assert result.scores == local.scores
        assert result.per_item == local.per_item
        assert result.notes == local.notes


@pytest.mark.parametrize("where", [pytest.param("local", marks=pytest.mark.slow), "hub"])
def test_rows_of_another_release_score_as_the_hubs_and_the_tables_say_so(
    whole: tuple[Evaluation, Path], tiny: Path, data: Path, tmp_path: Path, monkeypatch, where: str
) -> None:
    folder = tmp_path / ("piqa" if where == "local" else "baber/piqa")
    for split in ("train", "validation"):
        rows = [{**row, "label": "ab"[row["label"]]} for row in read(data / "piqa" / f"{split}.jsonl")]
        write(folder / f"{split}.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    found = evaluate(tiny, "piqa", data_dir=tmp_path if where == "local" else None)
    local = whole[0]["piqa"]
    assert found["piqa"].scores == local.scores
    assert found["piqa"].per_item == local.per_item
    (note,) = set(found["piqa"].notes) - set(local.notes)
    assert "converted 7 values of 'label' in piqa" in note
    assert note in found.to_markdown()
    assert note in found.to_csv()
    assert all(note in row["notes"] for row in found.rows() if row["kind"] == "eval")


@pytest.mark.slow
def test_a_tokenizer_without_special_tokens_scores_what_it_can(tiny: Path, data: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        settings.pop(name, None)
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (model / "special_tokens_map.json").unlink(missing_ok=True)
    write(tmp_path / "data" / "lambada_openai" / "test.jsonl", [{"text": "lamp"}, {"text": "river stone"}])
    for task in ("piqa", "paloma_wikitext_103"):
        shutil.copytree(data / task, tmp_path / "data" / task)
    seen: list[tuple[str, str]] = []
    with pytest.raises(EvaluationError) as refused:
        evaluate(
            model,
            "piqa,lambada_openai,paloma_wikitext_103",
            data_dir=tmp_path / "data",
            out=tmp_path / "out",
            progress=lambda task, what, *_: seen.append((task, what)),
        )
    said = str(refused.value)
    for task in ("lambada_openai", "paloma_wikitext_103"):
        assert f"{task}: the tokenizer of {model} has neither bos_token nor eos_token" in said
        # before anything is scored
        assert seen.index((task, "failed")) < seen.index(("piqa", "running"))
    assert "Finished and kept: piqa." in said


@pytest.mark.slow
def test_a_label_outside_the_choices_of_any_task_is_refused(tiny: Path, tmp_path: Path) -> None:
    row = {"ind": 1, "activity_label": "Lamp", "ctx_a": "A lamp", "ctx_b": "it", "endings": list("wxyz"), "label": "9"}
    write(tmp_path / "hellaswag" / "validation.jsonl", [{**row, "label": "1"}, row])
    with pytest.raises(EvaluationError, match=r"hellaswag, item 2: the answer 9 is not one of its 4 choices"):
        evaluate(tiny, "hellaswag", data_dir=tmp_path)


def test_a_strange_directory_is_left_alone(tiny: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(EvaluationError, match="holds no evaluation"):
        evaluate(tiny, "piqa", data_dir=data, out=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".")) == ["thesis.tex"]


def test_row_fields_of_older_files_are_still_read() -> None:
    old = {
        "kind": "eval", "study": "s", "study_fingerprint": "f", "arm": "a", "seed": 0, "step": 1, "tokens": 2,
        "task": "validation", "metric": "loss", "value": 1.5, "higher_is_better": False, "items": 3,
    }  # fmt: skip
    assert check_row(json.loads(json.dumps(old)))["notes"] == []
    item = {key: old[key] for key in ("study", "study_fingerprint", "arm", "seed", "step", "task", "metric", "value")}
    assert check_row({"kind": "eval_item", "item": "x", **item})["bits_per_byte"] is None
