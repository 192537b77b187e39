"""Figures: what they draw is what the rows say, they leave no state behind, and equal figures give equal bytes."""

from __future__ import annotations

import contextlib
import io
import re
import zlib
from itertools import pairwise

import matplotlib
import numpy as np
import pytest
from fontTools import subset, ttLib
from matplotlib.figure import Figure
from PIL import Image
from synthetic import BINS, LAYERS, TOKENS_A_STEP, study, with_arms

from decondense.compare import Study, compare
from decondense.figures import comparison as draw
from decondense.figures.style import ArmStyle, export, figure_style, render

# a figure that does not fit warns
pytestmark = pytest.mark.filterwarnings("error")

ARMS = {"cross-entropy": 0.0, "dispersion": -0.2, "noisy": 0.0}


@pytest.fixture(scope="module")
def three() -> Study:
    return Study.from_rows(study(ARMS))


def test_lines_are_means_and_bands_span_the_seeds(three: Study) -> None:
    (axes,) = draw.loss_curves(three, ["validation"]).axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert set(lines) == set(ARMS)
    values = np.array([[row["value"] for row in cell.scores["validation", "loss"].values()]
                       for cell in three.of_arm("dispersion")])  # fmt: skip
    np.testing.assert_allclose(lines["dispersion"].get_ydata(), values.mean(0))
    np.testing.assert_allclose(lines["dispersion"].get_xdata(), np.array([0, 30, 75, 150, 300]) * TOKENS_A_STEP)
    heights = axes.collections[1].get_paths()[0].vertices[:, 1]
    assert heights.max() == pytest.approx(values.max())
    assert heights.min() == pytest.approx(values.min())


def test_difference_panel_is_paired(three: Study) -> None:
    (axes,) = draw.loss_curves(three, ["difference"]).axes
    mean = next(line for line in axes.get_lines() if line.get_label() == "dispersion")
    found = compare(three)
    assert found.validation is not None
    assert mean.get_ydata()[-1] == pytest.approx(found.validation.differences[0].mean)


def test_profiles_share_one_axis(three: Study) -> None:
    assert draw.times(three) == [0, 30, 300]
    figure = draw.profiles(three)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["start", "step 30 (10%)", "end (step 300)"]
    single = [draw.profiles(three, [step]).axes[0] for step in (0, 300)]
    assert all(a.get_ylim() == b.get_ylim() for a, b in pairwise([*figure.axes, *single]))
    line = next(line for line in figure.axes[2].get_lines() if line.get_label() == "noisy")
    final = np.mean([cell.profiles[300]["mean_cosine"] for cell in three.of_arm("noisy")], axis=0)
    np.testing.assert_allclose(line.get_ydata(), final)


def test_heat_maps_pool_the_seeds(three: Study) -> None:
    maps = draw.histograms(three, "dispersion")
    assert list(maps) == [0, 30, 75, 150, 300]
    counts = sum(np.array(cell.profiles[75]["histogram"]) for cell in three.of_arm("dispersion"))
    np.testing.assert_array_equal(maps[75]["histogram"], counts)
    assert maps[75]["histogram"].shape == (len(LAYERS), BINS)
    figure = draw.heat_maps(three, ["cross-entropy", "dispersion"], count=3)
    assert len(figure.axes) == 2 * 3 + 1  # and the colour bar


def test_heat_maps_need_histograms() -> None:
    bare = Study.from_rows(study(change=lambda row: {**row, "histogram": None} if row["kind"] == "profile" else row))
    assert draw.histograms(bare, "dispersion") == {}
    with pytest.raises(ValueError, match="no evaluated step"):
        draw.heat_maps(bare, ["dispersion"])


def test_forest_draws_every_seed_mean_and_interval(three: Study) -> None:
    found = compare(three)
    assert found.validation is not None
    (axes,) = draw.forest([found.validation], found, xlabel="difference").axes
    d = found.validation.differences[0]
    drawn = [list(line.get_xdata()) for line in axes.get_lines()]
    assert list(d.differences) in drawn
    assert list(d.interval or ()) in drawn
    assert [d.mean] in drawn
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["dispersion", "noisy"]


def test_one_seed_draws_no_band_and_no_interval() -> None:
    rows = Study.from_rows(study(seeds=(0,)))
    found = compare(rows)
    (axes,) = draw.loss_curves(rows, ["training"]).axes
    assert not axes.collections
    assert found.validation is not None
    (axes,) = draw.forest([found.validation], found, xlabel="difference").axes
    assert max(len(line.get_xdata()) for line in axes.get_lines() if line.get_linestyle() == "-") <= 2
    draw.layer_differences(found)
    draw.cost(found)


def test_arms_differ_in_colour_dash_and_marker() -> None:
    arms = ["a", "b", "treated", "c", "d"]
    looks = ArmStyle(arms, "b", dispersed=["treated", "c"])
    assert looks.colour("b") == "#5f6368"
    assert looks.colour("treated") == "#0072b2"
    # no word of a name decides it
    assert ArmStyle(["a", "my-dispersion", "b"], "a", dispersed=["b"]).colour("b") == "#0072b2"
    assert ArmStyle(["a", "b", "my-dispersion"], "a").colour("b") == "#0072b2"
    for what in (looks.colour, looks.marker, lambda arm: str(looks.dash(arm))):
        assert len({what(arm) for arm in arms}) == len(arms)


def test_text_is_legible_at_the_width_of_a_column(three: Study) -> None:
    found = compare(three)
    assert found.validation is not None
    figures = [
        draw.loss_curves(three),
        draw.profiles(three),
        draw.layer_differences(found),
        draw.forest([found.validation], found, xlabel="difference"),
        draw.heat_maps(three, list(ARMS)),
        draw.cost(found),
    ]
    for figure in figures:
        assert figure.get_figwidth() <= 6.9
        sizes = [text.get_fontsize() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]
        assert min(sizes) >= 7


@pytest.mark.parametrize("kind", ["png", "pdf", "svg"])
def test_equal_figures_give_equal_bytes(three: Study, kind: str) -> None:
    first, second = (render(draw.profiles(three, [300]), kind, dpi=60) for _ in range(2))
    assert first == second
    assert b"Matplotlib" not in first.replace(b"Matplotlib v3", b"")[:2000] or kind == "pdf"
    assert b"CreationDate" not in first
    assert b"<dc:date>" not in first


def test_fonts_of_a_pdf_are_truetype_of_its_glyphs_alone(three: Study) -> None:
    before = list(subset.Options().drop_tables)
    pdf = render(draw.profiles(three, [300]), "pdf")
    assert b"/FontFile2" in pdf
    assert b"/Type3" not in pdf
    fonts = []
    for stream in re.findall(rb"stream\r?\n(.*?)endstream", pdf, re.DOTALL):
        with contextlib.suppress(zlib.error, ttLib.TTLibError):
            fonts.append(ttLib.TTFont(io.BytesIO(zlib.decompress(stream))))
    assert fonts
    for font in fonts:
        assert {"glyf", "head", "hmtx", "loca"} <= set(font.keys())
        assert not {"GSUB", "GPOS", "GDEF"} & set(font.keys())
        assert 3 <= font["maxp"].numGlyphs < 100
    assert subset.Options().drop_tables == before


def test_styles_of_the_user_neither_change_nor_are_changed(three: Study) -> None:
    plain = render(draw.profiles(three, [300]), "svg")
    with matplotlib.rc_context({"lines.linewidth": 9.0, "font.size": 30.0, "axes.facecolor": "red"}):
        before = dict(matplotlib.rcParams)
        assert render(draw.profiles(three, [300]), "svg") == plain
        assert dict(matplotlib.rcParams) == before


def test_labels_are_text_not_mathematics() -> None:
    with figure_style():
        figure = Figure()
        figure.text(0.5, 0.5, "costs $5 and $_")
    assert render(figure, "svg").startswith(b"<?xml")


def test_unknown_format(three: Study) -> None:
    with pytest.raises(ValueError, match="unknown figure format 'gif'"):
        render(draw.profiles(three), "gif")


def test_export_writes_whole_files(tmp_path, three: Study) -> None:
    paths = export(draw.profiles(three, [300]), tmp_path / "a.b", dpi=60)
    assert [path.name for path in paths] == ["a.b.png", "a.b.pdf"]
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    assert paths[1].read_bytes().startswith(b"%PDF")


def test_long_labels_are_cut_and_still_drawn() -> None:
    long = "an arm whose label somebody made much longer than any figure has room for"
    looks = ArmStyle(["a", long], "a")
    assert looks.label(long).startswith("an arm whose label")
    assert len(looks.label(long)) <= 36
    assert all(len(line) <= 18 for line in looks.tick(long).splitlines())
    labelled = with_arms(study({"cross-entropy": 0.0, "treated": 0.1}), {"treated": {"label": long}})
    rows = Study.from_rows(labelled)
    found = compare(rows)
    assert found.validation is not None
    for figure in (draw.loss_curves(rows), draw.heat_maps(rows, rows.arms), draw.cost(found),
                   draw.forest([found.validation], found, xlabel="difference")):  # fmt: skip
        render(figure, "svg")


@pytest.mark.parametrize("dpi", [72, 100, 160, 300])
@pytest.mark.parametrize("first", ["svg", "png"])
def test_no_label_is_cut_at_the_edge_at_any_resolution(dpi: int, first: str) -> None:
    """Text is wider at some resolutions than at others; the layout is that of the one which is saved."""
    for name in ("orthogonalization", "mean cosine 10", "noisy-embedding"):
        with figure_style():
            figure = Figure(figsize=(2.4, 1.2), layout="constrained")
            figure.subplots().set_yticks([0], [name])
        render(figure, first, dpi=dpi)
        pixels = np.asarray(Image.open(io.BytesIO(render(figure, "png", dpi=dpi))).convert("L"))
        for edge in (pixels[:, 0], pixels[:, -1], pixels[0], pixels[-1]):
            assert edge.min() == 255, name
