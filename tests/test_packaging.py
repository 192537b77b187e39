"""What is built holds the package and nothing else, whether from the tree or from the source distribution."""

from __future__ import annotations

import email
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import decondense

pytest.importorskip("hatchling", reason="hatchling is not installed")

ROOT = Path(__file__).resolve().parents[1]
STEM = f"decondense-{decondense.__version__}"


def build(what: str, source: Path, into: Path) -> Path:
    """``what`` (wheel or sdist) of the tree at ``source``; the build backend alone, without a network."""
    into.mkdir(exist_ok=True)
    code = f"from hatchling import build; print(build.build_{what}({str(into)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return into / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    return zipfile.ZipFile(build("wheel", ROOT, tmp_path_factory.mktemp("wheel")))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


def names_in(archive: Path) -> set[str]:
    with tarfile.open(archive) as files:
        return {name.removeprefix(f"{STEM}/") for name in files.getnames()}


def test_the_wheel_holds_the_package_and_all_of_it(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    assert {name.split("/")[0] for name in names} == {"decondense", f"{STEM}.dist-info"}
    ours = {
        f"decondense/{path.relative_to(ROOT / 'src' / 'decondense').as_posix()}"
        for path in (ROOT / "src" / "decondense").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if name.startswith("decondense/")} == ours
    assert {Path(name).suffix for name in ours} <= {".py", ".yaml", ".html", ".css", ".js", ".jsonl", ".typed"}
    assert {"decondense/py.typed", "decondense/studies/shipped/demo.yaml", "decondense/templates/report.html"} <= ours


def test_the_source_distribution_holds_what_it_takes_to_test_and_to_build(sdist: Path) -> None:
    names = names_in(sdist)
    assert {name.split("/")[0] for name in names} == {
        *("src", "tests", "docs", "benchmarks", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile"),
        *("constraints.txt", "constraints-oldest.txt", "mkdocs.yml", "pyproject.toml", "PKG-INFO", ".gitignore"),
    }
    assert {"tests/conftest.py", "benchmarks/tables.py", "docs/design.md"} <= names
    # the rows from which the numbers of the README and the results are made have to be there; reports have not
    assert any(name.startswith("benchmarks/results/studies/") for name in names)
    assert not any(name.startswith("benchmarks/results/") and name.endswith(".html") for name in names)
    kinds = {
        ".py",
        ".md",
        ".txt",
        ".yaml",
        ".yml",
        ".toml",
        ".jsonl",
        ".json",
        ".gz",
        ".npz",
        ".png",
        ".svg",
        ".css",
        ".js",
    }
    kinds |= {".html"}
    strange = sorted(
        name
        for name in names
        if "__pycache__" in name or (Path(name).suffix not in kinds and "." in Path(name).name.lstrip("."))
    )
    assert strange == ["src/decondense/py.typed"]
    assert sdist.stat().st_size < 8_000_000, "nearly all of it committed rows, compressed"


def test_a_wheel_from_the_source_distribution_is_the_same(wheel: zipfile.ZipFile, sdist: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as files:
        files.extractall(tmp_path, filter="data")
    again = zipfile.ZipFile(build("wheel", tmp_path / STEM, tmp_path / "wheel"))
    assert {(item.filename, item.CRC) for item in again.infolist()} == {
        (item.filename, item.CRC) for item in wheel.infolist()
    }


def test_the_metadata_say_what_it_is(wheel: zipfile.ZipFile) -> None:
    metadata = email.message_from_bytes(wheel.read(f"{STEM}.dist-info/METADATA"))
    assert metadata["Name"] == "decondense"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert f"{STEM}.dist-info/licenses/LICENSE" in wheel.namelist()
    classifiers = metadata.get_all("Classifier")
    assert "Typing :: Typed" in classifiers
    assert {"Operating System :: POSIX :: Linux", "Operating System :: MacOS"} <= set(classifiers)
    assert not any(name.startswith("License ::") for name in classifiers), "the licence is an expression"
    assert set(metadata.get_all("Provides-Extra")) >= {"dev", "eval", "frameworks", "kernels", "titan"}
    entry_points = wheel.read(f"{STEM}.dist-info/entry_points.txt").decode()
    assert entry_points.split() == ["[console_scripts]", "decondense", "=", "decondense.__main__:main"]


def test_the_oldest_versions_are_those_of_the_metadata(wheel: zipfile.ZipFile) -> None:
    """``make test-oldest`` tests what ``pip install`` allows, package by package."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    metadata = email.message_from_bytes(wheel.read(f"{STEM}.dist-info/METADATA"))
    asked = [Requirement(line) for line in metadata.get_all("Requires-Dist") if "extra" not in line]
    # torch is not among the constraints, so that another build can be put in its place
    oldest_torch = re.search(r"^OLDEST_TORCH \?= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert oldest_torch is not None
    pins = {"torch": SpecifierSet(f"=={oldest_torch.group(1)}")}
    for line in (ROOT / "constraints-oldest.txt").read_text().splitlines():
        if line.partition("#")[0].strip():
            pin = Requirement(line.partition("#")[0].strip())
            pins[pin.name.lower()] = pin.specifier
    for requirement in asked:
        (bound,) = requirement.specifier
        assert requirement.name.lower() in pins, f"constraints-oldest.txt lacks {requirement.name}"
        (pin,) = pins[requirement.name.lower()]
        assert (bound.operator, pin.operator) == (">=", "==")
        assert Version(pin.version.removesuffix(".*")) == Version(bound.version), requirement.name
