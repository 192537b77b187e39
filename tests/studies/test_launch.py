"""The Slurm script: written to a new file only, and passes on Slurm's warning."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from decondense.cli import main
from decondense.studies import load_study
from decondense.studies.launch import slurm_script

STUB = """#!/bin/bash
trap 'echo warned > warned; exit 138' USR1
printf '%s\\n' "$@" > started.part
mv started.part started
while :; do sleep 0.05; done
"""


def _wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 30
    while not path.exists():
        assert process.poll() is None, "the script has ended"
        assert time.monotonic() < end, f"no file {path.name}"
        time.sleep(0.02)


def test_the_warning_of_slurm_reaches_the_command(tmp_path: Path) -> None:
    """``--signal=B:`` sends it to the process of the batch script, and to no child of it."""
    (tmp_path / "bin").mkdir()
    stub = tmp_path / "bin" / "decondense"
    stub.write_text(STUB)
    stub.chmod(0o755)
    words = ["demo", "--text", "two words"]
    script = tmp_path / "job"
    script.write_text("\n".join(slurm_script(load_study("demo"), words, Path("out"))) + "\n")
    assert "\n#SBATCH --signal=B:USR1@" in script.read_text()
    environment = {**os.environ, "PATH": f"{stub.parent}{os.pathsep}{os.environ['PATH']}"}
    process = subprocess.Popen(["bash", str(script)], cwd=tmp_path, env=environment, start_new_session=True)
    try:
        _wait_for(tmp_path / "started", process)
        said = (tmp_path / "started").read_text().splitlines()
        assert said == ["study", *words, "--out", "out", "--workers", "1"]
        os.kill(process.pid, signal.SIGUSR1)
        assert process.wait(timeout=30) == 138
        assert (tmp_path / "warned").exists()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.parametrize("kind", ["file", "directory", "link to a file", "link to a new file"])
def test_a_slurm_script_replaces_nothing(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script, other = tmp_path / "job", tmp_path / "other"
    if kind == "directory":
        script.mkdir()
    elif kind == "file":
        script.write_text("mine")
    else:
        script.symlink_to(other)
        if kind == "link to a file":
            other.write_text("mine")
    assert main(["study", "demo", "--slurm", str(script)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "a file or a link exists there; choose another name or remove it" in said
    assert other.exists() == (kind == "link to a file")
    assert [path.read_text() for path in (script, other) if path.is_file()] in ([], ["mine"], ["mine", "mine"])
