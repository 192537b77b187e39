"""The Triton kernels compile for GPUs that are not at hand, without spilling registers, within their shared memory."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from decondense.records import read_rows

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_kernels_static as static  # noqa: E402
from decondense.losses import fused  # noqa: E402

COMMITTED = ROOT / "benchmarks" / "results" / "kernels-static.jsonl"


@pytest.mark.parametrize("target", list(static.TARGETS))
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_call_compiles_and_fits(target: str, dtype: str) -> None:
    compiled = static.compile_case(target, static.Case(dtype, "angular"))
    assert [one.kernel for one in compiled] == list(fused.LAUNCHES)
    assert static.problems(target, compiled) == []
    assert all(16 <= one.registers <= 255 for one in compiled)


@pytest.mark.parametrize(("target", "tokens"), [("sm_90", 32), pytest.param("gfx942", 64, marks=pytest.mark.slow)])
def test_a_spill_is_seen(target: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several arrays of 64 numbers a thread do not fit 255 registers, nor as many again AMD's 512."""
    monkeypatch.setitem(fused.LAUNCHES, "_tangent", fused.Launch(tokens, 256, 4, 2))
    (problem,) = static.problems(target, static.compile_case(target, static.Case("float32", "angular")))
    assert "kernel='_tangent'" in problem


def test_more_shared_memory_than_a_block_may_have_is_seen() -> None:
    fits = static.Compiled("_norms", "float32", "", 16, 128, 8, 2, registers=32, spills=0, shared=64 * 1024)
    assert static.problems("gfx942", [fits]) == []
    assert len(static.problems("gfx942", [fits._replace(shared=64 * 1024 + 1)])) == 1
    assert static.problems("sm_80", [fits._replace(shared=163 * 1024)]) == []


def test_committed_rows_are_those_of_the_launch_table() -> None:
    rows = read_rows(COMMITTED)
    assert {row["params"]["target"] for row in rows} == set(static.TARGETS)
    for name, launch in fused.LAUNCHES.items():
        params = [row["params"] for row in rows if row["variant"] == name]
        assert {(one["tokens"], one["warps"], one["stages"]) for one in params} == {(launch[0], *launch[2:])}
        assert max(one["across"] for one in params) == launch.across
    assert {row["provenance"]["kernels"] for row in rows} == {static.kernels_hash()}, "run `make kernels` again"
    for row in rows:
        assert row["metrics"]["spills"] == 0, row
        assert row["metrics"]["shared_bytes"] <= static.TARGETS[row["params"]["target"]][1], row


@pytest.mark.slow
@pytest.mark.parametrize("target", list(static.TARGETS))
def test_everything_that_is_launched_fits(target: str) -> None:
    """Minutes for each target; seconds where Triton has it in its cache."""
    rows, problems = static.rows_of(target, list(static.cases()))
    assert problems == []
    assert {row["params"]["dtype"] for row in rows} == set(static.DTYPES)
