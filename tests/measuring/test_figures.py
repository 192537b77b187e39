"""The figures show what they say: axes, colours, order, numbers; and leave matplotlib as it was."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest

from decondense.figures import condensation as figures

RNG = np.random.default_rng(0)


def profile(label: str, parameters: float = 1e6, layers: int = 5, **more: object) -> dict:
    mu = np.linspace(0.1, 0.8, layers)
    centres = np.linspace(-1, 1, 129)[:-1] + 1 / 128
    density = np.exp(-0.5 * ((centres - mu[:, None]) / 0.05) ** 2)
    density /= density.sum(axis=1, keepdims=True) / 64
    return {
        "label": label,
        "mean_cosine": mu,
        "averaged": density,
        "pooled": density[:, ::-1],
        "spearman": 0.9,
        "kendall": 0.8,
        "spearman_interval": (0.7, 1.0),
        "kendall_interval": (0.6, 0.9),
        "parameters": parameters,
        "passages": 100,
        **more,
    }


def texts(figure: object) -> str:
    return "\n".join(t.get_text() for t in figure.findobj(matplotlib.text.Text))


def meshes(figure: object) -> list:
    maps = [m for m in figure.findobj(matplotlib.collections.QuadMesh) if m.get_array().shape[0] == 128]
    return sorted(maps, key=lambda m: (-round(m.axes.get_position().y0, 2), m.axes.get_position().x0))


@pytest.mark.parametrize(("palette", "name"), [("reds", "Reds"), ("cividis", "cividis")])
def test_heat_map(palette: str, name: str) -> None:
    before = dict(matplotlib.rcParams)
    figure = figures.heatmap_figure(profile("tiny"), palette=palette)
    assert dict(matplotlib.rcParams) == before
    (mesh,) = meshes(figure)
    assert mesh.get_cmap().name == name
    assert mesh.get_clim() == (0, 10)
    np.testing.assert_allclose(mesh.get_array(), profile("tiny")["averaged"].T)
    assert mesh.axes.get_ylim() == (-0.25, 1)
    assert mesh.axes.get_xlabel() == "layer fraction"
    # the cell of layer l is centred at l / L
    edges = mesh.get_coordinates()[0, :, 0]
    np.testing.assert_allclose((edges[1:] + edges[:-1]) / 2, [0, 0.25, 0.5, 0.75, 1], atol=1e-12)
    shown = texts(figure)
    assert "tiny" in shown
    assert "ρ +0.90" in shown
    assert "averaged over 100 passages" in shown
    assert figure.get_size_inches()[0] <= 3.5  # a column


def test_pooled_from_the_counts_of_a_row() -> None:
    counts = RNG.integers(0, 50, (5, 128))
    row = {"label": "row", "histogram": counts.tolist(), "mean_cosine": [0.1] * 5, "spearman": None, "kendall": None}
    (mesh,) = meshes(figures.heatmap_figure(row, kind="pooled"))
    np.testing.assert_allclose(mesh.get_array().sum(axis=0) / 64, 1)
    with pytest.raises(ValueError, match="'row' holds no averaged histogram"):
        figures.heatmap_figure(row)


def test_family_is_ordered_by_size() -> None:
    sizes = {"large": 9e8, "small": 1e8, "medium": 4e8}
    figure = figures.family_figure([profile(k, v, spearman=v / 1e9) for k, v in sizes.items()], family="Family")
    titles = [mesh.axes.get_title() for mesh in meshes(figure)]
    assert titles == ["small", "medium", "large"]
    trend = next(a for a in figure.axes if a.get_xlabel() == "parameters")
    line = next(li for li in trend.get_lines() if "Spearman" in str(li.get_label()))
    assert list(line.get_xdata()) == [1e8, 4e8, 9e8]
    np.testing.assert_allclose(line.get_ydata(), [0.1, 0.4, 0.9])
    assert trend.get_xscale() == "log"
    assert [t.get_text() for t in trend.get_xticklabels()] == ["100M", "400M", "900M"]
    assert trend.get_title() == "Family"
    with pytest.raises(ValueError, match="number of parameters of unsized"):
        figures.family_figure([profile("unsized", 0)])
    with pytest.raises(ValueError, match="at least one"):
        figures.family_figure([])


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_any_number_of_models(count: int) -> None:
    figure = figures.family_figure([profile(f"m{i}", 10.0 ** (6 + i)) for i in range(count)], kind="pooled")
    assert len(meshes(figure)) == count
    assert figure.get_size_inches()[0] <= 7
    figure.canvas.draw()


def test_pairs() -> None:
    figure = figures.pairs_figure([(profile("a"), profile("a-r1")), (profile("b"), profile("b-r1"))])
    assert [m.axes.get_title() for m in meshes(figure)] == ["a", "b", "a-r1", "b-r1"]
    labels = [m.axes.get_ylabel() for m in meshes(figure)]
    assert labels == ["base\ncosine", "", "distilled\ncosine", ""]
    with pytest.raises(ValueError, match="at least one pair"):
        figures.pairs_figure([])


def test_checkpoints() -> None:
    steps = [0, 10, 100, 1000, 10000, 100000]
    figure = figures.checkpoints_figure([profile("x", step=s) for s in reversed(steps)], maps=3)
    assert [m.axes.get_title() for m in meshes(figure)] == ["step 0", "step 100", "step 100,000"]
    trend = next(a for a in figure.axes if a.get_xlabel() == "optimizer step")
    assert list(trend.get_lines()[1].get_xdata()) == steps
    assert trend.get_xlim()[0] > -10
    with pytest.raises(ValueError, match="missing for: y"):
        figures.checkpoints_figure([profile("y")])
