"""Equal time and tokens to the same loss, plateaus, and what weakens an interval, on rows whose answer is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats
from synthetic import TOKENS_A_STEP, study

from decondense.compare import VALIDATION, Cell, Comparison, Study, compare
from decondense.compare.context import Context
from decondense.compare.cost import equal_time, loss_at, speeds
from decondense.records import Row
from decondense.report import headline, plateau_table, sentences

STEPS = 300


def _losses(curve: Callable[[str, int, float], float]) -> Callable[[Row], Row]:
    """Validation losses by arm, seed and share of training."""

    def change(row: Row) -> Row:
        if row["kind"] == "eval":
            row["value"] = curve(row["arm"], row["seed"], row["step"] / STEPS)
        return row

    return change


def _straight(arm: str, seed: int, share: float) -> float:
    # the baseline falls by 1 over training, the arm by 2
    return 8.0 + 0.01 * seed - (2 if arm == "dispersion" else 1) * share


def _compared(curve: Callable[[str, int, float], float], pace: float = 1.25, **keywords: object) -> Comparison:
    times = {"cross-entropy": 100.0, "dispersion": 100.0 * pace}
    return compare(study(change=_losses(curve), step_ms=times, documents=3, **keywords))  # type: ignore[arg-type]


def test_the_loss_at_equal_time_by_hand() -> None:
    found = _compared(_straight)
    assert found.equal_time is not None
    assert found.equal_time.clock == "cpu"
    assert found.equal_time.paces == {"dispersion": pytest.approx(1.25)}
    # the baseline's time ends at 80 % of the arm's tokens, between 7 (at 50 %) and 6, linear in log tokens; less 7
    part = math.log(0.8 / 0.5) / math.log(2)
    (d,) = found.equal_time.differences
    assert d.mean == pytest.approx(-part)
    assert d.margin == found.margin
    # a faster arm is compared where it ends: 8 - 2 less the baseline at 80 %, between 7.5 and 7
    faster = _compared(_straight, pace=0.8)
    assert faster.equal_time is not None
    assert faster.equal_time.differences[0].mean == pytest.approx(6.0 - (7.5 - 0.5 * part))
    # at an equal pace it is the difference at equal tokens
    equal = _compared(_straight, pace=1.0)
    assert equal.equal_time is not None
    assert equal.validation is not None
    assert equal.equal_time.differences[0].differences == pytest.approx(equal.validation.differences[0].differences)


def test_a_gpu_is_timed_by_the_wall() -> None:
    def on_gpu(row: Row) -> Row:
        if row["kind"] == "run" and row["status"] == "finished":
            slow = 1.5 if row["arm"] == "dispersion" else 1.0
            row["timing"] |= {"peak_cuda_bytes": 1e9, "step_wall_ms": 100.0 * slow, "step_cpu_ms": 50.0}
        return row

    found = compare(study(change=on_gpu, documents=3))
    assert found.equal_time is not None
    assert (found.equal_time.clock, found.equal_time.paces["dispersion"]) == ("wall", pytest.approx(1.5))
    assert {speed.clock for speed in found.speed} == {"wall"}


def test_without_times_there_is_no_equal_time() -> None:
    found = compare(study(change=lambda row: {**row, "timing": {}} if "timing" in row else row, documents=3))
    assert found.equal_time is None
    assert found.speed[0].in_time is None
    assert found.speed[0].in_tokens is not None


def test_tokens_to_a_loss_that_both_reach_by_hand() -> None:
    found = _compared(_straight)
    (speed,) = found.speed
    assert (speed.reached, speed.n) == (3, 3)
    assert speed.targets == pytest.approx((7.0, 7.01, 7.02))
    assert speed.baseline_tokens == pytest.approx((STEPS * TOKENS_A_STEP,) * 3)
    assert speed.tokens == pytest.approx((STEPS / 2 * TOKENS_A_STEP,) * 3)
    assert speed.share_of_tokens == pytest.approx(0.5)
    assert speed.share_of_time == pytest.approx(0.625)


def test_exchanging_the_arms_inverts_what_is_said_of_equal_cost() -> None:
    rows = study(step_ms={"cross-entropy": 100.0, "dispersion": 120.0}, documents=3)
    there, back = compare(rows), compare(rows, "dispersion")
    for one, other in (
        (there.speed[0].in_tokens, back.speed[0].in_tokens),
        (there.speed[0].in_time, back.speed[0].in_time),
        (there.equal_time and there.equal_time.differences[0], back.equal_time and back.equal_time.differences[0]),
    ):
        assert one is not None
        assert other is not None
        assert one.differences == pytest.approx([-d for d in other.differences])
        assert {one.outcome, other.outcome} == {"better", "worse"}


def test_a_start_that_has_the_loss_already_is_no_speed_up() -> None:
    found = _compared(lambda arm, seed, share: 4.0 + share + 0.1 * seed * (arm == "dispersion"))
    (speed,) = found.speed
    assert speed.resolved
    assert speed.tokens == (0.0, 0.0, 0.0)
    assert speed.in_tokens is None
    assert speed.share_of_time is None


def test_checkpoints_too_far_apart_say_nothing_about_equal_cost() -> None:
    rows = study(change=lambda row: None if row["kind"] == "eval" and 0 < row["step"] < STEPS else row, documents=3)
    found = compare([{**row, "timing": {}} if row["kind"] == "step" else row for row in rows])
    assert not found.speed[0].resolved
    assert found.speed[0].in_tokens is None
    slow = {"cross-entropy": 100.0, "dispersion": 110.0}
    coarse = study(
        change=lambda row: None if row["kind"] == "eval" and 0 < row["step"] < STEPS else row,
        step_ms=slow,
        documents=3,
    )
    assert compare(coarse).equal_time is None


def test_the_first_table_has_the_rows_of_equal_cost() -> None:
    found = _compared(
        lambda arm, seed, share: _straight(arm, seed, share) - 0.02 * seed * (arm == "dispersion") * share
    )
    table = headline(found)
    assert table is not None
    by_name = {row[0]: row for row in table.rows if row[1] == "dispersion"}
    equal = by_name["validation loss at equal CPU time (nats/token)"]
    assert found.equal_time is not None
    assert equal[3][1] == found.equal_time.differences[0].mean
    assert by_name["CPU time to a loss that both reach (× baseline)"][3][1] == found.speed[0].share_of_time
    low, high = by_name["tokens to a loss that both reach (× baseline)"][4][1]
    assert found.speed[0].in_tokens is not None
    assert (math.log(low), math.log(high)) == pytest.approx(found.speed[0].in_tokens.interval)


# ---- error rates ---------------------------------------------------------------------------------------------------

POINTS = np.linspace(0, 1, 21)


def _context(curves: dict[str, np.ndarray], pace: float) -> Context:
    """Runs with these held-out losses [seeds, points] and nothing else."""
    seeds = list(range(len(next(iter(curves.values())))))
    cells = {}
    for arm, loss_SP in curves.items():
        for seed in seeds:
            steps = [round(1000 * point) for point in POINTS]
            score = {
                step: {"step": step, "tokens": step * TOKENS_A_STEP, "value": float(value)}
                for step, value in zip(steps, loss_SP[seed], strict=True)
            }
            timing = {"step_cpu_ms": 100.0 * (pace if arm == "arm" else 1.0)}
            run = {"steps": 1000, "timing": timing}
            cells[arm, seed] = Cell(arm, seed, status="finished", run=run, scores={VALIDATION: score})
    arms = list(curves)
    whole = Study("s", "f", "", "", arms[0], arms, seeds, {arm: arm for arm in arms}, None, cells)
    return Context(whole, arms[0], arms, seeds, cells, dict.fromkeys(arms, seeds), 0.02)


def _run(rng: np.random.Generator, seeds: int, faster: float = 1.0, noise: float = 0.02) -> np.ndarray:
    """A power law of the tokens that ends at a loss of its own, with an error of each evaluation."""
    loss_P = 3 + 2 / np.sqrt(0.05 + faster * POINTS)
    return loss_P + rng.normal(0, noise, (seeds, 1)) + rng.normal(0, noise / 10, (seeds, len(POINTS)))


def _shares(seeds: int, studies: int, faster: float, noise: float) -> tuple[float, float, float]:
    """Shares of studies called better and worse in tokens, and whose interval holds the truth."""
    rng = np.random.default_rng([seeds, round(100 * faster)])
    better = worse = covered = 0
    for _ in range(studies):
        curves = {"base": _run(rng, seeds, 1.0, noise), "arm": _run(rng, seeds, faster, noise)}
        (speed,) = speeds(_context(curves, 1.0))
        assert speed.in_tokens is not None
        assert speed.in_tokens.interval is not None
        better += speed.in_tokens.outcome == "better"
        worse += speed.in_tokens.outcome == "worse"
        # 0.05 + faster * share has the loss of the end of the slower run, 0.05 + 1
        low, high = speed.in_tokens.interval
        covered += low <= -math.log(faster) <= high
    return better / studies, worse / studies, covered / studies


def test_no_arm_is_called_faster_under_the_null() -> None:
    """Counting the seeds that reach the baseline's loss would call 1 of 8 such studies faster, and none slower."""
    better, worse, covered = _shares(3, 400, 1.0, 0.02)
    bound = stats.binom.ppf(1 - 1e-4, 400, 0.025) / 400
    assert better <= bound
    assert worse <= bound
    assert covered >= 0.95 - 0.04


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5, 8, 12])
@pytest.mark.parametrize(("faster", "noise"), [(1.0, 0.002), (1.0, 0.02), (1.0, 0.2), (1.5, 0.01), (0.7, 0.01)])
def test_tokens_to_the_same_loss_keep_their_level_and_coverage(seeds: int, faster: float, noise: float) -> None:
    """The chord between checkpoints 5 % apart is 0.1 % of the tokens late, a quarter of the least standard error here:
    with a noise of 0.002 and 12 seeds it is as large as that, and the coverage of a speed-up falls to 86 %, for an
    interval that is 0.2 % wide and errs towards no difference."""
    studies = 600
    better, worse, covered = _shares(seeds, studies, faster, noise)
    assert covered >= stats.binom.ppf(1e-3, studies, 0.94) / studies
    if faster == 1:
        assert better + worse <= stats.binom.ppf(0.999, studies, 0.06) / studies
        assert abs(better - worse) <= 4 * math.sqrt(0.06 / studies)


@pytest.mark.slow
@pytest.mark.parametrize("pace", [0.8, 1.0, 1.2])
def test_the_loss_at_equal_time_is_that_of_the_curve(pace: float) -> None:
    """The curve is known: coverage of its difference at the shorter of the two total times."""
    rng = np.random.default_rng(5)
    covered, studies = 0, 600
    truth = np.diff([2 / math.sqrt(0.05 + share) for share in (min(1.0, pace), min(1.0, 1 / pace))])[0]
    for _ in range(studies):
        found = equal_time(_context({"base": _run(rng, 4), "arm": _run(rng, 4)}, pace))
        assert found is not None
        assert found.differences[0].interval is not None
        low, high = found.differences[0].interval
        covered += low <= truth <= high
    assert covered >= stats.binom.ppf(1e-3, studies, 0.945)


@pytest.mark.parametrize("power", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("share", [0.6, 0.8, 0.95])
def test_between_checkpoints_the_loss_errs_a_little_and_against_the_run_that_is_cut(power: float, share: float) -> None:
    """On power laws, evaluated at the default points: above the curve, and nearer to it than the chord."""

    def truth(share: float) -> float:
        return 3 + 2 * (0.02 + share) ** -power

    cell = Cell("arm", 0, status="finished", run={"steps": 1000})
    for step in (0, 100, 250, 500, 1000):
        cell.scores.setdefault(VALIDATION, {})[step] = {"tokens": step, "value": truth(step / 1000)}
    chord = truth(0.5) + (share - 0.5) / 0.5 * (truth(1) - truth(0.5))
    found = loss_at(cell, share)
    assert found is not None
    assert 0 <= found - truth(share) < 0.6 * (chord - truth(share))
    assert loss_at(cell, 1.0) == truth(1)
    assert loss_at(cell, 0.05) == pytest.approx((truth(0) + truth(0.1)) / 2)


# ---- plateaus, spreads, documents ------------------------------------------------------------------------------------


def _condensed(levels: dict[tuple[str, int], list[float]]) -> Callable[[Row], Row]:
    """Mean cosine of every state, by arm and seed, at the evaluated points 0, 10, 25, 50 and 100 %."""
    points = [0, 30, 75, 150, 300]

    def change(row: Row) -> Row:
        if row["kind"] == "profile" and (row["arm"], row["seed"]) in levels:
            level = levels[row["arm"], row["seed"]][points.index(row["step"])]
            row["mean_cosine"] = [level] * len(row["layers"])
        return row

    return change


def test_plateaus_by_hand() -> None:
    levels = {
        ("cross-entropy", 0): [0.1, 0.98, 0.98, 0.82, 0.3],  # up at 30 * .8/.88, down half way from 75 to 150
        ("cross-entropy", 1): [0.1, 0.95, 0.95, 0.95, 0.95],
        ("cross-entropy", 2): [0.1, 0.95, 0.5, 0.95, 0.5],  # what counts is the last escape
    }
    found = compare(study(change=_condensed(levels), documents=3))
    by_run = {(p.arm, p.seed): p for p in found.plateaus}
    assert len(by_run) == 6
    first, stuck, twice = (by_run["cross-entropy", seed] for seed in range(3))
    assert first.escape == pytest.approx(112.5)
    assert first.between == (75.0, 150.0)
    assert first.share == pytest.approx((112.5 - 30 * 0.8 / 0.88) / 300)
    assert (stuck.escape, stuck.stuck) == (None, True)
    assert stuck.share == pytest.approx(1 - 30 * (0.8 / 0.85) / 300)
    assert twice.escape == pytest.approx(150 + 150 * 0.05 / 0.45)
    assert {p.share for p in found.plateaus if p.arm == "dispersion"} == {0.0}
    (note,) = [note for note in found.notes if note.kind == "plateaus in some arms"]
    assert (note.arms, note.facts["without"]) == (("cross-entropy",), ("dispersion",))
    table = plateau_table(found)
    assert table is not None
    assert [row[3] for row in table.text()] == ["112", "not escaped", "167", "–", "–", "–"]
    assert any("above 0.9" in sentence and "1 not by the end" in sentence for sentence in sentences(found))


def test_plateaus_of_every_arm_or_of_none_need_no_warning() -> None:
    both = {(arm, seed): [0.95] * 5 for arm in ("cross-entropy", "dispersion") for seed in range(3)}
    found = compare(study(change=_condensed(both), documents=3))
    assert not [note for note in found.notes if note.kind == "plateaus in some arms"]
    assert plateau_table(compare(study(documents=3))) is None


@pytest.mark.parametrize(("factor", "noted"), [(4.0, False), (8.0, True), (1 / 8, True)])
def test_arms_whose_seeds_spread_differently_are_named(factor: float, noted: bool) -> None:
    def curve(arm: str, seed: int, share: float) -> float:
        return 8.0 - share + 0.01 * (seed - 1) * (factor if arm == "dispersion" else 1)

    found = _compared(curve)
    notes = [note for note in found.notes if note.kind == "spreads differ"]
    assert [note.arms for note in notes] == ([("dispersion",)] if noted else [])
    if noted:
        assert notes[0].facts["arm_sd"] / notes[0].facts["baseline_sd"] == pytest.approx(factor)
    two = _compared(curve, seeds=(0, 2))
    assert not [note for note in two.notes if note.kind == "spreads differ"]


@pytest.mark.parametrize(("documents", "noted"), [(12, True), (60, False)])
def test_few_held_out_documents_are_named(documents: int, noted: bool) -> None:
    rows = study(documents=documents)
    weight = {row["item"]: row["weight"] for row in rows if row["kind"] == "eval_item"}
    effective = sum(weight.values()) ** 2 / sum(w**2 for w in weight.values())
    notes = [note for note in compare(rows).notes if note.kind == "few documents"]
    assert len(notes) == noted
    if noted:
        assert notes[0].facts == {"effective": pytest.approx(effective), "items": documents}
    # a single document with most of the weight is few, however many there are
    heavy = max(weight, key=weight.__getitem__)
    for row in rows:
        if row["kind"] == "eval_item" and row["item"] == heavy:
            row["weight"] = 1e6
    assert [note.kind for note in compare(rows).notes].count("few documents") == 1
