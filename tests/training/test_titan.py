"""torchtitan 0.3: the debug model trained on gloo, however the batch is cut; conversion to Hugging Face."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from attach_helpers import mean_residual

pytestmark = pytest.mark.titan
pytest.importorskip("torchtitan.trainer", exc_type=ImportError)

WORKER = Path(__file__).parents[1] / "helpers" / "titan_worker.py"
# name, ranks, weight, rows of a micro-batch, micro-batches of a step on a rank: always 8 rows a step
RUNS = [("whole", 1, 0.5, 8, 1), ("cut", 1, 0.5, 2, 4), ("ranks", 2, 0.5, 2, 2), ("control", 1, 0.0, 8, 1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    import titan_worker

    folder = tmp_path_factory.mktemp("titan")
    titan_worker.tokenizer_and_text(folder)
    for name, ranks, *settings in RUNS:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        processes = []
        for rank in range(ranks):
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MASTER_PORT": port}
            environment |= {"MASTER_ADDR": "127.0.0.1", "RANK": str(rank), "LOCAL_RANK": str(rank)}
            environment |= {"WORLD_SIZE": str(ranks)}
            command = [sys.executable, str(WORKER), str(folder), name, *map(str, settings)]
            processes.append(
                subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            )
        outputs = [process.communicate(timeout=300)[0] for process in processes]
        for process, output in zip(processes, outputs, strict=True):
            assert process.returncode == 0, output[-4000:]
    return folder


def load(folder: Path, name: str, rank: int = 0) -> dict:
    return torch.load(folder / f"{name}-{rank}.pt")


def relative(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm, over all tensors."""
    difference = sum((first[name] - second[name]).square().sum() for name in second)
    return float((difference / sum(value.square().sum() for value in second.values())).sqrt())


@pytest.mark.parametrize(("name", "rank"), [("cut", 0), ("ranks", 0), ("ranks", 1)])
def test_one_step_however_it_is_cut(folder, name, rank):
    whole, other, control = load(folder, "whole"), load(folder, name, rank), load(folder, "control")
    assert whole["gradients"].keys() == other["gradients"].keys()
    assert relative(other["gradients"], whole["gradients"]) < 1e-4
    assert mean_residual(other["gradients"], whole["gradients"]) < 1e-4
    # the loss does something here that is far above these tolerances
    assert relative(control["gradients"], whole["gradients"]) > 0.01
    for before, after in zip(whole["logs"], other["logs"], strict=True):
        for key in before:
            if key in ("loss", "cross_entropy") or key.startswith("dispersion"):
                assert after[key] == pytest.approx(before[key], rel=1e-3), key


def test_what_is_logged(folder):
    whole, control = load(folder, "whole")["logs"], load(folder, "control")["logs"]
    assert len(whole) == 2
    assert [row["dispersion_weight"] for row in whole] == [0.5, 0.5]
    assert [row["dispersion_weight"] for row in control] == [0.0, 0.0]
    assert len([key for key in whole[0] if key.startswith("dispersion/block_")]) == 8
    for row in whole:
        added = row["dispersion_weight"] * row["dispersion"]
        assert row["loss"] - row["cross_entropy"] == pytest.approx(added, rel=1e-4)
    # the same start: the same dispersion watched, and a loss that differs by the weighted term
    assert control[0]["dispersion"] == pytest.approx(whole[0]["dispersion"], rel=1e-5)
    assert whole[0]["loss"] - control[0]["loss"] == pytest.approx(0.5 * whole[0]["dispersion"], rel=1e-4)


def test_packed_documents_are_the_sequences():
    """The debug model outside torchtitan's trainer, and the loss written out over all documents of its rows."""
    import titan_worker
    from attach_helpers import angular
    from torchtitan.models.common.attention import ScaledDotProductAttention

    from decondense.training import titan

    spec = titan.model_registry("debugmodel")
    for layer in spec.model.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    model = spec.model.build()
    model.init_weights(buffer_device=None)
    inputs, _ = titan_worker.joined(titan_worker.batches()[:4])
    with titan.attach(model, 0.5) as handle:
        handle.defer = True
        model(inputs["input"], positions=inputs["positions"])
        taken = handle.take()
    kept = []
    hooks = [block.register_forward_hook(lambda m, a, out: kept.append(out)) for block in model.layers.values()]
    model(inputs["input"], positions=inputs["positions"])
    for hook in hooks:
        hook.remove()
    values = []
    for z_BTD in kept:
        documents = []
        for row in range(8):
            starts = [*(inputs["positions"][row] == 0).nonzero().flatten().tolist(), 32]
            documents += [z_BTD[row, a:b] for a, b in pairwise(starts) if b - a > 1]
        values.append(torch.stack([angular(document) for document in documents]).mean())
    assert torch.stack(values).mean().item() == pytest.approx(taken.item(), abs=1e-5)


def test_checkpoints_convert_to_hugging_face(folder):
    import titan_worker
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from decondense.training.titan import to_huggingface

    step = folder / "whole" / "checkpoint" / "step-2"
    out = to_huggingface(step, folder / "converted", flavor="debugmodel", tokenizer=folder)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(titan_worker.batches()[0][0]["input"]).logits
    assert (logits - load(folder, "whole")["logits"]).abs().max() < 2e-4
    assert len(AutoTokenizer.from_pretrained(out)) == 203
    with pytest.raises(ValueError, match="not a torchtitan checkpoint"):
        to_huggingface(folder, folder / "x")
    with pytest.raises(ValueError, match=r"lacks .*flavor"):
        to_huggingface(step, folder / "x", flavor="0.6B")


def test_configurations():
    from decondense.training import titan

    config = titan.qwen3_0_6b_dispersion()
    assert config.model_spec.flavor == "0.6B"
    assert len(config.model_spec.model.layers) == 28
    tokens = config.training.steps * config.training.global_batch_size * config.training.seq_len
    assert tokens == pytest.approx(156e9, rel=1e-4)
    assert config.dispersion.config().weight == 0.1
    assert titan.qwen3_0_6b_cross_entropy().dispersion.weight == 0.0
    assert titan.Dispersion(layers="0,-1").config().layers == (0, -1)
    with pytest.raises(ValueError, match="Did you mean 'deep'"):
        titan.Dispersion(layers="deeep").config()
    config.training.disable_cuda_graphs = False
    with pytest.raises(ValueError, match="CUDA graphs"):
        config.build()


def test_command_line():
    from torchtitan.config.manager import ConfigManager

    line = (
        "--module decondense.training.titan --config qwen3_debugmodel_dispersion --dispersion.weight 0.3 "
        "--dispersion.layers deep --dispersion.schedule cosine --training.steps 7"
    )
    config = ConfigManager().parse_args(line.split())
    made = config.dispersion.config()
    assert (made.weight, made.layers, made.schedule.kind, config.training.steps) == (0.3, "deep", "cosine", 7)
