"""What the rows say in five sentences, for the head of the results page; collected by tables.py."""

from __future__ import annotations

import json

import horizon
from beyond import answered
from claims import CLAIMS, judged
from decondense.compare import Difference
from decondense.report import number
from decondense.report import words as report_words
from real_tables import measured_rows
from study_rows import blocks, committed, estimate, loss_difference, mean, paired, shown, warm_up_control

KINDS = {
    "agrees": ("agrees", "agree"),
    "disagrees": ("disagrees", "disagree"),
    "equivalent": ("shows no difference that matters", "show no difference that matters"),
    "undecided": ("is undecided", "are undecided"),
    "not tested": ("cannot be tested by an interval (every seed gives one value)",) * 2,
    "not testable": ("cannot be tested at this scale (the statistic is at its bound)",) * 2,
    "not run": ("has not been run", "have not been run"),
}
"""What is said of one claim, and of several."""


def front() -> str:
    """Five sentences, good or bad, each from committed rows."""
    sentences = [_claims(), _dispersed(), _lead(), horizon.sentence(), _trained()]
    return "\n".join(f"{place}. {sentence}" for place, sentence in enumerate(sentences, start=1))


def _claims() -> str:
    found = [verdict for _, verdict in judged("tiny").values()]
    counts = [f"{found.count(kind)} {said[found.count(kind) > 1]}" for kind, said in KINDS.items() if kind in found]
    return f"**The published claims, at the scale of minutes:** of {len(CLAIMS)}, {', '.join(counts)}."


def _dispersed() -> str:
    """How many studies a dispersion loss spread the states in, by the mean cosine over the blocks."""
    lower, tested = 0, 0
    for name in ("schedule", "table5", "table3", "fig5", "fig7", "fig7-smollm2"):
        f = committed(name)
        if f is None:
            continue
        for arm in f.comparison.treated:
            if arm in f.comparison.dispersed:
                d = paired(f, arm, f.comparison.baseline, blocks)
                tested += 1
                lower += d.p is not None and d.p <= 0.05 and d.mean < 0
    real = next((row for row in measured_rows().values() if "SmolLM2" in row["variant"]), None)
    seen = "" if real is None else (
        f" Real small models are condensed: {real['variant']} has a mean cosine of "
        f"{number(real['metrics']['last']['half'], 2)} over its deep half, rising with depth (Spearman "
        f"{number(real['metrics']['spearman'], 2, sign=True)})."
    )  # fmt: skip
    return f"**Dispersion loss disperses:** it lowers the mean cosine in {lower} of {tested} arms that have it.{seen}"


def _lead() -> str:
    f = committed("schedule")
    if f is None:
        return "**The early lead:** not run yet."
    d = loss_difference(f, "cosine-0.3", "cross-entropy")
    fair = _tuned_lead()
    early = committed("table3")
    start = ""
    if early is not None:
        start = (
            f" At the very start of training, after {early.tokens / 1e6:.1f} M tokens, each side at the rate and "
            f"warm-up that a sweep chose, a lead is left: {shown(loss_difference(early, 'all', 'cross-entropy'))}."
        )
    return (
        "**Most of the early lead is the baseline's warm-up:** after 2 M tokens the held-out loss with dispersion loss "
        f"less that without is {shown(d)} with 10 % of warm-up, and {shown(fair)} with 30 % and a learning rate of its "
        f"own for either.{start}"
    )


def _tuned_lead() -> Difference:
    """After 2 M tokens: each side at its own best rate of those that have more than one seed."""
    _, ends = warm_up_control()
    best = {
        side: min(
            (key for key in ends if key[1] == side and len(ends[key]) > 1), key=lambda k: mean([*ends[k].values()])
        )
        for side in (False, True)
    }
    plain, dispersed = ends[best[False]], ends[best[True]]
    both = sorted({*plain} & {*dispersed})
    return estimate([dispersed[seed] - plain[seed] for seed in both], of=committed("schedule"))


def _trained() -> str:
    return f"**Added to a model that is trained already, at the paper's weight 0.1:** {_added()}"


TRAINED = {
    "table2": ("a model of 300 steps", "angular"),
    "mid-training-260k": ("a Llama of 260 K parameters", "dispersion-0.1"),
    "fig7-smollm2": ("SmolLM2-135M", "dispersion-0.1"),
}
"""Study of a trained start -> what the start is, and the arm with the paper's weight."""


def _added() -> str:
    said, scores = [], []
    for name, (start, arm) in TRAINED.items():
        f = committed(name)
        if f is not None and arm in f.comparison.treated:
            d = loss_difference(f, arm, f.comparison.baseline)
            verdict = "equivalent" if d.within_margin else report_words.outcome(d)
            said.append(f"{start} {shown(d)} ({verdict})")
            scores += [task_mean.measure.difference(arm) for task_mean in f.comparison.means]
    outcomes = {d.outcome for d in scores if d is not None}
    mean_score = "has not been measured" if not outcomes else f"is {' and '.join(sorted(outcomes))}"
    return (
        f"held-out loss less that of cross-entropy: {'; '.join(said)}. The mean score of the Llama over the ten "
        f"benchmarks {mean_score}."
    )


def default() -> str:
    """What the rows support, for the README: which call, for which training, and what is not known."""
    lines = []
    f = committed("table3")
    if f is not None and f.comparison.equal_time is not None:
        equal = f.comparison.equal_time
        timed = {arm: d for arm in f.comparison.treated if (d := equal.difference(arm)) is not None}
        better = [arm for arm, d in timed.items() if d.outcome == "better"]
        if better:
            arm = min(better, key=lambda name: timed[name].mean)
            entry = f.study.arm_config(arm)
            assert entry is not None
            assert entry.dispersion is not None
            layers = json.dumps(entry.dispersion.layers)
            call = f"attach(model, weight={entry.dispersion.weight}, layers={layers})"
            lines.append(
                f"**From scratch, a short run:** `{call}`, the best of {len(timed)} choices of layers. After "
                f"{f.tokens / 1e6:.1f} M tokens the held-out loss differs from that of cross-entropy by "
                f"{shown(loss_difference(f, arm))}, at equal CPU time by {shown(timed[arm])}; a sweep chose rate and "
                "warm-up of each side."
            )
        else:
            lines.append("**From scratch, a short run:** no choice of layers is better at equal time.")
    lines.append(
        f"**From scratch, at 20 tokens a parameter:** {horizon.advice()}."
        if horizon.ran()
        else f"**From scratch, a longer run:** not known: after 2 M tokens the difference is {shown(_tuned_lead())} "
        "where the warm-up is long enough; the study at 20 tokens a parameter has not been run."
    )
    lines.append(f"**A model that is trained already, weight 0.1:** {_added()}")
    lines += [answered(ran)[place] for name, place in (("target", 1), ("cause", 0)) if (ran := committed(name))]
    return "\n".join(f"- {line}" for line in lines)


TABLES = {"results-front": front, "default": default}
