"""What the terminal shows of names that come from elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.table import Table

from decondense.cli.console import Console

HOSTILE = "arm\x1b[2J\x07\x9b1m\x7f\r end"


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("way", ["text", "markup", "table"])
def test_control_characters_are_shown_not_sent(way: str, terminal: bool) -> None:
    """An escape in the name of an arm, in rows from elsewhere, must not clear the screen or ring the bell."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100, color_system=None)
    if way == "table":
        table = Table("arm")
        table.add_row(HOSTILE)
        console.print(table)
    else:
        console.print(HOSTILE, markup=way == "markup", highlight=False)
    shown = out.getvalue()
    assert not set(shown) & {"\x1b", "\x07", "\x9b", "\x7f", "\r"}
    assert "x1b" in shown
    assert "end" in shown or way == "table"  # whose cells are cut to the width of what has one
