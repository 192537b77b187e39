"""Record what `embedding-condensation` 2.0 says of two small models, as numbers to agree with.

Not part of the test run. The peer needs transformers < 4.48, so it lives in an environment of its own, outside of the
repository:

    python -m venv peer
    peer/bin/pip install "torch==2.13.0" "transformers<4.48" embedding-condensation==2.0 scipy
    peer/bin/python tests/measuring/golden/make_golden.py [DIRECTORY_OF_STORIES260K] > embedding_condensation_2.0.json

Its import asks for NLTK's punkt data, which only its own sampling of texts uses; passages are given here, so a stand-in
for the word tokenizer is put in place before the import.
"""

from __future__ import annotations

import json
import platform
import sys
import zlib
from importlib import metadata

import nltk.tokenize

nltk.tokenize.word_tokenize = str.split

import embedding_condensation  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from scipy.stats import kendalltau, spearmanr  # noqa: E402

TEXTS = [
    "Once upon a time there was a little fox who lived at the edge of a quiet wood. Every morning it walked "
    "down to the river to see the boats go by. One day a small red boat came without anybody in it, and the fox "
    "wondered who had lost it. It took the rope in its teeth and pulled until the boat lay safe on the sand.",
    "The baker had a cat that slept on the flour bags. When the sun came up, the cat woke and looked for mice, "
    "but the mice had gone to the mill where the corn was fresh. So the baker gave the cat some warm milk, and "
    "the two of them opened the shop and sold rolls to the children on their way to school until noon.",
    "Anna had a big blue ball. She liked to throw it high up in the air and catch it with both hands. Her "
    "brother Tom said that he could throw it over the house. He tried and tried, and at last the ball flew over "
    "the roof and was gone. They ran around the house and found it in the middle of the yellow flowers.",
]
"""Written for this file."""


def fill(model: torch.nn.Module) -> None:
    """Weights that depend on the parameters' names alone."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            rng = np.random.default_rng(zlib.crc32(name.encode()))
            values = rng.normal(1.0 if "ln_" in name and name.endswith("weight") else 0.0, 0.15, tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(values))


def token_ids(passages: int, tokens: int, vocabulary: int) -> np.ndarray:
    """Zipf-like token ids, so that tokens repeat as they do in text."""
    rng = np.random.default_rng(0)
    weights = 1 / np.arange(1, vocabulary + 1)
    return rng.choice(vocabulary, size=(passages, tokens), p=weights / weights.sum())


GPT2 = {"vocab_size": 96, "n_positions": 64, "n_embd": 32, "n_layer": 4, "n_head": 4}
GPT2_PASSAGES, GPT2_TOKENS = 5, 48
STORIES_TOKENS = 96


def record(result: np.ndarray) -> dict:
    mean = result.astype(np.float64).mean(axis=(1, 2))
    hidden = mean[:-1]
    depth = np.arange(len(hidden))
    return {
        "layers": "hidden states 0 to L, then the logits",
        "mean_cosine": mean.tolist(),
        "spearman": float(spearmanr(hidden, depth).statistic),
        "kendall": float(kendalltau(hidden, depth).statistic),
        "histogram": [np.histogram(m, bins=128, range=(-1, 1))[0].tolist() for m in result],
    }


def main() -> None:
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, bos_token_id=None, eos_token_id=None))
    fill(model)
    ids = token_ids(GPT2_PASSAGES, GPT2_TOKENS, GPT2["vocab_size"])

    def numbered(text: str, **_: object) -> dict[str, torch.Tensor]:
        row = torch.from_numpy(ids[int(text)])[None]
        return {"input_ids": row, "attention_mask": torch.ones_like(row)}

    options = {"plot": False, "save_path": None, "show_progress": False, "include_logits_layer": True}
    gpt2 = embedding_condensation.measure_embedding_condensation(
        model, numbered, texts=[str(i) for i in range(len(ids))], repetitions=len(ids), **options
    )
    golden = {
        "made_with": {
            "embedding-condensation": metadata.version("embedding-condensation"),
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
            "program": "tests/measuring/golden/make_golden.py",
        },
        "gpt2": {
            "config": GPT2,
            "weights": "normal(mean, 0.15) of numpy.random.default_rng(crc32(parameter name)); mean 1 for norms",
            "input_ids": ids.tolist(),
            **record(gpt2.cossim_by_layer),
        },
    }
    if len(sys.argv) > 1:
        stories = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
        tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])

        def only_ids(text: str, **keywords: object) -> dict[str, torch.Tensor]:
            return {"input_ids": tokenizer(text, **keywords)["input_ids"]}

        result = embedding_condensation.measure_embedding_condensation(
            stories, only_ids, texts=TEXTS, repetitions=len(TEXTS), max_length=STORIES_TOKENS, **options
        )
        golden["stories260K"] = {"texts": TEXTS, "tokens": STORIES_TOKENS, **record(result.cossim_by_layer)}
    json.dump(golden, sys.stdout, indent=None)
    print()


if __name__ == "__main__":
    main()
