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
        "Settings tried before the runs, with their loss on documents set aside for this choice (nats/token), averaged "
        "over seeds that the runs do not use. The arm's runs use the chosen setting."
    )
    columns = ("arm", *(KNOBS[knob] for knob in knobs), "loss", "steps", "seed", "note")
    return Table("learning_rates", caption, columns, tuple(rows))


def plateau_table(comparison: Comparison) -> Table | None:
    """Share of training spent condensed and step of escape, of every trained run; None where no run is condensed."""
    if not any(plateau.share > 0 for plateau in comparison.plateaus):
        return None
    rows: list[tuple[Entry, ...]] = []
    for p in comparison.plateaus:
        escape = "not escaped" if p.stuck else NONE if p.escape is None else f"{p.escape:,.0f}"
        rows.append(
            (
                comparison.labels[p.arm],
                str(p.seed),
                (f"{100 * p.share:.0f} %", p.share),
                (escape, p.escape),
                NONE if p.between is None else f"{p.between[0]:,.0f} to {p.between[1]:,.0f}",
            )
        )
    caption = (
        "Condensed plateau: share of training with a mean cosine over the blocks above 0.9, and the step at which it "
        "last falls to that (linear between the evaluated checkpoints)."
    )
    columns = ("arm", "seed", "above 0.9", "step of escape", "between checkpoints at")
    return Table("plateaus", caption, columns, tuple(rows), 2)


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
        " * Some runs were resumed: their total covers only the last attempt."
        if any(c.resumed for c in comparison.cost)
        else ""
    )
    idle = [comparison.labels[c.arm] for c in comparison.cost if c.untrained]
    untrained = f" Not trained, so there is no cost of training: {listed(idle)}." if idle else ""
    caption = (
        "Cost: median over seeds of each run's median optimizer step; ratios are paired by seed, with their range over "
        f"seeds.{note}{untrained}"
    )
    return Table("cost", caption, columns, tuple(rows))


def speed_table(comparison: Comparison) -> Table | None:
    """Tokens to a loss that both reach."""
    rows: list[tuple[Entry, ...]] = []
    for s in comparison.speed:
        unsure = "" if s.resolved else " (?)"
        for seed, target, base, own in zip(s.seeds, s.targets, s.baseline_tokens, s.tokens, strict=True):
            share = own / base if base and own and s.resolved else None
            pace = comparison.equal_time.paces.get(s.arm) if comparison.equal_time else None
            time = None if share is None or pace is None else share * pace
            rows.append(
                (
                    comparison.labels[s.arm],
                    str(seed),
                    (number(target, 4), target),
                    (count(base) + unsure, base),
                    (count(own) + unsure, own),
                    (number(share, 2), share),
                    (number(time, 2), time),
                )
            )
    if not rows:
        return None
    columns = (
        "arm", "seed", "loss to reach", "tokens, baseline", "tokens, arm", "tokens × baseline", "time × baseline",
    )  # fmt: skip
    caption = (
        "Tokens until a run reaches the loss that both runs of a seed reach, the higher of their final losses: an "
        "unbiased estimate if the arms do not differ (linear between the evaluated checkpoints, which is biased "
        "towards no difference; the learning rate is still high there). Time counts steps only, at the arm's median "
        f"pace on the {'CPU' if comparison.speed[0].clock == 'cpu' else 'wall'} clock. A question mark: the "
        "checkpoints are too far apart."
    )
    return Table("speed", caption, columns, tuple(rows), 2)
