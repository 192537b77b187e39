"""Tables of scores: the headline, seeds, benchmarks, best checkpoints, every difference."""

from __future__ import annotations

from collections.abc import Sequence

from decondense.compare import VALIDATION, Comparison, Difference, Measure, TaskMean, TaskMeasure
from decondense.compare.quantity import METRIC_TITLES
from decondense.formatting import MINUS, NONE, number, probability
from decondense.report import words
from decondense.report.cells import bounds, mean_and_sd, spread
from decondense.report.selection import MANY, flags, main_measures, names_of, qualified, task_head
from decondense.table import Entry, Table


def headline(comparison: Comparison) -> Table | None:
    """Held-out loss, means over tasks and condensation of the final checkpoints, with their paired differences.

    A measure begins with a row of the baseline, whatever the number of arms.
    """
    if not comparison.treated:
        return None
    rows: list[tuple[Entry, ...]] = []
    names = names_of(comparison)
    for measure in main_measures(comparison):
        if not measure.differences:
            continue
        unit = f" ({measure.unit})" if measure.unit and measure.unit != "cosine" else ""
        shown = names[measure.quantity] + unit
        values = measure.of(comparison.baseline)
        n = len(values.values) if values else 0
        rows.append(
            (
                shown,
                comparison.labels[comparison.baseline],
                spread(values),
                *[NONE] * 4,
                (str(n), n),
                NONE,
                NONE,
                "baseline",
            )
        )
        for d in measure.differences:
            rows.append(
                (
                    shown,
                    comparison.labels[d.arm],
                    mean_and_sd(measure, d.arm),
                    (number(d.mean, sign=True), d.mean),
                    bounds(d.interval),
                    (probability(d.p_holm), d.p_holm),
                    (probability(d.p_sign_flip_holm), d.p_sign_flip_holm),
                    (str(d.n), d.n),
                    (number(d.detectable), d.detectable),
                    (NONE if d.seeds_needed is None else str(d.seeds_needed), d.seeds_needed),
                    words.outcome(d),
                )
            )
        if measure is comparison.validation:
            rows += _equal_cost(comparison)
    columns = (
        "measure", "arm", "value", "difference", "95 % interval", "p", "p, sign flip", "n", "detectable",
        "seeds needed", "outcome",
    )  # fmt: skip
    validation = comparison.validation
    items = f" over {validation.items} held-out items" if validation is not None and validation.items else ""
    holm = " and is corrected over arms (Holm)" if len(comparison.treated) > 1 else ""
    what = (
        "Models as they are: mean ± standard deviation over choices of passages, and differences paired by passages. "
        if comparison.measured
        else "Final checkpoints: mean ± standard deviation over seeds, and paired differences by seed. "
    )
    loss = f"Validation loss{items}. " if validation is not None else ""
    equal = (
        " At equal time: the arm at the baseline's total step time (a faster arm: the baseline at the arm's), "
        "interpolated linearly in the logarithm of the tokens between evaluated checkpoints; a run that is cut short "
        "has not finished lowering its learning rate, so this is biased against the slower arm. A loss that both "
        "reach: the higher of the two final losses of a seed."
        if comparison.equal_time
        else ""
    )
    added = any(note.kind == "seeds added" for note in comparison.notes)
    tests = (
        "Seeds were added until every arm was decided: intervals and p hold at every number of seeds and for all arms "
        f"at once. equivalent: the whole interval lies within {comparison.margin:g} nats/token."
        if added
        else f"p is that of the interval shown{holm}; the sign-flip test assumes less and needs six seeds "
        "or more to reach 0.05. detectable: the smallest true difference that n seeds detect in 80 % of studies; "
        f"seeds needed: to detect {comparison.margin:g} nats/token. equivalent: the whole interval lies within that."
    )
    table = Table("headline", qualified(f"{what}{loss}{tests}{equal}", comparison), columns, tuple(rows), 2)
    fixed = ("p, sign flip", "detectable", "seeds needed")
    return table.select([name for name in columns if name not in fixed]) if added else table


def _equal_cost(comparison: Comparison) -> list[tuple[Entry, ...]]:
    """Rows of the headline: the loss at equal time, and tokens and time to a loss that both reach."""
    rows: list[tuple[Entry, ...]] = []

    def tail(d: Difference) -> tuple[Entry, ...]:
        return (probability(d.p_holm), d.p_holm), (probability(d.p_sign_flip_holm), d.p_sign_flip_holm), (str(d.n), d.n)

    for d in comparison.equal_time.differences if comparison.equal_time else ():
        mean = sum(d.arm_values) / d.n
        rows.append(
            (
                f"validation loss at equal {words.CLOCKS[comparison.equal_time.clock]} (nats/token)"
                if comparison.equal_time
                else "",
                comparison.labels[d.arm],
                (number(mean), mean),
                (number(d.mean, sign=True), d.mean),
                bounds(d.interval),
                *tail(d),
                (number(d.detectable), d.detectable),
                (NONE if d.seeds_needed is None else str(d.seeds_needed), d.seeds_needed),
                words.outcome(d),
            )
        )
    for what in ("tokens", "time"):
        for s in comparison.speed:
            found = s.in_tokens if what == "tokens" else s.in_time
            if found is None:
                continue
            share, span = words.shares(found)
            name = what if what == "tokens" else words.CLOCKS[s.clock]
            rows.append(
                (
                    f"{name} to a loss that both reach (× baseline)",
                    comparison.labels[s.arm],
                    NONE,
                    (f"× {share:.2f}", share),
                    NONE if span is None else (f"[{span[0]:.2f}, {span[1]:.2f}]", span),
                    *tail(found),
                    NONE,
                    NONE,
                    words.outcome(found),
                )
            )
    return rows


def seed_table(comparison: Comparison) -> Table | None:
    """Held-out loss of every run, and its difference to the baseline's of the same seed."""
    measure = comparison.validation
    if measure is None:
        return None
    rows: list[tuple[Entry, ...]] = []
    for arm in comparison.arms:
        values, d = measure.of(arm), measure.difference(arm)
        known = dict(zip(values.seeds, values.values, strict=True)) if values else {}
        gaps = dict(zip(d.seeds, d.differences, strict=True)) if d else {}
        rows.append(
            (
                comparison.labels[arm],
                *((number(known.get(seed), 4), known.get(seed)) for seed in comparison.seeds),
                *((number(gaps.get(seed), 4, sign=True), gaps.get(seed)) for seed in comparison.seeds),
            )
        )
    columns = ("arm", *(f"seed {seed}" for seed in comparison.seeds), *(f"Δ seed {seed}" for seed in comparison.seeds))
    caption = "Validation loss (nats/token) of every run's final checkpoint, and Δ, its difference to the baseline's."
    return Table("seeds", caption, columns, tuple(rows))


def selection_table(comparison: Comparison) -> Table | None:
    """What choosing the best checkpoint would have shown."""
    names = names_of(comparison)
    rows = tuple(
        (
            names[s.quantity],
            comparison.labels[s.arm],
            (number(s.final, 4), s.final),
            (number(s.best, 4), s.best),
            (number(s.gain, 4, sign=True), s.gain),
            (number(s.difference_final, 4, sign=True), s.difference_final),
            (number(s.difference_best, 4, sign=True), s.difference_best),
            (str(s.checkpoints), s.checkpoints),
        )
        for s in comparison.selection
    )
    if not rows:
        return None
    columns = (
        "measure", "arm", "final", "best checkpoint", "selection effect", "Δ final", "Δ best checkpoint", "checkpoints",
    )  # fmt: skip
    caption = (
        "Best checkpoint, chosen by the reported score itself: not the result, shown so that the effect of such a "
        "choice can be seen."
    )
    return Table("best_checkpoint", qualified(caption, comparison), columns, rows, 2)


def task_table(comparison: Comparison) -> Table | None:
    """Benchmarks: score and paired difference of every task, their mean, the mean rank."""
    tasks = [task for task in comparison.tasks if (task.task, task.metric) != VALIDATION]
    if not tasks:
        return None
    names = names_of(comparison)
    if len(comparison.treated) > MANY:
        return _tasks_by_arm(comparison, tasks)
    rows: list[tuple[Entry, ...]] = []

    def add(name: str, measure: Measure) -> None:
        counted = measure.items
        if isinstance(measure, TaskMeasure) and counted is None and len(measure.scored) == 1:
            counted = measure.scored[0]
        row: list[Entry] = [name, (f"{counted:,}" if counted else NONE, counted)]
        row += [mean_and_sd(measure, arm) for arm in comparison.arms]
        for arm in comparison.treated:
            d = measure.difference(arm)
            row += (
                [(number(d.mean, sign=True), d.mean), bounds(d.interval), (probability(d.p_holm), d.p_holm)]
                if d
                else [NONE] * 3
            )
        rows.append(tuple(row))

    for task in tasks:
        add(task_head(task), task)
    for mean in comparison.means:
        add(names[mean.measure.quantity], mean.measure)
        ranks: list[Entry] = [(number(mean.mean_rank.get(arm), 2), mean.mean_rank.get(arm)) for arm in comparison.arms]
        rows.append(
            (
                _rank_of(mean),
                NONE,
                *ranks,
                *[NONE] * (3 * len(comparison.treated)),
            )
        )
    columns = ["task", "items", *(comparison.labels[arm] for arm in comparison.arms)]
    for arm in comparison.treated:
        name = f"Δ {comparison.labels[arm]}"
        columns += [name, f"95 % interval of {name}", f"p of {name}"]
    return Table(
        "tasks",
        qualified(_BENCHMARKS, comparison),
        tuple(columns),
        tuple(rows),
        notes=flags(tasks),
    )


def _rank_of(mean: TaskMean) -> str:
    return f"mean rank ({METRIC_TITLES.get(mean.metric, mean.metric)})"


_BENCHMARKS = (
    "Benchmarks at the final checkpoint, paired by seed and by item; p is corrected over arms and tasks, each metric "
    "for itself; rank 1 is best. Bits per byte are those of the right answer, its margin is over the likeliest wrong "
    "one."
)


def _tasks_by_arm(comparison: Comparison, tasks: Sequence[TaskMeasure]) -> Table:
    """A row an arm, a column a task, as benchmarks of many models are usually printed."""
    names = names_of(comparison)
    tasks = [task for task in tasks if not task.gold]  # of these the mean has a column; every one would be too many
    columns: list[tuple[str, Measure | None, dict[str, float]]] = [(task_head(task), task, {}) for task in tasks]
    for mean in comparison.means:
        columns.append((names[mean.measure.quantity], mean.measure, {}))
        columns.append((_rank_of(mean), None, mean.mean_rank))
    rows: list[tuple[Entry, ...]] = []
    for arm in comparison.arms:
        row: list[Entry] = [comparison.labels[arm]]
        for _, measure, ranks in columns:
            if measure is None:
                row.append((number(ranks.get(arm), 2), ranks.get(arm)))
                continue
            values, d = measure.of(arm), measure.difference(arm)
            marked = f" {'+' if d.outcome == 'better' else MINUS}" if d is not None and d.detected else ""
            row.append(NONE if values is None else (number(values.mean) + marked, values.mean))
        rows.append(tuple(row))
    caption = (
        "Benchmarks at the final checkpoint, mean over seeds; + and − mark a detected difference to the baseline for "
        "the better and the worse, paired by seed and by item, corrected over arms and tasks (the table of every "
        "difference has the intervals); rank 1 is best."
    )
    head = ("arm", *(name for name, _, _ in columns))
    return Table("tasks", qualified(caption, comparison), head, tuple(rows), notes=flags(tasks))


def difference_table(comparison: Comparison) -> Table | None:
    """Every paired difference with both intervals and both tests."""
    names = names_of(comparison)
    if comparison.equal_time is not None:
        clock = words.CLOCKS[comparison.equal_time.clock]
        names |= {d.quantity: f"validation loss at equal {clock}" for d in comparison.equal_time.differences}
    if comparison.layers is not None:
        names |= {f"mean_cosine.state.{n}": f"mean cosine, {label}" for n, label in enumerate(comparison.layers.labels)}
    rows = tuple(
        (
            names[d.quantity],
            comparison.labels[d.arm],
            (number(d.mean, 4, sign=True), d.mean),
            bounds(d.interval_over_seeds, 4),
            bounds(d.interval_over_seeds_and_items, 4),
            d.interval_kind or NONE,
            (probability(d.p), d.p),
            (probability(d.p_holm), d.p_holm),
            (probability(d.p_sign_flip), d.p_sign_flip),
            (probability(d.p_sign_flip_smallest), d.p_sign_flip_smallest),
            (number(d.effect_size, 2, sign=True), d.effect_size),
            (str(d.n), d.n),
            (NONE if d.items is None else str(d.items), d.items),
            words.outcome(d),
        )
        for d in comparison.differences()
    )
    if not rows:
        return None
    columns = (
        "measure", "arm", "difference", "95 % interval over seeds", "95 % interval over seeds and items", "shown", "p",
        "p, Holm", "p, sign flip", "smallest p, sign flip", "effect g", "n", "items", "outcome",
    )  # fmt: skip
    caption = (
        "Every paired difference: both intervals (other tables show the one over items, if there is one), its p, "
        "and the exact sign-flip p."
    )
    return Table("differences", qualified(caption, comparison), columns, rows, 2)
