"""A report is rebuilt from rows on a machine without torch: every import of it, and of what needs it, is blocked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from synthetic import study

from decondense.records import write_rows

PROGRAM = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "accelerate", "datasets", "triton", "pandas"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocked())
from decondense import compare, figures, records, report
from decondense.figures import comparison, condensation, style
rows = records.read_rows(sys.argv[1])
found = compare.compare(rows)
report.build_report(rows, sys.argv[2])
assert "matplotlib.pyplot" not in sys.modules, "a report must not touch the caller's global figures"
print(report.summary(found))
"""


def test_compare_figures_and_report_work_without_torch(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", study())
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "rows.jsonl"), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Held-out loss at the end of training" in done.stdout
    assert (tmp_path / "out" / "report.html").stat().st_size > 50_000
