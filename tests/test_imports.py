from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import decondense

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


def untyped_reads(code: str) -> list[str]:
    """Where a configuration is read as a dictionary: by ``[...]``, ``.get``, ``model_dump``, or out of a row."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Subscript):
            read = ast.unparse(node.value).endswith("config") or ast.unparse(node.slice) == "'config'"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            of = ast.unparse(node.func.value)
            by_key = node.func.attr == "get" and (of.endswith("config") or "'config'" in map(ast.unparse, node.args))
            read = by_key or node.func.attr == "model_dump"
        else:
            continue
        if read:
            found.append(ast.unparse(node))
    return found


def test_the_evidence_side_reads_configurations_as_types() -> None:
    root = Path(decondense.__file__).parent
    files = [path for name in ("compare", "figures", "report") for path in sorted((root / name).rglob("*.py"))]
    assert len(files) > 20
    found = {str(path.relative_to(root)): untyped_reads(path.read_text()) for path in files}
    # the one place where the configuration of the rows becomes a StudyConfig
    assert {path: reads for path, reads in found.items() if reads} == {"compare/study.py": 2 * ["row['config']"]}


@pytest.mark.parametrize(
    "code", ["a = study.config['arms']", "row.get('config', {})", "config.get('x')", "study.config.model_dump()"]
)
def test_untyped_reads_are_seen(code: str) -> None:
    assert len(untyped_reads(code)) == 1
