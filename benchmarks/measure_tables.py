"""What measuring costs, from the rows of bench_measure.py, and when studies were condensed; collected by tables.py."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from pipes import pipe_table

from decondense.compare import VALIDATION
from decondense.compare.profiles import blocks
from decondense.config import METRIC_NAMES
from decondense.metrics import CORPUS, find_metric
from decondense.records import Row, read_rows
from study_rows import every_committed

THRESHOLD, GRACE = 0.9, 100
"""Of the alarm that docs/measuring.md shows."""
PULLED_TOGETHER = {("cause", "opposite"), ("cause", "straightness"), ("target", "profile-condensed")}
"""Study and arm that raise the cosine on purpose."""
RESULTS = Path(__file__).resolve().parent / "results"


def measure(name: str = "measure") -> str:
    """Time and memory of each variant for each width; the newest row of a variant counts."""
    path = RESULTS / f"{name}.jsonl"
    rows = [row for row in read_rows(path) if row["name"] == "measure"] if path.exists() else []
    newest: dict[tuple[int, str, str], Row] = {
        (row["params"].get("model", ""), row["params"]["width"], row["variant"]): row for row in rows
    }
    if not newest:
        return f"Not run: no row in `benchmarks/results/{name}.jsonl`.\n"
    head = ["model", "variant", "time / forward", "peak memory above forward, MB", "growth for 4 x the passages, MB"]
    lines, watches, passages = [], [], []
    for (model, width, variant), row in sorted(newest.items(), key=lambda item: item[0][:2]):
        metrics, label = row["metrics"], model or f"width {width}"
        if variant == "watch":
            watches.append(f"{100 * metrics['share_of_step']:.2f} % ({label})")
            continue
        if variant == "forward":
            passages.append(f"{row['params']['passages']} passages in {row['params']['rounds']} rounds ({label})")
        above, growth = (
            f"{metrics[key] / 1e6:+.0f}" if key in metrics else "" for key in ("above_forward_bytes", "growth_bytes")
        )
        lines.append([label, variant, f"{metrics['ratio_to_forward']:.2f}", above, growth])
    timed = next(row for row in reversed(rows) if row["variant"] == "forward")
    processors = dict.fromkeys(row["provenance"]["cpu"] for row in newest.values())
    params, made = timed["params"], timed["provenance"]
    machine = f"{made.get('gpu') or ' and '.join(processors)}; torch {made['versions']['torch']}"
    note = (
        f"12 layers where a width is named, {params['tokens']} tokens, {', '.join(passages)}, {params['threads']} "
        f"threads; medians over the rounds of one run; {machine}."
    )
    if watches:
        note += f" Watching every training step (`CondensationWatch`) takes {', '.join(watches)} of it."
    return pipe_table(head, lines, (2, 3, 4)) + f"\n\n{note} Rows: `benchmarks/results/{name}.jsonl`.\n"


def metrics() -> str:
    """What each side metric is; a metric of the corpus that also exists of a passage is named in its line."""
    body = []
    for name in METRIC_NAMES:
        metric = find_metric(name)
        twin = CORPUS + name
        if name.removeprefix(CORPUS) in METRIC_NAMES and name.startswith(CORPUS):
            continue
        names = f"`{name}`" + (f", `{twin}`" if twin in METRIC_NAMES else "")
        equation = f"${metric.equation}$".replace("|", r"\vert ")
        body.append([names, equation, metric.source, metric.sensitive, metric.undefined, metric.cost])
    return pipe_table(["metric", "definition", "source", "what moves it", "where it is not defined", "cost"], body)


def alarm() -> str:
    """When the runs of the committed studies were at the alarm's threshold, by whether their loss got better."""
    early, late, better, apart, pulled = 0, 0, 0, [], []
    for f in every_committed():
        for cell in f.study.cells.values():
            scores = {step: float(row["value"]) for step, row in cell.scores.get(VALIDATION, {}).items()}
            if cell.status != "finished" or cell.untrained or len(scores) < 2:
                continue
            condensed = [step for step, profile in cell.profiles.items() if (blocks(profile) or 0.0) >= THRESHOLD]
            if (f.name, cell.arm) in PULLED_TOGETHER:
                pulled.append(any(step >= GRACE for step in condensed))
                continue
            first, end = scores[min(scores)], scores[max(scores)]
            if end > first:
                if any(step >= GRACE for step in condensed):
                    apart.append((f.label(cell.arm), first, end))
                continue
            better += 1
            early += any(0 < step < GRACE for step in condensed)
            late += any(step >= GRACE for step in condensed)
    arms = sorted({label for label, _, _ in apart})
    losses = (
        f" {len(apart)} runs whose loss rose are there too: {', '.join(arms)}, from "
        f"{min(first for _, first, _ in apart):.2f} to {max(end for _, _, end in apart):.2f} at most."
        if apart
        else ""
    )
    return (
        f"Of {better} runs of the committed studies whose held-out loss fell, {early} have a profile at {THRESHOLD:g} "
        f"or more before step {GRACE}; {late or 'none'} of them from step {GRACE} on.{losses} Not counted are "
        f"{len(pulled)} runs whose states are pulled together on purpose; {sum(pulled)} of these are there from step "
        f"{GRACE} on."
    )


TABLES = {
    "measure-alarm": alarm,
    "measure": measure,
    "measure-gpu": partial(measure, "measure-gpu"),
    "metrics": metrics,
}
