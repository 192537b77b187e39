"""Everything that only a GPU can answer, in one command and under nine minutes; ``make gpu`` runs it.

    python benchmarks/gpu.py [--parts correct attach] [--again] [--out DIR]
    python benchmarks/gpu.py --device cpu --small --out DIR      the same path in Triton's interpreter, tiny sizes

Needs one GPU and what ``check`` below names, no network. Parts, each a process with a time limit:

- ``correct``: the tests marked ``gpu``;
- ``kernels-bf16``, ``kernels-fp32``: the loss against a direct implementation, compiled (once for all shapes) and
  not, the tiled engine and sampled pairs;
- ``attach``: a training step of a GPT2-124M, 32 x 1024 tokens, bfloat16 autocast, with and without the loss;
- ``measure``: measuring against the forward pass;
- ``compiled`` (only when it is named): ``attach`` with the model compiled.

A part that has passed on this GPU with this code is not run again: its row in ``gpu-parts.jsonl`` says so, and
``--again`` runs it nevertheless. Its other rows go to ``losses-gpu``, ``attach-gpu`` and ``measure-gpu.jsonl``.
Exit status: 0 all passed, 1 a part failed, 2 nothing could run.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

from decondense.records import append_rows, make_row, provenance, read_rows

ROOT = Path(__file__).resolve().parents[1]
KERNEL_TESTS = str(ROOT / "tests" / "losses" / "test_fused_kernels.py")
GPT2 = "--layers 12 --width 768 --tokens 1024 --batch 32 --vocabulary 50257 --rounds 10 --warm-up 3 --bf16"
TINY = "--threads 1 --rounds 1 --shapes 1x18x12 --no-memory"
TINY_GPT2 = "--layers 2 --width 32 --tokens 16 --batch 2 --vocabulary 64 --rounds 1 --warm-up 1 --threads 1"
TINY_MEASURE = "--width 32 --passages 1 --rounds 1 --threads 1 --memory-passages 0 --no-metrics"
NEEDED = ("torch", "triton", "transformers", "pydantic", "scipy", "pytest")

# seconds at most on a GPU; the command there, and with --small: words after the interpreter, OUT the folder of the rows
PARTS: dict[str, tuple[int, str, str | None]] = {
    "correct": (
        200,
        f"-m pytest -q -p no:cacheprovider -m gpu {KERNEL_TESTS}",
        f"-m pytest -q -p no:cacheprovider -k bit_identical {KERNEL_TESTS}",
    ),
    "kernels-bf16": (
        100,
        "bench_losses.py time --device cuda --dtype bfloat16 --rounds 5 --out OUT/losses-gpu.jsonl",
        f"bench_losses.py time {TINY} --dtype bfloat16 --out OUT/losses-gpu.jsonl",
    ),
    "kernels-fp32": (
        90,
        "bench_losses.py time --device cuda --dtype float32 --rounds 3 --out OUT/losses-gpu.jsonl",
        f"bench_losses.py time {TINY} --dtype float32 --out OUT/losses-gpu.jsonl",
    ),
    "attach": (
        100,
        f"bench_attach.py --device cuda {GPT2} --out OUT/attach-gpu.jsonl",
        f"bench_attach.py {TINY_GPT2} --out OUT/attach-gpu.jsonl",
    ),
    "measure": (
        45,
        "bench_measure.py --device cuda --width 768 --passages 40 --rounds 5 --memory-passages 4 "
        "--out OUT/measure-gpu.jsonl",
        f"bench_measure.py {TINY_MEASURE} --out OUT/measure-gpu.jsonl",
    ),
    "compiled": (400, f"bench_attach.py --device cuda {GPT2} --compile --out OUT/attach-gpu.jsonl", None),
}
ALL = tuple(name for name in PARTS if name != "compiled")


def check(device: str) -> str | None:
    """Why nothing can run here, and what to do; None: it can."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        return f"not installed: {', '.join(missing)}. Without a network: pip install --no-index --find-links WHEELS ..."
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no GPU; `--device cpu --small` proves this script without one."
    return None


def code_hash() -> str:
    """Of the package, these scripts and the kernels' tests; a commit would change with the rows that are written."""
    digest = hashlib.sha256()
    for folder in ("src", "benchmarks", "tests/losses"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def run(part: str, device: str, out: Path) -> tuple[bool, float]:
    """(passed, seconds) of one part."""
    limit, on_gpu, small = PARTS[part]
    paths = filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")])  # wheels may lie in a folder of their own
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    if device == "cpu":
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = on_gpu if device == "cuda" else small
    assert command is not None, part
    words = [str(out) + word[3:] if word.startswith("OUT/") else word for word in command.split()]
    words = [str(ROOT / "benchmarks" / word) if word.startswith("bench_") else word for word in words]
    start = time.monotonic()
    most = limit if device == "cuda" else None  # the interpreter takes what it takes
    try:
        code = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, timeout=most).returncode
    except subprocess.TimeoutExpired:
        print(f"{part}: stopped after {limit} s", flush=True)
        code = 124
    return code == 0, time.monotonic() - start


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(ALL))
    parser.add_argument("--again", action="store_true", help="also parts that have passed")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the rows")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes, with --device cpu")
    arguments = parser.parse_args(words)
    if arguments.small != (arguments.device == "cpu"):
        parser.error("--device cpu and --small go together")
    if arguments.small and "compiled" in arguments.parts:
        parser.error("the part 'compiled' needs a GPU")
    if (reason := check(arguments.device)) is not None:
        print(reason, file=sys.stderr)
        return 2
    import torch
    import triton

    name = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu, interpreted"
    made = provenance(gpu=name, triton=triton.__version__, cuda=torch.version.cuda or torch.version.hip)
    params = {"gpu": name, "code": code_hash(), "versions": made["versions"] | {"triton": made["triton"]}}
    kept = arguments.out / "gpu-parts.jsonl"
    passed = {row["variant"] for row in (read_rows(kept) if kept.exists() else []) if row["params"] == params}
    failed = []
    for part in arguments.parts:
        if part in passed and not arguments.again:
            print(f"{part}: passed before on this GPU with this code", flush=True)
            continue
        good, seconds = run(part, arguments.device, arguments.out)
        print(f"{part}: {'passed' if good else 'FAILED'} in {seconds:.0f} s", flush=True)
        if good:
            row = make_row(
                "benchmark",
                name="gpu-part",
                variant=part,
                params=params,
                metrics={"seconds": seconds},
                provenance=made,
            )
            append_rows(kept, [row])
        else:
            failed.append(part)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
