"""``make gpu`` from end to end on a CPU: the same script with tiny sizes, the kernels in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from decondense.records import read_rows

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import attach_tables  # noqa: E402
import gpu  # noqa: E402
import kernel_tables  # noqa: E402
import loss_tables  # noqa: E402
import measure_tables  # noqa: E402

TABLES = {
    "gpu-parts": kernel_tables,
    "losses-gpu": loss_tables,
    "attach-gpu": attach_tables,
    "measure-gpu": measure_tables,
}


def run(out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--out", str(out), *words]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_every_part_runs_resumes_and_fills_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(tmp_path, "--device", "cpu", "--small")
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    rows = {name: read_rows(tmp_path / f"{name}.jsonl") for name in TABLES}
    assert [row["variant"] for row in rows["gpu-parts"]] == [
        "correct",
        "kernels-bf16",
        "kernels-fp32",
        "attach",
        "measure",
    ]
    assert {"naive", "fused", "chunked", "subset of 256"} <= {row["variant"] for row in rows["losses-gpu"]}
    assert {"none", "all layers", "deep half", "mean cosine"} <= {row["variant"] for row in rows["attach-gpu"]}

    again = run(tmp_path, "--device", "cpu", "--small")
    assert again.returncode == 0
    assert again.stdout.count("passed before on this GPU with this code") == 5
    assert len(read_rows(tmp_path / "losses-gpu.jsonl")) == len(rows["losses-gpu"])

    for name, module in TABLES.items():
        monkeypatch.setattr(module, "RESULTS", tmp_path)
        assert module.TABLES[name]().startswith("| ")


@pytest.mark.parametrize("module", TABLES.values(), ids=list(TABLES))
def test_a_table_without_rows_says_not_run(module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    (name,) = [name for name, owner in TABLES.items() if owner is module]
    assert module.TABLES[name]().startswith("Not run")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_nothing_runs_and_a_message_says_why(capsys, tmp_path: Path) -> None:
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "sees no GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
