"""Thirteen arms, ten benchmarks, swept rates, an untrained arm: tables, figures and the terminal stay legible."""

from __future__ import annotations

import csv
import html
import io
import re
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from rich.console import Console
from synthetic import measured_study, study, trial, with_arms

from decondense.compare import Comparison, Study, compare
from decondense.figures import comparison as draw
from decondense.figures.style import ArmStyle, render
from decondense.records import Row, write_rows
from decondense.report import (
    build_report,
    condensation_table,
    cost_table,
    headline,
    layer_table,
    sentences,
    size_sentences,
    size_table,
    summary,
    task_table,
    terminal_table,
    trials_table,
    write_tables,
)

pytestmark = pytest.mark.filterwarnings("error")

ARMS = ["cross-entropy", "none", *(f"dispersion-{weight}" for weight in (0.01, 0.03, 0.1, 0.3, 1.0)), "deep-half",
        "forgetting", "noisy", "distilled", "temperature", "warm-up"]  # fmt: skip
EFFECTS = {arm: -0.02 * place for place, arm in enumerate(ARMS)}
TASKS = [f"task_{letter}" for letter in "abcdefghij"]


def _large(row: Row) -> Row | None:
    """Every second arm needs GPU memory, one benchmark is cut, and the arm ``none`` is not trained."""
    if row["kind"] == "eval" and row["task"] == "task_c":
        row.update(official_items=1234, limit=60, notes=["limited to the first 60 items"])
    if row["kind"] == "run" and row["status"] == "finished":
        row["timing"]["peak_cuda_bytes"] = 2.0**30 * (1.25 if row["arm"] == "noisy" else 1.0)
    if row["arm"] != "none":
        return row
    if row["kind"] == "run":
        row["order_hash"] = None
        if row["status"] == "finished":
            row.update(steps=0, tokens=0)
    elif row["kind"] == "eval_item":
        row["step"] = 0
    elif row["kind"] == "eval" and row["task"] != "validation":
        row.update(step=0, tokens=0)
    elif row["kind"] == "step" or row["step"] > 0:
        return None
    return row


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    tasks = {arm: {task: 0.3 + 0.03 * place for place, task in enumerate(TASKS)} for arm in ARMS}
    made = study(EFFECTS, change=_large, tasks=tasks, task_items=60, documents=20)
    arms = {"none": {"untrained": True}, "distilled": {"label": "+ distillation from a large teacher"}}
    swept = [
        row
        for place, arm in enumerate(ARMS)
        if arm != "none"
        for row in trial(arm, {1e-3: 5.3, 3e-3: 5.2, 1e-2: 5.25 - 0.1 * (place % 2), 3e-2: None if place % 3 else 5.9})
    ]
    return [*with_arms(made, arms, sweep={"learning_rates": [1e-3, 3e-3, 1e-2, 3e-2]}), *swept]


@pytest.fixture(scope="module")
def found(rows: list[Row]) -> Comparison:
    return compare(rows)


@pytest.mark.slow
def test_the_whole_report_of_thirteen_arms(rows: list[Row], tmp_path: Path) -> None:
    paths = build_report(rows, tmp_path)
    text = paths["report"].read_text()
    for heading in ("Benchmarks", "Condensation by arm", "Learning rates", "Over training"):
        assert f">{heading}<" in text
    stems = {path.stem for path in paths["figures"]}
    assert {"heat_maps_1", "heat_maps_2", "learning_rates", "difference_tasks_acc"} <= stems
    assert {"condensation.tex", "learning_rates.md", "tasks.csv"} <= {path.name for path in paths["tables"]}
    for path in paths["tables"]:
        if path.suffix == ".csv":
            lines = list(csv.reader(io.StringIO(path.read_text())))
            assert len(set(lines[0])) == len(lines[0]), path.name
            assert {len(line) for line in lines} == {len(lines[0])}, path.name


def test_tables_have_a_row_and_not_columns_for_each_of_many_arms(found: Comparison) -> None:
    tasks = task_table(found)
    assert tasks is not None
    assert len(tasks.rows) == 13
    assert len(tasks.columns) == 1 + len(TASKS) + 2
    layers = layer_table(found)
    assert layers is not None
    assert (len(layers.rows), len(layers.columns)) == (13, 8)
    table = headline(found)
    # validation, mean of the tasks, four measures of condensation; the baseline has a row in each
    cost = [row for row in table.rows if "at equal" in row[0] or "both reach" in row[0]]
    assert len(cost) == 3 * 11  # not of the baseline, nor of what was not trained
    assert len(table.rows) == 6 * 13 + len(cost)
    assert [row[1] for row in table.rows[:2]] == ["cross-entropy", "none"]
    assert sum(table.repeats) == 6 * 12 + 3 * 10


def test_a_benchmark_on_other_items_is_flagged_in_every_format(found: Comparison, tmp_path: Path) -> None:
    write_tables(found, tmp_path)
    task = "task_c (acc; 60 of 1,234 items)"
    for name, words in {
        "tasks": task,
        "differences": "task_c acc (60 of 1,234 items)",
        "headline": "mean acc of 10 tasks (1 not official)",
    }.items():
        for kind in ("csv", "md", "tex"):
            text = (tmp_path / f"{name}.{kind}").read_text().replace("\\_", "_")
            assert words in text, (name, kind)
    for kind in ("md", "tex"):
        for name in ("tasks", "differences", "headline", "best_checkpoint"):
            text = (tmp_path / f"{name}.{kind}").read_text().replace("\\_", "_")
            assert "not scored on the official number of items: task_c 60 of 1,234 items" in text, (name, kind)
    assert not any("task_d" in note for note in found.task_notes)


def test_the_cost_of_the_untrained_is_a_dash_and_never_a_zero(found: Comparison) -> None:
    table = cost_table(found)
    assert table is not None
    by_arm = {line[0]: line for line in table.text()}
    assert by_arm["none"][1:-1] == ["–"] * (len(table.columns) - 2)
    memory = table.columns.index("peak GPU memory (MiB)")
    assert by_arm["cross-entropy"][memory] == "1,024"
    assert by_arm["noisy"][memory : memory + 2] == ["1,280", "1.250 [1.250, 1.250]"]
    assert "Not trained, so there is no cost of training: none." in table.caption
    assert "none" not in {s.arm for s in found.speed}


def test_learning_rates_are_tabled_with_choice_edge_and_failure(found: Comparison) -> None:
    table = trials_table(found)
    assert table is not None
    lines = [line for line in table.text() if line[0] == "noisy"]
    assert [line[1] for line in lines] == ["0.001", "0.003", "0.01", "0.03"]
    assert [line[5] for line in lines] == ["", "", "chosen", ""]
    assert any("failed: the loss became NaN at step 7" in line[5] for line in table.text())
    edge = compare([*trial("dispersion", {1e-3: 4.9, 3e-3: 5.0}), *study(documents=3)])
    edged = trials_table(edge)
    assert edged is not None
    assert edged.text()[0][5] == "chosen; the smallest learning rate tried: the best setting may lie outside"
    assert trials_table(compare(study(documents=3))) is None


def test_the_figure_of_trials_draws_what_was_tried(found: Comparison) -> None:
    (axes,) = draw.trials(found).axes
    assert axes.get_xscale() == "log"
    line = next(line for line in axes.get_lines() if line.get_label() == "dispersion-0.01")
    np.testing.assert_allclose(line.get_xdata(), [1e-3, 3e-3, 1e-2])  # 3e-2 failed
    np.testing.assert_allclose(line.get_ydata(), [5.3, 5.2, 5.25])


def test_many_arms_are_grouped_in_words(found: Comparison) -> None:
    text = summary(found)
    first = sentences(found)[0]
    assert "12 arms, n = 3 seeds, p corrected over arms" in first
    assert found.validation is not None
    for d in found.validation.differences:
        assert found.labels[d.arm] in first
    better = [d for d in found.validation.differences if d.outcome == "better"]
    assert f"{len(better)} better: " in first
    assert "Cost: an optimizer step takes 1.00" in text


def test_figures_of_many_arms_fit_and_can_be_read(rows: list[Row], found: Comparison) -> None:
    data = Study.from_rows(rows)
    tasks = [task for task in found.tasks if task.metric == "acc"]
    figures = {
        "curves": draw.loss_curves(data),
        "profiles": draw.profiles(data),
        "layers": draw.layer_differences(found),
        "forest": draw.forest(tasks, found, xlabel="Δ acc", names=TASKS),
        "maps": draw.heat_maps(data, ARMS[2:8], among=ARMS[2:]),
        "trials": draw.trials(found),
        "cost": draw.cost(found),
    }
    for name, figure in figures.items():
        render(figure, "png", dpi=40)  # a layout that does not fit warns, and a warning is an error here
        assert figure.get_figwidth() <= 6.9, name
        assert figure.get_figheight() <= 11, name  # a page
        sizes = [text.get_fontsize() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]
        assert min(sizes) >= 7, name
        # laid out once: the files of a figure agree, and the second costs half of the first
        assert figure.get_layout_engine() is None, name
    for name in ("layers", "forest"):
        panels = [axes for axes in figures[name].axes if axes.get_visible()]
        assert len({(axes.get_xlim(), axes.get_ylim()) for axes in panels}) == 1, name
        for axes in panels:  # one range for all, and it holds what each of them draws
            low, high = sorted(axes.get_xlim())
            assert low <= axes.dataLim.x0 <= axes.dataLim.x1 <= high or axes.texts, name
    assert len([axes for axes in figures["forest"].axes if axes.get_visible()]) == len(TASKS)
    # the axes keep their height under a legend of thirteen names
    figures["trials"].draw_without_rendering()
    (axes,) = figures["trials"].axes
    assert axes.get_position().height * figures["trials"].get_figheight() > 1.2


def test_an_arm_far_out_does_not_squeeze_the_others(found: Comparison) -> None:
    assert found.validation is not None
    (axes,) = draw.forest([found.validation], found, xlabel="difference").axes
    far = found.validation.difference("none")
    assert far is not None
    assert far.mean > 2
    assert axes.get_xlim()[1] < 1
    assert any(text.get_text() == f"+{far.mean:.2f} →" for text in axes.texts)
    for d in found.validation.differences:
        if d.arm != "none":
            assert axes.get_xlim()[0] < d.mean < axes.get_xlim()[1]


def test_thirteen_arms_differ_in_colour_and_marker_or_dash() -> None:
    looks = ArmStyle(ARMS, "cross-entropy")
    assert len({looks.colour(arm) for arm in ARMS}) == 13
    assert len({(looks.marker(arm), str(looks.dash(arm))) for arm in ARMS}) == 13


@pytest.mark.parametrize("arms", [2, 3, 4, 13])
def test_the_terminal_keeps_to_eighty_columns(rows: list[Row], arms: int) -> None:
    from decondense.cli.evidence import _print_comparison

    kept = ["cross-entropy", *[arm for arm in ARMS[::-1] if arm not in ("cross-entropy", "none")], "none"][:arms]
    some = compare([row for row in rows if row["arm"] in kept], incomplete="omit")
    shown = io.StringIO()
    _print_comparison(some, Console(file=shown, width=80))
    lines = shown.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    table = [line for line in lines if re.search(r"[×+−]\s?\d", line) and "[" in line]
    # nothing is cut or broken: a row of a difference ends with its n
    assert sum(line.rstrip().endswith(" 3") for line in table) >= arms - 1
    if arms == 13:
        assert not any("task_a" in line[0] for line in terminal_table(some).text())


# ---- studies that measure -----------------------------------------------------------------------------------------

MODELS = {"gpt2": 124e6, "gpt2-medium": 355e6, "gpt2-large": 774e6, "Qwen/Qwen3-0.6B": 596e6, "Qwen/Qwen3-1.7B": 1720e6}


def test_a_measured_study_speaks_of_condensation_alone(tmp_path: Path) -> None:
    rows = measured_study(MODELS)
    found = compare(rows)
    text = summary(found)
    assert "5 models were measured as they are, on 3 choices of passages; nothing was trained." in text
    for words in ("gpt2-large", "Spearman", "Kendall", "in the last layer"):
        assert words in text
    for words in ("loss", "training", "Cost", "seed"):
        assert words not in text
    paths = build_report(rows, tmp_path)
    page = paths["report"].read_text()
    assert "every arm starts from the same weights" not in page
    assert "nothing was trained" in page
    stems = {path.stem for path in paths["figures"]}
    assert {"condensation_by_size", "family_1", "family_2", "mean_cosine_by_layer"} <= stems
    assert not stems & {"loss_curves", "cost", "heat_maps", "difference_validation_loss"}
    assert cost_table(found) is None


def test_condensation_by_arm_as_a_table() -> None:
    rows = measured_study(MODELS)
    table = condensation_table(compare(rows))
    assert table is not None
    assert table.columns == ("arm", "family", "parameters", "blocks", "last layer", "last 2", "last 3", "last 4",
                             "last 5", "last L/2", "Spearman", "Kendall")  # fmt: skip
    line = table.text()[3]
    assert line[:4] == ["Qwen3-0.6B", "Qwen3", "596M", "6"]
    last = [row["mean_cosine"][-1] for row in rows if row["kind"] == "profile" and row["arm"] == "Qwen3-0.6B"]
    assert line[4] == f"{np.mean(last):.3f} ± {np.std(last, ddof=1):.3f}"
    cells = next(row for row in csv.DictReader(io.StringIO(table.to_csv())) if row["arm"] == "Qwen3-0.6B")
    assert float(cells["last layer"]) == pytest.approx(np.mean(last))
    assert int(cells["parameters"]) == 596_000_000


def test_size_is_told_in_words_with_n_and_without_p_below_five_models() -> None:
    found = compare(measured_study(MODELS))
    lines = size_sentences(found)
    assert len(lines) == 2  # gpt2 and all families; two models of Qwen3 always lie on a line
    assert lines[0].startswith("Over the 3 models of the family gpt2, Spearman's rank correlation")
    assert lines[0].endswith("fewer than 5 models, so nothing is tested.")
    assert "p =" not in lines[0]
    assert "Over the 5 models of all families" in lines[1]
    # sizes 124 355 774 596 1720 are ranks 1 2 4 3 5 against 5 4 3 2 1: 1 - 6 * 38 / 120
    assert "−0.90 with Spearman of mean cosine with depth (p = 0.083, no detectable trend)" in lines[1]
    table = size_table(found)
    assert table is not None
    assert [row[4] for row in table.text()[:3]] == ["–"] * 3
    none = compare(measured_study({"gpt2": 1e8, "gpt2-xl": 1e9}))
    assert size_sentences(none) == ["Fewer than three sizes: whether condensation goes with model size cannot be said."]


def test_the_figure_over_size_has_a_line_a_family() -> None:
    found = compare(measured_study(MODELS))
    panels = draw.size_trend(found).axes
    assert [axes.get_xscale() for axes in panels] == ["log"] * 3
    assert found.size is not None
    (panel,) = [axes for axes in panels if axes.get_ylabel() == "Spearman (depth)"]
    drawn = panel.containers[0].lines[0]
    assert [float(x) for x in drawn.get_xdata()] == [124e6, 355e6, 774e6]
    assert [float(y) for y in drawn.get_ydata()] == pytest.approx([0.96, 0.86, 0.76])
    assert [text.get_text() for text in panels[0].figure.legends[0].get_texts()] == ["gpt2", "Qwen3"]


def test_models_of_several_depths_share_an_axis_of_fractions() -> None:
    def shallow(row: Row) -> Row:
        if row["kind"] == "profile" and row["arm"] == "gpt2":
            row.update(layers=row["layers"][:4], mean_cosine=row["mean_cosine"][:4], histogram=row["histogram"][:4])
        return row

    (axes,) = draw.profiles(Study.from_rows(measured_study(MODELS, change=shallow))).axes
    assert axes.get_xlabel() == "layer fraction (0 = embedding)"
    assert all(line.get_xdata()[-1] == 1 for line in axes.get_lines())


@pytest.mark.slow
def test_a_page_says_which_arms_start_elsewhere(tmp_path: Path) -> None:
    def other(row: Row) -> Row:
        return {**row, "init_hash": "e" * 16} if row["kind"] == "run" and row["arm"] == "dispersion" else row

    rows = with_arms(study(change=other, documents=5), {"dispersion": {"model": {"overrides": {"n_layer": 12}}}})
    page = build_report(rows, tmp_path)["report"].read_text()
    assert html.unescape(page).count("Other initial weights than the baseline's by design: dispersion.") == 1
    assert "dispersion: different initial weights by design, so not paired by the same start." in page
    assert "every arm starts from the same weights" not in page


# ---- the command line ---------------------------------------------------------------------------------------------


def _run(*words: object) -> tuple[int, str]:
    from typer.testing import CliRunner

    from decondense.cli import app

    done = CliRunner().invoke(app, [str(word) for word in words])
    return done.exit_code, done.output


def test_compare_omits_and_writes_tables(tmp_path: Path) -> None:
    rows = [r for r in study(documents=5) if not (r["kind"] == "run" and r["status"] == "finished" and r["seed"] == 1)]
    write_rows(tmp_path / "rows.jsonl", rows)
    assert _run("compare", tmp_path)[0] != 0
    status, said = _run("compare", tmp_path, "--omit", "--tables", tmp_path / "tables")
    assert status == 0, said
    assert "Left out of the comparison:" in said
    assert "dispersion (seed 1) is unfinished" in said
    names = {path.name for path in (tmp_path / "tables").iterdir()}
    assert {"headline.md", "headline.tex", "headline.csv", "condensation.md", "seeds.csv"} <= names
    assert not (tmp_path / "report.html").exists()
    whole = compare(rows, incomplete="omit")
    assert (tmp_path / "tables" / "headline.csv").read_text() == headline(whole).to_csv()


@pytest.mark.slow
def test_report_of_compressed_rows_with_another_baseline(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl.gz", study(documents=5))
    status, said = _run("report", tmp_path / "rows.jsonl.gz", "--baseline", "dispersion", "--out", tmp_path / "out")
    assert status == 0, said
    page = (tmp_path / "out" / "report.html").read_text()
    assert "paired with dispersion: cross-entropy is higher" in page
    assert "rows.jsonl.gz" in said.replace("\n", "")
    # a directory may hold them compressed too
    assert _run("compare", tmp_path)[0] == 0
    status, said = _run("report", tmp_path, "--baseline", "dispersoin")
    assert status != 0
