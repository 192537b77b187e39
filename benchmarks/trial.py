"""A trial of what the package promises about kills, damaged files and hostile folders: one table, and rows of it.

    python benchmarks/trial.py [--kills 20] [--files 300] [--folders 20] [--seed 0] [--jobs 2] [--out FILE.jsonl]

Kills: a tiny study with a sweep and a model that is trained first is started, and runner, worker or group get a signal
at a random moment; the same command is started again; *survived* when the rows at the end equal those of an undisturbed
run. Files: studies, rows, profiles, models, texts, benchmarks and checkpoints with random damage; *survived* when the
command ended with a result, or with one message that names the file. Folders: models, tokenizers, data sets, studies
and checkpoints that bring code, while standard input says "y" without end; *survived* when no code ran and nothing
broke. *Silent*: a signal without a sentence, certain damage without a word, other rows than the undisturbed. *Left
running*: processes that are there 5 seconds after the end of their runner, or a command that does not end. The same
seed makes the same damage; the moments of kills depend on the clock.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
COUNTS = ("tried", "survived", "tracebacks", "silent", "left_running", "code_run")
PARTS = ("kills", "files", "folders")


def inputs(part: str, count: int, seed: int, folder: Path, jobs: int) -> dict[str, Any]:
    """The part, in ``jobs`` processes of its own with a share of the cases each; their standard input says "y"."""
    yes = folder / "yes.txt"
    yes.write_bytes(b"y\n" * 1_000_000)
    bounds = [count * job // jobs for job in range(jobs + 1)]
    running = []
    for job, (first, end) in enumerate(itertools.pairwise(bounds)):
        place = folder / str(job)
        place.mkdir()
        words = [part, "--first", str(first), "--count", str(end), "--of", str(count)]
        words += ["--seed", str(seed), "--folder", str(place)]
        with yes.open("rb") as answers:
            running.append(subprocess.Popen([sys.executable, str(HERE / "trial_inputs.py"), *words], stdin=answers))
    if any(map(subprocess.Popen.wait, running)):
        raise RuntimeError(f"{part}: a process of the trial itself failed")
    found = [json.loads((folder / str(job) / "result.json").read_text()) for job in range(jobs)]
    problems = [problem for one in found for problem in one.pop("problems")]
    seconds = max(one.pop("seconds") for one in found)
    return {**{key: sum(one[key] for one in found) for key in found[0]}, "problems": problems, "seconds": seconds}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--files", type=int, default=300)
    parser.add_argument("--folders", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="what runs side by side: series of kills, shares of files")
    parser.add_argument("--out", type=Path, default=None, help="replace this .jsonl file with the rows")
    arguments = parser.parse_args()
    # before torch is imported, here and in every process that is started
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")

    for name in ("SIGINT", "SIGHUP"):  # whoever starts the trial in the background ignores them, and that is inherited
        if signal.getsignal(getattr(signal, name)) is signal.SIG_IGN:
            signal.signal(getattr(signal, name), signal.SIG_DFL)

    from decondense.records import make_row, provenance, write_rows
    from decondense.stopping import stop_on_signals

    rows = []
    print(f"{'':8s}" + "".join(f"{name.replace('_', ' '):>14s}" for name in COUNTS))
    for part in PARTS:
        count = getattr(arguments, part)
        if not count:
            continue
        with tempfile.TemporaryDirectory(prefix=f"trial-{part}-") as name:
            folder = Path(name)
            if part == "kills":
                import trial_kills

                try:
                    with stop_on_signals():
                        say = partial(print, file=sys.stderr, flush=True)
                        found = trial_kills.run(count, arguments.seed, folder, arguments.jobs, say=say)
                finally:
                    trial_kills.end_all()
            else:
                found = inputs(part, count, arguments.seed, folder, arguments.jobs)
        print(f"{part:8s}" + "".join(f"{found.get(name, 0):14d}" for name in COUNTS), flush=True)
        for problem in found.pop("problems"):
            print(f"    {problem}", flush=True)
        params = {"seed": arguments.seed}
        rows.append(
            make_row("benchmark", name="trial", variant=part, params=params, metrics=found, provenance=provenance())
        )
    if arguments.out:
        write_rows(arguments.out, rows)
    broken = ("tracebacks", "silent", "left_running", "code_run")
    whole = all(row["metrics"]["survived"] == row["metrics"]["tried"] for row in rows)
    return 0 if whole and not any(row["metrics"].get(name) for row in rows for name in broken) else 1


if __name__ == "__main__":
    sys.exit(main())
