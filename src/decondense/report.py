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

from matplotlib.figure import Figure

from decondense import __version__
from decondense.compare import (
    FEWEST_MODELS,
    QUANTITIES,
    SIZE_QUANTITIES,
    VALIDATION,
    CompareError,
    Comparison,
    Cost,
    Difference,
    Interval,
    Measure,
    SizeCorrelation,
    Study,
    TaskMeasure,
    Values,
    compare,
)
from decondense.figures import comparison as draw
from decondense.figures.style import COLUMN, export, render
from decondense.records import Row, atomic_write

MINUS = "\N{MINUS SIGN}"
NONE = "\N{EN DASH}"
NBSP = "\N{NO-BREAK SPACE}"
MANY = 3
"""With more arms than that beside the baseline, sentences group them, and tables have a row instead of columns for
each."""


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


def _grouped_scores(differences: Sequence[Difference], label: dict[str, str]) -> str:
    """Many arms by what was found of them."""
    groups: dict[str, list[Difference]] = {}
    for d in differences:
        groups.setdefault(
            "only one seed, not tested"
            if d.n < 2
            else f"{d.verdict}, which is {d.judgement}"
            if d.detected and d.judgement != "different"
            else d.verdict,
            [],
        ).append(d)
    order = ["better", "worse", "lower", "higher", "no detectable", "one seed"]
    parts = []
    for words, members in sorted(groups.items(), key=lambda item: next(i for i, w in enumerate(order) if w in item[0])):
        members = sorted(members, key=lambda d: d.mean)
        if members[0].detected or members[0].n < 2 or len(members) <= MANY:
            listed = ", ".join(f"{label[d.arm]} ({number(d.mean, sign=True)})" for d in members)
        else:
            span = f"{number(members[0].mean, sign=True)} to {number(members[-1].mean, sign=True)}"
            listed = f"{', '.join(label[d.arm] for d in members)} ({span})"
        lost = [label[d.arm] for d in members if not d.detected and d.p is not None and d.p <= 0.05]
        tail = f", of which {_listed(lost)} would differ without the correction for several arms" if lost else ""
        parts.append(f"{len(members)} {words}: {listed}{tail}")
    return "; ".join(parts)


def _many(differences: Sequence[Difference]) -> str:
    n = sorted({d.n for d in differences})
    seeds = f"{n[0]} to {n[-1]} seeds" if len(n) > 1 else _seeds(n[0])
    unit = f", in {differences[0].unit}" if differences[0].unit and differences[0].unit != "cosine" else ""
    return f"{len(differences)} arms, n = {seeds}, p corrected over arms, differences in brackets{unit}"


def _many_costs(found: Comparison, costs: Sequence[Cost]) -> str:
    known = sorted((c.wall_ratio[0], found.labels[c.arm]) for c in costs if c.wall_ratio)
    words = (
        f"an optimizer step takes {known[0][0]:.2f} ({known[0][1]}) to {known[-1][0]:.2f} ({known[-1][1]}) times as "
        "long as the baseline's"
    )
    speeds = [s for s in found.speed if s.median_token_ratio is not None]
    never = [s for s in found.speed if not s.reached]
    target = f"the loss with which {found.labels[found.baseline]} ended"
    if speeds:
        best = max(speeds, key=lambda s: s.median_token_ratio or 0.0)
        assert best.median_token_ratio is not None
        words += (
            f"; {target} is reached by every seed of {len(speeds)} of {len(found.speed)} arms, by "
            f"{found.labels[best.arm]} after {100 / best.median_token_ratio:.0f}{NBSP}% of the tokens"
        )
    if never:
        words += (
            f"; it is never reached by {_listed([found.labels[s.arm] for s in never])}"
            if speeds
            else (f"; {target} is never reached by {_listed([found.labels[s.arm] for s in never])}")
        )
    return words


def _signed(value: float | None) -> str:
    return number(value, 2, sign=True)


def _condensation_alone(found: Comparison) -> list[str]:
    """What is said where there are no scores: condensation, of each arm or of the most and the least condensed."""
    entries = [entry for entry in found.condensation_by_arm if entry.last]
    if not entries:
        return []
    if found.measured:
        several = len(found.seeds) > 1
        passages = f"{len(found.seeds)} choices of passages" if several else "one choice of passages"
        start = f"{len(entries)} models were measured as they are, on {passages}; nothing was trained."
    else:
        start = "The rows hold no score of a final checkpoint, so only condensation is compared."

    def words(arm: str) -> str:
        entry = next(e for e in entries if e.arm == arm)
        trend = ", ".join(
            f"{name} {_signed(values.mean)}"
            for name, values in (("Spearman", entry.spearman), ("Kendall", entry.kendall))
            if values is not None
        )
        last = f"{number(entry.last['1'].mean)} in the last layer"
        return f"{found.labels[arm]} {last}" + (f" ({trend} with depth)" if trend else "")

    lead = "Condensation, as the mean cosine of the last layer and the rank correlations of the mean cosine with depth"
    if len(entries) <= 2 * MANY:
        return [start, f"{lead}: " + "; ".join(words(entry.arm) for entry in entries) + "."]
    ordered = sorted(entries, key=lambda entry: entry.last["1"].mean)
    return [
        start,
        f"{lead}: least in {words(ordered[0].arm)}, most in {words(ordered[-1].arm)}; the table has all "
        f"{len(entries)}.",
    ]


def _size_clause(c: SizeCorrelation) -> str:
    name = SIZE_QUANTITIES[c.quantity]
    if c.rho is None:
        return f"the {name} does not vary with size" if c.quantity == "mean_cosine.last" else f"{name} does not vary"
    if c.p is None:
        return f"{_signed(c.rho)} with {name}"
    if c.p > 0.05:
        return f"{_signed(c.rho)} with {name} (p = {probability(c.p)}, no detectable trend)"
    way = "less" if c.rho < 0 else "more"
    return f"{_signed(c.rho)} with {name} (p = {probability(c.p)}: larger models are {way} condensed)"


def size_sentences(found: Comparison) -> list[str]:
    """How condensation goes with model size, a sentence a family and one over all families."""
    if found.size is None:
        return []
    if not found.size.correlations:
        return ["Fewer than three sizes: whether condensation goes with model size cannot be said."]
    lines = []
    for family in dict.fromkeys(c.family for c in found.size.correlations):
        group = [c for c in found.size.correlations if c.family == family]
        n = max(c.n for c in group)
        who = f"the {n} models of all families" if family is None else f"the {n} models of the family {family}"
        few = f"; fewer than {FEWEST_MODELS} models, so nothing is tested" if n < FEWEST_MODELS else ""
        lines.append(
            f"Over {who}, Spearman's rank correlation of the number of parameters is "
            + ", ".join(map(_size_clause, group))
            + f"{few}."
        )
    return lines


def sentences(found: Comparison) -> list[str]:
    """About three sentences: what happened to the held-out loss, to condensation, and at what cost."""
    label = found.labels
    base = label[found.baseline]
    if not found.tasks:
        alone = _condensation_alone(found)
        if alone:
            return alone + size_sentences(found)
    if not found.treated:
        return [f"Only {base} has finished runs, so there is nothing to compare it with."]
    lines: list[str] = []
    many = len(found.treated) > MANY
    scores = [("Held-out loss" if task is found.validation else task.name, task) for task in found.tasks]
    # with many tasks their mean speaks for them
    wanted = scores if len(found.tasks) < 3 else [pair for pair in scores if pair[1] is found.validation]
    for name, measure in [*wanted, *((f"The {mean.measure.name}", mean.measure) for mean in found.means)]:
        lead = f"{name} at the end of training, paired with {base}"
        if many and measure.differences:
            told = _grouped_scores(measure.differences, label)
            lines.append(f"{lead} ({_many(measure.differences)}): {told}.")
        elif measure.differences:
            clauses = [_score_clause(d, label[d.arm]) for d in measure.differences]
            lines.append(f"{lead}: " + "; ".join(clauses) + ".")
    blocks = found.measure("mean_cosine.blocks")
    if blocks is not None and blocks.differences and many:
        told = _grouped_scores(blocks.differences, label)
        lines.append(f"Condensation, as the mean cosine over the blocks ({_many(blocks.differences)}): {told}.")
    elif blocks is not None and blocks.differences:
        clauses = [_cosine_clause(d, label[d.arm]) for d in blocks.differences]
        lines.append("Condensation, as the mean cosine over the blocks: " + "; ".join(clauses) + ".")
    timed = [entry for entry in found.cost if entry.wall_ratio]
    if timed:
        costs = _many_costs(found, timed) if many else "; ".join(_cost_clause(found, entry) for entry in timed)
        lines.append(f"Cost: {costs}.")
    return lines + size_sentences(found)


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

    @property
    def repeats(self) -> list[bool]:
        """Whether a row begins like the one before it, so that a page need not say it again."""
        heads = [row[0] for row in self.text()]
        return [n > 0 and head == heads[n - 1] for n, head in enumerate(heads)]

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
    return _spread(measure.of(arm), digits)


def _spread(values: Values | None, digits: int = 3) -> Entry:
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


def _names(found: Comparison) -> dict[str, str]:
    """How tables call a measure: a benchmark of which other items were scored than it officially has says so."""
    names = {measure.quantity: measure.title for measure in _measures(found)}
    names |= {task.quantity: f"{task.title} ({task.deviation})" for task in found.tasks if task.deviation}
    odd = {(task.task, task.metric) for task in found.tasks if task.deviation}
    for mean in found.means:
        count = sum((task, mean.metric) in odd for task in mean.tasks)
        if count:
            names[mean.measure.quantity] = f"{mean.measure.title} ({count} not official)"
    return names


def _qualified(caption: str, found: Comparison) -> str:
    """The caption of a table that shows benchmarks, with what qualifies their scores."""
    return f"{caption} Benchmarks: {'; '.join(found.task_notes)}." if found.task_notes else caption


def headline(found: Comparison) -> Table:
    """Held-out loss, means over tasks and condensation of the final checkpoints, with their paired differences."""
    several, many = len(found.treated) > 1, len(found.treated) > MANY
    rows: list[tuple[Entry, ...]] = []
    names = _names(found)
    for measure in _main_measures(found):
        unit = f" ({measure.unit})" if measure.unit and measure.unit != "cosine" else ""
        shown = names[measure.quantity] + unit
        theirs = _mean_and_sd(measure, found.baseline)
        if many and measure.differences:  # the baseline has a row of its own instead of the same column in every row
            count = measure.of(found.baseline)
            n = len(count.values) if count else 0
            rows.append((shown, found.labels[found.baseline], theirs, *[NONE] * 4, (str(n), n), "baseline"))
        for d in measure.differences:
            rows.append(
                (
                    shown,
                    *((found.labels[d.arm],) if several else ()),
                    *(() if many else (theirs,)),
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
    value = "value" if many else "its value" if several else found.labels[found.treated[0]] if found.treated else "arm"
    columns = (
        *first,
        *(() if many else (found.labels[found.baseline],)),
        value,
        "difference",
        "95 % interval",
        "p",
        "p, sign flip",
        "n",
        "in words",
    )
    items = f" over {found.validation.items} held-out items" if found.validation and found.validation.items else ""
    holm = " and is corrected over arms (Holm)" if several else ""
    what = (
        "Models as they are: mean ± standard deviation over choices of passages, and differences paired by passages. "
        if found.measured
        else "Final checkpoints: mean ± standard deviation over seeds, and paired differences by seed. "
    )
    loss = f"Validation loss{items}. " if found.validation else ""
    caption = (
        f"{what}{loss}p belongs to the interval{holm}; the sign-flip test assumes less and needs six seeds "
        "or more to reach 0.05."
    )
    return Table("headline", _qualified(caption, found), columns, tuple(rows), len(first))


def condensation_table(found: Comparison) -> Table | None:
    """Condensation of every arm: the mean cosine of the last layers and its rank correlation with depth."""
    if not found.condensation_by_arm:
        return None
    widths = [n for n in ("1", "2", "3", "4", "5", "L/2") if any(n in e.last for e in found.condensation_by_arm)]
    family = {point.arm: point.family for point in found.size.points} if found.size else {}
    rows: list[tuple[Entry, ...]] = []
    for entry in found.condensation_by_arm:
        rows.append(
            (
                found.labels[entry.arm],
                *((family.get(entry.arm, NONE),) if family else ()),
                (_count(entry.parameters), entry.parameters),
                (NONE if entry.blocks is None else str(entry.blocks), entry.blocks),
                *(_spread(entry.last.get(n)) for n in widths),
                _spread(entry.spearman),
                _spread(entry.kendall),
            )
        )
    columns = (
        "arm",
        *(("family",) if family else ()),
        "parameters",
        "blocks",
        *(f"last {n}" if n != "1" else "last layer" for n in widths),
        "Spearman",
        "Kendall",
    )
    over = "choices of passages" if found.measured else "seeds"
    when = "of the models as they are" if found.measured else "of the final checkpoints"
    caption = (
        f"Condensation {when}, mean ± standard deviation over {over}: mean cosine averaged over the last n layers "
        "(L/2: half of the blocks), and rank correlation of the mean cosine with depth (+1: it rises at every layer)."
    )
    return Table("condensation", caption, columns, tuple(rows), 2 if family else 1)


def size_table(found: Comparison) -> Table | None:
    """Rank correlation between model size and condensation."""
    if found.size is None or not found.size.correlations:
        return None
    rows: tuple[tuple[Entry, ...], ...] = tuple(
        (
            c.family or "all families",
            SIZE_QUANTITIES[c.quantity],
            (str(c.n), c.n),
            (number(c.rho, 2, sign=True), c.rho),
            (probability(c.p), c.p),
        )
        for c in found.size.correlations
    )
    caption = (
        "Model size and condensation: Spearman's rank correlation over models between the number of parameters and "
        "each measure (mean over seeds). p is two-sided, exact up to 8 models, not corrected over measures, and "
        f"takes the models to be independent of each other; fewer than {FEWEST_MODELS} models are not tested."
    )
    return Table("size", caption, ("models", "measure", "n", "correlation", "p"), rows, 2)


def trials_table(found: Comparison) -> Table | None:
    """The learning rates tried for each arm."""
    rows: list[tuple[Entry, ...]] = []
    for sweep in found.trials:
        for t in sweep.trials:
            words = f"failed: {t.error}" if t.error is not None else ""
            if t.chosen:
                edge = f"; the {sweep.edge} tried: the best rate may lie outside" if sweep.edge else ""
                words = f"chosen{edge}"
            rows.append(
                (
                    found.labels[sweep.arm],
                    (f"{t.learning_rate:g}", t.learning_rate),
                    (number(t.value, 4), t.value),
                    (str(t.steps), t.steps),
                    (str(t.seed), t.seed),
                    words,
                )
            )
    if not rows:
        return None
    caption = (
        "Learning rates tried, by the loss on documents that are set aside for this choice (nats/token), before the "
        "runs and on a seed that is none of theirs. The chosen rate is that of the arm's runs."
    )
    return Table("learning_rates", caption, ("arm", "learning rate", "loss", "steps", "seed", "in words"), tuple(rows))


def layer_table(found: Comparison) -> Table | None:
    """Mean cosine of every layer; with many arms a row each, without the differences."""
    layers = found.layers
    if layers is None:
        return None
    if len(found.treated) > MANY:
        return _layers_by_arm(found)
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


def _layers_by_arm(found: Comparison) -> Table:
    layers = found.layers
    assert layers is not None
    heads = tuple(label if label[-1:].isdigit() else f"{place} {label}" for place, label in enumerate(layers.labels))
    rows: list[tuple[Entry, ...]] = []
    for arm in found.arms:
        entries = layers.values.get(arm, ())
        gaps = layers.differences.get(arm, ())
        if len(entries) != len(layers.labels):
            continue
        row: list[Entry] = [found.labels[arm]]
        for place, values in enumerate(entries):
            marked = len(gaps) == len(entries) and gaps[place].detected
            row.append((number(values.mean) + (" *" if marked else ""), values.mean))
        rows.append(tuple(row))
    return Table(
        "layers",
        "Mean cosine similarity by layer (columns) at the end of training, mean over seeds; *: detected difference to "
        "the baseline in that layer, corrected over arms, not over layers. The table of every difference has the "
        "intervals.",
        ("arm", *heads),
        tuple(rows),
    )


def _seeds_by_arm(found: Comparison) -> Table:
    measure = found.validation
    assert measure is not None
    rows: list[tuple[Entry, ...]] = []
    for arm in found.arms:
        values, d = measure.of(arm), measure.difference(arm)
        known = dict(zip(values.seeds, values.values, strict=True)) if values else {}
        gaps = dict(zip(d.seeds, d.differences, strict=True)) if d else {}
        rows.append(
            (
                found.labels[arm],
                *((number(known.get(seed), 4), known.get(seed)) for seed in found.seeds),
                *((number(gaps.get(seed), 4, sign=True), gaps.get(seed)) for seed in found.seeds),
            )
        )
    columns = ("arm", *(f"seed {seed}" for seed in found.seeds), *(f"Δ seed {seed}" for seed in found.seeds))
    caption = "Validation loss (nats/token) of every run's final checkpoint, and Δ, its difference to the baseline's."
    return Table("seeds", caption, columns, tuple(rows))


def seed_table(found: Comparison) -> Table | None:
    """Held-out loss of every run."""
    measure = found.validation
    if measure is None:
        return None
    if len(found.treated) > MANY:
        return _seeds_by_arm(found)
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
    """Time and memory; an untrained arm has dashes."""
    rows: list[tuple[Entry, ...]] = []
    with_gpu = any(any(c.peak_cuda_bytes) for c in found.cost)
    costs = [c for c in found.cost if any([*c.step_wall_ms, *c.train_wall_s, *c.peak_rss_bytes, *c.peak_cuda_bytes])]
    if not costs:
        return None
    for c in found.cost:
        if c not in costs and not c.untrained:
            continue
        step, cpu, total = (_median(values) for values in (c.step_wall_ms, c.step_cpu_ms, c.train_wall_s))
        rows.append(
            (
                found.labels[c.arm],
                (number(step, 1), step),
                _ratio(c.wall_ratio),
                (number(cpu, 1), cpu),
                _ratio(c.cpu_ratio),
                (number(total, 1) + (" *" if c.resumed else ""), total),
                _mebibytes(c.peak_rss_bytes),
                *((_mebibytes(c.peak_cuda_bytes), _ratio(c.cuda_ratio)) if with_gpu else ()),
                (str(len(c.seeds)), len(c.seeds)),
            )
        )
    columns = (
        "arm", "step (ms)", "step × baseline [range]", "CPU of a step (ms)", "CPU × baseline [range]", "training (s)",
        "peak memory (MiB)", *(("peak GPU memory (MiB)", "GPU memory × baseline [range]") if with_gpu else ()), "runs",
    )  # fmt: skip
    note = (
        " * Some runs were resumed: their total is that of the last attempt."
        if any(c.resumed for c in found.cost)
        else ""
    )
    idle = [found.labels[c.arm] for c in found.cost if c.untrained]
    untrained = f" Not trained, so without a cost of training: {_listed(idle)}." if idle else ""
    caption = (
        "Cost: median over seeds of each run's median optimizer step; ratios are paired by seed, with their range over "
        f"seeds.{note}{untrained}"
    )
    return Table("cost", caption, columns, tuple(rows))


def _mebibytes(values: Iterable[float | None]) -> Entry:
    memory = _median(values)
    return NONE if memory is None else (f"{memory / 2**20:,.0f}", memory / 2**20)


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
    names = _names(found)
    rows = tuple(
        (
            names[s.quantity],
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
    names = _names(found)
    if len(found.treated) > MANY:
        return _tasks_by_arm(found, tasks)
    rows: list[tuple[Entry, ...]] = []

    def add(name: str, measure: Measure) -> None:
        counted = measure.items
        if isinstance(measure, TaskMeasure) and counted is None and len(measure.scored) == 1:
            counted = measure.scored[0]
        row: list[Entry] = [name, (f"{counted:,}" if counted else NONE, counted)]
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
        add(_task_head(task), task)
    for mean in found.means:
        add(names[mean.measure.quantity], mean.measure)
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


def _task_head(task: TaskMeasure) -> str:
    return f"{task.task} ({task.metric}{f'; {task.deviation}' if task.deviation else ''})"


def _tasks_by_arm(found: Comparison, tasks: Sequence[TaskMeasure]) -> Table:
    """A row an arm, a column a task, as benchmarks of many models are usually printed."""
    names = _names(found)
    measures: list[tuple[str, Measure | None, dict[str, float]]] = [(_task_head(task), task, {}) for task in tasks]
    for mean in found.means:
        measures.append((names[mean.measure.quantity], mean.measure, {}))
        measures.append((f"mean rank ({mean.metric})", None, mean.mean_rank))
    rows: list[tuple[Entry, ...]] = []
    for arm in found.arms:
        row: list[Entry] = [found.labels[arm]]
        for _, measure, ranks in measures:
            if measure is None:
                row.append((number(ranks.get(arm), 2), ranks.get(arm)))
                continue
            values, d = measure.of(arm), measure.difference(arm)
            marked = f" {'+' if d.judgement == 'better' else MINUS}" if d is not None and d.detected else ""
            row.append(NONE if values is None else (number(values.mean) + marked, values.mean))
        rows.append(tuple(row))
    caption = (
        "Benchmarks at the final checkpoint, mean over seeds; + and − mark a detected difference to the baseline for "
        "the better and the worse, paired by seed and by item and corrected over arms (the table of every difference "
        "has the intervals); rank 1 is best."
    )
    return Table("tasks", _qualified(caption, found), ("arm", *(name for name, _, _ in measures)), tuple(rows))


def difference_table(found: Comparison) -> Table | None:
    """Every paired difference with both intervals and both tests."""
    names = _names(found)
    if found.layers is not None:
        names |= {f"mean_cosine.state.{n}": f"mean cosine, {label}" for n, label in enumerate(found.layers.labels)}
    rows = tuple(
        (
            names[d.quantity],
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
        for d in found.differences()
    )
    if not rows:
        return None
    columns = (
        "measure", "arm", "difference", "95 % interval over seeds", "95 % interval over seeds and items", "shown", "p",
        "p, Holm", "p, sign flip", "smallest p, sign flip", "effect g", "n", "items", "in words",
    )  # fmt: skip
    caption = (
        "Every paired difference: both intervals (that over items, where there is one, is shown elsewhere), its p, "
        "and the exact sign-flip p."
    )
    return Table("differences", _qualified(caption, found), columns, rows, 2)


def _fitting(value: float | None, *, sign: bool = False, among: Sequence[float] = ()) -> str:
    """A number with as many digits as a narrow column has room for; ``among``: numbers that share the digits."""
    largest = max((abs(v) for v in (value, *among) if v is not None and math.isfinite(v)), default=0.0)
    return number(value, 3 if largest < 100 else 1 if largest < 10_000 else 0, sign=sign)


def _fitting_interval(found: Interval | None) -> str:
    if found is None:
        return NONE
    low, high = (_fitting(bound, sign=True, among=found) for bound in found)
    return f"[{low}, {high}]"


def terminal_table(found: Comparison) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of text that fit 80 characters: measures, cosine by layer, step time, tokens to equal loss.

    With several arms each measure begins with a row of the baseline; with many the layers and, where they have a mean,
    the single benchmarks are left to the report.
    """
    several = len(found.treated) > 1
    many = len(found.treated) > MANY
    width = 13 if not several else 16
    # of a hub id the model's own name is enough, where that tells all arms apart
    names = {arm: found.labels[arm].rstrip("/").rsplit("/", 1)[-1] for arm in found.arms}
    if len(set(names.values())) < len(names):
        names = found.labels
    short = {arm: textwrap.fill(names[arm], width, max_lines=2, placeholder="…") for arm in found.arms}
    lines: list[list[str]] = []
    if not found.treated:
        for measure in _measures(found):
            values = measure.of(found.baseline)
            lines.append([textwrap.fill(measure.name, 40), _fitting(values.mean) if values else NONE])
        return ["", short[found.baseline]], lines
    columns = (
        ["", "arm", "value", "difference", "95 % interval", "n"]
        if several
        else ["", short[found.baseline], short[found.treated[0]], "difference", "95 % interval", "n"]
    )
    begun: set[str] = set()

    def add(name: str, arm: str, base: str, own: str, *cells: str) -> None:
        shown = textwrap.fill(name, 18)
        if not several:
            lines.append([shown, base, own, *cells])
            return
        if name not in begun:
            lines.append([shown, short[found.baseline], base, "", "", ""])
            begun.add(name)
        lines.append(["", short[arm], own, *cells])

    def add_difference(name: str, d: Difference) -> None:
        base, own = (_fitting(sum(values) / d.n) for values in (d.baseline_values, d.arm_values))
        add(name, d.arm, base, own, _fitting(d.mean, sign=True), _fitting_interval(d.interval), str(d.n))

    layered = found.layers is not None and not many
    # the mean over benchmarks speaks for them where every one would have a row for each of many arms
    for measure in _main_measures(found) if many and found.means else _measures(found):
        if layered and measure.quantity == "mean_cosine.last":
            continue  # the last of the layers below
        name = QUANTITIES[measure.quantity].short_title if measure.quantity in QUANTITIES else measure.title
        for d in measure.differences:
            add_difference(name, d)
    if found.layers is not None and layered:
        labels = found.layers.labels
        stride = math.ceil(len(labels) / 16)
        for place, label in enumerate(labels):
            if place % stride and place != len(labels) - 1:
                continue
            for arm in found.treated:
                if arm in found.layers.differences:
                    add_difference(f"cosine, {label}", found.layers.differences[arm][place])
    base_cost = next((c for c in found.cost if c.arm == found.baseline), None)
    costs: list[tuple[str, Callable[[Cost], Any], Callable[[Cost], Any], float]] = [
        ("step time (ms)", lambda c: c.wall_ratio, lambda c: c.step_wall_ms, 1.0),
        ("step, CPU (ms)", lambda c: c.cpu_ratio, lambda c: c.step_cpu_ms, 1.0),
        ("GPU memory (MiB)", lambda c: c.cuda_ratio, lambda c: c.peak_cuda_bytes, 2.0**20),
    ]
    for name, ratio_of, values_of, scale in costs:
        for c in found.cost:
            ratio = ratio_of(c)
            if ratio and base_cost is not None:
                theirs, mine = (
                    NONE if (value := _median(values_of(entry))) is None else number(value / scale, 1)
                    for entry in (base_cost, c)
                )
                add(name, c.arm, theirs, mine, f"× {ratio[0]:.3f}", f"{ratio[1]:.3f} to {ratio[2]:.3f}", str(c.n))
    # untrained arms have no tokens, so the runs need not have one number of them in common
    total = _median([ratio * at for s in found.speed for ratio, at in zip(s.token_ratios, s.tokens, strict=True)
                     if ratio is not None and at is not None]) or found.tokens  # fmt: skip
    for s in found.speed:
        told = NONE if s.median_token_ratio is None else f"× {1 / s.median_token_ratio:.2f}"
        # as many words as the column of values has room for
        words = (f"{s.reached}/{s.n} seeds" if s.resolved else "unsure") if several else textwrap.fill(s.words, 13)
        at = _count(_median(s.tokens)) if s.median_token_ratio is not None else words
        add("same-loss tokens", s.arm, _count(total), at, told, NONE, str(s.n))
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


def _compared(study: Study, found: Comparison | None) -> list[str]:
    """What makes the arms of a seed comparable, in paragraphs."""
    if study.measured:
        return [
            "Models as they are: nothing was trained. A seed is one choice of passages, the same for every model; each "
            "model reads them with its own tokenizer. The hashes below are of the models' weights."
        ]
    others = [arm for arm in (found.arms if found else study.arms) if study.has_own_model(arm)]
    same = "every arm starts from the same weights and reads" if not others else "every arm reads"
    lines = [
        f"The final checkpoint of every run, fixed in advance. Within a seed, {same} the same sequences in the same "
        "order; the hashes below are of the initial weights, of the sequences in the order of reading and of the "
        f"corpus, and a comparison refuses runs in which {'they' if not others else 'the last two'} differ."
    ]
    if others:
        lines.append(
            f"{_listed([study.labels[arm] for arm in others])}: other initial weights by design, so no pair from the "
            "same start. All other arms start from the same weights, which is checked."
        )
    return lines


def _limits(study: Study, found: Comparison | None) -> list[str]:
    lines = []
    if found is not None:
        n = max((d.n for m in _measures(found) for d in m.differences), default=0)
        if n == 1 and found.measured:
            lines.append("One choice of passages: no interval and no test is possible.")
        elif n == 1:
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
            "A mean cosine says how alike hidden states are, not how good a model is."
            if found.measured
            else "A lower mean cosine is what the loss is made to cause; it is no evidence that a model is better. "
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
    """What made the runs, as a user types it."""
    for cell in study.cells.values():
        command = str(cell.started.get("provenance", {}).get("command") or "")
        if command.startswith("decondense "):
            return command
    # started from Python, or by a worker of an older version: the file says it all
    return f"decondense study {study.name}.yaml --out {study.name}  # {study.name}.yaml: the configuration below"


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
                "init": str(cell.recorded("init_hash") or NONE),
                "order": str(cell.recorded("order_hash") or NONE),
                "corpus": str(cell.recorded("corpus_hash") or NONE),
                "final": str(cell.run.get("final_hash") or NONE),
                "note": note,
            }
        )
    return shown


def _pictures(study: Study, found: Comparison | None, out: Path) -> tuple[dict[str, list[Picture]], list[Path]]:
    """The figures of the page by section, and the files written for papers."""
    places = ("loss", "profiles", "maps", "differences", "cost", "size", "rates")
    sections: dict[str, list[Picture]] = {name: [] for name in places}
    files: list[Path] = []
    folder = out / "figures"

    def show(section: str, name: str, caption: str, figure: Figure, *, wide: bool = False) -> None:
        sections[section].append(Picture(name, caption, inline_svg(figure, name, caption), wide, figure.get_figwidth()))

    def write(name: str, figure: Figure) -> None:
        files.extend(export(figure, folder / name))

    finished = [cell for cell in study.cells.values() if cell.status == "finished"]
    base = study.labels.get(study.baseline or "", study.baseline or "")
    panels: list[draw.Panel] = []
    many = len(study.arms) > draw.MOST_BANDS
    band = "" if many else "; the band spans the seeds"
    trained = [cell for cell in finished if not cell.untrained]
    lines = "mean over seeds" if many else "thin lines are seeds"
    captions: dict[draw.Panel, str] = {
        "training": f"Training loss, mean over seeds{band}.",
        "validation": f"Validation loss at the evaluated checkpoints, mean over seeds{band}.",
        "difference": f"Paired difference of the validation loss to {base}: {lines}, below zero is better.",
    }
    if any(cell.steps for cell in trained):
        panels.append("training")
    if any(VALIDATION in cell.scores for cell in trained):
        panels.append("validation")
        if found is not None and found.speed:
            panels.append("difference")
    if panels and many:  # one legend of many arms is enough
        caption = " ".join(captions[panel] for panel in panels)
        show("loss", "loss", caption, draw.loss_curves(study, panels), wide=True)
    else:
        for panel in panels:
            name = "training-loss" if panel == "training" else f"validation-{panel}".replace("-validation", "-loss")
            show("loss", name, captions[panel], draw.loss_curves(study, [panel]))
    if panels:
        write("loss_curves", draw.loss_curves(study, panels))
    steps = draw.times(study)
    if steps and many:
        caption = "Mean cosine by layer, mean over seeds."
        show("profiles", "profiles", caption, draw.profiles(study, steps), wide=True)
    for step in [] if many else steps:
        caption = f"Mean cosine by layer, {draw.when(study, step)}{band}."
        show("profiles", f"profile-{step}", caption, draw.profiles(study, [step]))
    if steps:
        write("mean_cosine_by_layer", draw.profiles(study, steps))
    if found is not None and found.size is not None:
        caption = (
            "Condensation against the number of parameters, a line a family of models; bars are one standard deviation "
            "over seeds."
        )
        figure = draw.size_trend(found)
        show("size", "size", caption, figure, wide=True)
        write("condensation_by_size", figure)
        for place, family in enumerate(found.size.families, 1):
            drawn = draw.family(study, found, family)
            if drawn is not None:
                caption = (
                    f"{family}: cosines of all pairs of tokens by layer, from the smallest to the largest model, and "
                    "the rank correlation of the mean cosine with depth. Pooled over passages and seeds."
                )
                show("size", f"family-{place}", caption, drawn, wide=True)
                write(f"family_{place}", drawn)
    shown = {point.arm for point in found.size.points} if found is not None and found.size is not None else set()
    # what was not trained does not change over training; models of a family have their maps above
    moving = [arm for arm in study.arms if not any(cell.untrained for cell in study.of_arm(arm))]
    arms = [arm for arm in moving or study.arms if draw.histograms(study, arm) and (moving or arm not in shown)]
    pages = [arms[first : first + draw.MOST_MAPS] for first in range(0, len(arms), draw.MOST_MAPS)]
    for place, page in enumerate(pages, 1):
        if not draw.map_times(study, arms):
            break
        caption = (
            "Cosines of all pairs of tokens by layer, over training: colour is density (on a square-root scale), the "
            "dashed line the mean. Pooled over passages and seeds."
        )
        figure = draw.heat_maps(study, page, among=arms)
        tail = f"{place}" if len(pages) > 1 else ""
        show("maps", f"heat-maps{tail and '-'}{tail}", caption, figure, wide=True)
        write(f"heat_maps{tail and '_'}{tail}", figure)
    if found is not None and found.treated:
        dots = "Small dots are seeds, bars 95 % intervals; filled markers: detected after correction."
        if found.validation is not None and found.validation.differences:
            figure = draw.forest([found.validation], found, xlabel="Δ validation loss (nats/token)")
            caption = f"Difference of the validation loss to {base}. {dots}"
            show("differences", "forest-validation", caption, figure)
            write("difference_validation_loss", figure)
        if found.layers is not None and found.layers.differences:
            figure = draw.layer_differences(found)
            caption = f"Difference of the mean cosine to {base} by layer, with pointwise 95 % intervals."
            show("differences", "forest-layers", caption, figure, wide=figure.get_figwidth() > COLUMN)
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
                caption = f"Difference in {metric} to {base} by task. {dots}"
                show("differences", f"forest-{slug}", caption, figure, wide=figure.get_figwidth() > COLUMN)
                write(f"difference_tasks_{slug}", figure)
    if found is not None and any(any(c.step_wall_ms) for c in found.cost):
        figure = draw.cost(found)
        show("cost", "cost-step", "Median optimizer step of each run (dots), and the ratio to the baseline.", figure)
        write("cost", figure)
    if found is not None and found.trials:
        figure = draw.trials(found)
        caption = (
            "Loss on the documents set aside for the choice against the learning rate: filled markers are the chosen "
            "rates, crosses at the top are trials that failed."
        )
        show("rates", "learning-rates", caption, figure)
        write("learning_rates", figure)
    return sections, files


_TABLES: dict[str, Callable[[Comparison], Table | None]] = {
    "seeds": seed_table,
    "layers": layer_table,
    "tasks": task_table,
    "cost": cost_table,
    "speed": speed_table,
    "condensation": condensation_table,
    "size": size_table,
    "learning_rates": trials_table,
    "best_checkpoint": selection_table,
    "differences": difference_table,
}


def _tables(found: Comparison | None) -> dict[str, Table]:
    if found is None:
        return {}
    tables = {"headline": headline(found) if found.treated else None}
    tables.update({name: make(found) for name, make in _TABLES.items()})
    return {name: table for name, table in tables.items() if table is not None}


def write_tables(found: Comparison, folder: str | Path) -> list[Path]:
    """Every table of a comparison as ``NAME.csv``, ``NAME.md`` and ``NAME.tex`` in ``folder``, without a report."""
    return _write_tables(_tables(found), Path(folder))


def _write_tables(tables: dict[str, Table], folder: Path) -> list[Path]:
    written: list[Path] = []
    for table in tables.values():
        for kind, text in (("csv", table.to_csv()), ("md", table.to_markdown()), ("tex", table.to_latex())):
            path = folder / f"{table.name}.{kind}"
            atomic_write(path, text)
            written.append(path)
    return written


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
        problems = [str(fault) for fault in found.omitted]
    except CompareError as error:
        problems = [error.reason, *map(str, error.faults)]
    pictures, files = _pictures(study, found, out)
    tables = _tables(found)
    written = _write_tables(tables, out / "tables")
    page = _render(
        study=study,
        found=found,
        problems=problems,
        summary=sentences(found) if found is not None else [],
        tables={name: tables.get(name) for name in ("headline", *_TABLES)},
        pictures=pictures,
        cells=_cells(study),
        compared=_compared(study, found),
        limits=_limits(study, found),
        provenance=_provenance(study),
        command=_command(study),
        configuration=study.config.to_yaml() if study.config else "",
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
