"""What attaching the loss costs: wall time of a training step with and without it, as ratios within one run.

    python benchmarks/bench_attach.py [--device cpu|cuda] [--rounds 12] [--threads 2] [--out FILE.jsonl]

A GPT-2-like model (6 layers, width 256, 512 tokens, vocabulary of 4,096 by default), forward, backward and AdamW.
Rounds of one step per variant follow each other, in turning order, so that a busy machine slows all alike; a row gives
the median step time and the median ratio of a round to its own step without the loss. Variants: no loss; all layers;
the deep half; the mean cosine of all layers; weight 0 (values watched). ``--compile`` compiles the model, loss
included. On a GPU also the peak of allocated memory of a step over what lay there before it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

VARIANTS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "all layers": {"weight": 0.1, "layers": "all"},
    "deep half": {"weight": 0.1, "layers": "deep"},
    "mean cosine": {"weight": 0.1, "layers": "all", "form": "mean_cosine"},
    "weight 0": {"weight": 0.0, "layers": "all"},
}

AIMS = {"all layers": 5.0, "deep half": 2.5, "mean cosine": 0.7}
"""Largest overhead, in percent, that is aimed at for a step of a GPT2-124M in bfloat16 on a GPU."""


def aim(variant: str, percent: float) -> str:
    """Whether an overhead on a GPU is what is aimed at; empty for variants without an aim."""
    most = AIMS.get(variant)
    return "" if most is None else f"at most {most:g} %: {'met' if percent <= most else 'NOT met'}"


def stepper(arguments: argparse.Namespace, settings: dict[str, Any] | None) -> Callable[[], None]:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from decondense import attach

    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=arguments.width,
        n_layer=arguments.layers,
        n_head=max(1, arguments.width // 64),
        n_positions=arguments.tokens,
        vocab_size=arguments.vocabulary,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    model = GPT2LMHeadModel(config).to(arguments.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    draw = torch.Generator().manual_seed(0)
    shape = (arguments.batch, arguments.tokens)
    ids = torch.randint(0, arguments.vocabulary, shape, generator=draw).to(arguments.device)
    if settings is not None:
        attach(model, impl=arguments.impl, **settings)
    run: Any = torch.compile(model) if arguments.compile else model
    precision = torch.autocast(arguments.device, torch.bfloat16, enabled=arguments.bf16)

    def step() -> None:
        with precision:
            loss = run(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if arguments.device == "cuda":
            torch.cuda.synchronize()

    return step


def peak_bytes(step: Callable[[], None]) -> int:
    """Most memory that one step allocates on the GPU beyond what was allocated before it."""
    import torch

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--impl", default="auto", help="auto, reference, chunked or fused")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--out", default=None, help="append rows to this .jsonl file")
    arguments = parser.parse_args()

    import torch

    from decondense.records import append_rows, make_row, provenance

    torch.set_num_threads(arguments.threads)
    steps = {name: stepper(arguments, settings) for name, settings in VARIANTS.items()}
    for step in steps.values():
        for _ in range(arguments.warm_up):
            step()
    peaks = {name: peak_bytes(step) for name, step in steps.items()} if arguments.device == "cuda" else {}
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(arguments.rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            steps[name]()
            times[name].append(1000 * (time.perf_counter() - start))

    rows = []
    params = {key: value for key, value in vars(arguments).items() if key != "out"}
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else None
    for name in names:
        ratios = [own / base for own, base in zip(times[name], times["none"], strict=True)]
        metrics = {"step_ms": statistics.median(times[name]), "ratio": statistics.median(ratios)}
        metrics |= {"overhead_percent": 100 * (metrics["ratio"] - 1), "fastest_ms": min(times[name])}
        metrics["overhead_of_fastest_percent"] = 100 * (min(times[name]) / min(times["none"]) - 1)
        metrics |= {"peak_bytes": peaks[name]} if name in peaks else {}
        extra = {} if device is None else {"gpu": device}
        rows.append(
            make_row(
                "benchmark",
                name="attach",
                variant=name,
                params=params,
                metrics=metrics,
                provenance=provenance(threads=arguments.threads, **extra),
            )
        )
        print(
            f"{name:12s} {metrics['step_ms']:9.1f} ms   {metrics['overhead_percent']:+6.1f} %   "
            f"(fastest {metrics['fastest_ms']:.1f} ms, {metrics['overhead_of_fastest_percent']:+.1f} %)"
            + (f"   {aim(name, metrics['overhead_percent'])}" if device else "")
        )
    if arguments.out:
        append_rows(arguments.out, rows)


if __name__ == "__main__":
    main()
