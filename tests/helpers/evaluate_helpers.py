"""A tiny model, made-up benchmarks, and the harness's own numbers to compare with."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")

TEXT = (
    "river stone lamp seven under bright carry window quiet paper wheel grain north silver often because water build "
    "harbour letter market green simple engine garden cloud reason travel winter music signal copper field answer"
)
WORDS = TEXT.split()


def make_model(folder: Path, *, positions: int = 256, head: str = "causal", seed: int = 0) -> Path:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    from decondense.seeding import fence

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([TEXT] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|endoftext|>", bos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    shape = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0}
    with fence():
        torch.manual_seed(seed)
        if head == "causal":
            # large weights: a freshly initialised model would give every answer nearly the same probability
            config = GPT2Config(
                n_positions=positions,
                n_embd=32,
                n_layer=2,
                n_head=2,
                initializer_range=0.4,
                **shape,
                tie_word_embeddings=False,
            )
            model: Any = GPT2LMHeadModel(config)
        else:
            model = BertForMaskedLM(
                BertConfig(
                    vocab_size=len(tokenizer),
                    hidden_size=32,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                    intermediate_size=32,
                )
            )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def harness_tasks() -> Path:
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "tasks"


def subjects() -> list[str]:
    """MMLU's subjects, as the harness's own files name them."""
    found = []
    for path in sorted((harness_tasks() / "mmlu" / "default").glob("mmlu_*.yaml")):
        found += re.findall(r'^"?dataset_name"?: "?([a-z_]+)"?', path.read_text(), re.MULTILINE)
    assert len(found) == 57
    return found


SCORED, TRAIN = 7, 9


def make_data(root: Path) -> Path:
    """Rows of every benchmark with the hub's fields, and a few more fields as the hub has them."""
    draw = random.Random(7)

    def words(low: int, high: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(draw.randint(low, high)))

    def choices() -> dict[str, list[str]]:
        return {"text": [words(1, 4) for _ in range(4)], "label": list("ABCD")}

    for split, count in (("train_r2", TRAIN), ("dev_r2", TRAIN), ("test_r2", SCORED)):
        rows = [
            {
                "uid": str(k),
                "premise": words(8, 14),
                "hypothesis": words(3, 6),
                "label": draw.randrange(3),
                "reason": "",
            }
            for k in range(count)
        ]
        write(root / "anli_r2" / f"{split}.jsonl", rows)
    write(root / "lambada_openai" / "test.jsonl", [{"text": words(12, 20)} for _ in range(SCORED)])
    for name in ("train", "validation", "test"):
        count = SCORED if name == "test" else TRAIN
        for task, question in (
            ("openbookqa", "question_stem"),
            ("arc_easy", "question"),
            ("arc_challenge", "question"),
        ):
            rows = [
                {"id": f"{k}", question: words(5, 9), "choices": choices(), "answerKey": draw.choice("ABCD")}
                for k in range(count)
            ]
            write(root / task / f"{name}.jsonl", rows)
    for name, count in (("train", TRAIN), ("validation", SCORED)):
        rows = [
            {"goal": words(3, 8), "sol1": words(4, 9), "sol2": words(4, 9), "label": draw.randrange(2)}
            for _ in range(count)
        ]
        write(root / "piqa" / f"{name}.jsonl", rows)
        rows = [
            {
                "sentence": f"{words(3, 6)} _ {words(3, 6)}.",
                "option1": words(1, 1),
                "option2": words(1, 1),
                "answer": draw.choice("12"),
            }
            for _ in range(count)
        ]
        write(root / "winogrande" / f"{name}.jsonl", rows)
        rows = [
            {
                "id": str(k),
                "question": words(4, 9),
                **{f"op{letter}": words(1, 3) for letter in "abcd"},
                "cop": draw.randrange(4),
                "choice_type": "single",
                "exp": None if k % 2 else words(3, 4),
            }
            for k in range(count)
        ]
        write(root / "medmcqa" / f"{name}.jsonl", rows)
    rows = []
    for _ in range(SCORED):
        count = draw.randint(3, 6)
        texts = [words(2, 5) for _ in range(count)]
        right = draw.randint(1, count - 1)
        rows.append(
            {
                "question": words(4, 8) + "?",
                "mc1_targets": {"choices": texts[:2], "labels": [1, 0]},
                "mc2_targets": {"choices": texts, "labels": [1] * right + [0] * (count - right)},
            }
        )
    write(root / "truthfulqa_mc" / "validation.jsonl", rows)
    for split, count in (("dev", 3), ("test", 2)):
        rows = [
            {
                "question": words(4, 9),
                "subject": subject,
                "choices": [words(1, 3) for _ in range(4)],
                "answer": draw.randrange(4),
            }
            for subject in subjects()
            for _ in range(count)
        ]
        write(root / "mmlu" / f"all_{split}.jsonl", rows)
    # one document is longer than the context, so that windows are scored too
    for name in ("val", "test"):
        rows = [{"text": "\n".join(words(8, 12) for _ in range(lines)), "id": str(lines)} for lines in (1, 3, 30)]
        write(root / "paloma_wikitext_103" / f"{name}.jsonl", rows)
    return root


HUB = {
    "anli_r2": ("facebook/anli", None),
    "lambada_openai": ("EleutherAI/lambada_openai", "default"),
    "openbookqa": ("allenai/openbookqa", "main"),
    "piqa": ("baber/piqa", None),
    "truthfulqa_mc2": ("truthfulqa/truthful_qa", "multiple_choice"),
    "winogrande": ("allenai/winogrande", "winogrande_xl"),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy"),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge"),
    "medmcqa": ("openlifescienceai/medmcqa", None),
    "paloma_wikitext_103": ("allenai/paloma", "wikitext_103"),
}


def hub_of(root: Path, scratch: Path, *, copies: Mapping[str, Mapping[str, str]] | None = None) -> list[list[Any]]:
    """What the hub would serve: [path, configuration, {split: file}], from the same local rows.

    ``copies``: splits that a folder lacks and the harness opens all the same (it does not read them): name -> of which.
    """
    served: list[list[Any]] = []
    for task, (path, name) in HUB.items():
        folder = root / ("truthfulqa_mc" if task == "truthfulqa_mc2" else task)
        if folder.is_dir():
            files = {file.stem: str(file) for file in folder.glob("*.jsonl")}
            for split, of in (copies or {}).get(task, {}).items():
                files[split] = files[of]
            served.append([path, name, files])
    for split in ("dev", "test"):
        for row in read(root / "mmlu" / f"all_{split}.jsonl"):
            file = scratch / row["subject"] / f"{split}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(row) + "\n")
    for folder in sorted(path for path in scratch.iterdir() if path.is_dir()):
        served.append(["cais/mmlu", folder.name, {file.stem: str(file) for file in folder.glob("*.jsonl")}])
    return served


def ask_harness(
    model: Path, runs: Sequence[Mapping[str, Any]], served: list[list[Any]], scratch: Path, **more: Any
) -> dict[str, Any]:
    """The harness's own results, from its packaged tasks in a process of its own."""
    scratch.mkdir(parents=True, exist_ok=True)
    spec = {"model": str(model), "runs": list(runs), "served": served, "out": str(scratch / "oracle.json"), **more}
    (scratch / "spec.json").write_text(json.dumps(spec))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "harness_oracle.py"), str(scratch / "spec.json")],
        env={**os.environ, "HF_DATASETS_CACHE": str(scratch / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads((scratch / "oracle.json").read_text())
    return found
