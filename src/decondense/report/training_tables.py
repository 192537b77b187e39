"""Tables of the training itself: rates tried, cost, tokens to the same loss."""

from __future__ import annotations

from decondense.compare import Comparison
from decondense.formatting import NONE, count, listed, number
from decondense.report.cells import mebibytes, median_of, ratio
from decondense.report.notes import KNOBS
from decondense.table import Entry, Table


def trials_table(comparison: Comparison) -> Table | None:
    """The settings tried for each arm."""
    every = [trial for sweep in comparison.trials for trial in sweep.trials]
    if not every:
        return None
    knobs = [knob for knob in KNOBS if knob == "learning_rate" or len({getattr(t, knob) for t in every}) > 1]
    rows: list[tuple[Entry, ...]] = []
    for sweep in comparison.trials:
        for t in sweep.trials:
            note = f"failed: {t.error}" if t.error is not None else ""
            if t.chosen:
                edges = [f"the {side} {KNOBS[knob]} tried" for knob, side in sweep.edges.items()]
                note = f"chosen; {listed(edges)}: the best setting may lie outside" if edges else "chosen"
            settings = [getattr(t, knob) for knob in knobs]
            rows.append(
                (
                    comparison.labels[sweep.arm],
                    *((NONE if value is None else f"{value:g}", value) for value in settings),
                    (number(t.value, 4), t.value),
                    (str(t.steps), t.steps),
                    (", ".join(map(str, t.seeds)), ", ".join(map(str, t.seeds))),
                    note,
                )
            )
    caption = (
        "Settings tried, by the loss on documents that are set aside for this choice (nats/token), before the runs and "
        "on seeds that are none of theirs (mean over them). The chosen setting is that of the arm's runs."
    )
    columns = ("arm", *(KNOBS[knob] for knob in knobs), "loss", "steps", "seed", "note")
    return Table("learning_rates", caption, columns, tuple(rows))


def cost_table(comparison: Comparison) -> Table | None:
    """Time and memory; an untrained arm has dashes."""
    rows: list[tuple[Entry, ...]] = []
    with_gpu = any(any(c.peak_cuda_bytes) for c in comparison.cost)
    costs = [
        c for c in comparison.cost if any([*c.step_wall_ms, *c.train_wall_s, *c.peak_rss_bytes, *c.peak_cuda_bytes])
    ]
    if not costs:
        return None
    for c in comparison.cost:
        if c not in costs and not c.untrained:
            continue
        step, cpu, total = (median_of(values) for values in (c.step_wall_ms, c.step_cpu_ms, c.train_wall_s))
        rows.append(
            (
                comparison.labels[c.arm],
                (number(step, 1), step),
                ratio(c.wall_ratio),
                (number(cpu, 1), cpu),
                ratio(c.cpu_ratio),
                (number(total, 1) + (" *" if c.resumed else ""), total),
                mebibytes(c.peak_rss_bytes),
                *((mebibytes(c.peak_cuda_bytes), ratio(c.cuda_ratio)) if with_gpu else ()),
                (str(len(c.seeds)), len(c.seeds)),
            )
        )
    columns = (
        "arm", "step (ms)", "step × baseline [range]", "CPU of a step (ms)", "CPU × baseline [range]", "training (s)",
        "peak memory (MiB)", *(("peak GPU memory (MiB)", "GPU memory × baseline [range]") if with_gpu else ()), "runs",
    )  # fmt: skip
    note = (
        " * Some runs were resumed: their total is that of the last attempt."
        if any(c.resumed for c in comparison.cost)
        else ""
    )
    idle = [comparison.labels[c.arm] for c in comparison.cost if c.untrained]
    untrained = f" Not trained, so without a cost of training: {listed(idle)}." if idle else ""
    caption = (
        "Cost: median over seeds of each run's median optimizer step; ratios are paired by seed, with their range over "
        f"seeds.{note}{untrained}"
    )
    return Table("cost", caption, columns, tuple(rows))


def speed_table(comparison: Comparison) -> Table | None:
    """Tokens to reach the baseline's final loss."""
    rows: list[tuple[Entry, ...]] = []
    for s in comparison.speed:
        unsure = "" if s.resolved else " (?)"
        for seed, target, tokens, bracket, token_ratio, time in zip(
            s.seeds, s.targets, s.tokens, s.brackets, s.token_ratios, s.time_ratios, strict=True
        ):
            rows.append(
                (
                    comparison.labels[s.arm],
                    str(seed),
                    (number(target, 4), target),
                    ("not reached" if tokens is None else count(tokens) + unsure, tokens),
                    NONE if bracket is None else f"{count(bracket[0])} to {count(bracket[1])}",
                    (NONE if token_ratio is None or unsure else f"{token_ratio:.2f}", token_ratio),
                    (NONE if time is None or unsure else f"{time:.2f}", time),
                )
            )
    if not rows:
        return None
    columns = ("arm", "seed", "loss to reach", "tokens", "between checkpoints at", "speed-up, tokens", "speed-up, time")
    caption = (
        "Tokens needed to reach the loss with which the baseline of the same seed ended (linear between the evaluated "
        "checkpoints, which errs on the late side; the learning rate is still high there). A question mark: these "
        "checkpoints lie too far apart for that."
    )
    return Table("speed", caption, columns, tuple(rows), 2)
