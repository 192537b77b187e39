"""The report of a study: one self-contained HTML file, its figures and its tables, from the rows alone (no torch).

Nothing is typed by hand: sentences, tables and figures are computed from the rows, and equal rows give equal bytes.
A study with failed or missing runs still gets its report, which then says so first.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import yaml
from matplotlib.figure import Figure

from decondense import __version__
from decondense.compare import (
    VALIDATION,
    CompareError,
    Comparison,
    Cost,
    Difference,
    Interval,
    Measure,
    Study,
    compare,
)
from decondense.figures import comparison as draw
from decondense.figures.style import export, render
from decondense.records import Row, atomic_write

MINUS = "\N{MINUS SIGN}"
NONE = "\N{EN DASH}"
NBSP = "\N{NO-BREAK SPACE}"


class ReportPaths(TypedDict):
    """What a report consists of."""

    report: Path
    figures: list[Path]
    tables: list[Path]


# --------------------------------------------------------------------------------------------------------------------
# Numbers and words
# --------------------------------------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 3, *, sign: bool = False) -> str:
    """A number for people: fixed digits, a real minus sign, a dash for none."""
    if value is None or not math.isfinite(value):
        return NONE
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", MINUS)


def interval(bounds: tuple[float, float] | None, digits: int = 3) -> str:
    """``[low, high]``."""
    return (
        NONE if bounds is None else f"[{number(bounds[0], digits, sign=True)}, {number(bounds[1], digits, sign=True)}]"
    )


def _bounds(found: tuple[float, float] | None, digits: int = 3) -> Entry:
    return NONE if found is None else (interval(found, digits), found)


def probability(p: float | None) -> str:
    """A p-value with three digits, or ``<0.001``."""
    return NONE if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def _count(value: float | None) -> str:
    if value is None:
        return NONE
    for scale, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M")):
        if value >= scale:
            return f"{value / scale:.3g}{unit}"
    return f"{value:,.0f}"


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1] if words else ""


def _seeds(n: int) -> str:
    return "1 seed" if n == 1 else f"{n} seeds"


def _score_clause(d: Difference, label: str) -> str:
    size = f"{number(abs(d.mean))} {d.unit}".strip()
    better = sum((x > 0) == bool(d.higher_is_better) and x != 0 for x in d.differences)
    if d.n < 2:
        way = "lower" if d.mean < 0 else "higher"
        return (
            f"{label} is {way} by {size} in the only seed, which cannot be told from chance: no interval and no "
            "test, more seeds are needed"
        )
    evidence = (
        f"95{NBSP}% interval of the difference {interval(d.interval)}, n = {_seeds(d.n)}, better in {better} of {d.n}"
    )
    if not d.detected:
        corrected = ", after correction for several arms" if d.p is not None and d.p <= 0.05 else ""
        signed = f"{number(d.mean, sign=True)} {d.unit}".strip()
        return f"{label} shows no detectable difference{corrected} ({signed}, {evidence})"
    return f"{label} is {d.verdict}, which is {d.judgement}, by {size} ({evidence})"


def _cosine_clause(d: Difference, label: str) -> str:
    values = f"{number(sum(d.baseline_values) / d.n)} to {number(sum(d.arm_values) / d.n)}"
    if d.n < 2:
        return f"{label} moves it from {values} in its one seed (not tested)"
    tail = f"95{NBSP}% interval of the difference {interval(d.interval)}"
    if not d.detected:
        return f"{label} shows no detectable difference ({values}, {tail})"
    return f"{label} {'lowers' if d.mean < 0 else 'raises'} it from {values} ({tail})"


def _cost_clause(found: Comparison, cost: Cost) -> str:
    assert cost.wall_ratio is not None
    name = found.labels[cost.arm]
    processor = f" ({cost.cpu_ratio[0]:.2f} times the CPU time)" if cost.cpu_ratio else ""
    clause = f"an optimizer step of {name} takes {cost.wall_ratio[0]:.2f} times as long{processor}"
    speed = next((s for s in found.speed if s.arm == cost.arm), None)
    if speed is None:
        return clause
    target = f"the loss with which {found.labels[found.baseline]} ended"
    if speed.median_token_ratio is not None:
        return f"{clause}, and {target} is reached after {100 / speed.median_token_ratio:.0f}{NBSP}% of the tokens"
    if speed.reached and not speed.resolved:
        return f"{clause}; when {target} is reached cannot be said, because the runs were evaluated too rarely"
    if speed.reached:
        return f"{clause}, and {target} is reached in {speed.reached} of {speed.n} seeds"
    return f"{clause}, and {target} is never reached"


def sentences(found: Comparison) -> list[str]:
    """About three sentences: what happened to the held-out loss, to condensation, and at what cost."""
    label = found.labels
    base = label[found.baseline]
    if not found.treated:
        return [f"Only {base} has finished runs, so there is nothing to compare it with."]
    lines: list[str] = []
    scores = [("Held-out loss" if task is found.validation else task.name, task) for task in found.tasks]
    # with many tasks their mean speaks for them
    wanted = scores if len(found.tasks) < 3 else [pair for pair in scores if pair[1] is found.validation]
    for name, measure in [*wanted, *((f"The {mean.measure.name}", mean.measure) for mean in found.means)]:
        clauses = [_score_clause(d, label[d.arm]) for d in measure.differences]
        if clauses:
            lines.append(f"{name} at the end of training, paired with {base}: " + "; ".join(clauses) + ".")
    blocks = next((m for m in found.condensation if m.name == "mean cosine, all blocks"), None)
    if blocks is not None and blocks.differences:
        clauses = [_cosine_clause(d, label[d.arm]) for d in blocks.differences]
        lines.append("Condensation, as the mean cosine over the blocks: " + "; ".join(clauses) + ".")
    costs = "; ".join(_cost_clause(found, entry) for entry in found.cost if entry.wall_ratio)
    if costs:
        lines.append(f"Cost: {costs}.")
    return lines


def summary(found: Comparison) -> str:
    """The summary as one paragraph."""
    return " ".join(sentences(found))


# --------------------------------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------------------------------

Entry = str | tuple[str, float | int | None] | tuple[str, Interval]
"""What is shown, or what is shown and the number or the two bounds behind it (for CSV)."""


@dataclass(frozen=True)
class Table:
    """A table for people (text) and for programs (the numbers behind it)."""

    name: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Entry, ...], ...]
    words: int = 1
    """How many columns from the left hold words; the others hold numbers."""

    def text(self) -> list[list[str]]:
        """The cells as shown."""
        return [[entry if isinstance(entry, str) else entry[0] for entry in row] for row in self.rows]

    def to_csv(self) -> str:
        """Comma-separated, with full precision where a cell is a number."""
        pairs = {
            i for row in self.rows for i, e in enumerate(row) if not isinstance(e, str) and isinstance(e[1], tuple)
        }
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        head: list[str] = []
        for i, column in enumerate(self.columns):
            head += [f"{column}, low", f"{column}, high"] if i in pairs else [column]
        writer.writerow(head)
        for row in self.rows:
            cells: list[str] = []
            for i, entry in enumerate(row):
                value = entry if isinstance(entry, str) else entry[1]
                if i in pairs:
                    cells += [repr(bound) for bound in value] if isinstance(value, tuple) else ["", ""]
                elif isinstance(value, str):
                    cells.append("" if value == NONE else value)
                else:
                    cells.append("" if value is None else repr(value))
            writer.writerow(cells)
        return buffer.getvalue()

    def to_markdown(self) -> str:
        """A pipe table with its caption."""
        mark = [":---" if i < self.words else "---:" for i in range(len(self.columns))]
        lines = [self.columns, mark, *self.text()]
        return f"{_markdown(self.caption)}\n\n" + "".join(
            "| " + " | ".join(cell if line is mark else _markdown(cell) for cell in line) + " |\n" for line in lines
        )

    def to_latex(self) -> str:
        """A booktabs table."""
        spec = "".join("l" if i < self.words else "r" for i in range(len(self.columns)))
        body = "".join("  " + " & ".join(map(_latex, row)) + r" \\" + "\n" for row in self.text())
        return (
            "\\begin{table}\n  \\centering\n"
            f"  \\caption{{{_latex(self.caption)}}}\n  \\label{{tab:{self.name}}}\n"
            f"  \\begin{{tabular}}{{{spec}}}\n  \\toprule\n"
            "  " + " & ".join(map(_latex, self.columns)) + " \\\\\n  \\midrule\n"
            f"{body}  \\bottomrule\n  \\end{{tabular}}\n\\end{{table}}\n"
        )


def _markdown(text: str) -> str:
    return re.sub(r"([|<>*_`\\])", r"\\\1", text)


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    MINUS: "$-$", NONE: "--", "×": r"$\times$", "±": r"$\pm$", "Δ": r"$\Delta$", "[": "{[}", "]": "{]}",
}  # fmt: skip


def _latex(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in text)


def _mean_and_sd(measure: Measure, arm: str, digits: int = 3) -> Entry:
    values = measure.of(arm)
    if values is None:
        return NONE
    spread = f" ± {number(values.sd, digits)}" if values.sd is not None else ""
    return (number(values.mean, digits) + spread, values.mean)


def _measures(found: Comparison) -> list[Measure]:
    return [*found.tasks, *(mean.measure for mean in found.means), *found.condensation]


def _main_measures(found: Comparison) -> list[Measure]:
    """Without the single benchmarks, which have a table of their own."""
    validation = [found.validation] if found.validation is not None else []
    return [*validation, *(mean.measure for mean in found.means), *found.condensation]


def _qualified(caption: str, found: Comparison) -> str:
    """The caption of a table that shows benchmarks, with what qualifies their scores."""
    return f"{caption} Benchmarks: {'; '.join(found.task_notes)}." if found.task_notes else caption


def headline(found: Comparison) -> Table:
    """Held-out loss, means over tasks and condensation of the final checkpoints, with their paired differences."""
    several = len(found.treated) > 1
    rows: list[tuple[Entry, ...]] = []
    for measure in _main_measures(found):
        unit = f" ({measure.unit})" if measure.unit and measure.unit != "cosine" else ""
        for d in measure.differences:
            name: tuple[Entry, ...] = (measure.name + unit, *((found.labels[d.arm],) if several else ()))
            rows.append(
                (
                    *name,
                    _mean_and_sd(measure, found.baseline),
                    _mean_and_sd(measure, d.arm),
                    (number(d.mean, sign=True), d.mean),
                    _bounds(d.interval),
                    (probability(d.p_holm), d.p_holm),
                    (probability(d.p_sign_flip_holm), d.p_sign_flip_holm),
                    (str(d.n), d.n),
                    d.verdict + (f" ({d.judgement})" if d.judgement in ("better", "worse") else ""),
                )
            )
    first: tuple[str, ...] = ("measure", *(("arm",) if several else ()))
    columns = (
        *first,
        found.labels[found.baseline],
        "its value" if several else found.labels[found.treated[0]] if found.treated else "arm",
        "difference",
        "95 % interval",
        "p",
        "p, sign flip",
        "n",
        "in words",
    )
    items = f" over {found.validation.items} held-out items" if found.validation and found.validation.items else ""
    holm = " and is corrected over arms (Holm)" if several else ""
    caption = (
        "Final checkpoints: mean ± standard deviation over seeds, and paired differences by seed. "
        f"Validation loss{items}. p belongs to the interval{holm}; the sign-flip test assumes less and needs six seeds "
        "or more to reach 0.05."
    )
    return Table("headline", _qualified(caption, found), columns, tuple(rows), len(first))


def layer_table(found: Comparison) -> Table | None:
    """Mean cosine of every layer."""
    layers = found.layers
    if layers is None:
        return None
    arms = [arm for arm in found.arms if arm in layers.values and len(layers.values[arm]) == len(layers.labels)]
    treated = [arm for arm in found.treated if len(layers.differences.get(arm, ())) == len(layers.labels)]
    rows = []
    for place, label in enumerate(layers.labels):
        row: list[Entry] = [f"{place} {label}" if not label[-1:].isdigit() else label]
        for arm in arms:
            values = layers.values[arm][place]
            spread = f" ± {number(values.sd)}" if values.sd is not None else ""
            row.append((number(values.mean) + spread, values.mean))
        for arm in treated:
            d = layers.differences[arm][place]
            row += [(number(d.mean, sign=True), d.mean), _bounds(d.interval)]
        rows.append(tuple(row))
    several = len(treated) > 1
    tail = [f"Δ {found.labels[arm]}" if several else "difference" for arm in treated]
    columns = ["layer", *(found.labels[arm] for arm in arms)]
    for name in tail:
        columns += [name, f"95 % interval of {name}" if several else "95 % interval"]
    return Table(
        "layers",
        "Mean cosine similarity by layer at the end of training, mean ± standard deviation over seeds; intervals are "
        "pointwise (Student t over seeds).",
        tuple(columns),
        tuple(rows),
    )


def seed_table(found: Comparison) -> Table | None:
    """Held-out loss of every run."""
    measure = found.validation
    if measure is None:
        return None
    rows = []
    for seed in found.seeds:
        row: list[Entry] = [str(seed)]
        for arm in found.arms:
            values = measure.of(arm)
            known = dict(zip(values.seeds, values.values, strict=True)) if values else {}
            row.append((number(known.get(seed), 4), known.get(seed)))
        for arm in found.treated:
            d = measure.difference(arm)
            gaps = dict(zip(d.seeds, d.differences, strict=True)) if d else {}
            row.append((number(gaps.get(seed), 4, sign=True), gaps.get(seed)))
        rows.append(tuple(row))
    several = len(found.treated) > 1
    columns = (
        "seed",
        *(found.labels[arm] for arm in found.arms),
        *((f"Δ {found.labels[arm]}" if several else "difference") for arm in found.treated),
    )
    return Table("seeds", "Validation loss (nats/token) of every run's final checkpoint.", columns, tuple(rows))


def cost_table(found: Comparison) -> Table | None:
    """Time and memory."""
    rows = []
    for c in found.cost:
        if not any([*c.step_wall_ms, *c.train_wall_s, *c.peak_rss_bytes]):
            continue
        step, cpu, total, memory = (
            _median(values) for values in (c.step_wall_ms, c.step_cpu_ms, c.train_wall_s, c.peak_rss_bytes)
        )
        rows.append(
            (
                found.labels[c.arm],
                (number(step, 1), step),
                _ratio(c.wall_ratio),
                (number(cpu, 1), cpu),
                _ratio(c.cpu_ratio),
                (number(total, 1) + (" *" if c.resumed else ""), total),
                (NONE if memory is None else f"{memory / 2**20:,.0f}", None if memory is None else memory / 2**20),
                (str(len(c.seeds)), len(c.seeds)),
            )
        )
    if not rows:
        return None
    columns = (
        "arm", "step (ms)", "step × baseline [range]", "CPU of a step (ms)", "CPU × baseline [range]", "training (s)",
        "peak memory (MiB)", "runs",
    )  # fmt: skip
    note = (
        " * Some runs were resumed: their total is that of the last attempt."
        if any(c.resumed for c in found.cost)
        else ""
    )
    caption = (
        "Cost: median over seeds of each run's median optimizer step; ratios are paired by seed, with their range over "
        f"seeds.{note}"
    )
    return Table("cost", caption, columns, tuple(rows))


def _median(values: Iterable[float | None]) -> float | None:
    known = sorted(value for value in values if value is not None)
    if not known:
        return None
    middle = len(known) // 2
    return known[middle] if len(known) % 2 else (known[middle - 1] + known[middle]) / 2


def _ratio(found: tuple[float, float, float] | None) -> Entry:
    return NONE if found is None else (f"{found[0]:.3f} [{found[1]:.3f}, {found[2]:.3f}]", found[0])


def speed_table(found: Comparison) -> Table | None:
    """Tokens to reach the baseline's final loss."""
    rows: list[tuple[Entry, ...]] = []
    for s in found.speed:
        unsure = "" if s.resolved else " (?)"
        for seed, target, tokens, bracket, ratio, time in zip(
            s.seeds, s.targets, s.tokens, s.brackets, s.token_ratios, s.time_ratios, strict=True
        ):
            rows.append(
                (
                    found.labels[s.arm],
                    str(seed),
                    (number(target, 4), target),
                    ("not reached" if tokens is None else _count(tokens) + unsure, tokens),
                    NONE if bracket is None else f"{_count(bracket[0])} to {_count(bracket[1])}",
                    (NONE if ratio is None or unsure else f"{ratio:.2f}", ratio),
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


def selection_table(found: Comparison) -> Table | None:
    """What choosing the best checkpoint would have shown."""
    rows = tuple(
        (
            s.quantity,
            found.labels[s.arm],
            (number(s.final, 4), s.final),
            (number(s.best, 4), s.best),
            (number(s.gain, 4, sign=True), s.gain),
            (number(s.difference_final, 4, sign=True), s.difference_final),
            (number(s.difference_best, 4, sign=True), s.difference_best),
            (str(s.checkpoints), s.checkpoints),
        )
        for s in found.selection
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
    return Table("best_checkpoint", _qualified(caption, found), columns, rows, 2)


def task_table(found: Comparison) -> Table | None:
    """Benchmarks: score and paired difference of every task, their mean, the mean rank."""
    tasks = [task for task in found.tasks if (task.task, task.metric) != VALIDATION]
    if not tasks:
        return None
    rows: list[tuple[Entry, ...]] = []

    def add(name: str, measure: Measure) -> None:
        row: list[Entry] = [name, (str(measure.items or NONE), measure.items)]
        row += [_mean_and_sd(measure, arm) for arm in found.arms]
        for arm in found.treated:
            d = measure.difference(arm)
            row += (
                [(number(d.mean, sign=True), d.mean), _bounds(d.interval), (probability(d.p_holm), d.p_holm)]
                if d
                else [NONE] * 3
            )
        rows.append(tuple(row))

    for task in tasks:
        add(f"{task.task} ({task.metric})", task)
    for mean in found.means:
        add(mean.measure.name, mean.measure)
        ranks: list[Entry] = [(number(mean.mean_rank.get(arm), 2), mean.mean_rank.get(arm)) for arm in found.arms]
        rows.append((f"mean rank ({mean.metric})", NONE, *ranks, *[NONE] * (3 * len(found.treated))))
    columns = ["task", "items", *(found.labels[arm] for arm in found.arms)]
    for arm in found.treated:
        name = f"Δ {found.labels[arm]}"
        columns += [name, f"95 % interval of {name}", f"p of {name}"]
    return Table(
        "tasks",
        _qualified("Benchmarks at the final checkpoint, paired by seed and by item; rank 1 is best.", found),
        tuple(columns),
        tuple(rows),
    )


def difference_table(found: Comparison) -> Table | None:
    """Every paired difference with both intervals and both tests."""
    layers = [d for entries in found.layers.differences.values() for d in entries] if found.layers else []
    rows = tuple(
        (
            d.quantity,
            found.labels[d.arm],
            (number(d.mean, 4, sign=True), d.mean),
            _bounds(d.interval_over_seeds, 4),
            _bounds(d.interval_over_seeds_and_items, 4),
            d.interval_kind or NONE,
            (probability(d.p), d.p),
            (probability(d.p_holm), d.p_holm),
            (probability(d.p_sign_flip), d.p_sign_flip),
            (probability(d.p_sign_flip_smallest), d.p_sign_flip_smallest),
            (number(d.effect_size, 2, sign=True), d.effect_size),
            (str(d.n), d.n),
            (NONE if d.items is None else str(d.items), d.items),
            d.verdict,
        )
        for d in [*(d for measure in _measures(found) for d in measure.differences), *layers]
    )
    if not rows:
        return None
    columns = (
        "measure", "arm", "difference", "95 % interval over seeds", "95 % interval over seeds and items", "shown", "p",
        "p, Holm", "p, sign flip", "smallest p, sign flip", "effect g", "n", "items", "in words",
    )  # fmt: skip
    caption = (
        "Every paired difference: both intervals (the wider is the one shown elsewhere), the p of the shown one, "
        "and the exact sign-flip p."
    )
    return Table("differences", _qualified(caption, found), columns, rows, 2)


_SHORT = {
    "mean cosine, all blocks": "cosine, blocks",
    "mean cosine, last layer": None,  # the last of the layers below
    "Spearman of mean cosine with depth": "Spearman (depth)",
}


def terminal_table(found: Comparison) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of text that fit a terminal: measures, mean cosine by layer, step time, tokens to equal loss."""
    several = len(found.treated) > 1
    short = {arm: textwrap.fill(found.labels[arm], 13) for arm in found.arms}
    columns = ["", *(["arm"] if several else []), short[found.baseline]]
    lines: list[list[str]] = []
    if not found.treated:
        for measure in _measures(found):
            values = measure.of(found.baseline)
            lines.append([measure.name, number(values.mean) if values else NONE])
        return columns, lines
    columns += ["value" if several else short[found.treated[0]], "difference", "95 % interval", "n"]

    def add(name: str, arm: str, *cells: str) -> None:
        lines.append([name, *([short[arm]] if several else []), *cells])

    def add_difference(name: str, d: Difference) -> None:
        base, own = (number(sum(values) / d.n) for values in (d.baseline_values, d.arm_values))
        add(name, d.arm, base, own, number(d.mean, sign=True), interval(d.interval), str(d.n))

    for measure in _measures(found):
        name = _SHORT.get(measure.name, measure.name)
        for d in measure.differences:
            if name is not None:
                add_difference(name, d)
    if found.layers is not None:
        labels = found.layers.labels
        stride = math.ceil(len(labels) / 16)
        for place, label in enumerate(labels):
            if place % stride and place != len(labels) - 1:
                continue
            for arm in found.treated:
                if arm in found.layers.differences:
                    add_difference(f"cosine, {label}", found.layers.differences[arm][place])
    base_cost = next((c for c in found.cost if c.arm == found.baseline), None)
    for c in found.cost:
        for name, ratio, theirs, mine in (
            ("step time (ms)", c.wall_ratio, base_cost and base_cost.step_wall_ms, c.step_wall_ms),
            ("step, CPU (ms)", c.cpu_ratio, base_cost and base_cost.step_cpu_ms, c.step_cpu_ms),
        ):
            if ratio and theirs:
                times = number(_median(theirs), 1), number(_median(mine), 1)
                add(name, c.arm, *times, f"× {ratio[0]:.3f}", f"{ratio[1]:.3f} to {ratio[2]:.3f}", str(c.n))
    for s in found.speed:
        told = NONE if s.median_token_ratio is None else f"× {1 / s.median_token_ratio:.2f}"
        at = _count(_median(s.tokens)) if s.median_token_ratio is not None else s.words
        add("same-loss tokens", s.arm, _count(found.tokens), at, told, NONE, str(s.n))
    return columns, lines


# --------------------------------------------------------------------------------------------------------------------
# The page
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """A figure of the page."""

    name: str
    caption: str
    svg: str
    wide: bool = False
    width: float = 0.0
    """Inches."""


def inline_svg(figure: Figure, name: str, title: str) -> str:
    """A figure as SVG that can stand among others in one page: its ids carry ``name``, and it has a title."""
    text = render(figure, "svg").decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    head = text[: text.index(">") + 1]
    box = re.search(r'viewBox="[^"]+"', head)
    assert box is not None
    safe = title.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    start = f'<svg {box[0]} xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    return start + f'role="img" aria-label="{safe}">' + text[len(head) :].strip()


def _limits(study: Study, found: Comparison | None) -> list[str]:
    lines = []
    if found is not None:
        n = max((d.n for m in _measures(found) for d in m.differences), default=0)
        if n == 1:
            lines.append(
                "One seed: no interval and no test is possible; a difference of this size may be the luck of the start."
            )
        elif n:
            floor = next((d.p_sign_flip_smallest for m in _measures(found) for d in m.differences if d.n == n), None)
            weak = floor is not None and floor > 0.05
            lines.append(
                f"{n} seeds: the sign-flip test cannot give a p below {probability(floor)} with that many"
                + (
                    ", so that it can never detect anything here; what is said in words rests on the interval, which "
                    "takes the seeds' differences to be about normally distributed."
                    if weak
                    else "."
                )
            )
        if found.validation is not None and found.validation.differences:
            d = found.validation.differences[0]
            lines.append(f"The interval of the held-out loss shown: {d.interval_reason}.")
        scale = []
        if found.parameters:
            scale.append(f"{_count(found.parameters)} parameters")
        if found.tokens:
            scale.append(f"{_count(found.tokens)} training tokens")
        if scale:
            lines.append(
                f"The runs have {_listed(scale)}: whether the same holds for larger models, other text or longer "
                "training is not answered here."
            )
        if any(c.wall_ratio for c in found.cost):
            lines.append(
                "Times were taken on the machine named below; other work on it, other runs of the study included, "
                "shows up in them. The CPU times suffer less from that."
            )
        lines.append(
            "A lower mean cosine is what the loss is made to cause; it is no evidence that a model is better. "
            "The held-out scores are."
        )
        lines += list(found.notes)
    passages = {
        (p["passages"], p["passage_tokens"]) for cell in study.cells.values() for p in cell.profiles.values() if p
    }
    if passages:
        each = " and ".join(f"{count} passages of at most {tokens} tokens" for count, tokens in sorted(passages))
        lines.append(f"Condensation was measured on {each}; histograms pool all pairs of tokens within a passage.")
    return lines


def _provenance(study: Study) -> list[tuple[str, str]]:
    """Every provenance field, with all the values that the runs have."""
    fields: dict[str, dict[str, None]] = {}

    def take(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                take(f"{prefix}{key}.", item) if isinstance(item, dict) else take(f"{prefix}{key}", item)
        else:
            fields.setdefault(prefix, {})[str(value)] = None

    for cell in study.cells.values():
        for row in (cell.started, cell.run):
            take("", row.get("provenance", {}))
    shown = []
    for key, values in sorted(fields.items()):
        if key == "time":
            times = sorted(values)
            shown.append((key, times[0] if len(times) == 1 else f"{times[0]} to {times[-1]}"))
        else:
            shown.append((key, "; ".join(values)))
    return shown


def _command(study: Study) -> str:
    for cell in study.cells.values():
        command = cell.started.get("provenance", {}).get("command")
        if command:
            return str(command)
    return "decondense demo"


def _cells(study: Study) -> list[dict[str, str]]:
    shown = []
    for cell in study.cells.values():
        note = ""
        if cell.status == "failed":
            note = str(cell.run.get("error") or "no reason recorded")
        elif cell.status == "unfinished":
            note = f"last row at step {max([*cell.steps, *cell.profiles, 0])}"
        elif cell.resumed:
            note = f"resumed {cell.resumed} ×"
        shown.append(
            {
                "arm": study.labels[cell.arm],
                "seed": str(cell.seed),
                "status": cell.status,
                "init": str(cell.said("init_hash") or NONE),
                "order": str(cell.said("order_hash") or NONE),
                "corpus": str(cell.said("corpus_hash") or NONE),
                "final": str(cell.run.get("final_hash") or NONE),
                "note": note,
            }
        )
    return shown


def _pictures(study: Study, found: Comparison | None, out: Path) -> tuple[dict[str, list[Picture]], list[Path]]:
    """The figures of the page by section, and the files written for papers."""
    sections: dict[str, list[Picture]] = {"loss": [], "profiles": [], "maps": [], "differences": [], "cost": []}
    files: list[Path] = []
    folder = out / "figures"

    def show(section: str, name: str, caption: str, figure: Figure, *, wide: bool = False) -> None:
        sections[section].append(Picture(name, caption, inline_svg(figure, name, caption), wide, figure.get_figwidth()))

    def write(name: str, figure: Figure) -> None:
        files.extend(export(figure, folder / name))

    finished = [cell for cell in study.cells.values() if cell.status == "finished"]
    base = study.labels.get(study.baseline or "", study.baseline or "")
    panels: list[draw.Panel] = []
    if any(cell.steps for cell in finished):
        show(
            "loss",
            "training-loss",
            "Training loss, mean over seeds; the band spans the seeds.",
            draw.loss_curves(study, ["training"]),
        )
        panels.append("training")
    if any(VALIDATION in cell.scores for cell in finished):
        show(
            "loss",
            "validation-loss",
            "Validation loss at the evaluated checkpoints; the band spans the seeds.",
            draw.loss_curves(study, ["validation"]),
        )
        panels.append("validation")
        if found is not None and found.validation is not None and found.validation.differences:
            show(
                "loss",
                "validation-difference",
                f"Paired difference of the validation loss to {base}: thin lines are seeds, below zero is better.",
                draw.loss_curves(study, ["difference"]),
            )
            panels.append("difference")
    if panels:
        write("loss_curves", draw.loss_curves(study, panels))
    steps = draw.times(study)
    for step in steps:
        caption = f"Mean cosine by layer, {draw.when(study, step)}; the band spans the seeds."
        show("profiles", f"profile-{step}", caption, draw.profiles(study, [step]))
    if steps:
        write("mean_cosine_by_layer", draw.profiles(study, steps))
    arms = [arm for arm in study.arms if draw.histograms(study, arm)]
    if arms and draw.map_times(study, arms):
        caption = (
            "Cosines of all pairs of tokens by layer, over training: colour is density (on a square-root scale), the "
            "dashed line the mean. Pooled over passages and seeds."
        )
        figure = draw.heat_maps(study, arms)
        show("maps", "heat-maps", caption, figure, wide=True)
        write("heat_maps", figure)
    if found is not None and found.treated:
        dots = "Small dots are seeds, bars 95 % intervals; filled markers: detected after correction."
        if found.validation is not None and found.validation.differences:
            figure = draw.forest([found.validation], found, xlabel="Δ validation loss (nats/token)")
            show("differences", "forest-validation", f"Difference of the validation loss to {base}. {dots}", figure)
            write("difference_validation_loss", figure)
        if found.layers is not None and found.layers.differences:
            figure = draw.layer_differences(found)
            caption = f"Difference of the mean cosine to {base} by layer, with pointwise 95 % intervals."
            show("differences", "forest-layers", caption, figure)
            write("difference_mean_cosine", figure)
        for metric in dict.fromkeys(task.metric for task in found.tasks if (task.task, task.metric) != VALIDATION):
            tasks = [
                t for t in found.tasks if t.metric == metric and (t.task, t.metric) != VALIDATION and t.differences
            ]
            means = [mean.measure for mean in found.means if mean.metric == metric and mean.measure.differences]
            if tasks:
                names = [task.task for task in tasks] + ["mean"] * len(means)
                figure = draw.forest([*tasks, *means], found, xlabel=f"Δ {metric}", names=names)
                slug = re.sub(r"[^A-Za-z0-9]+", "-", metric)
                show("differences", f"forest-{slug}", f"Difference in {metric} to {base} by task. {dots}", figure)
                write(f"difference_tasks_{slug}", figure)
    if found is not None and any(any(c.step_wall_ms) for c in found.cost):
        figure = draw.cost(found)
        show("cost", "cost-step", "Median optimizer step of each run (dots), and the ratio to the baseline.", figure)
        write("cost", figure)
    return sections, files


_TABLES: dict[str, Callable[[Comparison], Table | None]] = {
    "seeds": seed_table,
    "layers": layer_table,
    "tasks": task_table,
    "cost": cost_table,
    "speed": speed_table,
    "best_checkpoint": selection_table,
    "differences": difference_table,
}


def _tables(found: Comparison | None) -> dict[str, Table]:
    if found is None:
        return {}
    tables = {"headline": headline(found) if found.treated else None}
    tables.update({name: make(found) for name, make in _TABLES.items()})
    return {name: table for name, table in tables.items() if table is not None}


def build_report(rows: Iterable[Row] | Study, out_dir: str | Path, *, baseline: str | None = None) -> ReportPaths:
    """Write ``report.html``, ``figures/`` and ``tables/`` into ``out_dir``.

    Failed, unfinished or unpaired runs do not stop the report: they are left out of the comparison and named on top.

    Args:
        rows: the rows of one study.
        out_dir: where the files go.
        baseline: the arm to compare with; default: the study's.

    Raises:
        CompareError: no rows of a run, or rows of more than one study.
    """
    study = rows if isinstance(rows, Study) else Study.from_rows(rows)
    out = Path(out_dir)
    if baseline is not None:
        study = dataclasses.replace(study, baseline=baseline)
    found: Comparison | None = None
    problems: list[str] = []
    try:
        found = compare(study, baseline, incomplete="omit")
        problems = list(found.omitted)
    except CompareError as error:
        problems = [line.strip(" -") for line in str(error).splitlines()]
    pictures, files = _pictures(study, found, out)
    tables = _tables(found)
    written: list[Path] = []
    for table in tables.values():
        for kind, text in (("csv", table.to_csv()), ("md", table.to_markdown()), ("tex", table.to_latex())):
            path = out / "tables" / f"{table.name}.{kind}"
            atomic_write(path, text)
            written.append(path)
    page = _render(
        study=study,
        found=found,
        problems=problems,
        summary=sentences(found) if found is not None else [],
        tables={name: tables.get(name) for name in ("headline", *_TABLES)},
        pictures=pictures,
        cells=_cells(study),
        limits=_limits(study, found),
        provenance=_provenance(study),
        command=_command(study),
        configuration=yaml.safe_dump(study.config, sort_keys=False, allow_unicode=True) if study.config else "",
        version=__version__,
        count=_count,
    )
    path = out / "report.html"
    atomic_write(path, page)
    return {"report": path, "figures": files, "tables": written}


def _render(**context: Any) -> str:
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("decondense", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # the only text that is not escaped: pictures that this module drew itself
    environment.filters["drawn"] = Markup
    return environment.get_template("report.html").render(**context)
