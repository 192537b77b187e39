"""Tables of the Triton kernels: as compiled, from the rows of bench_kernels_static.py, and a model of their time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from pipes import pipe_table

from decondense.records import Row, read_rows

RESULTS = Path(__file__).resolve().parent / "results"

# NVIDIA H100 Tensor Core GPU data sheet, SXM: memory, dense bfloat16 (half of what it lists with sparsity), float32
H100_BYTES, H100_BF16, H100_FP32 = 3.35e12, 989e12, 67e12
SHAPE = (32, 1024, 768)


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    found = row["metrics"]
    spilled = f", {found['spills']} spilled" if found["spills"] else ""
    return f"{found['registers']}; {found['shared_bytes']}{spilled}"


def static() -> str:
    """Registers and shared memory at full block sizes, a column for each target."""
    path = RESULTS / "kernels-static.jsonl"
    rows = read_rows(path) if path.exists() else []
    if not rows:
        return "Not run: no row in `benchmarks/results/kernels-static.jsonl`.\n"
    targets = list(dict.fromkeys(row["params"]["target"] for row in rows))
    full = {name: max(row["params"]["across"] for row in rows if row["variant"] == name) for name in KERNELS}
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        params = row["params"]
        if params["across"] == full[row["variant"]]:
            block = f"{params['tokens']} x {params['across']}, {params['warps']} warps"
            found.setdefault((row["variant"], params["function"], params["dtype"], block), {})[params["target"]] = row
    body = [
        [f"`{kernel}`", *rest, *(_cell(cells.get(target)) for target in targets)]
        for (kernel, *rest), cells in sorted(found.items(), key=lambda item: KERNELS.index(item[0][0]))
    ]
    bad = [row for row in rows if row["metrics"]["spills"]]
    large = max(row["metrics"]["shared_bytes"] / row["metrics"]["shared_limit_bytes"] for row in rows)
    limits = {row["params"]["target"]: row["metrics"]["shared_limit_bytes"] // 1024 for row in rows}
    note = (
        f"Registers of a thread; bytes of shared memory of a block (limit: "
        f"{', '.join(f'{target} {size} KiB' for target, size in limits.items())}). The worst over masks, segments, "
        f"alignment and with or without gradient. Of the {len(rows)} rows, smaller blocks included, "
        f"{len(bad) or 'none'} {'spill' if bad else 'spills'}, and the largest takes {100 * large:.0f} % of the shared "
        f"memory that it may have. Compiled by Triton {rows[-1]['provenance']['triton']} without a GPU; rows: "
        "`benchmarks/results/kernels-static.jsonl`.\n"
    )
    head = ["kernel", "function", "dtype", "block", *targets]
    return pipe_table(head, body, range(4, 4 + len(targets))) + f"\n\n{note}"


KERNELS = ("_norms", "_operand", "_weights", "_tangent")


def work(rows: int, n: int, width: int) -> dict[str, tuple[float, float, float]]:
    """(bytes to and from memory, FLOPs on tensor cores, other FLOPs) of each step for bfloat16 states.

    A tile that a program reads again comes from the cache and counts once; of the angular form, whose function and
    derivative take about 45 operations a pair, square roots, exponential and division counted as one each.
    """
    states, pairs = rows * n * width, rows * n * n
    return {
        "`_norms`, mean": ((2 + 2 * 4 / 16) * states, 0, 8 * states),
        "`_operand`": (4 * states, 0, 5 * states),
        "S = d d'": (2 * states + 4 * pairs, 2 * pairs * width, 0),
        "`_weights`": (6 * pairs, 0, 45 * pairs),
        "A = W d": (2 * pairs + 6 * states, 2 * pairs * width, 0),
        "`_tangent`": (10 * states, 0, 15 * states),
    }


def model() -> str:
    """The least time that the data sheet of an H100 allows each step."""
    body, total = [], 0.0
    for name, (moved, tensor, other) in work(*SHAPE).items():
        times = {
            "memory": moved / H100_BYTES,
            "tensor cores": tensor / H100_BF16,
            "float32 units": other / H100_FP32,
        }
        bound = max(times, key=lambda key: times[key])
        total += times[bound]
        body.append(
            [
                name,
                f"{moved / 1e6:.0f}",
                f"{(tensor + other) / 1e9:.1f}",
                f"{(tensor + other) / moved:.0f}",
                bound,
                f"{1e6 * times[bound]:.0f}",
            ]
        )
    body.append(["together", "", "", "", "", f"{1e6 * total:.0f}"])
    head = ["step", "MB moved", "GFLOP", "FLOP a byte", "bound by", "at least, µs"]
    return pipe_table(head, body, (1, 2, 3, 5)) + (
        f"\n\nA model, not a measurement: one call on {' x '.join(map(str, SHAPE))} bfloat16 states, angular loss and "
        f"gradient, each step at the limit of NVIDIA's data sheet of the H100 SXM ({H100_BYTES / 1e12} TB/s, "
        f"{H100_BF16 / 1e12:.0f} TFLOP/s dense bfloat16, {H100_FP32 / 1e12:.0f} TFLOP/s float32), steps one after the "
        "other, every tensor through memory once; what stays in the L2 cache between two steps is faster.\n"
    )


def parts() -> str:
    """What `make gpu` last passed on each GPU."""
    path = RESULTS / "gpu-parts.jsonl"
    rows = read_rows(path) if path.exists() else []
    if not rows:
        return "Not run: no row in `benchmarks/results/gpu-parts.jsonl`; `make gpu` makes them.\n"
    newest = {(row["provenance"]["gpu"], row["variant"]): row for row in rows}
    body = []
    for (gpu, part), row in newest.items():
        made = row["provenance"]
        versions = f"torch {made['versions']['torch']}, triton {made['triton']}"
        body.append([gpu, part, f"{row['metrics']['seconds']:.0f}", versions, made["commit"] or ""])
    return pipe_table(["GPU", "part", "seconds", "versions", "commit"], body, (2,)) + "\n"


TABLES: dict[str, Callable[[], str]] = {"kernels-static": static, "kernels-model": model, "gpu-parts": parts}
