from __future__ import annotations

import subprocess
import sys

import pytest

EVIDENCE = [
    "decondense",
    "decondense.config",
    "decondense.records",
    "decondense.compare",
    "decondense.figures",
    "decondense.report",
]
BLOCK = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "triton"):
            raise ImportError(f"{name} is not to be imported here")
sys.meta_path.insert(0, Refuse())
"""


@pytest.mark.parametrize("module", [*EVIDENCE, "decondense.cli", "decondense.studies"])
def test_works_without_torch(module: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"{BLOCK}\nimport {module}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names_resolve() -> None:
    import decondense

    for name in decondense.__all__:
        assert getattr(decondense, name) is not None
    assert set(decondense.__all__) <= set(dir(decondense))
    with pytest.raises(AttributeError, match="no attribute 'atach'"):
        decondense.atach  # noqa: B018


@pytest.mark.parametrize("command", ["import decondense", "from decondense.cli import main; main(['--help'])"])
def test_starts_in_under_a_second(command: str) -> None:
    # processor time of the child, because the wall clock of a busy machine says nothing; the best of three
    code = f"{command}\nimport resource as r; u = r.getrusage(r.RUSAGE_SELF); print('CPU', u.ru_utime + u.ru_stime)"
    times = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        times.append(float(done.stdout.rsplit("CPU", 1)[1]))
    assert min(times) < 1.0, times
