"""Tables of the losses, from FORMS and from the rows of bench_losses.py; collected by tables.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from pipes import pipe_table

from decondense.records import Row, read_rows

RESULTS = Path(__file__).resolve().parent / "results"


def _rows(name: str) -> list[Row]:
    path = RESULTS / f"{name}.jsonl"
    return read_rows(path) if path.exists() else []


def _machine(row: Row) -> str:
    made = row["provenance"]
    return f"{made.get('gpu') or made['cpu']}; torch {made['versions']['torch']}"


def _last(rows: list[Row]) -> list[Row]:
    """The newest row of each variant, params (rounds aside: a row without memory has none) and GPU."""

    def place(row: Row) -> tuple[str, str, str]:
        params = sorted((name, value) for name, value in row["params"].items() if name != "rounds")
        return row["variant"], repr(params), str(row["provenance"].get("gpu"))

    return list({place(row): row for row in rows}.values())


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e+")


def cpu() -> str:
    rows = [row for row in _last(_rows("losses-cpu")) if row["name"] == "losses"]
    if not rows:
        return ""
    body = []
    for row in rows:
        params, metrics = row["params"], row["metrics"]
        body.append(
            [
                " x ".join(map(str, params["shape"])),
                str(params["threads"]),
                row["variant"],
                f"{metrics['wall_ms']:.1f}",
                f"{metrics['ratio_to_naive']:.2f}",
                f"{metrics['peak_bytes'] / 1e6:.0f}" if "peak_bytes" in metrics else "",
                f"{metrics['peak_ratio_to_naive']:.2f}" if "peak_ratio_to_naive" in metrics else "",
            ]
        )
    head = ["B x T x D", "threads", "variant", "forward + backward, ms", "ratio", "peak memory, MB", "ratio"]
    note = (
        f"\nfloat32, medians of one run, ratios to `naive` (a direct implementation: normalise, multiply, arccos, "
        f"logsumexp, autograd) in the same round; {_machine(rows[-1])}. Rows: `benchmarks/results/losses-cpu.jsonl`.\n"
    )
    return pipe_table(head, body, (1, 3, 4, 5, 6)) + "\n" + note


def cpu_short() -> str:
    """A sentence for the README: the middle shape on one thread."""
    rows = [row for row in _last(_rows("losses-cpu")) if row["name"] == "losses"]
    chosen = [
        row
        for row in rows
        if row["params"]["shape"] == [8, 1024, 768] and row["params"]["threads"] == 1 and row["variant"] == "chunked"
    ]
    if not chosen:
        return ""
    metrics = chosen[-1]["metrics"]
    return (
        "8 sequences of 1024 tokens and 768 features, forward and backward: all pairs take "
        f"{metrics['ratio_to_naive']:.2f} of the time and {metrics['peak_ratio_to_naive']:.2f} of the memory of "
        "a direct implementation (normalise, multiply, arccos, logsumexp, autograd). One run; float32, 1 thread, "
        f"{_machine(chosen[-1])}.\n"
    )


def gpu() -> str:
    rows = [row for row in _last(_rows("losses-gpu")) if row["name"] == "losses"]
    if not rows:
        return "Not run: no row in `benchmarks/results/losses-gpu.jsonl`; `make gpu` makes them.\n"
    machines = list(dict.fromkeys(map(_machine, rows)))
    return "\n".join(f"{_gpu([row for row in rows if _machine(row) == one])}\n\n{one}\n" for one in machines)


def _gpu(rows: list[Row]) -> str:
    body = []
    for row in rows:
        params, metrics = row["params"], row["metrics"]
        if metrics.get("out_of_memory"):
            cells = ["out of memory", "", ""]
        else:
            ratio = f"{metrics['ratio_to_naive']:.3f}" if "ratio_to_naive" in metrics else ""
            peak = f"{metrics['peak_bytes'] / 1e6:.0f}" if "peak_bytes" in metrics else ""
            cells = [f"{metrics['wall_ms']:.2f}", ratio, peak]
        body.append([" x ".join(map(str, params["shape"])), params["dtype"], row["variant"], *cells])
    head = ["B x T x D", "dtype", "variant", "forward + backward, ms", "ratio to naive", "peak memory, MB"]
    return pipe_table(head, body, (3, 4, 5))


def precision() -> str:
    rows = _last(_rows("losses-precision"))
    if not rows:
        return ""
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    text = ""
    for tau in sorted({row["params"]["tau"] for row in rows}, reverse=True):
        body = []
        inputs = list(dict.fromkeys(row["params"]["input"] for row in rows))
        for variant in variants:
            cells = []
            for name in inputs:
                found = [
                    row
                    for row in rows
                    if (row["variant"], row["params"]["input"], row["params"]["tau"]) == (variant, name, tau)
                ]
                metrics = found[0]["metrics"] if found else None
                cells.append(
                    f"{_number(metrics['gradient_error'])} ({_number(metrics['value_error'])})" if metrics else ""
                )
            body.append([variant, *cells])
        text += f"tau = {tau:g}:\n\n" + pipe_table(["", *inputs], body, range(1, len(inputs) + 1)) + "\n\n"
    shape = " x ".join(map(str, rows[0]["params"]["shape"]))
    return (
        text + f"Relative error of the gradient (norm), in parentheses absolute error of the value; {shape}. Where the "
        "true gradient is zero (all identical), relative to that of the random input. First line: smoothed against "
        "exact, in float64; the others: against the smoothed loss in float64 of the same input, so rounding alone. "
        "The fused lines come from Triton's interpreter on a CPU. Rows: `benchmarks/results/losses-precision.jsonl`.\n"
    )


def pairs() -> str:
    rows = _last(_rows("losses-pairs"))
    if not rows:
        return ""
    body = []
    for row in rows:
        params, metrics = row["params"], row["metrics"]
        body.append(
            [
                params["input"],
                f"{params['tau']:g}",
                row["variant"],
                f"{100 * params['share_of_pairs']:.0f} %",
                f"{metrics['one_draw_gradient_error']:.2f}",
                f"{metrics['gradient_bias']:.3f}",
                f"{metrics['gradient_deviation']:.2f}",
                f"{metrics['value_bias']:+.4f}",
                f"{metrics['value_deviation']:.4f}",
            ]
        )
    head = [
        "input",
        "tau",
        "variant",
        "pairs",
        "gradient error of one draw",
        "gradient bias",
        "gradient deviation",
        "value bias",
        "value deviation",
    ]
    params = rows[0]["params"]
    return pipe_table(head, body, (1, *range(3, 9))) + (
        f"\n\nRelative to the norm of the gradient over all pairs; {params['tokens']} tokens x {params['features']} "
        f"features, {params['draws']} draws, whose noise is taken off the bias. Rows: "
        "`benchmarks/results/losses-pairs.jsonl`.\n"
    )


def forms() -> str:
    from decondense.forms import FORMS

    body = []
    for name, info in FORMS.items():
        implementations = (
            "without pairs" if info.kind == "features" else ", ".join(info.implementations[1:]) or "dense only"
        )
        body.append(
            [f"`{name}`", f"${info.equation}$".replace("|", r"\vert "), info.source, info.extremes, implementations]
        )
    return pipe_table(["form", "loss of one sequence of n tokens", "source", "extremes", "implementation"], body)


TABLES: dict[str, Callable[[], str]] = {
    "losses-cpu": cpu,
    "losses-cpu-short": cpu_short,
    "losses-gpu": gpu,
    "losses-precision": precision,
    "losses-pairs": pairs,
    "losses-forms": forms,
}
