"""The report: complete, true to the rows, self-contained, safe, reproducible, and there even when runs failed."""

from __future__ import annotations

import csv
import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from synthetic import study

from decondense.compare import CompareError, compare
from decondense.records import Row
from decondense.report import (
    Table,
    build_report,
    headline,
    interval,
    number,
    probability,
    sentences,
    summary,
    terminal_table,
)

# a figure that does not fit warns
pytestmark = pytest.mark.filterwarnings("error")

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Checks nesting and collects text, attributes and ids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("report")
    paths = build_report(study(step_ms={"dispersion": 108.0}), out)
    assert paths["report"] == out / "report.html"
    return out, paths["report"].read_text()


def test_page_is_well_formed_and_ids_are_unique(built: tuple[Path, str]) -> None:
    page = Page(built[1])
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    wanted = [
        value[1:] for _, name, value in page.attributes if name in ("href", "xlink:href") and value.startswith("#")
    ]
    wanted += re.findall(r"url\(#([^)]+)\)", built[1])
    assert wanted
    assert set(wanted) <= set(ids)


def test_page_is_self_contained(built: tuple[Path, str]) -> None:
    page = Page(built[1])
    for tag, name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "data", "poster", "action"):
            assert value.startswith(("#", "data:")), (tag, name, value[:80])
    assert "<script" not in built[1]
    assert "@import" not in built[1]
    assert not re.search(r"url\((?!#)", built[1])


def test_every_section_is_there(built: tuple[Path, str]) -> None:
    text = " ".join(Page(built[1]).text)
    for words in (
        "Does dispersion lower the held-out loss of a small model?",
        "Result", "Loss over training", "Tokens to a loss that both reach", "Condensation by layer", "Over training",
        "Cost", "Best checkpoint (not the result)", "What was compared", "Limits", "Provenance", "Configuration",
        "decondense demo --out out", "decondense report rows.jsonl", "A processor <with> marks", "2.13.0",
        "the sign-flip test cannot give a p below 0.250",
    ):  # fmt: skip
        assert words in text
    assert "left out" not in text
    for cell in compare(study()).pairing:
        assert text.count(cell.init_hash) == 2  # once an arm


def test_numbers_on_the_page_are_those_of_the_comparison(built: tuple[Path, str]) -> None:
    found = compare(study(step_ms={"dispersion": 108.0}))
    assert found.validation is not None
    d = found.validation.differences[0]
    text = " ".join(Page(built[1]).text)
    assert number(d.mean, sign=True) in text
    assert interval(d.interval) in text
    for sentence in sentences(found):
        assert sentence in text
    with (built[0] / "tables" / "headline.csv").open() as handle:
        row = next(row for row in csv.DictReader(handle) if row["arm"] == "dispersion")
    assert float(row["difference"]) == d.mean
    assert (float(row["95 % interval, low"]), float(row["95 % interval, high"])) == d.interval


def test_figures_and_tables_for_papers(built: tuple[Path, str]) -> None:
    names = {path.name for path in (built[0] / "figures").iterdir()}
    stems = ["loss_curves", "mean_cosine_by_layer", "heat_maps", "difference_validation_loss", "difference_mean_cosine",
             "cost"]  # fmt: skip
    assert names == {f"{stem}.{kind}" for stem in stems for kind in ("png", "pdf")}
    tables = {path.name for path in (built[0] / "tables").iterdir()}
    assert {"headline.csv", "headline.md", "headline.tex", "layers.csv", "cost.tex", "differences.csv"} <= tables
    for path in (built[0] / "tables").glob("*.csv"):
        with path.open() as handle:
            rows = list(csv.reader(handle))
        assert len(set(rows[0])) == len(rows[0]), path.name
        assert {len(row) for row in rows} == {len(rows[0])}, path.name


def test_equal_rows_give_equal_bytes(built: tuple[Path, str], tmp_path: Path) -> None:
    build_report(study(step_ms={"dispersion": 108.0}), tmp_path)
    first = {path.relative_to(built[0]): path.read_bytes() for path in built[0].rglob("*.*")}
    second = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.*")}
    assert first == second


def last(row: Row) -> bool:
    """Whether a row is kept where the curves do not matter: drawing them takes most of the time."""
    return row["kind"] == "run" or (row["kind"] != "step" and row["step"] == 300)


HOSTILE = '<script>alert("x")</script> & | $5_{a}^b % \\ #'


def test_text_of_the_rows_is_escaped(tmp_path: Path) -> None:
    def hostile(row: Row) -> Row | None:
        if not last(row):
            return None
        if row["kind"] == "run":
            arms = [{"name": arm["name"], "label": f"{arm['name']} {HOSTILE}"} for arm in row["config"]["arms"]]
            row["config"] = {**row["config"], "title": HOSTILE, "question": HOSTILE, "arms": arms}
            row["provenance"] = {**row["provenance"], "command": HOSTILE}
            if row["status"] == "finished" and row["seed"] == 2:
                row.update(status="failed", error=HOSTILE)
        if row["kind"] == "profile":
            row["layers"] = [f"{name} {HOSTILE}" for name in row["layers"]]
        return row

    build_report(study(change=hostile, seeds=(0, 1, 2)), tmp_path)
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert "<script" not in text
    assert HOSTILE in " ".join(page.text)
    latex = (tmp_path / "tables" / "layers.tex").read_text()
    body = latex.split("\\midrule")[1]
    assert r"\$5\_\{a\}\textasciicircum{}b \% \textbackslash{} \#" in body
    markdown = (tmp_path / "tables" / "layers.md").read_text().splitlines()
    pipes = {len(re.findall(r"(?<!\\)\|", line)) for line in markdown if line.startswith("|")}
    assert len(pipes) == 1


# ---- words --------------------------------------------------------------------------------------------------------


def _told(**keywords: object) -> str:
    return summary(compare(study(**keywords))).replace("\N{NO-BREAK SPACE}", " ")  # type: ignore[arg-type]


def test_a_gain_is_said_in_three_sentences() -> None:
    found = compare(study(step_ms={"cross-entropy": 100.0, "dispersion": 108.0}))
    lines = [line.replace("\N{NO-BREAK SPACE}", " ") for line in sentences(found)]
    assert len(lines) == 3
    assert "dispersion is lower, which is better, by 0.2" in lines[0]
    assert "95 % interval" in lines[0]
    assert "n = 3 seeds" in lines[0]
    assert "lowers it from" in lines[1]
    assert (
        "takes 1.08 times as long (1.08 times the CPU time); at equal CPU time its held-out loss differs by" in lines[2]
    )


def test_a_null_is_said_plainly() -> None:
    text = _told(effects={"cross-entropy": 0.0, "dispersion": 0.0}, seeds=range(5), seed_sd=0.05)
    assert "dispersion is undecided" in text.split("Condensation")[0]
    assert "is detected in 80 % of such studies, and one of 0.02 with" in text.split("Condensation")[0]
    assert "better" not in text.split("(")[0]


def test_a_loss_is_said_plainly() -> None:
    text = _told(effects={"cross-entropy": 0.0, "dispersion": 0.3})
    assert "dispersion is higher, which is worse, by 0.2" in text
    assert "better in 0 of 3" in text
    assert re.search(r"a loss that both reach after \d{3} % \[\d+, \d+\] of the tokens .*\(worse\)", text)


def test_one_seed_is_said_to_prove_nothing() -> None:
    text = _told(seeds=(0,))
    assert "in the only seed, which cannot be told from chance" in text
    assert "interval of" not in text


def test_a_difference_that_is_lost_to_the_correction_is_no_difference() -> None:
    many = {"cross-entropy": 0.0, **{f"arm{k}": 0.0 for k in range(6)}, "dispersion": -0.05}
    found = compare(study(many, seed_sd=0.012))
    few = compare(study({"cross-entropy": 0.0, "dispersion": -0.05, "arm0": 0.0}, seed_sd=0.012))
    assert found.validation is not None
    d = found.validation.difference("dispersion")
    assert d is not None
    assert d.p is not None
    assert d.p_holm is not None
    assert d.p < 0.05 < d.p_holm
    text = summary(found)
    assert "dispersion" in text.split("undecided: ")[1].split("of which")[0]
    assert re.search(r"of which [^;]*dispersion[^;]* would differ without the correction for several comparisons", text)
    # with few arms each has a clause
    assert few.validation is not None
    replaced = tuple(dataclasses.replace(d, p=0.03, p_holm=0.06) for d in few.validation.differences)
    changed = dataclasses.replace(few.tasks[0], differences=replaced)
    text = summary(dataclasses.replace(few, tasks=(changed,)))
    assert "dispersion is undecided after correction for several comparisons" in text


def test_several_arms_and_tasks() -> None:
    tasks = {"cross-entropy": {"a": 0.4, "b": 0.5}, "dispersion": {"a": 0.6, "b": 0.7}, "noisy": {"a": 0.4, "b": 0.5}}
    found = compare(study({"cross-entropy": 0.0, "dispersion": -0.2, "noisy": 0.0}, tasks=tasks))
    text = summary(found)
    assert "mean acc of 2 tasks" in text
    assert "dispersion is higher, which is better" in text
    assert "noisy is undecided" in text
    assert terminal_table(found).columns[1] == "arm"


# ---- robustness ---------------------------------------------------------------------------------------------------


def test_failed_and_unfinished_runs_are_shown_first(tmp_path: Path) -> None:
    def broken(row: Row) -> Row | None:
        if row["kind"] == "profile" or not last(row):
            return None
        if row["kind"] == "run" and row["status"] == "finished" and row["arm"] == "dispersion":
            if row["seed"] == 0:
                return {**row, "status": "failed", "error": "NaN in block 3"}
            if row["seed"] == 1:
                return None
        return row

    build_report(study(change=broken, seeds=(0, 1, 2, 3)), tmp_path)
    text = " ".join(Page((tmp_path / "report.html").read_text()).text)
    assert "dispersion (seed 0) failed: NaN in block 3" in text
    assert "dispersion (seed 1) is unfinished" in text
    assert text.index("NaN in block 3") < text.index("Held-out loss at the end")
    assert "n = 2 seeds" in text


def test_nothing_finished_still_gives_a_report(tmp_path: Path) -> None:
    rows = [row for row in study() if row.get("status") != "finished"]
    build_report(rows, tmp_path)
    text = " ".join(Page((tmp_path / "report.html").read_text()).text)
    assert "has no finished run" in text
    assert "dispersion (seed 2) is unfinished" in text
    assert not list(tmp_path.glob("tables/*"))


@pytest.mark.parametrize(
    "kinds",
    [{"run"}, {"run", "eval"}, *(pytest.param({"run", kind}, marks=pytest.mark.slow) for kind in ("profile", "step"))],
)
def test_only_some_kinds_of_rows(tmp_path: Path, kinds: set[str]) -> None:
    build_report([row for row in study() if row["kind"] in kinds], tmp_path)
    Page((tmp_path / "report.html").read_text())


@pytest.mark.parametrize(
    "keywords",
    [
        {"seeds": (3,), "effects": {"cross-entropy": 0.0}, "steps": 10, "log_every": 5},
        pytest.param({"seeds": (3,)}, marks=pytest.mark.slow),
        pytest.param({"effects": {"cross-entropy": 0.0}}, marks=pytest.mark.slow),
        pytest.param({"steps": 10, "log_every": 5}, marks=pytest.mark.slow),
    ],
)
def test_one_seed_one_arm_few_steps(tmp_path: Path, keywords: dict[str, object]) -> None:
    build_report(study(**keywords), tmp_path)  # type: ignore[arg-type]
    Page((tmp_path / "report.html").read_text())


@pytest.mark.slow
def test_another_baseline(tmp_path: Path) -> None:
    build_report(study(), tmp_path, baseline="dispersion")
    assert "paired with dispersion: cross-entropy is higher" in " ".join(
        Page((tmp_path / "report.html").read_text()).text
    )


def test_rows_of_two_studies_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CompareError, match="different studies"):
        build_report(study() + study(fingerprint="e" * 16), tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---- tables -------------------------------------------------------------------------------------------------------


def test_terminal_table_holds_layers_and_step_time() -> None:
    table = terminal_table(compare(study(step_ms={"cross-entropy": 100.0, "dispersion": 108.0})))
    columns, lines = list(table.columns), table.text()
    assert columns == ["", "cross-entropy", "dispersion", "difference", "95 % interval", "n"]
    by_name = {line[0]: line for line in lines}
    assert by_name["validation loss"][-1] == "3"
    assert "cosine, block 5" in by_name
    assert by_name["same-loss tokens"][1] == "614,400"
    assert by_name["step, CPU (ms)"][3] == "× 1.080"
    # with the narrowest of borders it fits 80 characters
    widths = [max(len(part) for line in [columns, *lines] for part in line[i].splitlines() or [""]) for i in range(6)]
    assert sum(widths) + 2 * (len(widths) - 1) <= 80
    assert by_name["step time (ms)"][1:4] == ["100.0", "108.0", "× 1.080"]


def test_numbers_for_people() -> None:
    assert number(-0.12345) == "−0.123"
    assert number(0.5, 2, sign=True) == "+0.50"
    assert number(-0.0001, 3, sign=True) == "0.000"
    assert number(None) == number(float("nan")) == "–"
    assert interval((-1.0, 2.0), 1) == "[−1.0, +2.0]"
    assert probability(0.0004) == "<0.001"
    assert probability(0.25) == "0.250"


def test_latex_table_is_balanced() -> None:
    table = headline(compare(study()))
    assert table is not None
    text, columns = table.to_latex(), len(table.columns)
    for line in text.split("\\midrule")[1].split("\\bottomrule")[0].strip().splitlines():
        assert line.count("&") == columns - 1
    assert text.count("{") == text.count("}")


def test_csv_spreads_intervals_over_two_columns() -> None:
    table = Table("t", "c", ("a", "b"), (("x", ("[1, 2]", (1.0, 2.0))), ("y", "–")))
    assert table.to_csv() == 'a,"b, low","b, high"\nx,1.0,2.0\ny,,\n'
