"""The dispersion losses: time and memory, errors, and what sampling pairs costs in gradient. Ratios within one run.

    python benchmarks/bench_losses.py time [--threads 1 2] [--rounds 5] [--out FILE.jsonl]      about 3 minutes
    python benchmarks/bench_losses.py time --device cuda [--dtype bfloat16] [--out FILE.jsonl]
    python benchmarks/bench_losses.py step --device cuda [--out FILE.jsonl]
    TRITON_INTERPRET=1 python benchmarks/bench_losses.py precision [--out FILE.jsonl]           about 1 minute
    python benchmarks/bench_losses.py pairs [--out FILE.jsonl]                                  about 2 minutes

``time``: forward + backward of one call. Rounds of one call per variant follow each other, in turning order, so that a
busy machine slows all alike; medians, and the median ratio of a round to its own ``naive``. ``naive`` is what one
writes down first: normalise, multiply, arccos, logsumexp, autograd. Peak memory: growth of the resident set (CPU, one
child process per variant) or of the allocator's peak (CUDA) over what held the input.

``step``: twelve layers' worth of calls at 32 x 1024 x 768 in bfloat16, as a share of a GPT2-124M training step.

``precision``: error of value and gradient against dense float64 with the same delta (rounding alone), and of that
against the exact angle from explicit differences (the smoothing alone). tf32 is simulated by rounding the operands.

``pairs``: gradient and value of random groups and of a random subset against all pairs, over independent draws.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from decondense.losses import dispersion_loss, vectors
from decondense.records import append_rows, make_row, provenance

CPU_SHAPES = ((8, 256, 768), (8, 1024, 768), (4, 2048, 1024))
GPU_SHAPES = tuple((max(1, 32 * 1024 // t), t, d) for t in (256, 1024, 4096, 8192) for d in (768, 1024, 4096))


def naive(z: Tensor, tau: float = 1.0) -> Tensor:
    """The angular loss as one writes it down first (smoothed, or no gradient would survive a repeated token)."""
    u = torch.nn.functional.normalize(z.float(), dim=-1)
    c = (u @ u.mT) / math.sqrt(1 + 1e-6)
    n = z.shape[1]
    logits = -torch.arccos(c.clamp(-1, 1)) / (math.pi * tau)
    diagonal = torch.eye(n, dtype=torch.bool, device=z.device)
    return (logits.masked_fill(diagonal, -math.inf).logsumexp(dim=(1, 2)) - math.log(n * (n - 1))).mean()


def variant(name: str, device: str) -> Callable[[Tensor], Tensor]:
    draws = torch.Generator(device).manual_seed(0)
    keywords: dict[str, dict[str, Any]] = {
        "reference": {"impl": "reference"},
        "chunked": {"impl": "chunked"},
        "chunked, recompute": {"impl": "chunked", "gradient": "recompute"},
        "fused": {"impl": "fused"},
        "fused, recompute": {"impl": "fused", "gradient": "recompute"},
        "groups of 64": {"pairs": "grouped", "group_size": 64, "generator": draws},
        "subset of 256": {"pairs": "subset", "subset_size": 256, "generator": draws},
        "mean cosine": {"form": "mean_cosine"},
    }
    if name == "naive":
        return naive
    if name == "naive, compiled":
        return torch.compile(naive, dynamic=True)  # one compilation for all shapes
    return lambda z: dispersion_loss(z, **keywords[name])


def variants(device: str) -> list[str]:
    own = ["chunked", "chunked, recompute", "groups of 64", "subset of 256", "mean cosine"]
    if device == "cuda":
        return ["naive", "naive, compiled", "fused", "fused, recompute", *own]
    return ["naive", "reference", *(["fused"] if os.environ.get("TRITON_INTERPRET") == "1" else []), *own]


def once(loss: Callable[[Tensor], Tensor], z: Tensor) -> float:
    """Milliseconds of one forward + backward."""
    x = z.clone().requires_grad_()
    if z.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    loss(x).backward()
    if z.device.type == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def make(shape: tuple[int, ...], arguments: argparse.Namespace) -> Tensor:
    # on the device: a processor would need longer for a large shape than the GPU for all its rounds
    draw = torch.Generator(arguments.device).manual_seed(0)
    z = torch.randn(shape, generator=draw, device=arguments.device) + 0.3
    return z.to(getattr(torch, arguments.dtype))


def peak_bytes(name: str, z: Tensor, arguments: argparse.Namespace) -> int | None:
    """Peak memory of one call beyond the input (CPU: in a child process, where nothing has been freed for reuse)."""
    shape = tuple(z.shape)
    if arguments.device == "cuda":
        z = z.detach().requires_grad_()
        loss = variant(name, "cuda")
        loss(z).backward()
        z.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss(z).backward()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if arguments.no_memory or not os.path.exists("/proc/self/clear_refs"):
        return None
    command = [sys.executable, __file__, "_peak", name, json.dumps(shape), str(max(arguments.threads))]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def child_peak(name: str, shape: tuple[int, ...], threads: int) -> int:
    def status(key: str) -> int:
        with open("/proc/self/status") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith(key))

    torch.set_num_threads(threads)
    loss = variant(name, "cpu")
    once(loss, torch.randn(2, 300, 16))  # libraries and their buffers are not the loss's memory
    z = torch.randn(shape).requires_grad_()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak
    before = status("VmRSS")
    loss(z).backward()
    return status("VmHWM") - before


def row(what: str, name: str, params: dict[str, Any], metrics: dict[str, Any], arguments: argparse.Namespace) -> None:
    extra: dict[str, Any] = {}
    if arguments.device == "cuda":
        extra["gpu"] = torch.cuda.get_device_name()
    made = make_row(
        "benchmark", name=what, variant=name, params=params, metrics=metrics, provenance=provenance(**extra)
    )
    if arguments.out:  # at once: a run that is stopped keeps what it has measured
        append_rows(arguments.out, [made])
    shown = "  ".join(f"{key} {value:.4g}" for key, value in metrics.items() if isinstance(value, (int, float)))
    print(f"{json.dumps(params)}  {name:20s} {shown}", flush=True)


def bench_time(arguments: argparse.Namespace) -> None:
    shapes = [tuple(map(int, s.split("x"))) for s in arguments.shapes] or (
        GPU_SHAPES if arguments.device == "cuda" else CPU_SHAPES
    )
    for shape in shapes:
        z = make(shape, arguments)
        peaks: dict[str, int | None] = {}
        for name in variants(arguments.device):
            try:
                peaks[name] = peak_bytes(name, z, arguments)
            except torch.OutOfMemoryError:  # said again below, where the row is made
                peaks[name] = None
        for threads in arguments.threads if arguments.device == "cpu" else [0]:
            if threads:
                torch.set_num_threads(threads)
            losses: dict[str, Callable[[Tensor], Tensor]] = {}
            for name in variants(arguments.device):
                loss = variant(name, arguments.device)
                try:
                    once(loss, z)
                    losses[name] = loss
                except torch.OutOfMemoryError:
                    params = {"shape": list(shape), "dtype": arguments.dtype, "device": arguments.device}
                    row("losses", name, params, {"out_of_memory": True}, arguments)
            rounds = arguments.rounds * (4 if shape[1] <= 256 else 1)
            names = list(losses)
            times: dict[str, list[float]] = {name: [] for name in names}
            for turn in range(rounds):
                for name in names[turn % len(names) :] + names[: turn % len(names)]:
                    times[name].append(once(losses[name], z))
            for name in names:
                params = {"shape": list(shape), "dtype": arguments.dtype, "device": arguments.device, "rounds": rounds}
                if threads:
                    params["threads"] = threads
                metrics: dict[str, Any] = {"wall_ms": statistics.median(times[name]), "fastest_ms": min(times[name])}
                if "naive" in times:
                    ratios = [own / base for own, base in zip(times[name], times["naive"], strict=True)]
                    metrics["ratio_to_naive"] = statistics.median(ratios)
                if "reference" in times:
                    ratios = [own / base for own, base in zip(times[name], times["reference"], strict=True)]
                    metrics["ratio_to_reference"] = statistics.median(ratios)
                if peaks[name] is not None:
                    metrics["peak_bytes"] = peaks[name]
                    if base := peaks.get("naive"):
                        metrics["peak_ratio_to_naive"] = peaks[name] / base
                row("losses", name, params, metrics, arguments)


def bench_step(arguments: argparse.Namespace) -> None:
    """Twelve calls against one GPT2-124M training step (AdamW, bfloat16 autocast, compiled)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    b, t, d = arguments.step_shape
    model = GPT2LMHeadModel(GPT2Config(use_cache=False)).to(arguments.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    compiled = torch.compile(model) if arguments.device == "cuda" else model
    ids = torch.randint(0, 50257, (b, t), generator=torch.Generator().manual_seed(0)).to(arguments.device)

    def step() -> float:
        if arguments.device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast(arguments.device, torch.bfloat16):
            compiled(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if arguments.device == "cuda":
            torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - start)

    for _ in range(3):
        step()
    step_ms = statistics.median(step() for _ in range(arguments.rounds))
    z = make((b, t, d), arguments)
    for name in ("fused", "chunked", "groups of 64", "subset of 256", "mean cosine"):
        if name == "fused" and arguments.device != "cuda":
            continue
        loss = variant(name, arguments.device)
        for _ in range(3):
            once(loss, z)
        call = statistics.median(once(loss, z) for _ in range(4 * arguments.rounds))
        metrics = {"step_ms": step_ms, "call_ms": call, "share_all_percent": 1200 * call / step_ms}
        metrics["share_deep_percent"] = metrics["share_all_percent"] / 2
        params = {"shape": [b, t, d], "dtype": arguments.dtype, "device": arguments.device}
        row("losses-step", name, params, metrics, arguments)


# --------------------------------------------------------------------------------------------------------------------
# Errors
# --------------------------------------------------------------------------------------------------------------------


def condensed(b: int, t: int, d: int, cosine: float, draw: torch.Generator) -> Tensor:
    common = torch.nn.functional.normalize(torch.randn(b, 1, d, generator=draw, dtype=torch.float64), dim=-1)
    noise = torch.randn(b, t, d, generator=draw, dtype=torch.float64) / math.sqrt(d)
    return math.sqrt(cosine) * common + math.sqrt(1 - cosine) * noise


def planted(b: int, t: int, d: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    random = torch.randn(b, t, d, generator=draw, dtype=torch.float64)
    duplicates = random.clone()
    duplicates[:, ::5] = duplicates[:, 1:2]
    return {
        "random": random,
        "mean cosine .99": condensed(b, t, d, 0.99, draw),
        "mean cosine .9999": condensed(b, t, d, 0.9999, draw),
        "20 % duplicates": duplicates,
        "all identical": random[:, :1].expand(b, t, d).clone(),
    }


def half_angle_loss(z: Tensor, tau: float) -> Tensor:
    """The unsmoothed loss through 2 atan2(|a - b|, |a + b|); pairs of equal tokens have angle 0 and feel no force."""
    values = []
    for z_TD in z:
        u = torch.nn.functional.normalize(z_TD, dim=-1)
        i, j = torch.triu_indices(len(u), len(u), 1)
        square, other = (u[i] - u[j]).square().sum(-1), (u[i] + u[j]).square().sum(-1)
        same = square == 0
        root = torch.where(same, 1.0, square).sqrt()
        theta = torch.where(same, 0.0, 2 * torch.atan2(root, other.sqrt()))
        values.append((-theta / (math.pi * tau)).logsumexp(0) - math.log(len(i)))
    return torch.stack(values).mean()


def value_and_gradient(loss: Callable[[Tensor], Tensor], z: Tensor) -> tuple[float, Tensor]:
    x = z.clone().requires_grad_()
    value = loss(x)
    value.backward()
    assert x.grad is not None
    return value.item(), x.grad.double()


class _RoundedProducts:
    """Round the operands of every batched product of the chunked implementation, as a tensor core would."""

    def __enter__(self) -> None:
        self.kept = torch.Tensor.baddbmm_
        self.asked = vectors.rounds_products
        vectors.rounds_products = lambda x: True

        def rounded(this: Tensor, a: Tensor, b: Tensor, **keywords: Any) -> Tensor:
            a, b = (vectors.to_tf32(operand.contiguous().clone()) for operand in (a, b))
            return self.kept(this, a, b, **keywords)

        torch.Tensor.baddbmm_ = rounded  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        torch.Tensor.baddbmm_ = self.kept  # type: ignore[method-assign]
        vectors.rounds_products = self.asked


def bench_precision(arguments: argparse.Namespace) -> None:
    shape = arguments.precision_shape
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    for tau in (1.0, 0.1):
        typical = None
        for name, z in planted(*shape).items():
            exact_value, exact = value_and_gradient(lambda x, t=tau: half_angle_loss(x, t), z)  # type: ignore[misc]
            base = lambda x, t=tau: dispersion_loss(x, impl="reference", tau=t)  # noqa: E731
            smooth_value, smooth = value_and_gradient(base, z)
            if typical is None:
                typical = exact.norm()
            scale = torch.maximum(exact.norm(), 1e-6 * typical)
            zero = bool(exact.norm() < 1e-6 * typical)
            params = {"input": name, "shape": list(shape), "tau": tau, "gradient_is_zero": zero}
            metrics = {
                "value_error": abs(smooth_value - exact_value),
                "gradient_error": ((smooth - exact).norm() / (typical if zero else scale)).item(),
            }
            row("losses-precision", "smoothing (float64)", params, metrics, arguments)
            runs: dict[str, tuple[torch.dtype, dict[str, Any], bool]] = {
                "reference, float32": (torch.float32, {"impl": "reference"}, False),
                "chunked, float32": (torch.float32, {"impl": "chunked"}, False),
                "chunked, tf32 operands": (torch.float32, {"impl": "chunked"}, True),
                "chunked, bfloat16 states": (torch.bfloat16, {"impl": "chunked"}, False),
            }
            if interpreted or arguments.device == "cuda":
                runs["fused, float32"] = (torch.float32, {"impl": "fused"}, False)
                runs["fused, bfloat16 states"] = (torch.bfloat16, {"impl": "fused"}, False)
            for label, (dtype, keywords, rounded) in runs.items():
                # the states are rounded first: what is measured is the loss, not the rounding of its input
                states = z.to(dtype)
                want_value, want = value_and_gradient(base, states.double())
                size = want.norm() if want.norm() > 1e-6 * typical else typical
                loss = lambda x, t=tau, k=keywords: dispersion_loss(x, tau=t, **k)  # noqa: E731
                if rounded:
                    with _RoundedProducts():
                        value, made = value_and_gradient(loss, states.to(arguments.device))
                else:
                    value, made = value_and_gradient(loss, states.to(arguments.device))
                made = made.cpu()
                metrics = {
                    "value_error": abs(value - want_value),
                    "gradient_error": ((made - want).norm() / size).item(),
                    "worst_element": ((made - want).abs().max() / want.abs().max().clamp(min=1e-6 * typical)).item(),
                    "not_a_number": int(made.isnan().sum()),
                }
                row("losses-precision", label, params, metrics, arguments)


# --------------------------------------------------------------------------------------------------------------------
# Sampled pairs
# --------------------------------------------------------------------------------------------------------------------


def texts(t: int, d: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=draw)  # noqa: E731
    centres = torch.nn.functional.normalize(randn(8, d), dim=-1)
    clusters = centres[torch.randint(0, 8, (t,), generator=draw)] + 0.3 * randn(t, d) / math.sqrt(d)
    probabilities = 1.0 / torch.arange(1, 4097, dtype=torch.float32)
    zipf = randn(4096, d)[torch.multinomial(probabilities, t, replacement=True, generator=draw)]
    return {
        "isotropic": randn(1, t, d),
        "condensed (.9)": condensed(1, t, d, 0.9, draw).float(),
        "8 clusters": clusters.unsqueeze(0),
        "Zipf tokens": zipf.unsqueeze(0),
    }


def bench_pairs(arguments: argparse.Namespace) -> None:
    t, d = arguments.pairs_shape
    choices: dict[str, dict[str, Any]] = {
        "groups of 64": {"pairs": "grouped", "group_size": 64},
        "groups of 128": {"pairs": "grouped", "group_size": 128},
        "groups of 256": {"pairs": "grouped", "group_size": 256},
        "subset of 256": {"pairs": "subset", "subset_size": 256},
    }
    for tau in (1.0, 0.1):
        for name, z in texts(t, d).items():
            want_value, want = value_and_gradient(lambda x, k=tau: dispersion_loss(x, tau=k), z)  # type: ignore[misc]
            for label, keywords in choices.items():
                draw = torch.Generator().manual_seed(1)
                total, square, values, errors = torch.zeros_like(want), 0.0, [], []
                for _ in range(arguments.draws):
                    loss = lambda x, k=tau, w=keywords, g=draw: dispersion_loss(x, tau=k, generator=g, **w)  # noqa: E731
                    value, made = value_and_gradient(loss, z)
                    values.append(value)
                    total += made
                    square += made.square().sum().item()
                    errors.append(((made - want).norm() / want.norm()).item())
                mean = total / arguments.draws
                variance = max(0.0, square / arguments.draws - mean.square().sum().item())
                variance *= arguments.draws / (arguments.draws - 1)
                # the mean over n draws still has variance / n of noise in it
                bias = max(0.0, (mean - want).square().sum().item() - variance / arguments.draws)
                n = t if keywords["pairs"] == "grouped" else keywords["subset_size"]
                size = keywords.get("group_size", keywords.get("subset_size"))
                params = {"input": name, "tokens": t, "features": d, "tau": tau, "draws": arguments.draws}
                params["share_of_pairs"] = n * (size - 1) / (t * (t - 1))
                metrics = {
                    "one_draw_gradient_error": statistics.mean(errors),
                    "gradient_bias": math.sqrt(bias) / want.norm().item(),
                    "gradient_deviation": math.sqrt(variance) / want.norm().item(),
                    "value": want_value,
                    "value_bias": statistics.mean(values) - want_value,
                    "value_deviation": statistics.stdev(values),
                }
                row("losses-pairs", label, params, metrics, arguments)


def main() -> None:
    if sys.argv[1:2] == ["_peak"]:
        print(child_peak(sys.argv[2], tuple(json.loads(sys.argv[3])), int(sys.argv[4])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("time", "step", "precision", "pairs"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5, help="calls of each variant (four times as many at T <= 256)")
    parser.add_argument("--no-memory", action="store_true", help="no child processes that measure memory on a CPU")
    parser.add_argument("--shapes", nargs="*", default=[], help="such as 8x256x768; default: the published table's")
    parser.add_argument("--step-shape", type=int, nargs=3, default=[32, 1024, 768])
    parser.add_argument("--precision-shape", type=int, nargs=3, default=[2, 256, 256])
    parser.add_argument("--pairs-shape", type=int, nargs=2, default=[1024, 256])
    parser.add_argument("--draws", type=int, default=48)
    parser.add_argument("--out", default=None, help="append rows to this .jsonl file")
    arguments = parser.parse_args()
    bench = {"time": bench_time, "step": bench_step, "precision": bench_precision, "pairs": bench_pairs}
    bench[arguments.what](arguments)


if __name__ == "__main__":
    main()
