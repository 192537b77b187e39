from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml

from decondense.cli import main
from decondense.config import (
    ConfigError,
    DispersionConfig,
    LoraConfig,
    LossConfig,
    MeasureConfig,
    ModelConfig,
    StudyConfig,
    WeightSchedule,
)
from decondense.config.titan import Dispersion
from decondense.seeding import fence, generator
from decondense.studies import cost as estimate
from decondense.studies import load_study, shipped_studies
from decondense.studies.catalogue import assigned, scales_of
from decondense.studies.launch import launches

ANSI = re.compile(r"\x1b\[[0-9;]*m")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, ANSI.sub("", captured.out), ANSI.sub("", captured.err)


# ---- changes from the command line -----------------------------------------------------------------------------------


def test_assignments_are_laid_over_the_file_and_leave_the_rest() -> None:
    given = [
        "train.learning_rate=1e-4",
        "arms.dispersion.dispersion.weight=0.3",
        "seeds=[4, 5]",
        'prepared."a.b".seed=3',
    ]
    changed, plain = load_study("demo", "quick", laid_over=assigned(given)), load_study("demo", "quick")
    assert changed.train.learning_rate == 1e-4
    assert changed.train == plain.train.model_copy(update={"learning_rate": 1e-4})
    assert changed.arm("dispersion").dispersion == plain.arm("dispersion").dispersion.model_copy(update={"weight": 0.3})
    assert changed.arm("cross-entropy") == plain.arm("cross-entropy")
    assert changed.seeds == (4, 5)
    assert changed.prepared["a.b"].seed == 3


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("train.stepz=3", r"train: unknown key 'stepz'.*Did you mean 'steps'"),
        ("trane.steps=3", r"unknown key 'trane'.*Did you mean 'train'"),
        ("train.steps=many", r"train\.steps: .*valid integer.*'many'"),
        ("train=3", r"train: .*got 3"),
        ("train.steps", r"'train\.steps': expected KEY\.PATH=VALUE"),
        ("train..steps=3", r"expected KEY\.PATH=VALUE"),
        ("train.steps=[1", r"value of train\.steps: not valid YAML"),
        ("arms.disperson.learning_rate=1", r"unknown arm 'disperson'.*Did you mean 'dispersion'"),
        ("arms.dispersion=1", r"arms\.dispersion: expected a mapping"),
        ("arms.dispersion.dispersion.wait=1", r"unknown key 'wait'.*Did you mean 'weight'"),
    ],
)
def test_a_wrong_assignment_names_the_key(entry: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_study("demo", "quick", laid_over=assigned([entry]))


STARTS = {
    "name": "starts",
    "title": "Mid-training",
    "question": "Does it help?",
    "baseline": "plain",
    "arms": [{"name": "plain"}, {"name": "spread", "dispersion": {}}],
    "model": {"pretrained": "own/model", "revision": "main", "parameters": 1e8},
    "corpus": {"tokenizer": "own/model"},
    "train": {"steps": 20, "checkpoint_every": 10},
}


def resolved(capsys: pytest.CaptureFixture[str], *arguments: object) -> StudyConfig:
    import yaml

    status, said, err = run(capsys, "study", *arguments, "--dry-run", "--yaml")
    assert status == 0, err
    return StudyConfig.parse(yaml.safe_load(said), where="printed")


@pytest.fixture
def starts(tmp_path: Path) -> Path:
    import yaml

    path = tmp_path / "starts.yaml"
    path.write_text(yaml.safe_dump(STARTS))
    return path


def test_options_change_what_they_name(capsys, starts: Path) -> None:
    plain = resolved(capsys, starts)
    options = ["--text", "some.txt", "--tasks", "piqa, arc_easy", "--data-dir", "data", "--limit", 5, "--seeds", 2]
    changed = resolved(capsys, starts, *options, "--set", "train.steps=30")
    assert changed.corpus == plain.corpus.model_copy(update={"source": "some.txt"})
    assert changed.evaluate == plain.evaluate.model_copy(
        update={"tasks": ("piqa", "arc_easy"), "data_dir": "data", "limit": 5}
    )
    assert changed.seeds == (0, 1)
    assert changed.train == plain.train.model_copy(update={"steps": 30})
    assert changed.model == plain.model


def test_another_start_brings_its_own_tokenizer_unless_one_is_named(capsys, starts: Path) -> None:
    changed = resolved(capsys, starts, "--start", "other/model")
    assert (changed.model.pretrained, changed.model.revision, changed.model.parameters) == ("other/model", None, None)
    assert changed.corpus.tokenizer == "other/model"
    assert resolved(capsys, starts, "--start", "a/b", "--tokenizer", "c/d").corpus.tokenizer == "c/d"
    status, _, err = run(capsys, "study", "demo", "--start", "a/b", "--dry-run")
    assert status == 2
    assert "starts from scratch" in " ".join(err.split())


def test_a_start_in_the_place_of_a_prepared_model_needs_no_preparing(capsys, tmp_path: Path) -> None:
    import yaml

    data = {**STARTS, "model": {"pretrained": "prepared:base"}, "corpus": {}, "prepared": {"base": {}, "teacher": {}}}
    data["arms"] = [{"name": "plain"}, {"name": "taught", "distillation": {"teacher": "prepared:teacher"}}]
    path = tmp_path / "prepared.yaml"
    path.write_text(yaml.safe_dump(data))
    assert set(resolved(capsys, path).prepared) == {"base", "teacher"}
    changed = resolved(capsys, path, "--start", "a/b")
    assert set(changed.prepared) == {"teacher"}
    assert changed.corpus.tokenizer == "a/b"


def test_studies_are_listed(capsys) -> None:
    status, said, _ = run(capsys, "study", "--list")
    assert status == 0
    assert "demo" in said
    assert "tiny, quick" in said
    status, said, err = run(capsys, "study")
    assert status == 2
    assert "demo" in said
    assert "--dry-run" in err


# ---- counting --------------------------------------------------------------------------------------------------------

GPT2 = ModelConfig(architecture="gpt2", overrides={"n_layer": 3, "n_embd": 48, "n_head": 4, "n_inner": 100})
QWEN3 = ModelConfig(
    architecture="qwen3",
    overrides={
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "intermediate_size": 80,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": False,
    },
)
MIXTRAL = ModelConfig(
    architecture="mixtral",
    overrides={
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "intermediate_size": 80,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
    },
)
VOCABULARY, LENGTH = 600, 32


def built(config: ModelConfig, **more: object) -> Any:
    from decondense.training.hf import build_model

    with fence():
        return build_model(config.model_copy(update=more), VOCABULARY, LENGTH, 0)


def planned_size(config: ModelConfig) -> estimate.Size:
    study = load_study("demo", "quick", model=config.model_dump(), corpus={"vocab_size": VOCABULARY})
    with fence():
        return estimate.Models(study).size(config, LENGTH)


@pytest.mark.parametrize("config", [GPT2, QWEN3, MIXTRAL], ids=lambda config: config.architecture)
def test_parameters_are_those_of_the_built_model(config: ModelConfig) -> None:
    model, size = built(config), planned_size(config)
    assert size.total == sum(p.numel() for p in model.parameters())
    tables = model.get_input_embeddings().weight.numel()
    if config is GPT2:
        tables += model.transformer.wpe.weight.numel()
    else:
        tables += model.lm_head.weight.numel()
    assert size.without_embeddings == size.total - tables
    assert (size.layers, size.features) == (model.config.num_hidden_layers, 48)
    assert size.attention == (64 if config is QWEN3 else 48)


def test_a_token_is_multiplied_with_the_experts_that_it_is_sent_to() -> None:
    expert = 3 * 48 * 80
    attention = 2 * 48 * 48 + 2 * 48 * 24
    assert planned_size(MIXTRAL).computing == 2 * (attention + 4 * 48 + expert) + 48 * VOCABULARY


def test_adapters_are_those_of_peft() -> None:
    pytest.importorskip("peft")
    for config in (GPT2, QWEN3):
        lora = config.model_copy(update={"lora": LoraConfig(rank=3)})
        model = built(lora)
        assert planned_size(lora).adapters == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_the_operations_are_those_of_a_closed_form() -> None:
    # GPT-2: 4 D^2 of attention and 2 D F of the MLP a layer, V D of the head
    computing = 3 * (4 * 48**2 + 2 * 48 * 100) + VOCABULARY * 48
    size, tokens = planned_size(GPT2), 8 * LENGTH
    assert size.computing == computing
    forward = 2 * computing * tokens + 3 * 2 * 2 * LENGTH * 48 * tokens  # QK^T and AV in three layers
    assert estimate.forward_flops(size, tokens, LENGTH, causal=False) == forward
    assert estimate.training_flops(size, tokens, LENGTH, causal=False) == 3 * forward
    assert estimate.training_flops(size, tokens, LENGTH, causal=False, checkpointing=True) == 4 * forward
    causal = 6 * computing * tokens + 6 * 3 * LENGTH * 48 * tokens
    assert estimate.training_flops(size, tokens, LENGTH) == causal


@pytest.mark.parametrize("config", [GPT2, QWEN3], ids=lambda config: config.architecture)
def test_the_operations_are_those_that_torch_counts(config: ModelConfig) -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    model = built(config)
    model.set_attn_implementation("eager")  # torch counts no operations in the fused kernel of a CPU
    ids = torch.randint(VOCABULARY, (4, LENGTH), generator=generator(0, "test"))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    expected = estimate.training_flops(planned_size(config), ids.numel(), LENGTH, causal=False)
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_the_dispersion_loss_costs_what_torch_counts() -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from decondense import dispersion_loss

    size = estimate.Size(1.0, 1.0, 1.0, layers=6, features=64)
    states = torch.randn(2, 1024, 64, generator=generator(0, "test"), requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        dispersion_loss(states, impl="reference").backward()
    one_layer = estimate.dispersion_flops(DispersionConfig(layers="last"), size, 2, 1024)
    assert one_layer == 2 * 3 * 1024**2 * 64
    # dense autograd computes every pair twice, and their gradient twice; nothing of the kernels' own is counted
    assert counter.get_total_flops() == pytest.approx(2 * one_layer, rel=0.05)
    assert estimate.dispersion_flops(DispersionConfig(layers="deep"), size, 2, 1024) == 3 * one_layer
    watched = DispersionConfig(layers="last", weight=0)
    assert estimate.dispersion_flops(watched, size, 2, 1024) == one_layer / 3
    subset = DispersionConfig(layers="last", loss={"pairs": "subset", "subset_size": 256})
    assert estimate.dispersion_flops(subset, size, 2, 1024) == one_layer / 16


def test_the_share_of_steps_follows_the_schedule() -> None:
    share = estimate.share_of_steps
    assert share(DispersionConfig(), 100) == 1
    assert share(DispersionConfig(schedule={"kind": "linear", "until": 0.3}), 100) == pytest.approx(0.3)
    assert share(DispersionConfig(schedule={"kind": "linear", "until": 0.3}), 100_000) == pytest.approx(0.3, abs=1e-3)
    assert share(DispersionConfig(schedule={"until": 0.5}), 100) == pytest.approx(0.5)
    assert share(DispersionConfig(weight=0, schedule={"until": 0.5}), 100) == 1
    assert share(DispersionConfig(), 0) == 0


def test_words_for_numbers() -> None:
    # the paper's pre-training, by hand: 6 x 0.6e9 x 156e9 operations at 0.4 x 312e12 a second
    assert estimate.gpu_hours(6 * 0.6e9 * 156e9, "A100") == pytest.approx(1250, rel=1e-3)


# ---- the plan --------------------------------------------------------------------------------------------------------

EVERYTHING = {
    "name": "everything",
    "title": "Everything",
    "question": "Does all of it add up?",
    "baseline": "cross-entropy",
    "arms": [
        {"name": "cross-entropy"},
        {"name": "fading", "dispersion": {"schedule": {"kind": "linear", "until": 0.5}}},
        {"name": "fixed", "learning_rate": 0.001, "distillation": {"teacher": "prepared:teacher"}},
        {"name": "none", "untrained": True},
    ],
    "seeds": [0, 1],
    "corpus": {"vocab_size": VOCABULARY},
    "model": GPT2.model_dump(),
    "prepared": {
        "teacher": {
            "model": QWEN3.model_dump(),
            "train": {"steps": 20, "checkpoint_every": 10, "max_seq_length": LENGTH},
        }
    },
    "sweep": {"learning_rates": [0.001, 0.01], "steps": 5},
    "train": {
        "steps": 10,
        "batch_size": 4,
        "max_seq_length": LENGTH,
        "log_every": 5,
        "checkpoint_every": 5,
    },
    "evaluate": {"points": [0, 1], "validation_tokens": 640, "passages": 4, "passage_tokens": LENGTH},
}


def test_the_plan_adds_up_and_draws_nothing() -> None:
    import random

    import numpy as np
    import torch

    study = StudyConfig.parse(EVERYTHING, where="test")
    before = (random.getstate(), str(np.random.get_state()), torch.get_rng_state(), torch.get_num_threads())
    plan = estimate.plan_of(study, workers=2)
    assert (random.getstate(), str(np.random.get_state())) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert torch.get_num_threads() == before[3]

    kinds = [(run.kind, run.name, run.seed, run.learning_rate) for run in plan.runs]
    assert kinds[:5] == [
        ("prepared", "teacher", 0, None),
        ("trial", "cross-entropy", 1000, 0.001),
        ("trial", "cross-entropy", 1000, 0.01),
        ("trial", "fading", 1000, 0.001),
        ("trial", "fading", 1000, 0.01),
    ]
    cells = [("cell", arm.name, seed, None) for seed in (0, 1) for arm in study.arms]
    assert kinds[5:] == cells
    batch = 4 * LENGTH
    assert plan.tokens == 20 * 16 * LENGTH + 4 * 5 * batch + 6 * 10 * batch

    lines = {(line.kind, line.name): line for line in plan.lines}
    size, teacher = planned_size(GPT2), planned_size(QWEN3)
    evaluated = estimate.forward_flops(size, 640 + 4 * LENGTH, LENGTH)
    plain = 10 * estimate.training_flops(size, batch, LENGTH) + 2 * evaluated
    assert lines["cell", "cross-entropy"].flops == pytest.approx(2 * plain)
    pairs = 5 * 4 * 3 * 3 * LENGTH**2 * 48  # half of the steps, four sequences, three layers
    assert lines["cell", "fading"].flops == pytest.approx(2 * (plain + pairs))
    taught = 10 * estimate.forward_flops(teacher, batch, LENGTH)
    assert lines["cell", "fixed"].flops == pytest.approx(2 * (plain + taught))
    assert lines["cell", "none"].flops == pytest.approx(2 * evaluated)
    assert plan.flops == pytest.approx(sum(line.flops for line in plan.lines))

    assert "timed on this machine" in plan.how
    assert all(line.seconds is not None and line.seconds > 0 for line in plan.lines)
    assert plan.seconds == pytest.approx(sum(line.seconds or 0 for line in plan.lines) / 2, rel=0.5)
    # 4 bytes of every trained model; two checkpoints of weights and two moments of the largest
    trained = 4 * (4 + 6) * size.total + 4 * teacher.total
    assert plan.final_bytes == trained
    assert plan.checkpoint_bytes == 2 * 3 * 4 * max(size.total, teacher.total)


def test_the_runs_are_those_of_the_runner(tmp_path: Path) -> None:
    from decondense.studies.runner import tasks

    study = StudyConfig.parse(EVERYTHING, where="test")
    mine = [(run.kind, run.seed, run.steps) for run in estimate.runs_of(study)]
    theirs = [(task.kind, task.seed, task.steps) for task in tasks(study, tmp_path)]
    assert mine == theirs


def test_runs_are_described_by_what_differs() -> None:
    arms = [
        {"name": "plain"},
        {"name": "a", "label": "the deep half", "dispersion": {"weight": 1.0, "layers": "deep"}},
        {"name": "f", "label": "as published", "model": {"pretrained": "a/b"}, "untrained": True},
    ]
    study = load_study("demo", "quick", arms=arms, baseline="plain")
    assert [estimate.describe(run, study) for run in estimate.runs_of(study)[: len(arms)]] == [
        "",
        "the deep half",
        "start as it is, as published",
    ]


def test_large_steps_are_estimated_and_unknown_models_are_said_to_be() -> None:
    study = load_study("demo", laid_over=assigned(["train.batch_size=4096", "train.precision=bf16"]))
    plan = estimate.plan_of(study)
    assert [line.seconds for line in plan.lines] == [None, None]
    assert not plan.how
    said = " ".join(estimate.totals(plan))
    assert "estimated at 40 % of their peak in bf16 (312 and 989 TFLOP/s)" in said
    hours = plan.flops / (0.4 * 312e12) / 3600
    assert plan.lines[0].flops + plan.lines[1].flops == plan.flops_on_gpus
    assert estimate.gpu_hours(plan.flops, "A100") == pytest.approx(hours)

    study = StudyConfig.parse({**STARTS, "model": {"pretrained": "own/model"}}, where="test")
    plan = estimate.plan_of(study)
    assert all(line.size.total is None for line in plan.lines)
    assert "own/model: not on this machine" in " ".join(estimate.totals(plan))
    plan = estimate.plan_of(StudyConfig.parse(STARTS, where="test"))
    assert plan.lines[0].size.total == 1e8
    trained, evaluated = 20 * 16 * 128, 5 * (32_768 + 32 * 128)
    assert plan.lines[0].flops == pytest.approx(3 * 1e8 * (6 * trained + 2 * evaluated))
    assert plan.lines[0].seconds is None


def test_a_start_in_a_directory_is_counted_from_its_config(tmp_path: Path) -> None:
    model = built(GPT2)
    model.config.save_pretrained(tmp_path)  # no weights needed
    data = {
        **STARTS,
        "model": {"pretrained": str(tmp_path)},
        "corpus": {"tokenizer": "no/where"},
        "train": {**STARTS["train"], "max_seq_length": LENGTH},
        "evaluate": {"passage_tokens": LENGTH},
    }
    study = StudyConfig.parse(data, where="test")
    (line, _) = estimate.plan_of(study).lines
    assert line.size.total == sum(p.numel() for p in model.parameters())
    with pytest.raises(ConfigError, match=rf"has {LENGTH} positions, fewer than train\.max_seq_length 64"):
        estimate.plan_of(study.model_copy(update={"train": study.train.model_copy(update={"max_seq_length": 64})}))


def test_the_short_form_needs_no_torch_and_no_time() -> None:
    import json
    import subprocess
    import sys

    code = (
        "import json, sys, time; from decondense.config import StudyConfig; "
        "from decondense.studies.cost import short_form; "
        "study = StudyConfig.parse(json.loads(sys.argv[1]), where='test'); began = time.perf_counter(); "
        "lines = short_form(study); took = time.perf_counter() - began; "
        "assert not {'torch', 'transformers'} & set(sys.modules); print(json.dumps([took, lines]))"
    )
    done = subprocess.run([sys.executable, "-c", code, json.dumps(EVERYTHING)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    took, lines = json.loads(done.stdout)
    assert took < 2
    assert lines[0] == "8 runs to train: 4 arms x 2 seeds, after 1 prepared model and 4 trials."
    assert lines[1] == "20.5K tokens in all, 1,280 per run."
    assert "--dry-run" in lines[2]


# ---- the dry run -----------------------------------------------------------------------------------------------------


def commands_of(text: str) -> list[list[str]]:
    """The decondense commands among printed shell lines, without what launches them."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        line = line.removeprefix("exec ")
        if line.startswith(("decondense ", "torchrun ")):
            words = shlex.split(line.replace('"$folder"', "folder"), comments=True)
            if words[0] == "torchrun" and "decondense" in words:
                words = words[words.index("decondense") :]
            if words[0] == "decondense":
                found.append(words[1:])
    return found


def accepts(words: list[str]) -> dict[str, Any]:
    """What the command line's own parser makes of the words; a usage error raises."""
    import typer

    from decondense.cli import app

    group: Any = typer.main.get_command(app)
    verb = group.commands[words[0]]
    return dict(verb.make_context(words[0], list(words[1:])).params)


def every_scale() -> list[tuple[str, str]]:
    return [(name, scale) for name in shipped_studies() for scale in scales_of(name)]


@pytest.mark.parametrize(("name", "scale"), every_scale())
def test_the_dry_run_of_every_shipped_study(name: str, scale: str, capsys, tmp_path, monkeypatch) -> None:
    """It works offline and its commands are ones that the command line takes and that mean this study."""
    import socket

    def refuse(*_: object) -> None:
        raise AssertionError("a dry run asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setitem(estimate.plan_of.__kwdefaults__, "budget", 0.0)  # one model is timed, the others follow it
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    status, said, err = run(capsys, "study", name, "--scale", scale, "--dry-run")
    assert status == 0, err
    assert not list(tmp_path.iterdir())
    study = load_study(name, scale)
    assert " ".join(study.title.split()) in " ".join(said.split())
    assert all(len(line.rstrip()) <= 80 for line in said.splitlines() if not line.startswith("    ")), said
    commands = commands_of(said)
    assert commands
    for words in commands:
        params = accepts(words)
        if words[0] in ("study", "train"):
            assert (params["name"], params["scale"]) == (name, scale)
        if words[0] == "train":
            assert study.arm(params["arm"])
            assert params["seed"] in study.seeds
    if study.launch == "torchtitan":
        status, _, err = run(capsys, "study", name, "--scale", scale)
        assert status == 2
        assert "torchtitan.train" in err


def test_commands_repeat_what_was_asked(capsys, starts: Path, tmp_path: Path) -> None:
    asked = ["--seeds", "2", "--text", "my text.txt", "--data-dir", "da'ta", "--set", "train.steps=[1, 2][0]"]
    asked = [*asked[:-1], "arms.spread.label=two words"]
    status, said, err = run(capsys, "study", starts, *asked, "--out", tmp_path / "o u t", "--dry-run")
    assert status == 0, err
    for words in commands_of(said):
        params = accepts(words)
        assert params["text"] == "my text.txt"
        assert params["data_dir"] == "da'ta"
        assert params["seeds"] == 2
        assert list(params["assignments"]) == ["arms.spread.label=two words"]
        assert params["out"] == tmp_path / "o u t"


def test_a_slurm_script_is_written_once_and_is_valid_shell(capsys, tmp_path: Path, monkeypatch) -> None:
    import os
    import subprocess

    monkeypatch.chdir(tmp_path)
    status, said, err = run(capsys, "study", "demo", "--seeds", 2, "--slurm", "run.sh")
    assert status == 0
    assert not said
    assert "sbatch run.sh" in err
    script = tmp_path / "run.sh"
    assert os.access(script, os.X_OK)
    assert [path.name for path in tmp_path.iterdir()] == ["run.sh"]
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text()
    assert text.startswith("#!/bin/bash\n#SBATCH")
    assert "#SBATCH --array=0-3\n" in text
    (words,) = commands_of(text)
    assert accepts(words)["workers"] == 1
    assert "--gpus" not in text
    for scale in ("gpu", "paper", "paper-qwen3"):
        study = load_study("table2", scale)
        assert "#SBATCH --gpus-per-task=1" in launches(study, ["table2", "--scale", scale], Path("out"))[-1].lines
    status, _, err = run(capsys, "study", "demo", "--slurm", "run.sh")
    assert status == 2
    assert "exists" in err
    status, _, err = run(capsys, "study", "demo", "--yaml")
    assert status == 2
    assert "--dry-run" in err


TITAN = {
    "name": "pretrain",
    "title": "Pre-training",
    "question": "Does it?",
    "scale": "paper",
    "baseline": "cross-entropy",
    "arms": [
        {"name": "cross-entropy"},
        {
            "name": "fading",
            "dispersion": {
                "weight": 0.2,
                "layers": [0, -1],
                "loss": {"tau": 0.5},
                "schedule": {"kind": "cosine", "warmup_steps": 100, "until": 0.3},
            },
        },
        {"name": "noise", "noisy_embedding": {}},
    ],
    "seeds": [0, 3],
    "model": {"architecture": "qwen3", "overrides": {"num_hidden_layers": 28, "hidden_size": 1024}},
    "train": {"steps": 1000, "batch_size": 256, "max_seq_length": 4096, "precision": "bf16"},
    "evaluate": {"tasks": ["paper"], "num_fewshot": "qwen3", "limit": 200},
    "launch": "torchtitan",
}


def test_a_study_for_torchtitan_prints_its_commands_and_is_not_run(capsys, tmp_path: Path) -> None:
    import subprocess

    import yaml

    path = tmp_path / "titan.yaml"
    path.write_text(yaml.safe_dump(TITAN))
    lines = launches(StudyConfig.parse(TITAN, where="test"), [], Path("out"))[0].lines
    subprocess.run(["bash", "-n"], input="\n".join(lines), text=True, check=True)
    joined = "\n".join(lines).replace("\\\n", " ")
    runs = [shlex.split(line) for line in joined.splitlines() if line.startswith("torchrun")]
    assert [words[words.index("--config") + 1] for words in runs] == [
        "qwen3_0_6b_cross_entropy",
        "qwen3_0_6b_dispersion",
    ]
    assert not any(word.startswith("--dispersion") for word in runs[0])
    flags = dict(zip(runs[1][::1], runs[1][1:], strict=False))
    study = StudyConfig.parse(TITAN, where="test")
    trained = [arm for arm in study.arms if arm.dispersion is not None]
    assert section_of(runs[1]).config() == trained[0].dispersion
    assert any("train.learning_rate 0.003" in line for line in lines)
    assert not any("model.overrides" in line for line in lines)
    assert (flags["--training.steps"], flags["--training.global-batch-size"]) == ("1000", "256")
    assert flags["--dump-folder"] == "$folder"
    assert "for seed in 0 3; do" in lines
    assert any("noise is omitted" in line for line in lines)
    (evaluation, _) = commands_of("\n".join(lines))
    assert accepts(evaluation)["shots"] == "qwen3"
    status, _, err = run(capsys, "study", path, "--out", tmp_path / "out")
    assert status == 2
    assert "torchtitan" in err
    assert "--dispersion.schedule" in err
    assert not (tmp_path / "out").exists()


def section_of(words: list[str]) -> Dispersion:
    """The section that torchtitan's parser makes of the flags: numbers, text and switches by the field's type."""
    values: dict[str, Any] = {}
    types = get_type_hints(Dispersion)
    for word in words:
        if word.startswith("--dispersion."):
            name, equals, text = word.removeprefix("--dispersion.").partition("=")
            kind = next(kind for kind in (bool, int, float, str) if kind in (types[name], *get_args(types[name])))
            # a switch has no value; what may be None besides True and False has one
            assert bool(equals) == (types[name] is not bool)
            values[name] = text in ("", "True") if kind is bool else kind(text)
    return Dispersion(**values)


OTHER: dict[str, Any] = {
    "weight": 0.123456789, "layers": (-1, 0, 3), "blocks": "model.layers", "final_norm": True, "embedding": True,
    "gradient_ratio_every": 7, "tokens_first": False,
}  # fmt: skip
OTHER_LOSS: dict[str, Any] = {
    "form": "hinge", "tau": 1 / 3, "delta": 0.0123, "impl": "reference", "pairs": "subset", "group_size": 9,
    "subset_size": 11, "within": "batch", "compat": "lm-dispersion:t=0.1", "gradient": "recompute", "margin": 0.25,
    "norm_weight": 0.7, "variance_weight": 2.5, "covariance_weight": 3.5, "target_std": 0.5, "target_cosine": 0.2,
    "slices": 5, "knots": 4, "seed": 8,
}  # fmt: skip
OTHER_SCHEDULE: dict[str, Any] = {
    "kind": "linear", "warmup": 0.125, "until": 0.7, "final": 0.3, "warmup_steps": 5, "until_step": 6,
}  # fmt: skip


def one_by_one() -> list[dict[str, Any]]:
    """A dispersion section for each field of the configuration, with another value there."""
    return [
        *[{name: value} for name, value in OTHER.items()],
        *[{"loss": {name: value}} for name, value in OTHER_LOSS.items()],
        *[{"schedule": {name: value}} for name, value in OTHER_SCHEDULE.items()],
    ]


def test_every_field_of_a_dispersion_loss_reaches_torchtitan() -> None:
    assert set(OTHER) | {"loss", "schedule", "target"} == set(DispersionConfig.model_fields)
    assert set(OTHER_LOSS) == set(LossConfig.model_fields)
    assert set(OTHER_SCHEDULE) == set(WeightSchedule.model_fields)
    tried = 0
    for changes in one_by_one():
        try:
            asked = DispersionConfig.parse(changes, where="test")
        except ConfigError:  # only valid together with other fields
            continue
        tried += 1
        assert asked != DispersionConfig()
        data = {**TITAN, "arms": [{"name": "cross-entropy"}, {"name": "d", "dispersion": changes}]}
        lines = launches(StudyConfig.parse(data, where="test"), [], Path("out"))[0].lines
        joined = "\n".join(lines).replace("\\\n", " ")
        (words,) = [shlex.split(line) for line in joined.splitlines() if "qwen3_0_6b_dispersion" in line]
        assert section_of(words).config() == asked, changes
    assert tried >= 25


def test_an_arm_with_a_target_is_omitted_with_its_reason() -> None:
    arms = [{"name": "cross-entropy"}, {"name": "held", "dispersion": {"target": 0.1}}]
    lines = launches(StudyConfig.parse({**TITAN, "arms": arms}, where="test"), [], Path("out"))[0].lines
    assert "# held is omitted: torchtitan does not support dispersion.target" in lines
    assert not any("dispersion.target" in line for line in lines if not line.startswith("#"))


def test_the_settings_of_an_arm_reach_torchtitan() -> None:
    arms = [{"name": "cross-entropy"}, {"name": "own", "warmup": 0.25, "max_grad_norm": 0.5}]
    lines = launches(StudyConfig.parse({**TITAN, "arms": arms}, where="test"), [], Path("out"))[0].lines
    joined = "\n".join(lines).replace("\\\n", " ")
    runs = [shlex.split(line) for line in joined.splitlines() if line.startswith("torchrun")]
    found = [
        [words[words.index(flag) + 1] for flag in ("--lr-scheduler.warmup-steps", "--training.max-norm")]
        for words in runs
    ]
    assert found == [["100", "1.0"], ["250", "0.5"]]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train": {"weight_decay": 0.3}}, "train.weight_decay 0.3"),
        ({"train": {"lr_scheduler_type": "linear"}}, "train.lr_scheduler_type linear"),
        ({"model": {"architecture": "llama"}}, "model.architecture llama"),
        ({"model": {"architecture": "qwen3", "overrides": {"hidden_size": 64}}}, "model.overrides.hidden_size 64"),
        ({"corpus": {"source": "somebody/else"}}, "corpus.source somebody/else"),
    ],
)
def test_what_torchtitan_is_not_told_is_named(changes: dict[str, Any], named: str) -> None:
    lines = launches(StudyConfig.parse({**TITAN, **changes}, where="test"), [], Path("out"))[0].lines
    assert any(line.startswith("# not in these commands: ") and named in line for line in lines)


def test_measured_studies_offer_measure_commands() -> None:
    data = {
        **{key: STARTS[key] for key in ("name", "title", "question")},
        "baseline": "small",
        "arms": [
            {"name": "small", "untrained": True, "model": {"pretrained": "a/small", "revision": "step1000"}},
            {"name": "large", "untrained": True, "model": {"pretrained": "a/large", "parameters": 1e9}},
        ],
        "measure": {"dataset": "wikitext", "passages": 7, "metrics": ["all"], "passage_seed": 5, "resamples": 500},
    }
    study = StudyConfig.parse(data, where="test")
    found = [
        command
        for launch in launches(study, ["s.yaml"], Path("out"))
        for command in commands_of("\n".join(launch.lines))
    ]
    measured = [accepts(words) for words in found if words[0] == "measure"]
    assert [params["models"] for params in measured] == [["a/small@step1000"]] * 3 + [["a/large"]] * 3
    # each run of the study draws passages of its own
    assert [params["seed"] for params in measured] == [5 + 7 * seed for seed in study.seeds] * 2
    assert len({params["out"] for params in measured}) == 6
    assert any("resamples" in line for launch in launches(study, ["s.yaml"], Path("out")) for line in launch.lines)
    assert {(params["dataset"], params["passages"], params["metrics"]) for params in measured} == {
        ("wikitext", 7, "all")
    }
    plan = estimate.plan_of(study)
    assert plan.tokens == 2 * 3 * 7 * 512
    assert plan.lines[1].flops == pytest.approx(3 * 2 * 1e9 * 7 * 512)


@pytest.mark.parametrize("name", sorted(MeasureConfig.model_fields))
def test_every_setting_of_a_measured_study_is_in_the_commands_or_named(name: str) -> None:
    value: Any = {
        "tokens": 64,
        "bins": 64,
        "histograms": ["pooled"],
        "metrics": ["isoscore"],
        "logits": True,
        "blocks": "body.h",
        "tokens_first": True,
        "dataset": "imdb",
        "passages": 7,
        "passage_words": [20, 30],
        "passage_seed": 11,
        "batch_size": 3,
        "resamples": 500,
        "confidence": 0.9,
    }[name]
    data = {key: STARTS[key] for key in ("name", "title", "question")}
    arms = [{"name": name, "untrained": True, "model": {"pretrained": f"a/{name}"}} for name in ("small", "large")]
    study = StudyConfig.parse({**data, "baseline": "small", "arms": arms, "measure": {name: value}}, where="test")
    text = "\n".join(next(item.lines for item in launches(study, [], Path("out")) if "model by model" in item.title))
    options = {"passage_words": "words", "passage_seed": "seed"}
    params = accepts(commands_of(text)[0])
    if options.get(name, name) not in params:
        assert f"no option for the study's {name}" in text
    else:
        wanted = ",".join(value) if name == "metrics" else tuple(value) if isinstance(value, list) else value
        assert params[options.get(name, name)] == wanted


def test_local_text_takes_the_place_of_a_data_set_of_the_hub(tmp_path: Path, capsys) -> None:
    (tmp_path / "text.txt").write_text("a text")
    words = ["study", "fig3", "--scale", "gpu", "--text", str(tmp_path / "text.txt"), "--tokenizer", str(tmp_path)]
    assert main([*words, "--dry-run", "--yaml"]) == 0
    corpus = yaml.safe_load(capsys.readouterr().out)["corpus"]
    assert corpus["source"] == str(tmp_path / "text.txt")
    assert (corpus["subset"], corpus["split"], corpus["streaming"]) == (None, "train", False)
    assert corpus["tokenizer"] == str(tmp_path)
    assert main([*words, "--set", "corpus.text_field=body", "--dry-run", "--yaml"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["corpus"]["text_field"] == "body"
