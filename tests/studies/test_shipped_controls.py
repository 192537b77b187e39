"""The shipped studies of targets and controls: what they fix in advance, and that every arm of them runs."""

from __future__ import annotations

import pytest

from decondense.compare import compare
from decondense.studies import load_study, run_study
from decondense.studies.catalogue import committed_rows
from studies.conftest import SMALL

NAMES = ["target", "cause"]
MICRO = {
    "corpus": SMALL["corpus"],
    "model": {"overrides": {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_inner": 64}},
    "train": {"steps": 4, "batch_size": 4, "max_seq_length": 32, "log_every": 2, "checkpoint_every": 4},
    "evaluate": {"points": [0, 0.1, 0.5, 1], "validation_tokens": 512, "passages": 2, "passage_tokens": 32},
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", ["tiny", "gpu"])
def test_they_are_tuned_and_measured_where_mediation_looks(name: str, scale: str) -> None:
    study = load_study(name, scale)
    assert study.until == ("decided" if scale == "gpu" else None)
    assert study.sweep is not None
    assert len(study.sweep.learning_rates) > 1
    assert len(study.sweep.warmups) > 1 or study.train.warmup == 0.75  # what the sweep of the tiny base chose
    assert {0.1, 0.5, 1.0} <= set(study.evaluate.points)
    assert len(study.seeds) >= 5  # the fewest that have a share explained
    assert all(study.swept(arm) for arm in study.arms)
    tokens = {study.train_of(arm).steps * study.train_of(arm).batch_size for arm in study.arms}
    assert len(tokens) == 1
    assert scale == "tiny" or committed_rows(study) is None  # not run on a GPU yet


def test_what_the_arms_of_the_cause_are() -> None:
    study = load_study("cause", "tiny")
    assert study.train_of(study.arm("batch-x2")).batch_size == 2 * study.train.batch_size
    assert study.train_of(study.arm("batch-x2")).steps == study.train.steps // 2
    assert study.train_of(study.arm("decay-x2")).weight_decay == 2 * study.train.weight_decay
    assert study.arm("noise").dispersion == study.arm("dispersion").dispersion
    assert load_study("cause", "gpu").arm("batch-x2").batch_size == 2 * load_study("cause", "gpu").train.batch_size


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_arm_runs(name: str, tmp_path) -> None:
    small = {"steps": 4, "batch_size": 4, "max_seq_length": 32, "log_every": 2, "checkpoint_every": 4}
    prepared = {
        key: {"model": {"overrides": {"n_layer": 2, "n_embd": 48, "n_inner": 64}}, "train": small}
        for key in load_study(name, "tiny").prepared
    }
    arms = {"batch-x2": {"batch_size": 8}} if name == "cause" else {}
    over = {**MICRO, "prepared": prepared, "sweep": {"steps": 2}, "arms": arms}
    study = load_study(name, "tiny", laid_over=over, seeds=[0], until=None)
    study = study.model_copy(update={"sweep": None})
    rows = run_study(study, tmp_path / name, workers=0)
    found = compare(rows)
    assert set(found.arms) == {arm.name for arm in study.arms}
    assert not found.omitted
    assert found.validation is not None
    assert len({values.mean for values in found.validation.values}) == len(study.arms)
