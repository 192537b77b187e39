"""Damaged files and hostile folders, each given to a command in this process; the other parts of ``trial.py``.

python benchmarks/trial_inputs.py files|folders --count N --seed S --folder WORK < yes.txt

``WORK/result.json`` gets the counts of the table.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests" / "helpers"))

from trial_kills import write_study  # noqa: E402

LONGEST = 120
"""Seconds of this process's CPU time after which a command counts as left running."""
WAITS = 900
"""Seconds after which it does so in any case: it waits for what never comes."""


class TooLong(BaseException):
    """The alarm; no command may catch it."""


@dataclass
class Done:
    """How a command ended."""

    status: int | str
    """Exit status, or the traceback of what was not caught."""
    text: str
    """What it printed."""


@dataclass
class Tally:
    """The counts of one part of the trial."""

    tried: int = 0
    survived: int = 0
    tracebacks: int = 0
    silent: int = 0
    left_running: int = 0
    code_run: int = 0
    refused: int = 0
    problems: list[str] = field(default_factory=list)

    def add(self, what: str, done: Done, name: Path | None, *, certain: bool = False, ran: bool = False) -> None:
        """Count a case.

        Args:
            what: names it.
            done: how it ended.
            name: the file that a refusal has to name; None: it names a key of the study.
            certain: it cannot have ended well without a word.
            ran: code ran.
        """
        self.tried += 1
        text = "".join(done.text.split())
        broke = isinstance(done.status, str) or "Traceback(mostrecentcalllast)" in text
        stuck = done.status == "stuck"
        refused = done.status not in (0, "stuck") and not broke
        named = name is None or name.name in text
        silent = (refused and not (text and named)) or (done.status == 0 and certain and not named)
        self.refused += refused
        self.tracebacks += broke and not stuck
        self.left_running += stuck
        self.silent += silent
        self.code_run += ran
        if broke or stuck or silent or ran:
            why = "stuck" if stuck else "a traceback" if broke else "code ran" if ran else "silent"
            last = done.status if isinstance(done.status, str) else f"status {done.status}: {done.text[-300:]}"
            self.problems.append(f"{what}: {why}: {last[-500:]!r}")
            print(self.problems[-1], file=sys.stderr, flush=True)
        else:
            self.survived += 1


def ended(folder: Path, action: Callable[[], int]) -> Done:
    """Run a command in this process with its output in a file and answers on its standard input."""

    def ring(number: int, frame: object) -> None:
        raise TooLong

    os.lseek(0, 0, os.SEEK_SET)
    sys.stdin = os.fdopen(os.dup(0), "r")
    printed = folder / "printed.txt"
    kept = os.dup(1), os.dup(2)
    sys.stdout.flush()
    sys.stderr.flush()
    with printed.open("wb") as handle:
        os.dup2(handle.fileno(), 1)
        os.dup2(handle.fileno(), 2)
    signal.signal(signal.SIGALRM, ring)
    signal.signal(signal.SIGPROF, ring)
    signal.alarm(WAITS)
    signal.setitimer(signal.ITIMER_PROF, LONGEST)
    status: int | str
    try:
        status = action()
    except TooLong:
        status = "stuck"
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except (KeyboardInterrupt, Exception):
        status = traceback.format_exc()
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.flush()
        sys.stderr.flush()
        for number, descriptor in enumerate(kept, start=1):
            os.dup2(descriptor, number)
            os.close(descriptor)
        sys.stdin.close()
    return Done(status, printed.read_text(errors="replace"))


def command(*words: object) -> Callable[[], int]:
    """A command line, in this process."""
    from decondense.cli import main

    return lambda: main([str(word) for word in words])


def call(action: Callable[[], object]) -> Callable[[], int]:
    """A function of the library as a command: a ValueError is its refusal."""

    def run() -> int:
        try:
            action()
        except ValueError as error:
            print(error)
            return 2
        return 0

    return run


# --------------------------------------------------------------------------------------------------------------------
# Damage
# --------------------------------------------------------------------------------------------------------------------

ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 3.5, 10**40, float("nan"), float("inf"), "", "x", "-1", "\x00", "é" * 300),
    *([], {}, [[]], {"a": {"b": []}}, [None], ["x", 1], "/etc/passwd", "!!python/object:os.system"),
)


def places(data: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something can be replaced in nested data."""
    if here:
        yield here
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from places(value, (*here, key))


def changed(data: Any, chance: random.Random) -> Any:
    """Nested data with one place that holds something odd, is called something else, or is gone."""
    data = json.loads(json.dumps(data))
    *above, last = chance.choice(list(places(data)))
    inner = data
    for key in above:
        inner = inner[key]
    kind = chance.choice(("odd", "odd", "odd", "gone", "renamed", "nested"))
    if kind == "odd" or isinstance(inner, list):
        inner[last] = chance.choice(ODD)
    elif kind == "nested":
        for _ in range(300):
            inner[last] = [inner[last]]
    else:
        value = inner.pop(last)
        if kind == "renamed":
            inner[f"{last}x"] = value
    return data


def bytes_changed(data: bytes, chance: random.Random) -> tuple[bytes, bool]:
    """Damaged bytes, and whether they are cut."""
    kind = chance.choice(("flip", "flips", "cut", "hole", "more", "empty"))
    if kind == "empty" or not data:
        return b"", True
    place = chance.randrange(len(data))
    if kind == "cut":
        return data[:place], True
    if kind == "hole":
        return data[:place] + data[place + chance.randint(1, 64) :], False
    if kind == "more":
        return data + chance.randbytes(chance.randint(1, 64)), False
    changed = bytearray(data)
    for _ in range(1 if kind == "flip" else 20):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed), False


def damage(path: Path, chance: random.Random) -> bool:
    """Damage a file; True when nothing could be overlooked: a compressed file or a checksummed one is cut."""
    if path.suffix in (".json", ".yaml") and chance.random() < 0.6:
        with contextlib.suppress(json.JSONDecodeError):  # a study that the package wrote is YAML
            path.write_text(json.dumps(changed(json.loads(path.read_text()), chance)))
            return False
    if path.suffix == ".jsonl" and chance.random() < 0.6:
        lines = path.read_text().splitlines()
        number = chance.randrange(len(lines))
        lines[number] = json.dumps(changed(json.loads(lines[number]), chance))
        path.write_text("\n".join(lines) + "\n")
        return False
    data, cut = bytes_changed(path.read_bytes(), chance)
    path.write_bytes(data)
    return cut and path.suffix in (".gz", ".npz", ".safetensors", ".parquet")


# --------------------------------------------------------------------------------------------------------------------
# 300 files
# --------------------------------------------------------------------------------------------------------------------


class Files:
    """Whole files of every kind, and the command that reads each."""

    def __init__(self, folder: Path) -> None:
        from model_folders import save_model, write_text

        self.folder, self.whole = folder, folder / "whole"
        self.whole.mkdir()
        self.model, self.text = self.whole / "model", self.whole / "text.jsonl"
        save_model(self.model)
        write_text(self.text, words=3000)
        self._texts()
        self._rows()
        self._profile()
        self._states()
        self._study()

    def _texts(self) -> None:
        import pyarrow as pa
        import pyarrow.csv
        import pyarrow.parquet

        rows = [json.loads(line) for line in self.text.read_text().splitlines()]
        (self.whole / "text.json").write_text(json.dumps(rows))
        (self.whole / "text.txt").write_text("\n\n".join(row["text"] for row in rows))
        (self.whole / "text.jsonl.gz").write_bytes(gzip.compress(self.text.read_bytes()))
        pyarrow.csv.write_csv(pa.Table.from_pylist(rows), self.whole / "text.csv")
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), self.whole / "text.parquet")
        task = self.whole / "data" / "piqa"
        task.mkdir(parents=True)
        row = {"goal": "To open a jar", "sol1": "turn the lid", "sol2": "eat the lid", "label": 0}
        lines = [json.dumps({**row, "label": number % 2}) for number in range(8)]
        (task / "validation.jsonl").write_text("\n".join(lines) + "\n")

    def _rows(self) -> None:
        from decondense.records import read_rows, write_rows

        rows = [row for row in read_rows(HERE / "results" / "demo.jsonl") if row["kind"] != "step"]
        write_rows(self.whole / "rows.jsonl", rows)
        write_rows(self.whole / "rows.jsonl.gz", rows)

    def _profile(self) -> None:
        import torch

        from decondense import measure
        from decondense.models import load_model

        model, _ = load_model(self.model)
        measure(model, input_ids=torch.arange(60).reshape(3, 20)).save(self.whole / "profile")
        (self.whole / "entry").mkdir()
        shutil.copy(self.whole / "profile.json", self.whole / "entry")

    def _states(self) -> None:
        """Hidden states from elsewhere: three layers of two passages, and the manifest that says so."""
        import numpy as np

        place = self.whole / "states"
        place.mkdir()
        draw = np.random.default_rng(0)
        for passage in range(2):
            np.save(place / f"{passage}.npy", draw.normal(size=(3, 12, 8)).astype(np.float32))
        manifest = {"layout": "passages", "layers": [0, 1, 2], "final_norm": False, "model": "a/b", "source": "text"}
        (place / "manifest.json").write_text(json.dumps(manifest))

    def _study(self) -> None:
        """A study with a finished cell, and one that was stopped behind its second checkpoint."""
        from decondense.studies import load_study, run_study
        from decondense.studies.runner import cell_folder, opened_corpus
        from decondense.training.hf import run_cell

        changes = {"sweep": None, "prepared": None, "model": {"architecture": "gpt2", "overrides": SMALL}}
        train = {"steps": 8, "batch_size": 2, "max_seq_length": 16, "log_every": 2, "checkpoint_every": 2}
        self.study = load_study(write_study(self.whole, **changes, train=train))
        self.stopped = self.whole / "stopped"
        self.expected = run_study(self.study, self.stopped, workers=0)
        cell, written = cell_folder(self.stopped, "dispersion", 0), [0]
        shutil.rmtree(cell)

        def watch() -> None:
            written[0] += 1
            if written[0] == 5:
                raise TooLong

        with contextlib.suppress(TooLong):
            run_cell(self.study, self.study.arm("dispersion"), 0, opened_corpus(self.stopped), cell, watch=watch)

    def copy(self, name: str, number: int) -> Path:
        """A copy of a whole file or directory, for one case."""
        place = self.folder / f"case-{number}" / name
        place.parent.mkdir(parents=True)
        source = self.whole / name
        shutil.copytree(source, place) if source.is_dir() else shutil.copy(source, place)
        return place

    def measured(self, model: Path, text: Path) -> Callable[[], int]:
        out = self.folder / "measured"
        shutil.rmtree(out, ignore_errors=True)
        sizes = ["--passages", 2, "--tokens", 8, "--words", 10, 20]
        return command("measure", model, "--text", text, *sizes, "--out", out)


SMALL = {"n_layer": 1, "n_embd": 16, "n_head": 2}


def a_study_file(files: Files, number: int, chance: random.Random) -> tuple[None, bool, Callable[[], int]]:
    path = files.copy("study.yaml", number)
    certain = damage(path, chance)
    return None, certain, command("study", path, "--dry-run")


def rows(files: Files, number: int, chance: random.Random) -> tuple[Path, bool, Callable[[], int]]:
    path = files.copy(chance.choice(("rows.jsonl", "rows.jsonl.gz")), number)
    certain = damage(path, chance)
    if chance.random() < 0.04:
        return path, certain, command("report", path, "--out", path.parent / "report")
    return path, certain, command("compare", path, *(["--omit"] if chance.random() < 0.5 else []))


def profile(files: Files, number: int, chance: random.Random) -> tuple[Path, bool, Callable[[], int]]:
    from decondense import Profile

    one, other = (files.whole / f"profile.{ending}" for ending in ("json", "npz"))
    folder = files.folder / f"case-{number}"
    folder.mkdir()
    for path in (one, other):
        shutil.copy(path, folder)
    path = folder / chance.choice((one, other)).name
    certain = damage(path, chance)
    return folder / "profile", certain, call(lambda: Profile.load(folder).summary())


def entry(files: Files, number: int, chance: random.Random) -> tuple[Path, bool, Callable[[], int]]:
    """A profile as a card and an atlas read it: the readable file alone."""
    path = files.copy("entry", number) / "profile.json"
    certain = damage(path, chance)
    if chance.random() < 0.3:
        return path, certain, command("atlas", "add", path, "--atlas", path.parent / "atlas")
    return path, certain, command("card", path, "--out", path.parent / "card")


def states(files: Files, number: int, chance: random.Random) -> tuple[Path, bool, Callable[[], int]]:
    place = files.copy("states", number)
    certain = damage(chance.choice(sorted(place.iterdir())), chance)
    return place, certain, command("measure", "--states", place, "--out", place.parent / "measured")


def model(files: Files, number: int, chance: random.Random) -> tuple[Path, bool, Callable[[], int]]:
    place = files.copy("model", number)
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "generation_config.json")
    path = place / chance.choice(names)
    certain = damage(path, chance)
    return place, certain, files.measured(place, files.text)


def text(files: Files, number: int, chance: random.Random) -> tuple[Path, bool, Callable[[], int]]:
    endings = ("jsonl", "json", "txt", "csv", "parquet", "jsonl.gz")
    path = files.copy(f"text.{chance.choice(endings)}", number)
    certain = damage(path, chance)
    return path, certain, files.measured(files.model, path)


def benchmark(files: Files, number: int, chance: random.Random) -> tuple[Path, bool, Callable[[], int]]:
    from decondense.evaluate.local import find_tasks

    place = files.copy("data", number)
    path = place / "piqa" / "validation.jsonl"
    certain = damage(path, chance)
    return path, certain, call(lambda: find_tasks(place, {"piqa": 0}))


def a_study_directory(files: Files, number: int, chance: random.Random) -> tuple[Path, bool, Callable[[], int]]:
    """Exit status 0 with other rows is silence, whatever was printed."""
    from decondense.records import read_rows, stable

    place = files.copy("stopped", number)
    path = chance.choice([path for path in sorted(place.rglob("*")) if path.is_file() and path.stat().st_size])
    damage(path, chance)
    resume = command("study", files.whole / "study.yaml", "--out", place, "--workers", 0)

    def run() -> int:
        status = resume()
        if status == 0:
            now = [stable(row) for row in read_rows(place / "rows.jsonl")]
            if now != [stable(row) for row in files.expected]:
                raise AssertionError(f"other rows after damage to {path.relative_to(place)}")
        return status

    return place, False, run


FILES = {
    a_study_file: 50,
    rows: 50,
    profile: 30,
    entry: 30,
    states: 20,
    model: 45,
    text: 35,
    benchmark: 25,
    a_study_directory: 15,
}
"""Of 300 files, how many of each kind."""


def files(cases: range, of: int, seed: int, folder: Path) -> Tally:
    """Damage files: these cases of so many."""
    made, tally = Files(folder), Tally()
    shares = [kind for kind, share in FILES.items() for _ in range(share)]
    for number in cases:
        kind = shares[number * len(shares) // of]
        # of the number, so that one case can be made again alone
        chance = random.Random(f"{seed}-{number}")
        name, certain, action = kind(made, number, chance)
        began = time.process_time()
        done = ended(folder, action)
        other = isinstance(done.status, str) and "other rows after damage" in done.status
        tally.add(f"{kind.__name__} {number}", Done(0, "") if other else done, name, certain=certain or other)
        if (took := time.process_time() - began) > 20:
            print(f"{kind.__name__} {number}: {took:.0f} s of CPU time", file=sys.stderr, flush=True)
        shutil.rmtree(folder / f"case-{number}", ignore_errors=True)
    return tally


# --------------------------------------------------------------------------------------------------------------------
# 20 folders
# --------------------------------------------------------------------------------------------------------------------


def _study(folder: Path, model: Path, text: Path, **changes: Any) -> Path:
    study = {
        **{"name": "s", "title": "s", "question": "q?", "baseline": "a", "seeds": [0]},
        "arms": [{"name": "a"}],
        "corpus": {"source": str(text), "tokenizer": str(model), "held_out": 0.2},
        "model": {"pretrained": str(model)},
        "train": {"steps": 1, "batch_size": 2, "max_seq_length": 16},
        "evaluate": {"validation_tokens": 100, "passages": 2, "passage_tokens": 8},
    }
    path = folder / "study.yaml"
    path.write_text(json.dumps({**study, **changes}))
    return path


def _template(folder: Path, marker: Path) -> None:
    from model_folders import edit

    attack = "{{ cycler.__init__.__globals__.os.system('touch " + str(marker) + "') }}"
    edit(folder / "tokenizer_config.json", chat_template=attack)
    (folder / "chat_template.jinja").write_text(attack)


def _everything(folder: Path, marker: Path) -> None:
    from model_folders import IGNORED

    for change in IGNORED.values():
        change(folder, marker)
    _template(folder, marker)


def _yaml(folder: Path, marker: Path) -> Path:
    path = folder / "study.yaml"
    path.write_text(f"name: !!python/object/apply:os.system ['touch {marker}']\n")
    return path


def _pickled_array(folder: Path, marker: Path) -> Path:
    from model_folders import bomb

    bomb(folder / "profile.npz", marker)
    (folder / "profile.json").write_text("{}")
    return folder


def folders(numbers: range, of: int, seed: int, folder: Path) -> Tally:
    """Give hostile folders to the verbs; the seed has nothing to choose."""
    from model_folders import IGNORED, REFUSED, bomb, code, save_model, unknown_architecture, write_text

    from decondense import Profile

    text = write_text(folder / "text.jsonl", words=3000)
    cases: list[tuple[str, Callable[[Path, Path], Path | None], Callable[[Path], Callable[[], int]]]] = []

    def measured(place: Path) -> Callable[[], int]:
        sizes = ["--passages", 2, "--tokens", 8, "--words", 10, 20]
        return command("measure", place, "--text", text, *sizes, "--out", place.parent / "out")

    def started(place: Path) -> Callable[[], int]:
        study = _study(place.parent, place, text)
        return command("study", study, "--out", place.parent / "out", "--workers", 0)

    def evaluated(place: Path) -> Callable[[], int]:
        task = place.parent / "data" / "piqa"
        task.mkdir(parents=True)
        (task / "validation.jsonl").write_text('{"goal": "w1", "sol1": "w2", "sol2": "w3", "label": 0}\n' * 2)
        return command("evaluate", place, "--tasks", "piqa", "--data-dir", task.parent, "--out", place.parent / "out")

    def plain(change: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
        def make(place: Path, marker: Path) -> None:
            save_model(place)
            change(place, marker)

        return make

    harmful = {**{name: entry[0] for name, entry in REFUSED.items()}, **IGNORED}
    for name, change in harmful.items():
        cases.append((f"measure, {name}", plain(change), measured))
    for name in ("architecture", "weights", "adapter"):
        cases.append((f"study, {name}", plain(harmful[name]), started))
    cases.append(("study, everything that is not needed", plain(_everything), started))
    cases.append(("evaluate, architecture", plain(unknown_architecture), evaluated))
    cases.append(("evaluate, everything that is not needed", plain(_everything), evaluated))
    cases.append(("measure, template", plain(_template), measured))

    def script(place: Path, marker: Path) -> Path:
        write_text(place / "train.jsonl", words=3000)
        code(place / f"{place.name}.py", marker)
        return place

    def a_text(place: Path) -> Callable[[], int]:
        save_model(place.parent / "model")
        sizes = ["--passages", 2, "--tokens", 8, "--words", 10, 20]
        words = ["measure", place.parent / "model", "--text", place, *sizes, "--out", place.parent / "out"]
        return command(*words)

    cases.append(("measure, data set with a script", script, a_text))
    cases.append(("study, YAML tag", _yaml, lambda path: command("study", path, "--dry-run")))
    cases.append(("profile, pickled array", _pickled_array, lambda path: call(lambda: Profile.load(path))))

    def checkpoint(place: Path, marker: Path) -> Path:
        made = Files(place)
        (newest, *_) = sorted(made.stopped.glob("cells/*/*/checkpoint-*"), reverse=True)
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            bomb(newest / name, marker)
        return made.stopped

    def resumed(place: Path) -> Callable[[], int]:
        return command("study", place.parent / "study.yaml", "--out", place, "--workers", 0)

    cases.append(("study, pickles in a checkpoint", checkpoint, resumed))

    tally = Tally()
    for number, (what, make, verb) in enumerate(cases):
        if number not in numbers:
            continue
        place, marker = folder / f"case-{number}" / "hostile", folder / f"ran-{number}"
        place.mkdir(parents=True)
        target = make(place, marker) or place
        os.environ["HF_MODULES_CACHE"] = str(place.parent / "modules")
        done = ended(folder, verb(target))
        asked = "[y/N]" in done.text
        if asked:
            tally.problems.append(f"{what}: it asked")
        tally.add(what, done, target, ran=marker.exists() or asked)
        shutil.rmtree(place.parent)
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("files", "folders"))
    parser.add_argument("--count", type=int, required=True, help="end before this case")
    parser.add_argument("--of", type=int, default=None, help="number of cases among which the kinds are shared")
    parser.add_argument("--first", type=int, default=0, help="begin with this case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()
    os.environ["DECONDENSE_CACHE"] = str(arguments.folder / "cache")
    began = time.monotonic()
    action = {"files": files, "folders": folders}[arguments.part]
    tally = action(
        range(arguments.first, arguments.count), arguments.of or arguments.count, arguments.seed, arguments.folder
    )
    found = {**vars(tally), "seconds": round(time.monotonic() - began, 1)}
    (arguments.folder / "result.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
