"""The site builds strictly and without a network, shows what it should, and loads nothing from elsewhere."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import decondense
from decondense.config import LossConfig, StudyConfig
from test_readme_and_docs import BLOCK, ROOT, run_command, run_python

BLOCKS = BLOCK.findall((ROOT / "docs" / "index.md").read_text(encoding="utf-8"))
TOOLS = ("mkdocs", "material", "mkdocstrings", "latex2mathml")
needs_tools = pytest.mark.skipif(
    any(importlib.util.find_spec(tool) is None for tool in TOOLS), reason="needs decondense[docs]"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, **nowhere, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


class Page(HTMLParser):
    """What a browser would load for a page, its anchors, and the text that a reader sees outside of code."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.resources: list[str] = []
        self.policies: list[str] = []
        self.anchors: set[str] = set()
        self.formulas = 0
        self.text = ""
        self._hidden = 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values: dict[str, Any] = dict(attrs)
        self.anchors.add(values.get("id") or "")
        if tag == "link":
            self.resources.append(values["href"])
        elif tag != "a":
            self.resources += [values[key] for key in ("src", "href", "srcset", "data", "poster") if values.get(key)]
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policies.append(values["content"])
        self.formulas += tag == "math"
        self._hidden += tag in ("script", "style", "pre", "code")

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in ("script", "style", "pre", "code")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.text += data


def pages_of(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for entry in nav.values() if isinstance(nav, dict) else nav:
            yield from pages_of(entry)


@needs_tools
def test_every_page_of_the_navigation_is_built(site: Path) -> None:
    pages = list(pages_of(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert {"index.md", "faq.md", "results.md", "changelog.md", "contributing.md", "api/losses.md"} <= set(pages)
    for page in pages:
        assert (site / page).with_suffix(".html").stat().st_size > 1000, page
    for path in (ROOT / "docs").rglob("*.md"):
        assert str(path.relative_to(ROOT / "docs")) in pages
    assert "Keep a Changelog" in (site / "changelog.html").read_text()


@needs_tools
def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    paths = sorted(site.rglob("*.html"))
    for path in paths:
        page = Page(path)
        assert len(page.resources) > 3
        for resource in page.resources:
            assert not re.match(r"(\w+:)?//", resource), f"{path.name} loads {resource}"
        # scripts that are there may ask for more only when they run; the browser refuses it then
        assert page.policies == ["default-src 'self' data: blob: 'unsafe-inline'"], path.name
    for path in site.rglob("*.css"):
        for address in re.findall(r"url\(([^)]*)\)|@import\s+([^;]*)", path.read_text(encoding="utf-8")):
            assert not re.match(r"""["']?(https?:)?//""", "".join(address)), f"{path.name} loads {address}"


@needs_tools
def test_formulas_and_docstrings_are_rendered(site: Path) -> None:
    for path in sorted(site.rglob("*.html")):
        text = Page(path).text
        assert "arithmatex" not in path.read_text(encoding="utf-8"), path.name
        for raw in (r"\\[a-zA-Z]{2,}", r"\$\$", r"\.\. \w+::", r":\w+:`", "``", r">>> "):
            assert not (found := re.search(f".{{0,40}}{raw}.{{0,40}}", text)), f"{path.name}: {found}"
    source = re.sub(r"```.*?```|`[^`]*`", "", (ROOT / "docs" / "math.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    formulas = re.findall(r"\$\$.+?\$\$|\$.+?\$", source, flags=re.DOTALL)
    assert Page(site / "math.html").formulas == len(formulas) > 30
    assert Page(site / "api" / "losses.html").formulas > 3  # from docstrings


@needs_tools
def test_every_public_name_has_its_place_in_the_reference(site: Path) -> None:
    pages = {path.name: Page(path) for path in (site / "api").glob("*.html")}
    anchors = set().union(*(page.anchors for page in pages.values()))
    for name in decondense.__all__:
        if name != "__version__":
            assert f"decondense.{name}" in anchors, f"the reference lacks decondense.{name}"
    assert "decondense.__version__" in (site / "api" / "index.html").read_text()
    # a default that stands in a configuration is shown as its value, and the configurations have every field
    shown = re.sub(r"<[^>]+>", "", (site / "api" / "configuration.html").read_text())
    assert f"default={LossConfig().tau}" in shown
    assert {f"decondense.config.LossConfig.{name}" for name in LossConfig.model_fields} <= anchors


def hook_of(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "hooks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_tools
def test_links_out_of_the_documentation_become_pages_or_text() -> None:
    rows, changes = "[rows](../benchmarks/results/demo.jsonl)", "[changes](../CHANGELOG.md#unreleased)"
    rewrite = hook_of("pages").on_page_markdown
    for page, text, expected in (
        ("faq.md", rows, "rows"),
        ("faq.md", changes, "[changes](changelog.md#unreleased)"),
        ("api/losses.md", "[math](../math.md)", "[math](../math.md)"),
        ("api/losses.md", "[changes](../../CHANGELOG.md)", "[changes](../changelog.md)"),
        ("faq.md", "![figure](../figure.png) and [math](math.md)", "![figure](../figure.png) and [math](math.md)"),
    ):
        assert rewrite(text, page=SimpleNamespace(file=SimpleNamespace(src_uri=page))) == expected


@needs_tools
def test_a_formula_that_cannot_be_converted_stops_the_build() -> None:
    from mkdocs.exceptions import PluginError

    hook = hook_of("formulas")
    assert "<mfrac><mn>1</mn><mi>n</mi></mfrac>" in hook.to_mathml(r"\frac1n")
    for wrong in (r"\nosuchcommand{x}", r"\frac{1}"):
        with pytest.raises(PluginError, match="formula"):
            hook.to_mathml(wrong)


@pytest.mark.parametrize("number", [n for n, (language, _) in enumerate(BLOCKS) if language == "python"])
def test_python_blocks_of_the_first_page_run(number: int, tmp_path: Path) -> None:
    run_python(BLOCKS[number][1], tmp_path)


def test_the_study_of_the_first_page_is_valid() -> None:
    (text,) = [text for language, text in BLOCKS if language == "yaml"]
    assert StudyConfig.parse(yaml.safe_load(text), where="docs/index.md").name == "mine"


@pytest.mark.slow
def test_commands_of_the_first_page_work(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DECONDENSE_CACHE", str(tmp_path / "cache"))
    (study,) = [text for language, text in BLOCKS if language == "yaml"]
    Path("mine.yaml").write_text(study)
    lines = [line for language, text in BLOCKS if language == "bash" for line in text.splitlines()]
    assert len(lines) >= 6
    for line in lines:
        run_command(shlex.split(line, comments=True), capsys)
    for path in ("first/report.html", "measured", "mine/report.html"):
        assert Path(path).exists()
    assert {language for language, _ in BLOCKS} == {"bash", "python", "yaml"}
