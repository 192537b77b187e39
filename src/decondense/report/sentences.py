"""The comparison in sentences."""

from __future__ import annotations

from collections.abc import Sequence

from decondense.compare import FEWEST_MODELS, SIZE_QUANTITIES, Comparison, Cost, Difference, SizeCorrelation
from decondense.formatting import NBSP, interval, listed, number, probability, shortened
from decondense.report import words
from decondense.report.selection import MANY


def _seeds(n: int) -> str:
    return "1 seed" if n == 1 else f"{n} seeds"


def _score_clause(d: Difference, label: str) -> str:
    size = f"{number(abs(d.mean))} {d.unit}".strip()
    if d.n < 2:
        return (
            f"{label} is {words.direction(d)} by {size} in the only seed, which cannot be told from chance: not "
            "tested, more seeds are needed"
        )
    if not d.tested:
        return f"{label} differs by {number(d.mean, sign=True)} {d.unit}".strip() + f" ({words.outcome(d)})"
    better = sum((x > 0) == bool(d.higher_is_better) and x != 0 for x in d.differences)
    power = f"; {strength}" if (strength := words.power([d])) else ""
    evidence = (
        f"95{NBSP}% interval of the difference {interval(d.interval)}, n = {_seeds(d.n)}, better in {better} of "
        f"{d.n}{power}"
    )
    if d.detected:
        return f"{label} is {words.direction(d)}, by {size} ({evidence})"
    signed = f"{number(d.mean, sign=True)} {d.unit}".strip()
    corrected = " after correction for several comparisons" if d.p is not None and d.p <= 0.05 else ""
    within = f" within {number(d.margin)} {d.unit}".rstrip() if d.outcome == "equivalent" else ""
    return f"{label} is {d.outcome}{within}{corrected} ({signed}, {evidence})"


def _cosine_clause(d: Difference, label: str) -> str:
    values = f"{number(sum(d.baseline_values) / d.n)} to {number(sum(d.arm_values) / d.n)}"
    if not d.tested:
        return f"{label} moves it from {values} ({words.outcome(d)})"
    tail = f"95{NBSP}% interval of the difference {interval(d.interval)}"
    if not d.detected:
        power = f"; {strength}" if (strength := words.power([d])) else ""
        return f"{label} is {d.outcome} ({values}, {tail}{power})"
    return f"{label} {'lowers' if d.mean < 0 else 'raises'} it from {values} ({tail})"


def _cost_clause(comparison: Comparison, cost: Cost) -> str:
    assert cost.wall_ratio is not None
    name = comparison.labels[cost.arm]
    processor = f" ({cost.cpu_ratio[0]:.2f} times the CPU time)" if cost.cpu_ratio else ""
    clause = f"an optimizer step of {name} takes {cost.wall_ratio[0]:.2f} times as long{processor}"
    equal = comparison.equal_time
    d = equal.difference(cost.arm) if equal is not None else None
    if equal is not None and d is not None:
        clause += (
            f"; at equal {words.CLOCKS[equal.clock]} its held-out loss differs by {number(d.mean, sign=True)} "
            f"{interval(d.interval)} ({words.outcome(d)})"
        )
    speed = next((s for s in comparison.speed if s.arm == cost.arm), None)
    return clause if speed is None else f"{clause}; {words.same_loss(speed)}"


def _grouped_scores(differences: Sequence[Difference], label: dict[str, str], *, power: bool = True) -> str:
    """Many arms, grouped by outcome."""
    parts = []
    for outcome in words.ORDER:
        members = sorted((d for d in differences if d.outcome == outcome), key=lambda d: d.mean)
        if not members:
            continue
        if members[0].detected or not members[0].tested or len(members) <= MANY:
            members_text = ", ".join(shortened([f"{label[d.arm]} ({number(d.mean, sign=True)})" for d in members]))
        else:
            span = f"{number(members[0].mean, sign=True)} to {number(members[-1].mean, sign=True)}"
            members_text = f"{', '.join(shortened([label[d.arm] for d in members]))} ({span})"
        lost = [label[d.arm] for d in members if not d.detected and d.p is not None and d.p <= 0.05]
        tail = (
            f", of which {listed(shortened(lost))} would differ without the correction for several comparisons"
            if lost
            else ""
        )
        parts.append(f"{len(members)} {words.outcome(members[0])}: {members_text}{tail}")
    strength = words.power(differences) if power else ""
    return "; ".join(parts) + (f". Power: {strength}" if strength else "")


def _many(differences: Sequence[Difference]) -> str:
    n = sorted({d.n for d in differences})
    seeds = f"{n[0]} to {n[-1]} seeds" if len(n) > 1 else _seeds(n[0])
    unit = f", in {differences[0].unit}" if differences[0].unit and differences[0].unit != "cosine" else ""
    return f"{len(differences)} arms, n = {seeds}, p corrected over arms, differences in brackets{unit}"


def _many_costs(comparison: Comparison, costs: Sequence[Cost]) -> str:
    known = sorted((c.wall_ratio[0], comparison.labels[c.arm]) for c in costs if c.wall_ratio)
    text = (
        f"an optimizer step takes {known[0][0]:.2f} ({known[0][1]}) to {known[-1][0]:.2f} ({known[-1][1]}) times as "
        "long as the baseline's"
    )
    if comparison.equal_time is not None:
        clock = words.CLOCKS[comparison.equal_time.clock]
        told = _grouped_scores(comparison.equal_time.differences, comparison.labels, power=False)
        text += f"; held-out loss at equal {clock}: {told}"
    speeds = [s.in_tokens for s in comparison.speed if s.in_tokens is not None]
    if speeds:
        best = min(speeds, key=lambda d: d.mean)
        share, bounds = words.shares(best)
        span = "" if bounds is None else f" [{100 * bounds[0]:.0f}, {100 * bounds[1]:.0f}]"
        text += (
            f"; a loss that both reach takes {comparison.labels[best.arm]}, which needs fewest, {100 * share:.0f}"
            f"{NBSP}%{span} of the tokens ({words.outcome(best)})"
        )
    return text


def _signed(value: float | None) -> str:
    return number(value, 2, sign=True)


def _condensation_alone(comparison: Comparison) -> list[str]:
    """What is said where there are no scores: condensation, of each arm or of the most and the least condensed."""
    entries = [entry for entry in comparison.condensation_by_arm if entry.last]
    if not entries:
        return []
    if comparison.measured:
        several = len(comparison.seeds) > 1
        passages = f"{len(comparison.seeds)} choices of passages" if several else "one choice of passages"
        start = f"{len(entries)} models were measured as they are, on {passages}; nothing was trained."
    else:
        start = "The rows hold no score of a final checkpoint, so only condensation is compared."

    def state(arm: str) -> str:
        entry = next(e for e in entries if e.arm == arm)
        trend = ", ".join(
            f"{name} {_signed(values.mean)}"
            for name, values in (("Spearman", entry.spearman), ("Kendall", entry.kendall))
            if values is not None
        )
        last = f"{number(entry.last['1'].mean)} in the last layer"
        return f"{comparison.labels[arm]} {last}" + (f" ({trend} with depth)" if trend else "")

    lead = "Condensation, as the mean cosine of the last layer and the rank correlations of the mean cosine with depth"
    if len(entries) <= 2 * MANY:
        return [start, f"{lead}: " + "; ".join(state(entry.arm) for entry in entries) + "."]
    ordered = sorted(entries, key=lambda entry: entry.last["1"].mean)
    return [
        start,
        f"{lead}: least in {state(ordered[0].arm)}, most in {state(ordered[-1].arm)}; the table has all "
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


def size_sentences(comparison: Comparison) -> list[str]:
    """How condensation goes with model size, a sentence a family and one over all families."""
    if comparison.size is None:
        return []
    if not comparison.size.correlations:
        return ["Fewer than three sizes: whether condensation goes with model size cannot be said."]
    lines = []
    for family in dict.fromkeys(c.family for c in comparison.size.correlations):
        group = [c for c in comparison.size.correlations if c.family == family]
        n = max(c.n for c in group)
        who = f"the {n} models of all families" if family is None else f"the {n} models of the family {family}"
        few = f"; fewer than {FEWEST_MODELS} models, so nothing is tested" if n < FEWEST_MODELS else ""
        lines.append(
            f"Over {who}, Spearman's rank correlation of the number of parameters is "
            + ", ".join(map(_size_clause, group))
            + f"{few}."
        )
    return lines


def _plateaus(comparison: Comparison) -> list[str]:
    """Which arms spend part of training condensed; none: nothing is said."""
    clauses = []
    for arm in comparison.arms:
        runs = [p for p in comparison.plateaus if p.arm == arm]
        above = [p for p in runs if p.share > 0]
        if not above:
            continue
        mean = sum(p.share for p in runs) / len(runs)
        escapes = sorted(p.escape for p in above if p.escape is not None)
        when = ""
        if escapes:
            span = f"step {escapes[0]:,.0f}" if len(escapes) == 1 else f"steps {escapes[0]:,.0f} to {escapes[-1]:,.0f}"
            when = f", escaping at {span}"
        stuck = sum(p.stuck for p in above)
        end = f", {stuck} not by the end" if stuck else ""
        clauses.append(
            f"{comparison.labels[arm]} {100 * mean:.0f}{NBSP}% (in {len(above)} of {_seeds(len(runs))}{when}{end})"
        )
    if not clauses:
        return []
    others = "" if len(clauses) == len(comparison.arms) else "; no run of the other arms"
    return [f"Share of training with a mean cosine above 0.9 over the blocks: {'; '.join(shortened(clauses))}{others}."]


def sentences(comparison: Comparison) -> list[str]:
    """About three sentences: what happened to the held-out loss, to condensation, and at what cost."""
    label = comparison.labels
    base = label[comparison.baseline]
    if not comparison.tasks:
        alone = _condensation_alone(comparison)
        if alone:
            return alone + size_sentences(comparison)
    if not comparison.treated:
        return [f"Only {base} has finished runs, so there is nothing to compare it with."]
    lines: list[str] = []
    many = len(comparison.treated) > MANY
    own = [task for task in comparison.tasks if not task.gold]
    scores = [("Held-out loss" if task is comparison.validation else task.title, task) for task in own]
    # with many tasks their mean speaks for them
    wanted = scores if len(own) < 3 else [pair for pair in scores if pair[1] is comparison.validation]
    for name, measure in [*wanted, *((f"The {mean.measure.title}", mean.measure) for mean in comparison.means)]:
        lead = f"{name} at the end of training, paired with {base}"
        if many and measure.differences:
            told = _grouped_scores(measure.differences, label)
            lines.append(f"{lead} ({_many(measure.differences)}): {told}.")
        elif measure.differences:
            clauses = [_score_clause(d, label[d.arm]) for d in measure.differences]
            lines.append(f"{lead}: " + "; ".join(clauses) + ".")
    blocks = comparison.measure("mean_cosine.blocks")
    if blocks is not None and blocks.differences and many:
        told = _grouped_scores(blocks.differences, label)
        lines.append(f"Condensation, as the mean cosine over the blocks ({_many(blocks.differences)}): {told}.")
    elif blocks is not None and blocks.differences:
        clauses = [_cosine_clause(d, label[d.arm]) for d in blocks.differences]
        lines.append("Condensation, as the mean cosine over the blocks: " + "; ".join(clauses) + ".")
    lines += _plateaus(comparison)
    timed = [entry for entry in comparison.cost if entry.wall_ratio]
    if timed:
        costs = (
            _many_costs(comparison, timed) if many else "; ".join(_cost_clause(comparison, entry) for entry in timed)
        )
        lines.append(f"Cost: {costs}.")
    return lines + size_sentences(comparison)


def summary(comparison: Comparison) -> str:
    """The summary as one paragraph."""
    return " ".join(sentences(comparison))
