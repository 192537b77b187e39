"""torchtitan's debug model on CPU and gloo. torchtitan does not support that as shipped: the patches are for tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch._utils


class Properties:
    total_memory = 2**34
    name = "cpu"


def use_cpu() -> None:
    """Make torchtitan take the processor for its accelerator."""
    torch._utils._get_available_device_type = lambda: "cpu"
    torch.cpu.get_device_name = lambda *_: "cpu"
    torch.cpu.get_device_properties = lambda *_: Properties
    torch.cpu.memory_stats = lambda *_: {}
    for name in ("reset_peak_memory_stats", "empty_cache", "set_device"):
        setattr(torch.cpu, name, lambda *_: None)
    from torchtitan.distributed import utils

    # torchtitan 0.3 expects torch.distributed.set_timeout of a nightly build of torch
    utils.set_pg_timeouts = lambda *_, **__: None


def tokenizer_and_text(folder: Path) -> None:
    """A small word tokenizer and a data set of its words, as torchtitan's loader wants them."""
    import json
    import random

    from tokenizers import Tokenizer, models, pre_tokenizers

    if (folder / "text.json").exists():
        return
    words = [f"w{i}" for i in range(200)]
    vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    draw = random.Random(0)
    rows = [{"text": " ".join(draw.choices(words, k=draw.choice([7, 20, 45])))} for _ in range(400)]
    (folder / "text.json").write_text("\n".join(json.dumps(row) for row in rows))


def batches(tokens: int = 32, rows: int = 2) -> list[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """Eight micro-batches of packed documents; their numbers of documents differ."""
    draw = torch.Generator().manual_seed(0)
    found = []
    for number in range(8):
        ids = torch.randint(3, 200, (rows, tokens + 1), generator=draw)
        positions = torch.arange(tokens).repeat(rows, 1)
        for row in range(rows):
            for cut in torch.randint(1, tokens, (number % 4 + row,), generator=draw).tolist():
                positions[row, cut:] = torch.arange(tokens - cut)
        labels = ids[:, 1:].clone()
        labels[:, : number + 1] = -100  # unequal numbers of valid tokens
        found.append(({"input": ids[:, :-1], "positions": positions}, labels))
    return found


def joined(parts: list[tuple[dict[str, torch.Tensor], torch.Tensor]]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Several micro-batches as one."""
    inputs = {key: torch.cat([inputs[key] for inputs, _ in parts]) for key in parts[0][0]}
    return inputs, torch.cat([labels for _, labels in parts])


def same_start(model: torch.nn.Module) -> None:
    """Weights that do not depend on the number of ranks, as torchtitan's own do on a processor."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    draw = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        value = torch.ones(parameter.shape)
        if parameter.ndim > 1:
            value = torch.randn(parameter.shape, generator=draw) * 0.03
        if isinstance(parameter, DTensor):
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
        parameter.data.copy_(value)


def main(folder: Path, name: str, weight: float, local: int, accumulate: int) -> None:
    """Two steps of four micro-batches each, cut as asked; keeps the first gradient, the logs and the last logits."""
    use_cpu()
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

    from datasets import load_dataset
    from torch.distributed.fsdp import FSDPModule
    from torchtitan.components.checkpoint import CheckpointManager
    from torchtitan.hf_datasets import DatasetConfig, text_datasets
    from torchtitan.models.common.attention import ScaledDotProductAttention

    from decondense.training.titan import qwen3_debugmodel_dispersion

    text_datasets.DATASETS["words"] = DatasetConfig(
        path=str(folder / "text.json"),
        loader=lambda path: load_dataset(
            "json", data_files=path, split="train", cache_dir=str(folder / name / "cache")
        ),
        sample_processor=lambda sample: sample["text"],
    )
    config = qwen3_debugmodel_dispersion()
    config.hf_assets_path = str(folder)
    config.dump_folder = str(folder / name)
    config.dataloader.dataset = "words"
    config.training.local_batch_size = local
    config.training.global_batch_size = local * accumulate * ranks
    config.training.seq_len = 32
    config.training.steps = 2
    config.training.mixed_precision_param = "float32"
    config.parallelism.spmd_backend = "partial_dtensor"
    config.debug.seed = 0
    config.dispersion.weight = weight
    config.checkpoint = CheckpointManager.Config(enable=True, interval=1000, last_save_model_only=True)
    for layer in config.model_spec.model.layers:  # FlexAttention has no backward on a processor
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    trainer = config.build()
    for module in trainer.model_parts[0].modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum

    same_start(trainer.model_parts[0])
    # the same eight micro-batches however many of them a forward takes, and however many ranks share them
    each = local // 2
    parts = [joined(batches()[i : i + each]) for i in range(0, 8, each)]
    trainer.batch_generator = lambda _: iter(parts[rank::ranks])

    found = {"logs": [], "gradients": None}
    step = trainer.optimizers.step

    def keep_log(*arguments, **keywords):
        found["logs"].append({"loss": float(arguments[1]), **keywords["extra_metrics"]})

    def keep_gradients(*arguments, **keywords):
        if found["gradients"] is None:
            grads = {n: p.grad for n, p in trainer.model_parts[0].named_parameters()}
            found["gradients"] = {
                n: (g.full_tensor() if hasattr(g, "full_tensor") else g).clone() for n, g in grads.items()
            }
        return step(*arguments, **keywords)

    trainer._plain_log, trainer.optimizers.step = keep_log, keep_gradients
    trainer.train()
    model = trainer.model_parts[0].eval()
    model._skip_lm_head = False
    with torch.no_grad():
        found["logits"] = model(batches()[0][0]["input"])
    trainer.close()
    torch.save(found, folder / f"{name}-{rank}.pt")


if __name__ == "__main__":
    main(
        Path(sys.argv[1]),
        sys.argv[2],
        *(kind(value) for kind, value in zip((float, int, int), sys.argv[3:], strict=True)),
    )
