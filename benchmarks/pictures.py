"""Figures of the docs as small PNG files."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from decondense.figures.style import render
from decondense.records import atomic_write

COLOURS = 256


def picture(figure: Figure, path: Path, *, dpi: int = 160) -> None:
    """Write the figure with a palette, which takes a third of the space that full colour does."""
    whole = Image.open(io.BytesIO(render(figure, "png", dpi=dpi))).convert("RGB")
    small = io.BytesIO()
    whole.quantize(COLOURS, dither=Image.Dither.NONE).save(small, "png", optimize=True)
    atomic_write(path, small.getvalue())
