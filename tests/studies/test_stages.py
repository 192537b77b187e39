"""What a study does beside training its arms: models trained first, rates tried, starts taken as they are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import decondense
from decondense.compare import compare
from decondense.config import ConfigError, StudyConfig
from decondense.corpora.packed import prepare
from decondense.corpora.passages import sample_passages
from decondense.records import Row, read_rows
from decondense.seeding import hash_parameters
from decondense.studies import run_study
from decondense.studies.plan import Setting
from decondense.studies.runner import (
    cell_folder,
    open_directory,
    opened_corpus,
    prepared_folder,
    study_corpus,
    tasks,
    trial_folder,
)
from studies.conftest import SMALL, Interrupted, small_study, stable_rows, stop_after

BASE = {"model": SMALL["model"], "train": {**SMALL["train"], "learning_rate": 0.01}, "seed": 5}
STAGED = {
    "arms": [
        {"name": "cross-entropy"},
        {"name": "none", "untrained": True},
        {"name": "dispersion", "dispersion": {"weight": 0.5}},
        {"name": "taught", "distillation": {"teacher": "prepared:teacher"}, "learning_rate": 0.002},
    ],
    "prepared": {"base": BASE, "teacher": {**BASE, "seed": 6}},
    "model": {"pretrained": "prepared:base"},
    "sweep": {"learning_rates": [0.03, 0.001], "seed": 77},
    "evaluate": {**SMALL["evaluate"], "validation_tokens": 4096},
}


def staged_study(**changes: object) -> StudyConfig:
    return small_study(**{**STAGED, **changes})


@pytest.fixture(scope="module")
def staged(tmp_path_factory, cache_base: Path) -> tuple[Path, list[Row]]:
    os.environ.setdefault("DECONDENSE_CACHE", str(cache_base))
    out = tmp_path_factory.mktemp("staged") / "study"
    return out, run_study(staged_study(), out, workers=0)


def ends(rows: list[Row]) -> dict[tuple[str, int], Row]:
    return {
        (row["arm"], row["seed"]): row
        for row in rows
        if row["kind"] == "run" and row["status"] in ("finished", "failed")
    }


def test_a_sweep_chooses_each_arms_rate_on_a_seed_and_documents_of_its_own(staged) -> None:
    out, rows = staged
    trials = [row for row in rows if row["kind"] == "trial"]
    assert [(row["arm"], row["learning_rate"]) for row in trials] == [
        (arm, rate) for arm in ("cross-entropy", "dispersion") for rate in (0.001, 0.03)
    ], "the arm with a rate of its own and the untrained one are not swept"
    assert {row["seed"] for row in trials} == {77}
    for arm in ("cross-entropy", "dispersion"):
        mine = {row["learning_rate"]: row for row in trials if row["arm"] == arm}
        best = min(mine, key=lambda rate: mine[rate]["value"])
        assert [rate for rate, row in mine.items() if row["chosen"]] == [best]
        assert {end["learning_rate"] for (name, _), end in ends(rows).items() if name == arm} == {best}
        for rate, row in mine.items():
            own = read_rows(trial_folder(out, arm, rate) / "rows.jsonl")
            assert [r["value"] for r in own if r["kind"] == "eval"] == [row["value"]]
            scored = {r["item"] for r in own if r["kind"] == "eval_item"}
            reported = {r["item"] for r in rows if r["kind"] == "eval_item" and r["task"] == "validation"}
            assert scored
            assert not scored & reported
    assert ends(rows)["taught", 0]["learning_rate"] == 0.002
    steps = [row["learning_rate"] for row in rows if row["kind"] == "step" and row["arm"] == "taught"]
    assert max(steps) <= 0.002


def test_the_chosen_warm_up_and_clip_are_those_of_the_runs(tmp_path) -> None:
    sweep = {"learning_rates": [0.01], "warmups": [0.0, 0.5], "max_grad_norms": [0.1], "seed": 77, "steps": 6}
    study = small_study(
        sweep=sweep, arms=[{"name": "cross-entropy"}], evaluate={**SMALL["evaluate"], "validation_tokens": 4096}
    )
    rows = run_study(study, tmp_path / "study", workers=0)
    trials = {row["warmup"]: row for row in rows if row["kind"] == "trial"}
    assert {warmup: row["max_grad_norm"] for warmup, row in trials.items()} == {0.0: 0.1, 0.5: 0.1}
    (chosen,) = [row for row in trials.values() if row["chosen"]]
    assert chosen["value"] == min(row["value"] for row in trials.values())
    end = ends(rows)["cross-entropy", 0]
    assert (end["learning_rate"], end["warmup"], end["max_grad_norm"]) == (0.01, chosen["warmup"], 0.1)
    for warmup in trials:
        own = read_rows(trial_folder(tmp_path / "study", "cross-entropy", Setting(0.01, warmup, 0.1)) / "rows.jsonl")
        logged = {row["step"]: row["learning_rate"] for row in own if row["kind"] == "step"}
        # the run of 8 steps warms up for 4 at a fraction of .5, and so does its trial of 6, by .0025 a step;
        # which of two neighbouring steps a logged rate belongs to depends on the release of transformers
        if warmup:
            assert min(abs(logged[2] - rate) for rate in (0.0025, 0.005)) < 1e-9
            assert logged[4] - logged[2] == pytest.approx(0.005)
        else:
            assert 0.01 >= logged[2] > logged[4]


def test_tuning_takes_other_documents_or_says_that_there_are_none() -> None:
    corpus = prepare(staged_study().corpus)
    validation = {name for name, _ in corpus.held_out_documents(4096)}
    tuning = {name for name, _ in corpus.held_out_documents(4096, part="tuning")}
    assert validation
    assert tuning
    assert not validation & tuning
    with pytest.raises(ValueError, match="none is left to choose a learning rate on"):
        corpus.held_out_documents(10**9, part="tuning")


def test_a_document_counts_up_to_its_limit() -> None:
    corpus = prepare(staged_study().corpus)
    whole = dict(corpus.held_out_documents(10**9))
    cut = dict(corpus.held_out_documents(10**9, of_one=300))
    assert max(map(len, whole.values())) > 300
    assert {name: len(ids) for name, ids in cut.items()} == {name: min(300, len(ids)) for name, ids in whole.items()}
    assert all((ids == whole[name][: len(ids)]).all() for name, ids in cut.items())
    # the same budget reaches more documents, and tuning still takes others
    few, many = corpus.held_out_documents(3000), corpus.held_out_documents(3000, of_one=300)
    assert sum(len(ids) for _, ids in many) == 3000
    assert len(many) > len(few)
    tuning = corpus.held_out_documents(3000, of_one=300, part="tuning")
    assert not {name for name, _ in many} & {name for name, _ in tuning}


def test_a_prepared_model_is_the_start_of_every_seed(staged) -> None:
    out, rows = staged
    for name in ("base", "teacher"):
        own = read_rows(prepared_folder(out, name) / "rows.jsonl")
        assert [row["status"] for row in own if row["kind"] == "run"] == ["started", "finished"]
    trained = load_file(prepared_folder(out, "base") / "final" / "model.safetensors")
    start = AutoModelForCausalLM.from_pretrained(prepared_folder(out, "base") / "final", dtype=torch.float32)
    assert {key: value.shape for key, value in trained.items()}.items() <= {
        key: value.shape for key, value in start.state_dict().items()
    }.items()
    assert {end["init_hash"] for end in ends(rows).values()} == {hash_parameters(start)}
    taught = [row for row in rows if row["kind"] == "step" and row["arm"] == "taught"]
    assert all(row["distillation"] > 0 for row in taught)


def test_the_untouched_start_is_evaluated_and_compared(staged) -> None:
    _, rows = staged
    mine = [row for row in rows if row["arm"] == "none" and row["seed"] == 0]
    assert [row["kind"] for row in mine if row["kind"] != "eval_item"] == ["run", "profile", "eval", "run"]
    end = ends(rows)["none", 0]
    assert (end["steps"], end["tokens"], end["order_hash"], end["learning_rate"]) == (0, 0, None, None)
    assert end["final_hash"] == end["init_hash"]
    first = {row["arm"]: row["value"] for row in rows if row["kind"] == "eval" and row["step"] == 0}
    assert len(set(first.values())) == 1, "step 0 of the trained arms is what the untrained one scores"
    found = compare(rows)
    assert found.validation is not None
    difference = found.validation.difference("none")
    assert difference is not None
    assert difference.n == 1


@pytest.mark.slow
def test_killed_in_a_stage_the_study_ends_the_same(staged, tmp_path) -> None:
    """Kill -9 while a model is prepared, while a rate is tried, and while an arm is trained."""
    study = staged_study()
    (tmp_path / "study.yaml").write_text(study.to_yaml())
    out = tmp_path / "study"
    command = [sys.executable, "-m", "decondense", "study", str(tmp_path / "study.yaml"), "--out", str(out)]
    for stage in ("prepared/base", "sweep/dispersion", "cells/dispersion"):
        process = subprocess.Popen([*command, "--workers", "1"], stdout=subprocess.PIPE, start_new_session=True)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if any(b'"kind":"step"' in path.read_bytes() for path in out.glob(f"{stage}/**/rows.jsonl")):
                break
            time.sleep(0.005)
        assert process.poll() is None, f"the study ended before it was killed in {stage}"
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    rows = run_study(study, out, workers=2)
    assert stable_rows(rows) == stable_rows(staged[1])
    (first, *_) = [row for row in rows if row["kind"] == "run"]
    said = first["provenance"]["command"]
    assert said.startswith("decondense study study.yaml --out study"), "what was typed, not how a worker is started"


def test_what_cannot_start_is_a_row_and_the_rest_goes_on(tmp_path) -> None:
    broken = {**BASE, "train": {**BASE["train"], "learning_rate": 1e30}}
    study = staged_study(
        prepared={"teacher": broken},
        model=SMALL["model"],
        sweep=None,
        seeds=[0],
        arms=[STAGED["arms"][0], STAGED["arms"][3]],
    )
    rows = run_study(study, tmp_path / "study", workers=0)
    assert ends(rows)["cross-entropy", 0]["status"] == "finished"
    failed = ends(rows)["taught", 0]
    assert failed["status"] == "failed"
    assert "needs the prepared model 'teacher', whose training failed" in failed["error"]


def test_an_arm_none_of_whose_rates_works_fails_as_rows(tmp_path) -> None:
    study = small_study(
        sweep={"learning_rates": [1e30, 1e31]},
        arms=[{"name": "cross-entropy", "learning_rate": 0.001}, {"name": "wild"}],
        evaluate={**SMALL["evaluate"], "validation_tokens": 4096},
    )
    rows = run_study(study, tmp_path / "study", workers=0)
    trials = [row for row in rows if row["kind"] == "trial"]
    assert [(row["arm"], row["status"], row["value"]) for row in trials] == [("wild", "failed", None)] * 2
    assert all(row["error"] for row in trials)
    assert ends(rows)["wild", 0]["status"] == "failed"
    assert ends(rows)["cross-entropy", 0]["status"] == "finished"


def test_an_arm_with_a_model_of_its_own_reads_the_same_data(tmp_path) -> None:
    arms = [{"name": "cross-entropy"}, {"name": "wide", "model": {"overrides": {"n_inner": 128}}}]
    rows = run_study(small_study(arms=arms), tmp_path / "study", workers=0)
    base, wide = ends(rows)["cross-entropy", 0], ends(rows)["wide", 0]
    # two layers: a wider MLP has 64 more rows of 32 + 1 + 32 numbers
    assert wide["parameters"] - base["parameters"] == 2 * 64 * (32 + 1 + 32)
    assert wide["order_hash"] == base["order_hash"]
    assert wide["init_hash"] != base["init_hash"]


@pytest.mark.slow
def test_adapters_train_alone_and_resume(tmp_path) -> None:
    pytest.importorskip("peft")
    from decondense.training.hf import run_cell

    study = small_study(
        prepared={"base": BASE},
        model={"pretrained": "prepared:base", "lora": {"rank": 2, "targets": ["c_attn"]}},
        arms=[{"name": "cross-entropy"}, {"name": "dispersion", "dispersion": {"weight": 0.5}}],
        train={**SMALL["train"], "learning_rate": 0.05},
    )
    rows = run_study(study, tmp_path / "whole", workers=0)
    start = load_file(tmp_path / "whole" / "prepared" / "base" / "final" / "model.safetensors")
    for arm in ("cross-entropy", "dispersion"):
        final = load_file(cell_folder(tmp_path / "whole", arm, 0) / "final" / "model.safetensors")
        assert final.keys() == start.keys()
        changed = {name for name in start if not torch.equal(start[name], final[name])}
        assert changed == {f"transformer.h.{layer}.attn.c_attn.weight" for layer in (0, 1)}
        one = "transformer.h.0.attn.c_attn.weight"
        assert torch.linalg.matrix_rank(final[one] - start[one], rtol=1e-4) == 2
    assert len({end["init_hash"] for end in ends(rows).values()}) == 1

    out = tmp_path / "resumed"
    open_directory(study, out)
    study_corpus(study, out)
    (first, *_, last) = tasks(study, out)
    run_cell(first.study, first.study.arms[0], first.seed, opened_corpus(out), first.folder)
    with pytest.raises(Interrupted):
        run_cell(
            study,
            study.arm("dispersion"),
            0,
            opened_corpus(out),
            last.folder,
            watch=stop_after(5),
            prepared={"base": first.folder / "final"},
        )
    assert stable_rows(run_study(study, out, workers=0)) == stable_rows(rows)

    wrong = {"pretrained": "prepared:base", "lora": {"targets": ["nothing"]}}
    missing = small_study(prepared={"base": BASE}, model=wrong)
    with pytest.raises(ConfigError, match=r"model\.lora\.targets \('nothing',\) cannot be used"):
        run_study(missing, tmp_path / "wrong", workers=0)
    arms = [{"name": "cross-entropy"}, {"name": "forget", "active_forgetting": {"every": 2}}]
    forgetting = small_study(prepared={"base": BASE}, model=study.model.model_dump(), arms=arms)
    with pytest.raises(ConfigError, match="active forgetting trains the input embedding"):
        run_study(forgetting, tmp_path / "forget", workers=0)


@pytest.mark.slow
def test_measured_starts_are_measured_with_their_own_tokenizers(staged, tmp_path) -> None:
    out, _ = staged
    places = {name: str(prepared_folder(out, name) / "final") for name in ("base", "teacher")}
    settings = {"passages": 3, "tokens": 32, "passage_words": [60, 80], "histograms": ["pooled"]}
    study = small_study(
        arms=[{"name": name, "untrained": True, "model": {"pretrained": path}} for name, path in places.items()],
        baseline="base",
        measure=settings,
        seeds=[0, 1],
    )
    rows = run_study(study, tmp_path / "measured", workers=1)
    assert not (tmp_path / "measured" / "corpus.json").exists()
    assert sum(row["kind"] == "run" for row in rows) == 4
    texts = sample_passages("embedded", count=3, words=(60, 80), seed=3)
    for name, path in places.items():
        expected = decondense.measure(
            AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path), texts, tokens=32
        )
        (row,) = [row for row in rows if row["kind"] == "profile" and row["arm"] == name and row["seed"] == 1]
        assert row["mean_cosine"] == pytest.approx(expected.mean_cosine.tolist(), abs=1e-6)
    assert compare(rows).condensation
    assert run_study(study, tmp_path / "measured", workers=0) == rows, "done cells are not measured again"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sweep": {"learning_rates": [0.1, 0.1]}}, "different positive numbers"),
        ({"sweep": {"learning_rates": [0.1, 0.2], "seed": 0}}, "choose a seed that the study does not use"),
        (
            {"model": {"pretrained": "prepared:bass"}, "prepared": {"base": BASE}},
            r"unknown prepared model 'bass'.*'base'",
        ),
        ({"arms": [{"name": "a", "untrained": True, "learning_rate": 0.1}], "baseline": "a"}, "would have no effect"),
        ({"measure": {}}, "measures starts and trains nothing, so arm 'cross-entropy'"),
        ({"prepared": {"a/b": BASE}}, "'a/b' is not a valid name"),
        (
            {"arms": [{"name": "x", "model": {"pretrained": "m", "overrides": {"n_layer": 1}}}], "baseline": "x"},
            "brings its own architecture",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small_study(**changes)


def test_one_cell_brings_what_it_needs(staged, tmp_path) -> None:
    from decondense.cli import main

    (tmp_path / "study.yaml").write_text(staged_study().to_yaml())
    out = tmp_path / "study"
    command = ["train", str(tmp_path / "study.yaml"), "--arm", "dispersion", "--seed", "0", "--out", str(out)]
    assert main(command) == 0
    assert not prepared_folder(out, "teacher").exists(), "only what this arm needs"
    rows = [row for row in read_rows(out / "rows.jsonl") if row["arm"] == "dispersion"]
    assert stable_rows(rows) == stable_rows([row for row in staged[1] if row["arm"] == "dispersion"])
