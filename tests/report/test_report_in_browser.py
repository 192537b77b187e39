"""The report in a real browser: nothing is logged, nothing is fetched, nothing overflows, at phone and desk width."""

from __future__ import annotations

import functools
import html
import http.server
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from synthetic import study

from decondense.report import build_report

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

# the report is looked at inside a frame of the wanted width, because a headless window has a least width of its own
PROBE = """<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,">
<body style="margin:0"><iframe id="frame" style="border:0;width:WIDTHpx;height:900px" src="/report.html"></iframe>
<pre id="answer"></pre>
<script>
const frame = document.getElementById("frame");
frame.onload = () => {
  const page = frame.contentDocument, root = page.documentElement, width = root.clientWidth;
  const inside = element => element.closest(".scroll");
  const out = [...page.querySelectorAll("body *")].filter(e => !inside(e) && !e.closest("svg")
      && (e.getBoundingClientRect().right > width + 0.5 || e.getBoundingClientRect().left < -0.5))
      .map(e => e.tagName + "." + e.className);
  const regions = [...page.querySelectorAll(".scroll")].filter(e => e.getBoundingClientRect().right > width + 0.5);
  const drawn = [...page.querySelectorAll("figure svg")].map(e => e.getBoundingClientRect());
  document.getElementById("answer").textContent = "ANSWER" + JSON.stringify({
    width, scroll: root.scrollWidth, out, regions: regions.length, figures: drawn.length,
    smallest: Math.min(...drawn.map(box => Math.min(box.width, box.height))),
    rows: page.querySelectorAll("tbody tr").length, title: page.title,
    fetched: frame.contentWindow.performance.getEntriesByType("resource").map(entry => entry.name),
    text: getComputedStyle(page.querySelector(".summary p")).fontSize}) + "END";
};
</script></body>"""


class _Handler(http.server.SimpleHTTPRequestHandler):
    asked: list[str]

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str, list[str]]]:
    root = tmp_path_factory.mktemp("site")
    arms = {"cross-entropy": 0.0, "dispersion": -0.2, "an-arm-with-a-rather-long-name-indeed": 0.0}
    tasks = {arm: {"arc_easy": 0.4, "piqa": 0.6} for arm in arms}
    build_report(study(arms, tasks=tasks, steps=100), root)
    asked: list[str] = []
    handler = type("Handler", (_Handler,), {"asked": asked})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(root)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield root, f"http://127.0.0.1:{server.server_address[1]}", asked
    server.shutdown()
    thread.join()
    server.server_close()


def _visit(address: str, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """What the probe found, and the lines of the browser's console, after a headless visit."""
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", f"--user-data-dir={folder / 'profile'}",
            "--enable-logging=stderr", "--v=0", "--window-size=1600,1000", "--virtual-time-budget=20000", "--dump-dom",
            address,
        ],
        capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "HOME": str(folder)},
    )  # fmt: skip
    answer = re.search(r"ANSWER(.*?)END</pre>", done.stdout, re.S)
    assert answer, done.stderr[-2000:]
    return json.loads(html.unescape(answer[1])), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize("width", [380, 1400])
def test_report_in_a_real_browser(site: tuple[Path, str, list[str]], tmp_path: Path, width: int) -> None:
    root, address, asked = site
    (root / f"probe-{width}.html").write_text(PROBE.replace("WIDTH", str(width)))
    asked.clear()
    found, console = _visit(f"{address}/probe-{width}.html", tmp_path)
    assert found["title"] == "A study that never ran"
    assert found["width"] == pytest.approx(width, abs=20)  # less a scroll bar
    assert found["scroll"] <= found["width"]
    assert found["out"] == []
    assert found["regions"] == 0
    assert found["figures"] >= 10
    assert found["smallest"] > 60
    assert found["rows"] > 30
    assert float(found["text"].removesuffix("px")) >= 14
    assert console == []
    assert found["fetched"] == []
    assert sorted(asked) == [f"/probe-{width}.html", "/report.html"]


def test_the_probe_notices_what_it_looks_for(site: tuple[Path, str, list[str]], tmp_path: Path) -> None:
    """The test above can fail: a page with an overflow, an error and a fetch is caught by the same means."""
    root, address, asked = site
    kept = (root / "report.html").read_text()
    bad = kept.replace("<main>", '<main><div style="width:2000px">wide</div>', 1)
    bad = bad.replace("default-src 'none';", "default-src 'unsafe-inline' *;", 1)
    bad = bad.replace("</main>", '<script>console.error("boom")</script><img src="/other.png"></main>', 1)
    bad = bad.replace("img-src data:", "img-src * data:", 1)
    (root / "probe-bad.html").write_text(PROBE.replace("WIDTH", "380"))
    try:
        (root / "report.html").write_text(bad)
        found, console = _visit(f"{address}/probe-bad.html", tmp_path)
    finally:
        (root / "report.html").write_text(kept)
    assert found["scroll"] > found["width"]
    assert "DIV." in found["out"]
    assert any("boom" in line for line in console)
    assert found["fetched"] == [f"{address}/other.png"]
    assert "/other.png" in asked
