"""The embedded corpus: English technical prose that is part of every installation.

Nothing is downloaded and nothing is redistributed. The documentation strings of the standard library and of this
package's dependencies are read with :mod:`ast` (no module is imported), and the Python language reference from
``pydoc_data.topics``. One document is one module's documentation in source order. Repeated paragraphs are dropped:
libraries repeat their boilerplate, and a repeated paragraph would leak training text into the held-out text.

The text depends on the installed versions, so a corpus is named by the hash of its content, never by its recipe.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Literal

from decondense.records import atomic_write

Progress = Callable[[str, int, int], None]
"""Called as progress(what, done, total); if the total is unknown, it is one more than ``done``."""

# Direct and indirect dependencies, in the order of their documents; fixed, so that other packages have no influence.
PACKAGES = (
    "numpy", "scipy", "matplotlib", "torch", "transformers", "datasets", "accelerate",
    "huggingface_hub", "pandas", "sympy", "networkx", "pydantic", "jinja2", "rich",
)  # fmt: skip
Extent = Literal["standard_library", "scientific", "all"]
EXTENTS: dict[str, tuple[str, ...]] = {"standard_library": (), "scientific": PACKAGES[:3], "all": PACKAGES}
"""Packages that are read in addition to the standard library."""
MINIMUM_DOCSTRING = 60
"""Characters; shorter ones are labels rather than prose."""
MINIMUM_DOCUMENT = 400
"""Characters of a module's documentation; less makes no document."""
_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "testing", "site-packages", "dist-packages", "idlelib", "lib2to3", "__pycache__"}
)
_RECIPE = 1  # raise when the code below would produce other text from the same installation


@dataclass(frozen=True)
class Document:
    """One text with the name of its source."""

    name: str
    text: str

    @cached_property
    def identity(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of the text: equal texts have equal identities everywhere."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]


def cache_directory() -> Path:
    """``$DECONDENSE_CACHE``, else ``$XDG_CACHE_HOME/decondense``, else ``~/.cache/decondense``."""
    if chosen := os.environ.get("DECONDENSE_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "decondense"


def python_docs(
    documents: Extent = "all", *, cache: Path | None = None, progress: Progress | None = None
) -> list[Document]:
    """The documentation of this Python installation as documents, cached after the first call.

    Args:
        documents: ``"standard_library"`` (about 2 MB, two seconds), ``"scientific"``: with numpy, scipy and matplotlib
            (about 10 MB, six seconds), or ``"all"``: with every dependency (20-30 MB, half a minute the first time).
        cache: directory of the cache; None: :func:`cache_directory`.
        progress: called with ("reading documentation", files read, files in all).

    Returns:
        Documents in a fixed order, without repeated paragraphs.

    Raises:
        ValueError: ``documents`` is not one of these names, or the installation has no source files (a frozen or
            stripped Python).
    """
    if documents not in EXTENTS:
        raise ValueError(f"documents must be one of {', '.join(map(repr, EXTENTS))}, got {documents!r}.")
    packages = EXTENTS[documents]
    path = (cache or cache_directory()) / "python_docs" / f"{_installation(packages)}.jsonl"
    if (cached := _read(path)) is not None:
        return cached
    collected = list(_collect(packages, progress))
    if not collected:
        raise ValueError(
            "this Python installation contains no readable source files, so it has no documentation to read; give a "
            "text file or directory instead (corpus.source: PATH, or --text PATH)."
        )
    lines = [json.dumps({"name": item.name, "text": item.text}, ensure_ascii=False) for item in collected]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    atomic_write(path, json.dumps({"sha256": digest}) + "\n" + "\n".join(lines) + "\n")
    return collected


def _read(path: Path) -> list[Document] | None:
    """A cached corpus; None if there is none or it is damaged."""
    try:
        head, _, body = path.read_text(encoding="utf-8").partition("\n")
        expected = json.loads(head)["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    body = body.removesuffix("\n")
    if hashlib.sha256(body.encode()).hexdigest() != expected:
        return None
    # not splitlines(), which also splits at form feeds and other characters of the prose
    return [Document(**json.loads(line)) for line in body.split("\n")]


def _installation(packages: tuple[str, ...]) -> str:
    """Name of the cache entry: a hash of everything that determines the text."""
    parts = [f"recipe {_RECIPE}", sys.version, str(MINIMUM_DOCSTRING), str(MINIMUM_DOCUMENT)]
    for package in packages:
        try:
            parts.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            parts.append(f"{package} absent")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _collect(packages: tuple[str, ...], progress: Progress | None) -> Iterator[Document]:
    seen: set[bytes] = set()
    for name, topic in sorted(_topics().items()):
        if text := _without_repeats(topic.strip(), seen):
            yield Document(f"python reference: {name}", text)
    files = [(name, path) for name, root in _roots(packages) for path in _sources(root)]
    for number, (package, path) in enumerate(files, 1):
        pieces = [_without_repeats(text, seen) for text in _docstrings(path)]
        text = "\n\n".join(piece for piece in pieces if piece)
        if len(text) >= MINIMUM_DOCUMENT:
            yield Document(f"{package}: {path.stem}", text)
        if progress is not None and (number % 50 == 0 or number == len(files)):
            progress("reading documentation", number, len(files))


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it separately
        return {}
    return dict(topics)


def _roots(packages: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    yield "python", Path(sysconfig.get_paths()["stdlib"])
    for package in packages:
        spec = importlib.util.find_spec(package)  # imports nothing, because none of these is a submodule
        if spec is not None and spec.origin is not None:
            yield package, Path(spec.origin).parent


def _sources(root: Path) -> list[Path]:
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in _SKIPPED_FOLDERS)
        files += [Path(folder) / name for name in sorted(names) if name.endswith(".py")]
    return files


def _docstrings(path: Path) -> list[str]:
    """Documentation strings of a module, its classes and functions, in the order of the source."""
    try:
        source = path.read_text(encoding="utf-8")
        if '"""' not in source and "'''" not in source:
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in the strings of other packages
            tree = ast.parse(source)
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
    texts = [ast.get_docstring(node) for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0))]
    return [text for text in texts if text is not None and len(text) >= MINIMUM_DOCSTRING]


def _without_repeats(text: str, seen: set[bytes]) -> str:
    """The paragraphs of a text that did not occur before; empty if they are shorter than a docstring."""
    fresh = []
    for paragraph in text.split("\n\n"):
        key = hashlib.blake2b(" ".join(paragraph.split()).encode("utf-8", "replace"), digest_size=12).digest()
        if key not in seen:
            seen.add(key)
            fresh.append(paragraph)
    # surrogates from escapes in the strings cannot be encoded
    rest = "\n\n".join(fresh).strip("\n").encode("utf-8", "replace").decode("utf-8")
    return rest if len(rest) >= MINIMUM_DOCSTRING else ""
