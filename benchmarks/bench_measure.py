"""What measuring costs beside the forward pass: wall time and peak memory, as ratios within one run.

    python benchmarks/bench_measure.py [--width 256 | --model DIR_OR_GGUF] [--passages 100] [--rounds 10] [--threads N]
                                       [--no-metrics] [--device cuda] [--out FILE.jsonl]

A GPT-2-like model of 12 layers with random weights, or with ``--model`` whatever ``decondense measure`` loads, 512
tokens a passage. Time: rounds of (forward, means, both histograms, side metrics by cost class) follow each other, so
that a busy machine slows all alike; each row gives the sum over rounds and the median ratios of a round to its own
forward pass, of the clock and of the processor time. "means, rows" are the means with every side metric of the class
``rows``, "means, all" with all of them. "forward" is the model without its language-model head, which measuring
does not need; "forward with logits" is what a plain call of the model costs. "watch": what ``CondensationWatch`` spends
of a training step (4 sequences, forward and backward) when it watches every one. Memory: the peak of resident memory
after the model is built, each variant in a process of its own (Linux); on a GPU the peak of what is allocated there,
and no "watch", whose share of a step the clock of the host cannot tell.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TOKENS = 512
VOCABULARY = 50257
COSTS = ("rows", "gram", "spectrum", "moments", "layers", "all")


def build(width: int, source: str | None = None) -> Any:
    """The model of this width, or the one that ``source`` names."""
    import torch

    from decondense.measuring.loading import load_model

    if source is not None:
        return load_model(source)[0].eval()
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    heads = max(1, width // 64)
    config = GPT2Config(n_embd=width, n_layer=12, n_head=heads, n_positions=TOKENS, vocab_size=VOCABULARY)
    return GPT2LMHeadModel(config).eval()


def passages(count: int, vocabulary: int = VOCABULARY) -> Any:
    import torch

    return torch.randint(0, vocabulary, (count, TOKENS), generator=torch.Generator().manual_seed(0))


def runner(variant: str, model: Any, batch_size: int) -> Callable[[Any], None]:
    import torch

    from decondense import measure
    from decondense.metrics import find_metric, metric_names

    if variant.startswith("forward"):
        module = model if variant == "forward with logits" else model.base_model

        def forward(ids: Any) -> None:
            with torch.no_grad():
                for start in range(0, len(ids), batch_size):
                    module(input_ids=ids[start : start + batch_size].to(model.device), use_cache=False)
            if model.device.type == "cuda":
                torch.cuda.synchronize()

        return forward
    options: dict[str, Any] = {"histograms": {"pooled": ("pooled",), "both": ("pooled", "averaged")}.get(variant, ())}
    if cost := variant.partition("means, ")[2]:
        names = [name for name in metric_names() if cost in ("all", find_metric(name).cost)]
        options["metrics"] = names
    return lambda ids: void(measure(model, input_ids=ids, batch_size=batch_size, **options))


def void(_: object) -> None:
    """Let a result go."""


def watch_share(model: Any, ids: Any) -> tuple[float, float]:
    """(seconds of a training step, share of it that a watched pass spends on its numbers)."""
    from decondense.measuring import CondensationWatch

    model.train()
    with CondensationWatch(model, every=1) as watch:
        spent = [0.0]
        take = watch._take

        def timed(layer: Any, state: Any) -> None:
            start = time.perf_counter()
            take(layer, state)
            spent[0] += time.perf_counter() - start

        watch._take = timed  # type: ignore[method-assign]
        steps, shares = [], []
        for _ in range(4):
            spent[0] = 0.0
            start = time.perf_counter()
            model(input_ids=ids, labels=ids).loss.backward()
            watch.step()
            steps.append(time.perf_counter() - start)
            shares.append(spent[0] / steps[-1])
            model.zero_grad()
    return statistics.median(steps[1:]), statistics.median(shares[1:])


def peak_on_gpu(run: Callable[[Any], None], ids: Any) -> int:
    """Most memory allocated on the GPU while ``run`` works on these passages."""
    import torch

    torch.cuda.reset_peak_memory_stats()
    run(ids)
    return torch.cuda.max_memory_allocated()


def peak_bytes(variant: str, arguments: argparse.Namespace, count: int, batch_size: int) -> int:
    """Peak resident bytes of a process that runs one variant on ``count`` passages."""
    command = [sys.executable, __file__, "--child", variant, "--width", str(arguments.width)]
    command += ["--passages", str(count), "--batch-size", str(batch_size), "--threads", str(arguments.threads)]
    command += ["--model", arguments.model] if arguments.model else []
    return int(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--model", default=None, help="a model directory, hub id or GGUF file instead of --width")
    parser.add_argument("--no-metrics", action="store_true", help="omit the side metrics")
    parser.add_argument("--passages", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory-passages", type=int, default=12, help="0: memory is not measured")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default=None, help="append rows to this .jsonl file")
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()

    import torch

    torch.set_num_threads(arguments.threads)
    model = build(arguments.width, arguments.model).to(arguments.device)
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = passages(arguments.passages, vocabulary)
    if arguments.child:
        run = runner(arguments.child, model, arguments.batch_size)
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of building the model
        run(ids)
        status = Path("/proc/self/status").read_text()
        print(1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]))
        return

    from decondense.blocks import find_blocks
    from decondense.measuring.running import _batch_size

    found = find_blocks(model)
    batch_size = arguments.batch_size or _batch_size(model, found, TOKENS, False, model.device)
    variants = ["forward", "forward with logits", "means", "pooled", "both"]
    variants += [] if arguments.no_metrics else [f"means, {cost}" for cost in COSTS]
    runs = {variant: runner(variant, model, batch_size) for variant in variants}
    warm = ids[:batch_size]
    for run in runs.values():
        run(warm)
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    cpu_seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    for chunk in ids.chunk(arguments.rounds):
        for variant, run in runs.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            run(chunk)
            seconds[variant].append(time.perf_counter() - start)
            cpu_seconds[variant].append(time.process_time() - cpu_start)
    few, many = arguments.memory_passages, 4 * arguments.memory_passages
    memory = {
        variant: {
            n: peak_on_gpu(runs[variant], passages(n, vocabulary))
            if arguments.device == "cuda"
            else peak_bytes(variant, arguments, n, batch_size)
            for n in (few, many)
        }
        for variant in ("forward", "means", "both", *(["means, all"] if "means, all" in variants else []))
        if few
    }

    from decondense.records import append_rows, make_row, provenance

    made = provenance(**({"gpu": torch.cuda.get_device_name()} if arguments.device == "cuda" else {}))
    rows = []
    shape: dict[str, Any] = {"layers": len(found.modules), "width": model.get_input_embeddings().embedding_dim}
    shape |= {"model": Path(arguments.model).name} if arguments.model else {}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    for variant in variants:
        metrics: dict[str, Any] = {"wall_s": sum(seconds[variant])}
        # of the processor time: what other processes do to the clock does not enter
        for name, taken in (("ratio_to_forward", seconds), ("cpu_ratio_to_forward", cpu_seconds)):
            rounds = zip(taken[variant], taken["forward"], strict=True)
            metrics[name] = statistics.median(a / b for a, b in rounds)
        if variant in memory:
            peak, base = memory[variant], memory["forward"]
            metrics["peak_bytes"] = peak[many]
            metrics["above_forward_bytes"] = peak[many] - base[many]
            metrics["growth_bytes"] = peak[many] - peak[few]
            metrics["memory_passages"] = [few, many]
        params = {
            **shape,
            "parameters": parameters,
            "tokens": TOKENS,
            "passages": arguments.passages,
            "rounds": arguments.rounds,
            "batch_size": batch_size,
            "threads": arguments.threads,
            "device": arguments.device,
        }
        rows.append(
            make_row("benchmark", name="measure", variant=variant, params=params, metrics=metrics, provenance=made)
        )
        line = f"{variant:20s} {metrics['wall_s']:8.2f} s  {metrics['ratio_to_forward']:.3f} x"
        line += f"  cpu {metrics['cpu_ratio_to_forward']:.3f} x"
        if variant in memory:
            above, growth = metrics["above_forward_bytes"] / 1e6, metrics["growth_bytes"] / 1e6
            line += f"  peak {above:+.0f} MB, growth {growth:+.0f} MB"
        print(line)
    if arguments.device == "cpu":
        step_seconds, share = watch_share(model, ids[:4])
        metrics = {"step_s": step_seconds, "share_of_step": share}
        params = {**shape, "tokens": TOKENS, "sequences": 4, "every": 1}
        params |= {"threads": arguments.threads, "device": "cpu"}
        rows.append(
            make_row("benchmark", name="measure", variant="watch", params=params, metrics=metrics, provenance=made)
        )
        print(f"{'watch, every step':20s} {100 * share:.2f} % of a training step of {step_seconds:.2f} s")
    if arguments.out:
        append_rows(arguments.out, rows)


if __name__ == "__main__":
    main()
