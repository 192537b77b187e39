"""How a study is started elsewhere: commands for one machine, several GPUs, a Ray or Slurm cluster, torchtitan."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from decondense.config import ARM_SETTINGS, ArmConfig, MeasureConfig, StudyConfig
from decondense.config.measure import first_passage
from decondense.config.titan import Dispersion

_WIDTH = 80


@dataclass(frozen=True)
class Launch:
    """One way to start a study, or a part of one."""

    title: str
    lines: list[str]
    """Text of a shell script."""


def launches(study: StudyConfig, words: list[str], out: Path) -> list[Launch]:
    """The ways to start ``study``.

    Args:
        study: the study to start.
        words: the arguments of ``decondense study`` for it: the name and the changes.
        out: the study's directory.
    """
    if study.launch == "torchtitan":
        return [Launch("With torchtitan, one run after the other", torchtitan(study, out))]
    found = [
        Launch(
            "On one machine, on all of its GPUs or cores", command(["decondense", "study", *words, "--out", str(out)])
        )
    ]
    if study.measure is not None:
        found.append(Launch("Or model by model, with figures", measuring(study, out)))
    else:
        found += list(_torchrun(study, words, out))
    ray = ["decondense", "study", *words, "--out", str(out), "--ray", "auto"]
    found.append(Launch("On a Ray cluster, from one of its machines", command(ray)))
    found.append(Launch("On a Slurm cluster (--slurm FILE writes this script)", slurm_script(study, words, out)))
    return found


def command(words: list[str]) -> list[str]:
    """A shell command, broken where a line would be too long, never between an option and its value."""
    parts: list[str] = []
    for word in words:
        quoted = shlex.quote(word)
        if parts and parts[-1].startswith("-") and " " not in parts[-1] and not word.startswith("-"):
            parts[-1] += f" {quoted}"
        else:
            parts.append(quoted)
    lines, line = [], ""
    for part in parts:
        if line and len(line) + len(part) + 3 > _WIDTH:
            lines.append(line + " \\")
            line = f"    {part}"
        else:
            line = f"{line} {part}" if line else part
    return [*lines, line]


def _torchrun(study: StudyConfig, words: list[str], out: Path) -> Iterator[Launch]:
    trained = [arm for arm in study.arms if not arm.untrained]
    if not trained:
        return
    arm = next((arm for arm in trained if arm.name != study.baseline), trained[0])
    batch = study.train.batch_size
    cell = ["train", *words, "--arm", arm.name, "--seed", str(study.seeds[0]), "--out", str(out)]
    processes = max((number for number in (8, 4, 2) if _shared(study, number)), default=1)
    needs = []
    if study.prepared or study.sweep is not None:
        what = " and ".join(
            name for name, there in (("prepared models", study.prepared), ("trials", study.sweep is not None)) if there
        )
        needs = [f"# run after the {what}, trained first by `decondense study`"]
    if processes > 1:
        yield Launch(
            f"One run on {processes} GPUs",
            [*needs, *command(["torchrun", "--nproc-per-node", str(processes), "-m", "decondense", *cell])],
        )
    nodes = max((number for number in (4, 2) if processes > 1 and _shared(study, number * processes)), default=1)
    if nodes > 1:
        first = ["torchrun", "--nnodes", str(nodes), "--nproc-per-node", str(processes), "--rdzv-backend", "c10d"]
        yield Launch(
            f"One run on {nodes} machines with {processes} GPUs each: run this on every machine",
            [
                "HOST=first-machine  # the name of one of the machines",
                *needs,
                *_unquoted(command([*first, "--rdzv-endpoint", "HOST:29500", "-m", "decondense", *cell])),
            ],
        )
    if processes == 1 and batch > 1:
        yield Launch("One run", [*needs, *command(["decondense", *cell])])


def _unquoted(lines: list[str]) -> list[str]:
    return [line.replace("HOST:29500", '"$HOST:29500"') for line in lines]


def _shared(study: StudyConfig, processes: int) -> bool:
    """Whether a batch can be divided among so many processes."""
    each, rest = divmod(study.train.batch_size, processes)
    micro = min(study.train.micro_batch_size or each, each)
    return not rest and each > 0 and not each % micro


def slurm_script(study: StudyConfig, words: list[str], out: Path) -> list[str]:
    """A job array in which every task runs the whole command and takes the next free run.

    Prepared models and trials run first without further options: a task waits for the runs that it needs.
    """
    cells = len(study.seeds) * len(study.arms)
    large = study.scale not in ("quick", "tiny")
    resources = ["#SBATCH --gpus-per-task=1", "#SBATCH --cpus-per-task=8"] if large else []
    if not large:
        resources = [f"#SBATCH --cpus-per-task={study.train.threads or 4}"]
    return [
        "#!/bin/bash",
        f"#SBATCH --job-name=decondense-{study.name}",
        f"#SBATCH --array=0-{cells - 1}",
        "#SBATCH --ntasks=1",
        *resources,
        "#SBATCH --time=24:00:00  # your limit; submit again to resume",
        # B: to the batch shell, which `exec` makes the command: without it, Slurm warns only the steps of srun
        "#SBATCH --signal=B:USR1@120  # a checkpoint is saved before the limit",
        f"#SBATCH --output=decondense-{study.name}-%A_%a.log",
        "# Each task of the array takes the next free run, so fewer tasks also work.",
        "# Runs are claimed with flock: the file system of --out must support flock",
        "# on all nodes.",
        *command(["exec", "decondense", "study", *words, "--out", str(out), "--workers", "1"]),
    ]


def measuring(study: StudyConfig, out: Path) -> list[str]:
    """The commands that measure each arm's model alone, on the passages of the study's runs."""
    assert study.measure is not None
    settings, lines = study.measure, []
    unlike = [name for name in _NOT_IN_MEASURE if getattr(settings, name) != MeasureConfig.model_fields[name].default]
    if unlike:
        lines.append(f"# decondense measure has no option for the study's {', '.join(unlike)}: it uses the default")
    for arm in study.arms:
        model = study.model_of(arm)
        if model.pretrained is None or model.prepared is not None:
            lines.append(f"# {arm.name} is omitted: the study trains its model")
            continue
        source = model.pretrained if model.revision is None else f"{model.pretrained}@{model.revision}"
        for seed in study.seeds:
            words = ["decondense", "measure", source, "--dataset", settings.dataset]
            words += ["--passages", str(settings.passages), "--tokens", str(settings.tokens)]
            words += ["--words", *map(str, settings.passage_words)]
            words += ["--seed", str(first_passage(settings, seed)), "--bins", str(settings.bins)]
            if settings.metrics:
                words += ["--metrics", ",".join(settings.metrics)]
            if settings.logits:
                words.append("--logits")
            if settings.blocks is not None:
                words += ["--blocks", settings.blocks]
            if settings.batch_size is not None:
                words += ["--batch-size", str(settings.batch_size)]
            suffix = "" if len(study.seeds) == 1 else f"-seed-{seed}"
            lines += command([*words, "--out", str(out.with_name(f"{out.name}-{arm.name}{suffix}"))])
    return lines


_NOT_IN_MEASURE = ("histograms", "resamples", "confidence", "tokens_first")


# --------------------------------------------------------------------------------------------------------------------
# torchtitan
# --------------------------------------------------------------------------------------------------------------------

_ASSETS = "assets/hf/Qwen3-0.6B"


def torchtitan(study: StudyConfig, out: Path) -> list[str]:
    """The commands of a study that torchtitan trains: tokenizer, runs, conversion, benchmarks."""
    files = ["tokenizer.json", "tokenizer_config.json"]
    lines = [
        "# needs: pip install 'decondense[titan]', and the tokenizer:",
        *command(["hf", "download", "Qwen/Qwen3-0.6B", *files, "--local-dir", _ASSETS]),
        # of these torchtitan's own configuration has a value
        *[f"# not in these commands: {' '.join(entry.split())}" for entry in _not_passed(study)],
    ]
    for arm in study.arms:
        missing = _not_in_torchtitan(arm)
        if missing:
            lines += ["", f"# {arm.name} is omitted: torchtitan does not support {missing}"]
            continue
        lines += [
            "",
            f"# {arm.name}",
            f"for seed in {' '.join(map(str, study.seeds))}; do",
            f"folder={shlex.quote(str(out / 'cells' / arm.name))}/seed-$seed",
            *_in_loop(_titan_run(study, arm)),
            "python -c 'import sys",
            "from decondense.training.titan import to_huggingface",
            "to_huggingface(*sys.argv[1:3], tokenizer=sys.argv[3])' \\",
            f'    "$folder/checkpoint/step-{study.train.steps}" "$folder/final" {_ASSETS}',
            *_in_loop(_evaluation(study)),
            "done",
        ]
    return lines


def _in_loop(words: list[str]) -> list[str]:
    return [line.replace("SEED", '"$seed"').replace("FOLDER", '"$folder"') for line in command(words)]


def _not_in_torchtitan(arm: ArmConfig) -> str | None:
    """The first treatment or setting of an arm that the commands cannot pass on."""
    missing = [name for name, treatment in arm.treatments.items() if not treatment.torchtitan]
    if arm.dispersion is not None and arm.dispersion.target is not None:
        missing.append("dispersion.target")  # its checkpoints would not hold the weights
    passed = ("warmup", "max_grad_norm")
    missing += [name for name in (*ARM_SETTINGS, "model") if name not in passed and getattr(arm, name) is not None]
    missing += ["untrained"] if arm.untrained else []
    return next(iter(missing), None)


_TITAN_TRAIN = {
    "learning_rate": 3e-4,
    "betas": (0.9, 0.95),
    "weight_decay": 0.1,
    "lr_scheduler_type": "cosine",
    "precision": "bf16",
}
_TITAN_MODEL = {
    "num_hidden_layers": 28,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}


def _not_passed(study: StudyConfig) -> list[str]:
    """The settings of a study that torchtitan's configuration for Qwen3-0.6B on C4 fixes to another value."""
    found = [
        f"train.{name} {getattr(study.train, name)}"
        for name, value in _TITAN_TRAIN.items()
        if getattr(study.train, name) != value
    ]
    model = study.model
    if model.architecture != "qwen3":
        found.append(f"model.architecture {model.architecture}")
    found += [f"model.{name} {value}" for name in ("pretrained", "lora") if (value := getattr(model, name)) is not None]
    found += [
        f"model.overrides.{name} {value}" for name, value in model.overrides.items() if _TITAN_MODEL.get(name) != value
    ]
    if study.corpus.source != "allenai/c4":
        found.append(f"corpus.source {study.corpus.source}")
    return found


def _titan_run(study: StudyConfig, arm: ArmConfig) -> list[str]:
    train = study.train_of(arm)
    config = "qwen3_0_6b_cross_entropy" if arm.dispersion is None else "qwen3_0_6b_dispersion"
    words = ["torchrun", "--nproc-per-node", "8", "-m", "torchtitan.train"]
    words += ["--module", "decondense.training.titan", "--config", config]
    if arm.dispersion is not None:
        words += Dispersion.of(arm.dispersion).words()
    words += ["--training.steps", str(train.steps), "--training.seq-len", str(train.max_seq_length)]
    words += ["--training.global-batch-size", str(train.batch_size)]
    if train.micro_batch_size is not None:
        words += ["--training.local-batch-size", str(train.micro_batch_size)]
    words += ["--training.max-norm", str(train.max_grad_norm)]
    words += ["--lr-scheduler.warmup-steps", str(round(train.warmup * train.steps))]
    words += ["--dataloader.dataset", "c4", "--hf-assets-path", _ASSETS]
    return [*words, "--debug.seed", "SEED", "--dump-folder", "FOLDER"]


def _evaluation(study: StudyConfig) -> list[str]:
    settings = study.evaluate
    words = ["decondense", "evaluate", "FOLDER/final", "--tasks", ",".join(settings.tasks or ("paper",))]
    words += ["--shots", str(settings.num_fewshot)]
    if settings.limit is not None:
        words += ["--limit", str(settings.limit)]
    if settings.data_dir is not None:
        words += ["--data-dir", settings.data_dir]
    return [*words, "--out", "FOLDER/benchmarks"]
