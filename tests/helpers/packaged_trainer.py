"""One step of plain gradient descent under a package that builds its own trainer, in a process of its own because such
packages patch transformers. Started by test_packaged_trainers.py: ``python packaged_trainer.py PACKAGE FOLDER``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

WEIGHT, RATE = 2.0, 0.5
LENGTHS = (4, 7, 5, 6, 8, 4, 6, 5)

PLUGIN = f"""
from swift.callbacks import TrainerCallback, callbacks_map
from decondense import attach_trainer


class Dispersion(TrainerCallback):
    def on_init_end(self, args, state, control, **kwargs):
        attach_trainer(self.trainer, weight={WEIGHT})


class Untouched(TrainerCallback):
    def on_init_end(self, args, state, control, **kwargs):
        attach_trainer(self.trainer, weight=0.0)


callbacks_map.update(dispersion=Dispersion, untouched=Untouched)
"""


def words(place: int, length: int) -> str:
    return " ".join(f"w{3 + (place * 7 + j * 5) % 60}" for j in range(length))


def step_settings(size: int) -> dict[str, object]:
    return {
        "max_steps": 1, "per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size,
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "learning_rate": RATE, "max_grad_norm": 0.0,
        "weight_decay": 0.0, "optim": "sgd", "lr_scheduler_type": "constant", "dataset_num_proc": 1, "max_length": 64,
        "bf16": False, "fp16": False,
    }  # fmt: skip


def with_swift(folder: Path, model: Path, size: int, weight: float):
    from swift import SftArguments, sft_main
    from swift.trainers import Seq2SeqTrainer

    trainers = []
    before = Seq2SeqTrainer.train
    Seq2SeqTrainer.train = lambda self, *a, **k: (trainers.append(self), before(self, *a, **k))[1]
    (folder / "data.jsonl").write_text(
        "\n".join(
            json.dumps({"messages": [{"role": "user", "content": words(i, n)},
                                     {"role": "assistant", "content": words(i + 9, 3)}]})
            for i, n in enumerate(LENGTHS)
        )
    )  # fmt: skip
    (folder / "dispersion.py").write_text(PLUGIN)
    sft_main(
        SftArguments(
            model=str(model), model_type="qwen3", template="dummy", dataset=[str(folder / "data.jsonl")],
            tuner_type="full", torch_dtype="float32", external_plugins=[str(folder / "dispersion.py")],
            callbacks=["dispersion" if weight else "untouched"], output_dir=str(folder / "out"), attn_impl="eager",
            split_dataset_ratio=0.0, gradient_checkpointing=False, **step_settings(size),
        )
    )  # fmt: skip
    Seq2SeqTrainer.train = before
    return trainers[0]


def with_unsloth(folder: Path, model: Path, size: int, weight: float):
    import torch
    import trl
    from datasets import Dataset
    from unsloth import FastLanguageModel

    from decondense import attach_trainer

    loaded, tokenizer = FastLanguageModel.from_pretrained(
        str(model), max_seq_length=64, dtype=torch.float32, load_in_4bit=False, full_finetuning=True, device_map="cpu",
        use_gradient_checkpointing=False,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model=loaded,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"text": words(i, n)} for i, n in enumerate(LENGTHS)]),
        args=trl.SFTConfig(output_dir=str(folder / "out"), dataset_text_field="text", **step_settings(size)),
    )
    attach_trainer(trainer, weight=weight)
    trainer.train()
    return trainer


def main(package: str, folder: Path) -> None:
    os.environ.update(HF_HUB_OFFLINE="1", USE_HF="1", CUDA_VISIBLE_DEVICES="", UNSLOTH_DISABLE_STATISTICS="1")
    if package == "unsloth":
        import unsloth  # noqa: F401  before transformers, as it asks for
    import torch
    from attach_helpers import block_outputs, dispersion, gradients, tiny
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 64)}}, unk_token="<pad>")
    fast = Tokenizer(known)
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    model = folder / "model"
    torch.manual_seed(0)
    start = tiny("qwen3", dtype=torch.float32)
    start.save_pretrained(model)
    tokenizer.save_pretrained(model)

    run = {"swift": with_swift, "unsloth": with_unsloth}[package]
    found: dict[str, object] = {}
    for size in (8, 2):
        changed = {}
        for weight in (WEIGHT, 0.0):
            trainer = run(folder, model, size, weight)
            changed[weight] = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
            found[f"log {size} {weight}"] = trainer.state.log_history[0]
            batch = next(iter(trainer.get_train_dataloader()))
            if size == 8:
                ids = batch["input_ids"]
                mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
                found["documents"] = [row[mask[place]].tolist() for place, row in enumerate(ids)]
        found[f"part {size}"] = {name: changed[WEIGHT][name] - changed[0.0][name] for name in changed[0.0]}
    values = []
    for document in found["documents"]:
        kept, hooks = block_outputs(list(start.model.layers))
        start(input_ids=torch.tensor([document]))
        values.append(dispersion(kept))
        for hook in hooks:
            hook.remove()
    mean = torch.stack(values).mean()
    (WEIGHT * mean).backward()
    got = gradients(start)
    found["expected"] = {n: -RATE * got.get(n, torch.zeros_like(p)) for n, p in start.named_parameters()}
    found["value"] = float(mean)
    torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
