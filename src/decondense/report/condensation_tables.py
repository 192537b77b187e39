"""Tables of condensation: by arm, by size, by layer."""

from __future__ import annotations

from decondense.compare import FEWEST_MODELS, SIZE_QUANTITIES, Comparison
from decondense.compare.results import Undefined
from decondense.formatting import NONE, count, interval, number, probability
from decondense.report.cells import bounds, spread
from decondense.report.selection import MANY
from decondense.table import Entry, Table


def condensation_table(comparison: Comparison) -> Table | None:
    """Condensation of every arm: the mean cosine of the last layers and its rank correlation with depth."""
    if not comparison.condensation_by_arm:
        return None
    widths = [n for n in ("1", "2", "3", "4", "5", "L/2") if any(n in e.last for e in comparison.condensation_by_arm)]
    family = {point.arm: point.family for point in comparison.size.points} if comparison.size else {}
    rows: list[tuple[Entry, ...]] = []
    for entry in comparison.condensation_by_arm:
        rows.append(
            (
                comparison.labels[entry.arm],
                *((family.get(entry.arm, NONE),) if family else ()),
                (count(entry.parameters), entry.parameters),
                (NONE if entry.blocks is None else str(entry.blocks), entry.blocks),
                *(spread(entry.last.get(n)) for n in widths),
                spread(entry.spearman),
                spread(entry.kendall),
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
    over = "choices of passages" if comparison.measured else "seeds"
    when = "of the models as they are" if comparison.measured else "of the final checkpoints"
    caption = (
        f"Condensation {when}, mean ± standard deviation over {over}: mean cosine averaged over the last n layers "
        "(L/2: half of the blocks), and rank correlation of the mean cosine with depth (+1: it rises at every layer)."
    )
    return Table("condensation", caption, columns, tuple(rows), 2 if family else 1)


def size_table(comparison: Comparison) -> Table | None:
    """Rank correlation between model size and condensation."""
    if comparison.size is None or not comparison.size.correlations:
        return None
    rows: tuple[tuple[Entry, ...], ...] = tuple(
        (
            c.family or "all families",
            SIZE_QUANTITIES[c.quantity],
            (str(c.n), c.n),
            (number(c.rho, 2, sign=True), c.rho),
            (probability(c.p), c.p),
        )
        for c in comparison.size.correlations
    )
    caption = (
        "Model size and condensation: Spearman's rank correlation over models between the number of parameters and "
        "each measure (mean over seeds). p is two-sided, exact up to 8 models, not corrected over measures, and "
        f"takes the models to be independent of each other; fewer than {FEWEST_MODELS} models are not tested."
    )
    return Table("size", caption, ("models", "measure", "n", "correlation", "p"), rows, 2)


def layer_table(comparison: Comparison) -> Table | None:
    """Mean cosine of every layer; with many arms a row each, without the differences."""
    layers = comparison.layers
    if layers is None:
        return None
    if len(comparison.treated) > MANY:
        return _layers_by_arm(comparison)
    arms = [arm for arm in comparison.arms if arm in layers.values and len(layers.values[arm]) == len(layers.labels)]
    treated = [arm for arm in comparison.treated if len(layers.differences.get(arm, ())) == len(layers.labels)]
    rows = []
    for place, label in enumerate(layers.labels):
        row: list[Entry] = [f"{place} {label}" if not label[-1:].isdigit() else label]
        for arm in arms:
            values = layers.values[arm][place]
            spread = f" ± {number(values.sd)}" if values.sd is not None else ""
            row.append((number(values.mean) + spread, values.mean))
        for arm in treated:
            d = layers.differences[arm][place]
            row += [(number(d.mean, sign=True), d.mean), bounds(d.interval)]
        rows.append(tuple(row))
    several = len(treated) > 1
    tail = [f"Δ {comparison.labels[arm]}" if several else "difference" for arm in treated]
    columns = ["layer", *(comparison.labels[arm] for arm in arms)]
    for name in tail:
        columns += [name, f"95 % interval of {name}" if several else "95 % interval"]
    return Table(
        "layers",
        "Mean cosine similarity by layer at the end of training, mean ± standard deviation over seeds; intervals are "
        "pointwise (Student t over seeds).",
        tuple(columns),
        tuple(rows),
    )


def _layers_by_arm(comparison: Comparison) -> Table:
    layers = comparison.layers
    assert layers is not None
    heads = tuple(label if label[-1:].isdigit() else f"{place} {label}" for place, label in enumerate(layers.labels))
    rows: list[tuple[Entry, ...]] = []
    for arm in comparison.arms:
        entries = layers.values.get(arm, ())
        gaps = layers.differences.get(arm, ())
        if len(entries) != len(layers.labels):
            continue
        row: list[Entry] = [comparison.labels[arm]]
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


NO_SHARE: dict[Undefined, str] = {
    "few seeds": "too few seeds for a line",
    "no gain": "no share: the difference in loss is not detectably different from 0",
    "equal cosines": "no line: the cosine difference is equal in every seed",
    "on a line": "no interval: the seeds lie exactly on a line",
}
"""Why an arm has no share explained."""


def mediation_table(comparison: Comparison) -> Table | None:
    """The share of each arm's gain that goes with the cosine, by point of training."""
    rows: list[tuple[Entry, ...]] = [
        (
            comparison.labels[m.arm],
            (f"{100 * m.at:.0f} %", m.at),
            (str(len(m.seeds)), len(m.seeds)),
            (number(m.cosine, sign=True), m.cosine),
            (number(m.gain, 4, sign=True), m.gain),
            (number(m.slope, sign=True), m.slope),
            (number(m.correlation, 2, sign=True), m.correlation),
            (NONE if m.share is None else f"{100 * m.share:.0f} %", m.share),
            NONE if m.interval is None else (interval((100 * m.interval[0], 100 * m.interval[1]), 0), m.interval),
            "" if m.undefined is None else NO_SHARE[m.undefined],
        )
        for m in comparison.mediation
    ]
    if not rows:
        return None
    caption = (
        "Share of the difference in held-out loss that goes with the cosine: slope of the paired differences of the "
        "loss on those of the mean cosine over the blocks at a point of training, times the mean difference in cosine, "
        "over the mean difference in loss. 100 %: all of it; 0 %: none; an interval that holds both says neither. The "
        "slope comes from how the seeds of one arm differ, so it is no proof of a cause; not corrected over arms and "
        "points."
    )
    columns = (
        "arm", "cosine at", "seeds", "Δ cosine", "Δ loss (nats/token)", "slope", "correlation", "share",
        "95 % interval (%)", "note",
    )  # fmt: skip
    return Table("mediation", caption, columns, tuple(rows), 2)
