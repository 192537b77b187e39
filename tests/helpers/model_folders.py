"""Folders with tiny models, whole, adapted and hostile."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from decondense.seeding import fence

WORDS = 64


def save_tokenizer(folder: Path, ids: list[int] | None = None) -> None:
    """Words w0, w1, ... with the given ids; w0 is both the unknown and the end-of-text token."""
    numbers = list(range(WORDS)) if ids is None else ids
    words = Tokenizer(models.WordLevel({f"w{i}": number for i, number in enumerate(numbers)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w0").save_pretrained(folder)


def save_model(folder: Path, seed: int = 0, **settings: object) -> GPT2LMHeadModel:
    """A random GPT-2 of two layers and width 16, with its tokenizer."""
    values = {"vocab_size": WORDS, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, **settings}
    config = GPT2Config(**values, bos_token_id=0, eos_token_id=0)
    with fence():
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model.eval()


def write_text(path: Path, words: int = 4000) -> Path:
    """Documents of some 100 words each, one a line of JSON."""
    lines = []
    for first in range(0, words, 100):
        text = " ".join(f"w{(i * 7 + i * i * (1 + first)) % (WORDS - 1) + 1}" for i in range(first, first + 100))
        lines.append(json.dumps({"text": text}))
    path.write_text("\n".join(lines) + "\n")
    return path


def edit(path: Path, **changes: object) -> None:
    """Lay keys over a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


class _Touch:
    """Unpickled, it creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return (open, (str(self.marker), "w"))


def bomb(path: Path, marker: Path) -> None:
    """A pickle that creates ``marker`` when it is read."""
    path.write_bytes(pickle.dumps(_Touch(marker)))


def code(path: Path, marker: Path) -> None:
    """A module that creates ``marker`` when it is imported, and has the classes that its folder names."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast\n"
        "class Config(GPT2Config):\n    model_type = 'hostile'\n"
        "class Model(GPT2LMHeadModel):\n    config_class = Config\n"
        "class Words(PreTrainedTokenizerFast):\n    pass\n"
        "def generate(model, *args, **kwargs):\n    pass\n"
    )


def unknown_architecture(folder: Path, marker: Path) -> None:
    code(folder / "own.py", marker)
    names = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model", "AutoModel": "own.Model"}
    edit(folder / "config.json", model_type="hostile", auto_map=names)


def known_architecture(folder: Path, marker: Path) -> None:
    unknown_architecture(folder, marker)
    edit(folder / "config.json", model_type="gpt2")


def tokenizer_code(folder: Path, marker: Path) -> None:
    code(folder / "own.py", marker)
    edit(folder / "tokenizer_config.json", tokenizer_class="Words", auto_map={"AutoTokenizer": [None, "own.Words"]})


def processor_code(folder: Path, marker: Path) -> None:
    code(folder / "own.py", marker)
    text = json.dumps({"processor_class": "P", "auto_map": {"AutoProcessor": "own.Words"}})
    for name in ("processor_config.json", "preprocessor_config.json"):
        (folder / name).write_text(text)
    (folder / "chat_template.jinja").write_text(
        "{{ cycler.__init__.__globals__.os.system('touch " + str(marker) + "') }}"
    )


def generation_code(folder: Path, marker: Path) -> None:
    code(folder / "custom_generate" / "generate.py", marker)
    (folder / "custom_generate" / "requirements.txt").write_text("")


def pickled_weights(folder: Path, marker: Path) -> None:
    (folder / "model.safetensors").unlink()
    bomb(folder / "pytorch_model.bin", marker)


def pickled_adapter(folder: Path, marker: Path) -> None:
    base = folder / "base"
    save_model(base)
    (folder / "model.safetensors").unlink()
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(base), "target_modules": ["c_attn"]})
    )
    bomb(folder / "adapter_model.bin", marker)


def other_pickles(folder: Path, marker: Path) -> None:
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin"):
        bomb(folder / name, marker)


def hub_kernels(folder: Path, marker: Path) -> None:
    edit(folder / "config.json", attn_implementation="owner/kernels")


REFUSED = {
    "architecture": (unknown_architecture, "code"),
    "weights": (pickled_weights, "pickle"),
    "adapter": (pickled_adapter, "pickle"),
    "kernels": (hub_kernels, "owner/kernels"),
}
"""What brings code that is needed, and a word of the message that refuses it."""
IGNORED = {
    "known architecture": known_architecture,
    "tokenizer": tokenizer_code,
    "processor": processor_code,
    "generation": generation_code,
    "pickles beside the weights": other_pickles,
}
"""What brings code or pickles that transformers can do without."""
