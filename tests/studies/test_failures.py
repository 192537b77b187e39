"""What fails is told apart: a model that cannot be measured, a divergence, a wrong configuration, an order to stop."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from decondense.blocks import BlocksError
from decondense.compare import CompareError, compare
from decondense.config import StudyConfig
from decondense.corpora.packed import PackedCorpus, prepare
from decondense.records import Row, read_rows
from decondense.seeding import fence
from decondense.studies import CellState, run_study
from decondense.studies.measuring import measure_cell
from decondense.training.checkpoints import COMPLETE
from decondense.training.hf import run_cell
from studies.conftest import SMALL, Interrupted, small_study, stop_after


@pytest.fixture
def corpus(own_cache: Path) -> PackedCorpus:
    return prepare(small_study().corpus, cache=own_cache)


def save_start(folder: Path, corpus: PackedCorpus, *, words: bool = True) -> None:
    """A random model whose output embedding is its own, with the corpus's tokenizer."""
    settings = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "tie_word_embeddings": False}
    with fence():
        torch.manual_seed(0)
        GPT2LMHeadModel(GPT2Config(vocab_size=corpus.vocabulary, **settings)).save_pretrained(folder)
    if words:
        corpus.tokenizer().save_pretrained(folder)


def change(folder: Path, **tensors: float | None) -> None:
    """Fill tensors of a model's weights with a number, or take them out."""
    stored = load_file(folder / "model.safetensors")
    for name, value in tensors.items():
        key = name.replace("__", ".")
        if value is None:
            del stored[key]
        else:
            stored[key].fill_(value)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


def started(folder: Path) -> StudyConfig:
    """A study that goes on from a folder, with its tokenizer."""
    text = {key: value for key, value in SMALL["corpus"].items() if key != "vocabulary"}
    return small_study(model={"pretrained": str(folder)}, corpus={**text, "tokenizer": str(folder)})


def run(study: StudyConfig, corpus: PackedCorpus, folder: Path, **options: object) -> Row:
    return run_cell(study, study.arms[0], 0, corpus, folder, **options)


# ---- studies that measure --------------------------------------------------------------------------------------------

TENSOR = "transformer__h__1__mlp__c_fc__weight"


class Counting:
    """A watcher that keeps how many runs had ended each time."""

    def __init__(self) -> None:
        self.ended: list[int] = []

    def corpus(self, what: str, done: int, total: int) -> None:
        pass

    def cells(self, states: list[CellState]) -> None:
        self.ended.append(sum(state.status in ("finished", "failed") for state in states))


def test_a_model_that_cannot_be_measured_is_a_row_and_the_others_are_measured(
    corpus: PackedCorpus, tmp_path: Path
) -> None:
    places = {name: tmp_path / name for name in ("gap", "good", "mute", "wild", "other", "nowhere")}
    for name in ("gap", "good", "mute", "wild", "other"):
        save_start(places[name], corpus, words=name != "mute")
    change(places["gap"], **{TENSOR: None})
    change(places["wild"], **{TENSOR: float("nan")})
    study = small_study(
        arms=[{"name": name, "untrained": True, "model": {"pretrained": str(path)}} for name, path in places.items()],
        baseline="good",
        measure={"passages": 2, "tokens": 16, "passage_words": [20, 30], "histograms": ["pooled"]},
    )
    watcher = Counting()
    rows = run_study(study, tmp_path / "out", workers=0, watcher=watcher)
    assert watcher.ended[0] < watcher.ended[-1] == len(places)
    ends = {row["arm"]: row for row in rows if row["kind"] == "run"}
    reasons = {name: row["error"] for name, row in ends.items() if row["status"] == "failed"}
    assert reasons.keys() == {"gap", "mute", "wild", "nowhere"}
    assert "lack 1 of the tensors" in reasons["gap"]
    assert "without a tokenizer" in reasons["mute"]
    assert "NaN" in reasons["wild"]
    assert "nowhere" in reasons["nowhere"]
    assert {row["arm"] for row in rows if row["kind"] == "profile"} == {"good", "other"}
    with pytest.raises(CompareError, match=r"gap \(seed 0\) failed"):
        compare(rows)
    assert compare(rows, incomplete="omit").condensation

    save_start(places["gap"], corpus)
    assert run_study(study, tmp_path / "out", workers=0) == rows, "a failure is a result until it is asked for again"
    arm, folder = study.arm("gap"), tmp_path / "out" / "cells" / "gap" / "seed-0"
    with pytest.raises(Interrupted):
        measure_cell(study, arm, 0, folder, stop_after(1), retry_failed=True)
    assert read_rows(folder / "rows.jsonl")[-1]["status"] == "failed", "an order to stop is no failure of the model"
    assert measure_cell(study, arm, 0, folder, lambda: None, retry_failed=True)["status"] == "finished"


# ---- cells that train ------------------------------------------------------------------------------------------------


def test_logits_that_are_nan_over_finite_states_are_a_divergence(corpus: PackedCorpus, tmp_path: Path) -> None:
    save_start(tmp_path / "start", corpus)
    change(tmp_path / "start", lm_head__weight=float("inf"))
    row = run(started(tmp_path / "start"), corpus, tmp_path / "cell")
    assert row["status"] == "failed"
    assert row["error"].startswith("step 0: the held-out loss of document")


def test_states_that_are_nan_are_a_divergence_with_step_and_layer(corpus: PackedCorpus, tmp_path: Path) -> None:
    save_start(tmp_path / "start", corpus)
    change(tmp_path / "start", **{TENSOR: float("inf")})
    row = run(started(tmp_path / "start"), corpus, tmp_path / "cell")
    assert row["status"] == "failed"
    assert row["error"].startswith("step 0:")
    assert "layer 'block 2'" in row["error"]


def test_blocks_that_are_not_there_are_an_error_and_no_result(corpus: PackedCorpus, tmp_path: Path) -> None:
    arms = [{"name": "cross-entropy"}, {"name": "dispersion", "dispersion": {"blocks": "transformer.layers"}}]
    with pytest.raises(BlocksError, match=r"transformer\.layers"):
        run(small_study(arms=arms), corpus, tmp_path / "cell")
    assert all(row["status"] != "failed" for row in read_rows(tmp_path / "cell" / "rows.jsonl"))


def test_blocks_named_for_the_loss_are_the_ones_that_are_evaluated(corpus: PackedCorpus, tmp_path: Path) -> None:
    arms = [{"name": "cross-entropy"}, {"name": "dispersion", "dispersion": {"blocks": "transformer.h"}}]
    train = {**small_study().train.model_dump(), "steps": 1, "checkpoint_every": 1, "log_every": 1}
    named = run(small_study(arms=arms, train=train), corpus, tmp_path / "named")
    arms[1]["dispersion"] = {}
    plain = run(small_study(arms=arms, train=train), corpus, tmp_path / "plain")
    assert named["final_hash"] == plain["final_hash"]
    first, second = (
        [row["mean_cosine"] for row in read_rows(tmp_path / name / "rows.jsonl") if row["kind"] == "profile"]
        for name in ("named", "plain")
    )
    assert first == second


class _Touch:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return (open, (str(self.marker), "w"))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, cache_base: Path) -> Path:
    """A cell that was interrupted after its first checkpoint."""
    folder = tmp_path_factory.mktemp("stopped") / "cell"
    with pytest.raises(Interrupted):
        run(small_study(), prepare(small_study().corpus, cache=cache_base), folder, watch=stop_after(5))
    return folder


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_a_pickle_in_a_checkpoint_does_not_run(name: str, corpus: PackedCorpus, stopped: Path, tmp_path: Path) -> None:
    study, folder, marker = small_study(), tmp_path / "cell", tmp_path / "ran"
    shutil.copytree(stopped, folder)
    (mark,) = folder.glob(f"checkpoint-*/{COMPLETE}")
    (mark.parent / name).write_bytes(pickle.dumps(_Touch(marker)))
    try:
        ended = run(study, corpus, folder)
    except Exception as error:
        assert "unpickl" in str(error).lower() or name in str(error)  # noqa: PT017 - a refusal is as good
    else:
        assert ended["status"] == "finished"
    assert not marker.exists()
