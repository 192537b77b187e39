"""A cell under torchrun is the same cell."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from decondense.records import read_rows
from decondense.seeding import hash_parameters
from decondense.studies import load_study

pytestmark = pytest.mark.invariant

STUDY = {
    "seeds": [0],
    "model": {
        "architecture": "gpt2",
        "overrides": {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_inner": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
        | {"attn_pdrop": 0.0},
    },
    "corpus": {"source": "python_docs", "documents": "standard_library", "vocab_size": 512, "held_out": 0.1},
    "train": {"steps": 8, "batch_size": 4, "max_seq_length": 32, "log_every": 2, "checkpoint_every": 4},
    "evaluate": {"points": [0, 0.5, 1], "validation_tokens": 1024, "passages": 4, "passage_tokens": 32},
}


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [pytest.param(False, id="ddp"), pytest.param(True, id="fsdp2")])
def test_two_ranks_train_the_same_cell_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fsdp: bool) -> None:
    monkeypatch.setenv("DECONDENSE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "study.yaml").write_text(
        load_study("demo", "quick", **{**STUDY, "train": {**STUDY["train"], "fsdp": fsdp}}).to_yaml()
    )
    rows = {}
    for ranks in (1, 2):
        out = tmp_path / f"ranks-{ranks}"
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        verb = ["-m", "decondense", "train", str(tmp_path / "study.yaml"), "--arm", "dispersion", "--out", str(out)]
        done = subprocess.run([*launch, *verb], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        rows[ranks] = read_rows(out / "rows.jsonl")
    assert [row["kind"] for row in rows[1]] == [row["kind"] for row in rows[2]]
    assert rows[2][-1]["provenance"]["world_size"] == 2
    # what is saved and hashed is the whole model, whoever trained it
    hashes = [rows[n][-1]["final_hash"] for n in (1, 2)]
    assert hash_parameters({}) not in hashes
    final = [load_file(tmp_path / f"ranks-{n}" / "cells/dispersion/seed-0/final/model.safetensors") for n in (1, 2)]
    assert final[0].keys() == final[1].keys()
    for name, tensor in final[0].items():
        assert torch.allclose(final[1][name], tensor, atol=2e-4), name
    for one, two in zip(rows[1], rows[2], strict=True):
        if one["kind"] == "step":
            assert two["loss"] == pytest.approx(one["loss"], rel=2e-5)
            assert two["dispersion"] == pytest.approx(one["dispersion"], rel=2e-4)
            assert two["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=2e-3)
        elif one["kind"] in ("eval", "eval_item"):
            assert two["value"] == pytest.approx(one["value"], rel=1e-4)
