"""A child ends within seconds of its parent, whenever that is killed; signals become exit statuses."""

from __future__ import annotations

import ast
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from decondense import lifeline

CHILD = """
import sys, time
def main():
    open(sys.argv[1], "w").close()
    if len(sys.argv) > 2:
        from decondense.lifeline import end_without
        end_without(sys.argv[2])
    time.sleep(120)
    return 0
"""
PARENT = """
import subprocess, sys, time
from decondense.lifeline import Lifeline
with Lifeline() as lifeline:
    child = subprocess.Popen(lifeline.command("sleeping_child", *sys.argv[1:]), pass_fds=lifeline.pass_fds)
    print(child.pid, flush=True)
    child.wait()
"""


def start(tmp_path: Path, *arguments: object) -> tuple[subprocess.Popen[str], int]:
    (tmp_path / "sleeping_child.py").write_text(CHILD)
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert parent.stdout is not None
    return parent, int(parent.stdout.readline())


def ends(pid: int, seconds: float) -> bool:
    """Whether a process that is not our child ends in time; a zombie has ended."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("moment", ["at once", "while it starts", "when it runs"])
def test_a_child_ends_with_its_killed_parent(tmp_path: Path, moment: str) -> None:
    ready = tmp_path / "ready"
    parent, child = start(tmp_path, ready)
    if moment == "while it starts":
        time.sleep(0.05)
    while moment == "when it runs" and not ready.exists():
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    assert ends(child, 5.0)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_child_ends_when_its_folder_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    folder.mkdir()
    parent, child = start(tmp_path, tmp_path / "ready", folder)
    while not (tmp_path / "ready").exists():
        time.sleep(0.02)
    time.sleep(0.5)
    folder.rmdir()
    folder.mkdir()  # another directory of the same name is not the same directory
    (folder / "other").mkdir()
    assert ends(child, 5.0)
    parent.wait()


SIGNALLED = """
import os, signal, sys, time
from decondense.stopping import Stopped, save_requested, stop_on_signals
with stop_on_signals():
    try:
        print("ready", flush=True)
        for _ in range(1000):
            time.sleep(0.01)
            if save_requested():
                print("saves first", flush=True)
                raise Stopped(signal.SIGUSR1)
    finally:
        print("cleaned up", flush=True)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_unwinds_and_becomes_the_exit_status(name: str) -> None:
    number = getattr(signal, name)
    process = subprocess.Popen([sys.executable, "-c", SIGNALLED], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert out.split("\n")[:-1] == [*(["saves first"] if name == "SIGUSR1" else []), "cleaned up"]


def test_an_ignored_signal_stays_ignored() -> None:
    code = (
        "import os, signal; from decondense.stopping import stop_on_signals\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "with stop_on_signals():\n    os.kill(os.getpid(), signal.SIGHUP)\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


NESTED = """
import os, signal, sys
from decondense.stopping import Stopped, save_requested, stop_on_signals
number, inside = int(sys.argv[1]), sys.argv[2] == "inside"
with stop_on_signals(save_first=False):
    with stop_on_signals():
        if inside:
            os.kill(os.getpid(), number)
            print(save_requested(), flush=True)
    os.kill(os.getpid(), number)
    print("not reached", flush=True)
"""


@pytest.mark.parametrize(
    ("name", "where", "printed"),
    [
        ("SIGUSR1", "inside", "True\n"),  # saved first; then the outer block ends the process
        ("SIGUSR1", "outside", ""),
        ("SIGTERM", "inside", ""),
        ("SIGHUP", "outside", ""),
    ],
)
def test_blocks_may_be_nested(name: str, where: str, printed: str) -> None:
    number = getattr(signal, name)
    done = subprocess.run([sys.executable, "-c", NESTED, str(int(number)), where], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (128 + number, printed)


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGHUP", marks=pytest.mark.slow), "SIGINT"])
def test_every_verb_ends_with_a_sentence_and_the_status_of_the_signal(tmp_path: Path, name: str) -> None:
    """`compare` has no runner and no handlers of its own; it waits here for a text that never comes."""
    fifo = tmp_path / "rows.jsonl"
    os.mkfifo(fifo)
    process = subprocess.Popen(
        [sys.executable, "-m", "decondense", "compare", str(fifo)], stderr=subprocess.PIPE, stdout=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # whoever started the tests may ignore it
    )  # fmt: skip
    # opening for writing without waiting succeeds as soon as the command reads
    limit = time.monotonic() + 60
    while time.monotonic() < limit:
        try:
            writer = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
            break
        except OSError:
            time.sleep(0.02)
    number = getattr(signal, name)
    # Python cannot see a signal that comes just before a system call that blocks: it is sent again until it is seen
    while process.poll() is None and time.monotonic() < limit:
        process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=1)
    os.close(writer)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert b"interrupted" in error
    assert b"Traceback" not in error


AMID_AN_IMPORT = """
import sys
import decondense.cli
from decondense.__main__ import main

def run():
    try:
        exec("raise KeyboardInterrupt")  # where Ctrl-C meets the code that dataclasses makes from a string
    except KeyboardInterrupt:
        return 130

decondense.cli.main = run
sys.exit(main())
"""


def test_ctrl_c_amid_code_from_a_string_keeps_the_status(tmp_path: Path) -> None:
    (tmp_path / "amid.py").write_text(AMID_AN_IMPORT)
    # under -m, as launchers start it, Python would end by the signal: -2
    assert subprocess.run([sys.executable, "-m", "amid"], cwd=tmp_path).returncode == 130


def test_every_process_that_lasts_is_started_with_a_lifeline() -> None:
    source = Path(lifeline.__file__).parent
    starts = [
        call
        for path in source.rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "Popen"
    ]
    assert len(starts) == 2
    assert all(ast.unparse(call.args[0]).startswith("lifeline.command(") for call in starts)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_ctrl_c_is_left_to_the_parent(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    parent, child = start(tmp_path, ready)
    while not ready.exists():
        time.sleep(0.02)
    os.kill(child, signal.SIGINT)
    assert not ends(child, 0.3)
    parent.kill()
    parent.wait()
    assert ends(child, 5.0)
