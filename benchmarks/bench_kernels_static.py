"""Registers, spills and shared memory of every Triton kernel, compiled ahead of time for GPUs that are not at hand.

    python benchmarks/bench_kernels_static.py [--targets sm_90 gfx942] [--jobs 2] [--out FILE.jsonl]   about 15 minutes
    python benchmarks/bench_kernels_static.py --sweep sm_90                 block sizes beside those of the launch table

``decondense.losses.fused.sweep`` runs on tensors of the device ``meta``, with a launcher that compiles what it is
asked to start: the specialisations are those of real calls. All functions of a pair, dtypes and both alignments at full
block sizes, with and without gradient, with no mask and with all; every combination of masks of the angular loss; every
smaller block and the addresses beyond 2 GiB with every dtype, the smaller blocks with every function too. A row is one
(target, kernel, dtype, function of the pair, block sizes): the worst of its specialisations. Ends with 1 if one spills
registers or needs more shared memory than a block may have.

Registers, stack (spilled registers, in bytes) of a cubin: ``cuobjdump -res-usage``; of AMD code: the metadata of the
assembly, in which spills are registers. Both tools are Triton's own.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from decondense.config import LossConfig
from decondense.forms import FORMS
from decondense.losses import fused, vectors
from decondense.losses.forms import form_of
from decondense.losses.pair_forms import PairForm
from decondense.records import Row, make_row, provenance, write_rows

KIB = 1024
TARGETS = {
    # shared memory of one block: CUDA C++ Programming Guide, technical specifications per compute capability
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * KIB),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * KIB),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * KIB),
    # ROCm documentation, AMD GPU specifications: LDS of an MI300
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * KIB),
}
DTYPES = {
    "float32": (torch.float32, False),
    "float32, TF32 products": (torch.float32, True),
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
}
ALIGNED, ODD = (2, 1024, 768), (2, 1023, 777)  # all dimensions divided by 16, or none
LARGE = (1024, 1024, 1024)  # more than 2 GiB, which AMD's backend addresses otherwise
NARROW = tuple((2, size, size) for size in (2, 3, 4, 8, 16, 32, 64, 128))


class Case(NamedTuple):
    """One call of ``sweep``."""

    dtype: str
    form: str
    shape: tuple[int, int, int] = ALIGNED
    masked: bool = True
    segments: bool = True
    gradient: bool = True


class Compiled(NamedTuple):
    """One specialisation of a kernel."""

    kernel: str
    dtype: str
    function: str
    tokens: int
    across: int
    warps: int
    stages: int
    registers: int
    spills: int
    shared: int
    digest: str = ""


class Ahead:
    """As much of a Triton driver as compiling takes; active inside ``with``."""

    def __init__(self, target: str) -> None:
        self.target = TARGETS[target][0]
        # Triton keeps what it compiled by the number of the device: not that of a real one
        self.index = 1000 + list(TARGETS).index(target)

    def __enter__(self) -> None:
        self.before = driver._active
        driver.set_active(self)

    def __exit__(self, *_: object) -> None:
        driver._active = self.before

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.index

    def get_current_stream(self, device: int) -> int:
        return 0


def pair_forms() -> dict[str, PairForm]:
    """Of the forms that the kernels know, one for each (function, pairs i = j count)."""
    found: dict[tuple[str, bool], tuple[str, PairForm]] = {}
    for name, info in FORMS.items():
        config = LossConfig(form=name)  # type: ignore[arg-type]
        make = form_of(config).pair_form
        if info.fused and make is not None and (kernel := (pair := make(config)).kernel()) is not None:
            found.setdefault((kernel.function, pair.diagonal), (name, pair))
    return dict(found.values())


def cases() -> Iterator[Case]:
    """What is launched: see the module."""
    forms = list(pair_forms())
    for dtype in DTYPES:
        for form, gradient in itertools.product(forms, (True, False)):
            for shape, masked, segments in itertools.product((ALIGNED, ODD), (True, False), (True, False)):
                # masks only decide which pairs count, in the same way for every function: all of them for one
                if form == forms[0] or (masked == segments and (masked or shape == ALIGNED)):
                    yield Case(dtype, form, shape, masked, segments, gradient)
        yield Case(dtype, forms[0], LARGE)
        for form, shape in itertools.product(forms, NARROW):
            yield Case(dtype, form, shape)


def kernels_hash() -> str:
    """Of the kernels and how they are launched: rows of other kernels say nothing about these."""
    jitted = sorted(name for name, one in vars(fused).items() if isinstance(one, triton.JITFunction))
    text = [getattr(fused, name).src for name in jitted] + [repr(sorted(fused.LAUNCHES.items()))]
    return hashlib.sha256("\n".join(text).encode()).hexdigest()[:16]


_usages: dict[str, tuple[int, int]] = {}


def usage(compiled: Any) -> tuple[int, int]:
    """(registers of a thread, spills), read once of each."""
    if compiled.hash not in _usages:
        _usages[compiled.hash] = _usage(compiled)
    return _usages[compiled.hash]


def _usage(compiled: Any) -> tuple[int, int]:
    if "cubin" in compiled.asm:
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [str(tool), "-res-usage", file.name]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
        return found["REG"], found["STACK"] + found["LOCAL"]
    names = r"vgpr_count|agpr_count|vgpr_spill_count|sgpr_spill_count"
    found = {name: int(value) for name, value in re.findall(rf"\.({names}):\s+(\d+)", compiled.asm["amdgcn"])}
    return found["vgpr_count"] + found["agpr_count"], found["vgpr_spill_count"] + found["sgpr_spill_count"]


def compile_case(target: str, case: Case) -> list[Compiled]:
    """Compile what one call launches."""
    dtype, tf32 = DTYPES[case.dtype]
    form = pair_forms()[case.form]
    found: dict[str, Compiled] = {}

    def run(kernel: Any, grid: tuple[int, int], *arguments: Any, **constants: Any) -> None:
        made = kernel.warmup(*arguments, grid=grid, **constants)
        if made.hash in found:
            return
        name = kernel.__name__
        known = form.kernel()
        function = "" if known is None or name != "_weights" else known.function
        settings = [constants[key] for key in ("BM", "BC", "num_warps", "num_stages")]
        # the other kernels do not see how products are taken
        sees = case.dtype if name in ("_operand", "_weights") else case.dtype.partition(",")[0]
        found[made.hash] = Compiled(name, sees, function, *settings, *usage(made), made.metadata.shared, made.hash)

    new = partial(torch.ones, case.shape[:2], device="meta")
    z = torch.empty(case.shape, dtype=dtype, device="meta")
    asked = vectors.rounds_products
    vectors.rounds_products = lambda x: tf32
    valid, label = new(dtype=torch.bool), new(dtype=torch.int64)
    try:
        with Ahead(target):
            fused.sweep(z, valid if case.masked else None, label if case.segments else None, form, case.gradient, run)
    finally:
        vectors.rounds_products = asked
    return list(found.values())


def problems(target: str, compiled: list[Compiled]) -> list[str]:
    """What does not fit the target."""
    limit = TARGETS[target][1]
    return [f"{target}: {one}" for one in compiled if one.spills or one.shared > limit]


def rows_of(target: str, chosen: list[Case]) -> tuple[list[Row], list[str]]:
    """One row for each kernel and launch, the worst of its specialisations; and what does not fit."""
    compiled = [one for case in chosen for one in compile_case(target, case)]
    rows = []
    for key in sorted({one[:7] for one in compiled}):
        these = [one for one in compiled if one[:7] == key]
        kernel, *settings = key
        params = dict(zip(("dtype", "function", "tokens", "across", "warps", "stages"), settings, strict=True))
        metrics = {name: max(getattr(one, name) for one in these) for name in ("registers", "spills")}
        metrics |= {
            "compiled": len({one.digest for one in these}),
            "shared_bytes": max(one.shared for one in these),
            "shared_limit_bytes": TARGETS[target][1],
        }
        made = provenance(triton=triton.__version__, kernels=kernels_hash())
        rows.append(
            make_row(
                "benchmark",
                name="kernels-static",
                variant=kernel,
                params={"target": target, **params},
                metrics=metrics,
                provenance=made,
            )
        )
    return rows, problems(target, compiled)


def occupancy(registers: int, warps: int) -> float:
    """Share of the 64 warps of an NVIDIA multiprocessor that 65,536 registers, given out by 256 a warp, can hold."""
    blocks = 65536 // (-(-32 * registers // 256) * 256 * warps)
    return min(1.0, blocks * warps / 64)


def sweep_blocks(target: str) -> None:
    """Print registers, spills and occupancy for block sizes around those of the launch table."""
    shipped = dict(fused.LAUNCHES)
    form = next(iter(pair_forms()))
    for name, tokens, across, warps in itertools.product(shipped, (8, 16, 32), (64, 128, 256), (4, 8)):
        fused.LAUNCHES.update({**shipped, name: fused.Launch(tokens, across, warps, shipped[name].stages)})
        for dtype in ("float32", "bfloat16"):
            worst = next(one for one in compile_case(target, Case(dtype, form)) if one.kernel == name)
            share = occupancy(worst.registers, warps)
            mark = "*" if shipped[name][:3] == (tokens, across, warps) else " "
            print(
                f"{mark} {name:9s} {tokens:3d} x {across:3d}, {warps} warps, {dtype:9s} registers {worst.registers:3d} "
                f"spills {worst.spills:3d} shared {worst.shared:6d} occupancy {share:.2f}",
                flush=True,
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--sweep", default=None, choices=list(TARGETS), metavar="TARGET")
    parser.add_argument("--jobs", type=int, default=1, help="processes, one target each")
    parser.add_argument("--out", default=None, help="write the rows to this .jsonl file")
    arguments = parser.parse_args()
    if arguments.sweep:
        sweep_blocks(arguments.sweep)
        return 0
    every: list[Row] = []
    wrong: list[str] = []
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        for rows, bad in pool.map(partial(rows_of, chosen=list(cases())), arguments.targets):
            every += rows
            wrong += bad
            print(f"{rows[0]['params']['target']}: {len(rows)} launches, {len(bad)} that do not fit", flush=True)
    if arguments.out:
        write_rows(arguments.out, every)
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
