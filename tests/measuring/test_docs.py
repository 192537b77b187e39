"""The Python of docs/measuring.md runs, from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path


def test_every_block_runs(capsys: object, registry: None) -> None:
    page = (Path(__file__).parents[2] / "docs" / "measuring.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    assert len(blocks) == 7
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/measuring.md", "exec"), names)
    assert names["profile"].layers == ["embedding", "block 1", "block 2", "block 3", "final norm"]
