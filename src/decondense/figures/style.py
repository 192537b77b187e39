"""The style of every figure: sizes that fit a column, legible fonts, colours that most readers can tell apart.

Figures are made with ``matplotlib.figure.Figure`` (never pyplot), inside :func:`figure_style`, and written by
:func:`render` or :func:`export`, which strip dates and versions: equal figures give equal bytes.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from decondense.records import atomic_write

COLUMN = 3.35
"""Width in inches of one column of a two-column page."""
PAGE = 6.9
"""Width in inches of both columns."""

GREY = "#5f6368"
BLUE = "#0072b2"
INK = "#1a1a1a"
_COLOURS = (
    "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#7b3294",
    "#7a3600", "#00503b", "#8a2f5e", "#5c4305", "#1b5e86", "#c08cd8",
)  # fmt: skip
"""Okabe and Ito's colours (2008), which most colour-blind readers can distinguish, without the yellow; then darker
ones of the same hues, which differ from the first by dash and marker."""
_DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)), (0, (6, 2)), (0, (2, 1)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")

_RC: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # ships with matplotlib: the same glyphs everywhere
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 6,
    "axes.labelsize": 8,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#8a8d91",
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": False,
    "grid.color": "#e3e5e8",
    "grid.linewidth": 0.6,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "xtick.color": "#8a8d91",
    "ytick.color": "#8a8d91",
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "legend.handlelength": 1.8,
    "legend.borderaxespad": 0.3,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "text.color": INK,
    "figure.dpi": 100,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "savefig.dpi": 300,
    "svg.fonttype": "path",
    "svg.hashsalt": "decondense",
    "pdf.fonttype": 42,
    "text.parse_math": False,  # a label may hold a dollar sign
}


@contextlib.contextmanager
def figure_style() -> Iterator[None]:
    """Draw in the project's style; matplotlib's settings are restored afterwards."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's matplotlibrc would change the figures; the backend is unchanged
        matplotlib.rcParams.update(cast(Any, _RC))
        yield


class ArmStyle:
    """Colour, dash and marker of each arm: the baseline is grey, the first arm with a dispersion loss blue.

    Args:
        arms: ids of the arms.
        baseline: id of the baseline; None: there is none.
        labels: labels of the arms; default: their ids.
        dispersed: ids of the arms with a dispersion loss. Without any, the first treated arm is blue.
    """

    def __init__(
        self,
        arms: Sequence[str],
        baseline: str | None,
        labels: Mapping[str, str] | None = None,
        dispersed: Sequence[str] = (),
    ) -> None:
        self.labels = dict(labels or {})
        treated = [arm for arm in arms if arm != baseline]
        first = next((arm for arm in treated if arm in dispersed), treated[0] if treated else None)
        ordered = [arm for arm in arms if arm == baseline] + treated
        self._number = {arm: number for number, arm in enumerate(ordered)}
        self._colour = dict(zip((arm for arm in treated if arm != first), itertools.cycle(_COLOURS), strict=False))
        self._colour |= {arm: GREY if arm == baseline else BLUE for arm in ordered if arm in (baseline, first)}

    def colour(self, arm: str) -> str:
        """Hexadecimal colour."""
        return self._colour.get(arm, INK)

    def dash(self, arm: str) -> Any:
        """Line style; it distinguishes arms in black and white."""
        return _DASHES[self._number.get(arm, 0) % len(_DASHES)]

    def marker(self, arm: str) -> str:
        """Marker; it distinguishes arms in black and white."""
        return _MARKERS[self._number.get(arm, 0) % len(_MARKERS)]

    def line(self, arm: str) -> dict[str, Any]:
        """Keywords of matplotlib's ``plot`` and ``errorbar`` for the arm's line, its label included."""
        return {
            "color": self.colour(arm),
            "linestyle": self.dash(arm),
            "marker": self.marker(arm),
            "label": self.label(arm),
        }

    def label(self, arm: str) -> str:
        """The arm's label in a legend, truncated to 36 characters."""
        text = self.labels.get(arm) or arm
        return text if len(text) <= 36 else text[:35].rstrip() + "…"

    def tick(self, arm: str) -> str:
        """The arm's label beside an axis: at most two short lines."""
        return textwrap.fill(self.labels.get(arm) or arm, 18, max_lines=2, placeholder="…")


def new_figure(width: float, height: float, panels: int = 1, **keywords: Any) -> tuple[Figure, list[Axes]]:
    """A figure of ``width`` x ``height`` inches with ``panels`` axes in a row."""
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.06))
    axes = figure.subplots(1, panels, squeeze=False, **keywords)[0]
    return figure, list(axes)


def panel_grid(panels: int, row_height: float, extra_height: float) -> tuple[Figure, Iterator[tuple[Axes, bool, bool]]]:
    """A page-wide grid of panels, at most four in a row; :func:`same_limits` when they are drawn.

    Returns:
        The figure, and for each panel its axes, whether it is the first of its row, and the last of its column.
    """
    columns = min(4, panels)
    rows = math.ceil(panels / columns)
    figure = Figure(figsize=(PAGE, row_height * rows + extra_height), layout="constrained")
    table = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in table[panels:]:
        axes.set_visible(False)
    return figure, ((table[n], n % columns == 0, n + columns >= panels) for n in range(panels))


def same_limits(figure: Figure) -> None:
    """Give all panels one range. Axes that matplotlib shares do the same, but each asks all others at every step."""
    panels = [axes for axes in figure.axes if axes.get_visible()]
    for get, set_ in (("get_xlim", "set_xlim"), ("get_ylim", "set_ylim")):
        limits = np.array([getattr(axes, get)() for axes in panels])
        down = limits[0, 0] > limits[0, 1]
        low, high = limits.min(), limits.max()
        for axes in panels:
            getattr(axes, set_)(*((high, low) if down else (low, high)))


def grid(axes: Axes, which: Literal["x", "y", "both"] = "y") -> None:
    """Faint lines behind the data."""
    axes.grid(True, axis=which)


def legend_above(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend above all panels, where it hides no data, in as many rows as it needs."""
    entries: dict[str, Any] = {}
    for panel in axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if not entries:
        return
    room = 16 * figure.get_figwidth()  # characters that fit a row
    columns = len(entries)
    while columns > 1 and sum(sorted(len(label) + 7 for label in entries)[-columns:]) > room:
        columns -= 1
    rows = math.ceil(len(entries) / columns)
    if rows > 2:  # a tall legend must not shrink the panels
        figure.set_figheight(figure.get_figheight() + 0.17 * (rows - 2))
    figure.legend(entries.values(), entries.keys(), loc="outside upper left", ncols=columns, columnspacing=1.4)


_METADATA: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "pdf": {"Creator": None, "Producer": None, "CreationDate": None},
    "svg": {"Date": None, "Creator": None, "Format": None, "Type": None},
}


def render(figure: Figure, kind: str, *, dpi: int = 300) -> bytes:
    """The bytes of a figure as ``png``, ``pdf`` or ``svg``, without dates or versions."""
    if kind not in _METADATA:
        raise ValueError(f"unknown figure format {kind!r}; known: {', '.join(_METADATA)}.")
    buffer = io.BytesIO()
    with figure_style():
        # lay out once: every saving would do it again, and draw everything for it
        if (engine := figure.get_layout_engine()) is not None:
            # at the resolution of the file, because text is wider at some than at others
            before, figure.dpi = figure.dpi, dpi
            engine.execute(figure)
            figure.set_layout_engine(None)
            figure.dpi = before
        with _plain_fonts() if kind == "pdf" else contextlib.nullcontext():
            figure.savefig(buffer, format=kind, dpi=dpi, metadata=_METADATA[kind])
    return buffer.getvalue()


@contextlib.contextmanager
def _plain_fonts() -> Iterator[None]:
    """Embed fonts without the tables for composing text: a PDF names glyphs, and to cut the tables to the glyphs of a
    figure takes most of the time of writing it."""
    from fontTools.subset import Options  # type: ignore[import-untyped]

    before = getattr(Options, "_drop_tables_default", None)  # not a public name: without it figures are written slower
    if before is None:
        yield
        return
    Options._drop_tables_default = [*before, "GDEF", "GPOS", "GSUB"]
    try:
        yield
    finally:
        Options._drop_tables_default = before


def export(figure: Figure, stem: Path, kinds: Sequence[str] = ("png", "pdf"), *, dpi: int = 300) -> list[Path]:
    """Write ``stem.png`` and so on, each file atomically."""
    paths = [stem.parent / f"{stem.name}.{kind}" for kind in kinds]
    for path, kind in zip(paths, kinds, strict=True):
        atomic_write(path, render(figure, kind, dpi=dpi))
    return paths
