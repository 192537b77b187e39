"""Arms with models of their own, untrained arms, swept learning rates, and studies that measure and train nothing."""

from __future__ import annotations

import math
from string import Formatter
from typing import Any, get_args

import numpy as np
import pytest
from scipy import stats
from synthetic import LAYERS, digest, measured_study, study, trial, with_arms

from decondense.compare import CompareError, Note, NoteKind, Study, compare, family_of
from decondense.records import Row
from decondense.report.notes import TEXTS, in_words

# ---- pairs --------------------------------------------------------------------------------------------------------

LARGE = {"dispersion": {"model": {"overrides": {"n_layer": 12}}}}


def _other_start(row: Row) -> Row:
    if row["kind"] == "run" and row["arm"] == "dispersion":
        row["init_hash"] = digest("larger", row["seed"])
    return row


def test_an_arm_with_its_own_model_is_a_pair_by_data_order_only() -> None:
    rows = with_arms(study(change=_other_start), LARGE)
    found = compare(rows)
    assert found.other_starts == ("dispersion",)
    assert found.pairing[0].other_starts == ("dispersion",)
    assert found.pairing[0].init_hash == digest("init", 0)
    assert [note.arms for note in found.notes if note.kind == "other start"] == [("dispersion",)]
    # the same rows without a model of their own are refused
    with pytest.raises(CompareError, match="different initial weights"):
        compare(study(change=_other_start))


@pytest.mark.parametrize("what", ["order_hash", "corpus_hash"])
def test_an_arm_with_its_own_model_still_reads_the_same_data(what: str) -> None:
    def other(row: Row) -> Row:
        row = _other_start(row)
        if row["kind"] == "run" and row["arm"] == "dispersion" and row["seed"] == 1:
            row[what] = "0" * 16
        return row

    with pytest.raises(CompareError, match=r"dispersion \(seed 1\) is not paired with cross-entropy \(seed 1\)"):
        compare(with_arms(study(change=other), LARGE))


def test_an_arm_with_its_own_model_may_be_the_baseline_of_a_comparison() -> None:
    found = compare(with_arms(study(change=_other_start), LARGE), "dispersion")
    assert found.other_starts == ("cross-entropy",)


def _untrained(row: Row) -> Row | None:
    """The arm ``none``: only its start is evaluated, and nothing was trained."""
    if row["arm"] != "none":
        return row
    if row["kind"] == "run":
        row.update(order_hash=None)
        if row["status"] == "finished":
            row.update(steps=0, tokens=0, final_hash=row["init_hash"], timing={"peak_rss_bytes": 5e8})
    elif row["kind"] == "step" or (row["kind"] in ("eval", "profile") and row["step"] > 0):
        return None
    elif row["kind"] == "eval_item":
        row["step"] = 0
    return row


NONE = {"none": {"untrained": True}}


def test_an_untrained_arm_must_have_the_baselines_start() -> None:
    effects = {"cross-entropy": 0.0, "none": 0.0}
    found = compare(with_arms(study(effects, change=_untrained), NONE))
    assert found.untrained == ("none",)
    assert "none" not in found.learning_rates
    assert [note.arms for note in found.notes if note.kind == "untrained"] == [("none",)]

    def other(row: Row) -> Row | None:
        changed = _untrained(row)
        if changed is not None and changed["kind"] == "run" and changed["arm"] == "none":
            changed["init_hash"] = "1" * 16
        return changed

    with pytest.raises(CompareError, match=r"none \(seed 0\) is not paired .* different initial weights"):
        compare(with_arms(study(effects, change=other), NONE))
    assert compare(
        with_arms(study(effects, change=other), {"none": {"untrained": True, "model": {"pretrained": "x/y"}}})
    )


def test_an_untrained_arm_has_no_cost_and_no_speed() -> None:
    effects = {"cross-entropy": 0.0, "none": 0.0, "dispersion": -0.2}
    found = compare(with_arms(study(effects, change=_untrained), NONE))
    cost = next(c for c in found.cost if c.arm == "none")
    for values in (cost.step_wall_ms, cost.step_cpu_ms, cost.train_wall_s, cost.peak_rss_bytes, cost.peak_cuda_bytes):
        assert values == (None, None, None)
    assert cost.wall_ratio is None
    assert [s.arm for s in found.speed] == ["dispersion"]


def test_gpu_memory_is_paired_by_seed() -> None:
    def memory(row: Row) -> Row:
        if row["kind"] == "run" and row["status"] == "finished":
            row["timing"]["peak_cuda_bytes"] = (3e9 if row["arm"] == "dispersion" else 2e9) * (1 + row["seed"])
        return row

    cost = {c.arm: c for c in compare(study(change=memory)).cost}
    assert cost["dispersion"].cuda_ratio == pytest.approx((1.5, 1.5, 1.5))
    assert cost["cross-entropy"].cuda_ratio is None
    assert cost["dispersion"].peak_cuda_bytes == (3e9, 6e9, 9e9)


# ---- learning rates -----------------------------------------------------------------------------------------------


def test_trials_are_sorted_and_edges_are_said() -> None:
    grid = {
        "cross-entropy": {3e-3: 5.0, 1e-3: 5.2, 1e-2: 5.4},  # inside
        "dispersion": {1e-3: 5.3, 3e-3: 5.1, 1e-2: 4.9},  # the largest
    }
    rows = [*trial("cross-entropy", grid["cross-entropy"]), *trial("dispersion", grid["dispersion"]), *study()]
    found = compare(rows)
    assert found.seeds == (0, 1, 2)  # the trials' own seed makes no cell
    by_arm = {sweep.arm: sweep for sweep in found.trials}
    assert [t.learning_rate for t in by_arm["cross-entropy"].trials] == [1e-3, 3e-3, 1e-2]
    assert [t.value for t in by_arm["cross-entropy"].trials] == [5.2, 5.0, 5.4]
    assert by_arm["cross-entropy"].edge is None
    assert by_arm["dispersion"].edge == "largest"
    chosen = by_arm["dispersion"].chosen
    assert chosen is not None
    assert chosen.learning_rate == 1e-2
    edges = [note for note in found.notes if note.kind == "edge of the grid"]
    assert edges == [
        Note("edge of the grid", ("dispersion",), {"knob": "learning_rate", "value": 1e-2, "side": "largest"})
    ]


def test_a_rate_that_failed_bounds_the_grid() -> None:
    rows = [*trial("dispersion", {1e-3: 5.0, 3e-3: 4.9, 1e-2: None}), *study()]
    (sweep,) = compare(rows).trials
    assert sweep.edge is None
    assert sweep.trials[-1].error == "the loss became NaN at step 7"
    rows = [*trial("dispersion", {1e-3: None, 3e-3: None}), *study()]
    assert Note("no trial finished", ("dispersion",)) in compare(rows).notes


def test_a_choice_that_the_trials_do_not_support_is_noted() -> None:
    rows = [*trial("dispersion", {1e-3: 5.0, 3e-3: 4.9, 1e-2: 5.5}, chosen=1e-3), *study()]
    assert Note("not the least loss", ("dispersion",), {"chosen": 1e-3, "best": 3e-3}) in compare(rows).notes

    def other(row: Row) -> Row:
        return {**row, "learning_rate": 0.5} if row["kind"] == "run" and row["arm"] == "dispersion" else row

    rows = [*trial("dispersion", {1e-3: 5.0, 3e-3: 4.9, 1e-2: 5.5}), *study(change=other)]
    found = compare(rows)
    assert Note("not as chosen", ("dispersion",), {"rates": (0.5,), "chosen": 3e-3}) in found.notes
    assert found.learning_rates["dispersion"] == (0.5,)


def test_without_a_sweep_the_rates_are_named() -> None:
    def rates(row: Row, other: float) -> Row:
        if row["kind"] == "run":
            row["learning_rate"] = 1e-3 if row["arm"] == "cross-entropy" else other
        return row

    same = compare(study(change=lambda row: rates(row, 1e-3)))
    kinds = {note.kind for note in same.notes}
    assert "not swept" in kinds
    assert "rates without a sweep" not in kinds
    other = compare(study(change=lambda row: rates(row, 2e-3)))
    (note,) = [note for note in other.notes if note.kind == "rates without a sweep"]
    assert note.facts == {"rates": {"cross-entropy": (1e-3,), "dispersion": (2e-3,)}}
    # rows of older studies say it in their configuration alone
    old = [
        {**row, "config": {**row["config"], "train": {"steps": 300, "learning_rate": 4e-3}}}
        if row["kind"] == "run"
        else row
        for row in study()
    ]
    assert compare(old).learning_rates == {"cross-entropy": (4e-3,), "dispersion": (4e-3,)}


@pytest.mark.parametrize(
    ("sweep", "knobs"),
    [
        (None, {"learning_rate": 3e-3, "warmup": 0.25}),
        ({"learning_rates": [1e-3, 3e-3]}, {"warmup": 0.25}),
        ({"learning_rates": [2e-3], "warmups": [0.1, 0.3]}, {"learning_rate": 3e-3}),
        ({"learning_rates": [1e-3, 3e-3], "warmups": [0.1, 0.3]}, None),
    ],
)
def test_knobs_of_the_baseline_that_were_not_swept_are_named(sweep: object, knobs: object) -> None:
    rows = with_arms(study(documents=3), {}, train={"steps": 300, "warmup": 0.25}, sweep=sweep)
    notes = [note for note in compare(rows).notes if note.kind == "not swept"]
    assert [note.facts["knobs"] for note in notes] == ([] if knobs is None else [knobs])
    assert not [note for note in compare(measured_study(GPT2)).notes if note.kind == "not swept"]


def test_a_setting_is_judged_by_its_mean_over_trial_seeds_and_every_knob_has_an_edge() -> None:
    def tried(rate: float, warmup: float, values: dict[int, float | None], *, chosen: bool = False) -> list[Row]:
        rows = [row for seed, value in values.items() for row in trial("dispersion", {rate: value}, seed=seed)]
        return [{**row, "warmup": warmup, "chosen": chosen} for row in rows]

    rows = [
        *tried(1e-3, 0.1, {1000: 5.2, 1001: 5.0}),
        *tried(1e-3, 0.3, {1000: 4.8, 1001: 5.0}, chosen=True),
        *tried(3e-3, 0.1, {1000: 4.0, 1001: None}),
        *tried(3e-3, 0.3, {1000: 5.2, 1001: 5.2}),
        *study(documents=3),
    ]
    (sweep,) = compare(rows).trials
    assert [(t.learning_rate, t.warmup) for t in sweep.trials] == [(1e-3, 0.1), (1e-3, 0.3), (3e-3, 0.1), (3e-3, 0.3)]
    assert [t.value for t in sweep.trials] == [pytest.approx(5.1), pytest.approx(4.9), None, pytest.approx(5.2)]
    assert sweep.trials[0].seeds == (1000, 1001)
    assert sweep.edges == {"learning_rate": "smallest", "warmup": "largest"}
    assert [t.value for t in sweep.by_rate] == [pytest.approx(4.9), pytest.approx(5.2)]


# ---- studies that measure -----------------------------------------------------------------------------------------

GPT2 = {"gpt2": 124e6, "gpt2-medium": 355e6, "gpt2-large": 774e6, "gpt2-xl": 1558e6}
QWEN = {"Qwen/Qwen3-0.6B": 596e6, "Qwen/Qwen3-1.7B": 1720e6, "Qwen/Qwen3-4B": 4022e6}


def test_profiles_alone_are_compared() -> None:
    rows = measured_study(GPT2)
    found = compare(rows)
    assert found.measured
    assert found.tasks == ()
    assert found.omitted == ()
    assert {m.quantity: len(m.differences) for m in found.condensation} == dict.fromkeys(
        ("mean_cosine.blocks", "mean_cosine.last", "spearman.depth", "kendall.depth"), 3
    )
    assert all(p.init_hash is None and p.order_hash is None for p in found.pairing)
    assert [note.kind for note in found.notes] == ["measured"]
    gone = [row for row in rows if row["kind"] != "profile" or row["arm"] != "gpt2-xl" or row["seed"] != 1]
    with pytest.raises(CompareError, match=r"gpt2-xl \(seed 1\) has no profile of its final checkpoint \(step 0\)"):
        compare(gone)


def test_profiles_alone_of_a_trained_study_are_compared() -> None:
    found = compare([row for row in study() if row["kind"] in ("run", "profile")])
    assert found.validation is None
    assert len(found.condensation) == 4


def test_condensation_by_arm_against_the_rows() -> None:
    rows = measured_study(GPT2)
    profiles = {(r["arm"], r["seed"]): r for r in rows if r["kind"] == "profile"}
    entry = compare(rows).condensation_by_arm[2]
    assert (entry.arm, entry.parameters, entry.blocks) == ("gpt2-large", 774_000_000, len(LAYERS) - 1)
    mine = [profiles["gpt2-large", seed] for seed in (0, 1, 2)]
    for n in range(1, 6):
        values = [sum(p["mean_cosine"][len(LAYERS) - n :]) / n for p in mine]
        assert entry.last[str(n)].mean == pytest.approx(np.mean(values))
        assert entry.last[str(n)].sd == pytest.approx(np.std(values, ddof=1))
    half = (len(LAYERS) - 1) // 2
    assert entry.last["L/2"].values[1] == pytest.approx(np.mean(mine[1]["mean_cosine"][-half:]))
    assert entry.kendall is not None
    assert entry.kendall.values == tuple(p["kendall"] for p in mine)


def test_a_shallow_model_has_no_last_five() -> None:
    def shallow(row: Row) -> Row:
        if row["kind"] == "profile" and row["arm"] == "gpt2":
            row.update(layers=LAYERS[:4], mean_cosine=row["mean_cosine"][:4])
        return row

    entry = compare(measured_study(GPT2, change=shallow)).condensation_by_arm[0]
    assert list(entry.last) == ["1", "2", "3", "L/2"]
    assert entry.blocks == 3


def _sizes_rise(row: Row) -> Row:
    if row["kind"] == "profile":
        row["spearman"] = {"gpt2": 0.9, "gpt2-medium": 0.5, "gpt2-large": 0.6, "gpt2-xl": 0.1}.get(row["arm"], 0.3)
        row["spearman"] += 0.01 * row["seed"] - 0.1 * ("1.7B" in row["arm"]) - 0.2 * ("4B" in row["arm"])
    return row


def test_size_and_condensation_against_scipy() -> None:
    found = compare(measured_study({**GPT2, **QWEN}, change=_sizes_rise))
    assert found.size is not None
    assert found.size.families == ("gpt2", "Qwen3")
    known = {(c.family, c.quantity): c for c in found.size.correlations}
    gpt2 = known["gpt2", "spearman.depth"]
    assert gpt2.n == 4
    assert gpt2.rho == pytest.approx(-0.8)  # ranks 4 2 3 1 against 1 2 3 4: 1 - 6 * 18 / 60
    assert gpt2.p is None  # four models
    both = known[None, "spearman.depth"]
    assert both.n == 7
    x = [point.parameters for point in found.size.points]
    y = [point.value("spearman.depth") for point in found.size.points]
    oracle = stats.permutation_test(
        (x,), lambda a: stats.spearmanr(a, y).statistic, permutation_type="pairings", n_resamples=np.inf
    )
    assert both.rho == pytest.approx(stats.spearmanr(x, y).statistic)
    assert both.p == pytest.approx(oracle.pvalue)


def test_p_over_many_models_is_students() -> None:
    sizes = {f"org/m-{n}m": n * 1e6 for n in range(1, 11)}

    def vary(row: Row) -> Row:
        if row["kind"] == "profile":
            row["spearman"] = math.sin(int(row["arm"].split("-")[1][:-1]))
        return row

    found = compare(measured_study(sizes, change=vary))
    assert found.size is not None
    c = next(c for c in found.size.correlations if c.quantity == "spearman.depth")
    oracle = stats.spearmanr(range(1, 11), [math.sin(n) for n in range(1, 11)])
    assert (c.n, c.rho, c.p) == (10, pytest.approx(oracle.statistic), pytest.approx(oracle.pvalue))
    # what is the same in every model has no correlation
    same = compare(measured_study(sizes, change=lambda r: {**r, "kendall": 0.5} if r["kind"] == "profile" else r))
    assert same.size is not None
    assert next(c for c in same.size.correlations if c.quantity == "kendall.depth").rho is None


def test_one_size_has_no_trend() -> None:
    assert compare(study()).size is None
    assert compare(measured_study({"a/x-1": 1e6, "a/x-2": 1e6})).size is None


@pytest.mark.parametrize(
    ("entry", "family"),
    [
        ({"model": {"pretrained": "Qwen/Qwen3-0.6B-Base"}}, "Qwen3-Base"),
        ({"model": {"pretrained": "EleutherAI/pythia-70m-deduped"}}, "pythia-deduped"),
        ({"model": {"pretrained": "models/gpt2-xl/"}}, "gpt2"),
        ({"model": {"pretrained": "distilgpt2"}}, "distilgpt2"),
        ({"model": {"pretrained": "prepared:teacher"}}, "llama"),
        ({"model": {"architecture": "qwen3"}}, "qwen3"),
        ({"model": {"overrides": {"n_layer": 3}}}, "gpt2"),
        ({"model": {"overrides": {"n_layer": 3}}, "dispersion": {"weight": 0.1}}, "gpt2 + dispersion"),
        ({"untrained": True}, "gpt2 (untrained)"),
    ],
)
def test_families_by_architecture_or_by_the_name_of_a_start(entry: dict[str, Any], family: str) -> None:
    rows = with_arms(
        study(documents=3), {"dispersion": entry}, model={"architecture": "gpt2"},
        prepared={"teacher": {"model": {"architecture": "llama"}}},
    )  # fmt: skip
    assert family_of(Study.from_rows(rows), "dispersion") == family


def test_every_kind_of_note_has_a_text() -> None:
    found = compare(study(documents=3))
    assert set(TEXTS) == set(get_args(NoteKind))
    facts = {name: 0.5 for text in TEXTS.values() for _, name, _, _ in Formatter().parse(text) if name}
    facts.pop("arms")
    for kind in TEXTS:
        text = in_words(Note(kind, ("dispersion",), facts), found)
        assert "{" not in text
        assert text.endswith(".")
