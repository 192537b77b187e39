"""Pages that lie outside of ``docs/``, and links that are for the code host alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

_PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(((?:\.\./)+)([^)#\s]+)(#[^)]*)?\)")


def on_files(files: Files, *, config: Any) -> Files:
    """Called by mkdocs with the files of the site: add the ones that stand at the root of the repository."""
    root = Path(config.config_file_path).parent
    for source, target in _PAGES.items():
        files.append(File.generated(config, target, content=(root / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Called by mkdocs with the text of each page: a link out of ``docs/`` becomes one in the site, or plain text."""
    depth = page.file.src_uri.count("/")

    def replace(match: re.Match[str]) -> str:
        text, up, path, anchor = match.groups()
        if up.count("/") <= depth:
            return match[0]
        if path in _PAGES:
            return f"[{text}]({'../' * depth}{_PAGES[path]}{anchor or ''})"
        return text

    return _LINK.sub(replace, markdown)
