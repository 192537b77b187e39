"""The embedded default: real English technical prose that every installation already has.

Nothing is downloaded and nothing is redistributed. The documentation strings of the standard library and of the
packages that this one depends on are read with :mod:`ast` (no module is imported), and the Python language reference
is read from ``pydoc_data.topics``. One document is one module's documentation in source order. Paragraphs that
occurred before are dropped, because libraries repeat their boilerplate and a repeated paragraph would let the
training text leak into the held-out text.

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
"""Called as progress(what, done, total); while a total is unknown, it is one more than what is done."""

# Direct and indirect dependencies with prose worth reading; fixed, so that an unrelated installed package changes
# nothing. The order is the order of the documents before they are hashed.
PACKAGES = (
    "numpy",
    "scipy",
    "matplotlib",
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "huggingface_hub",
    "pandas",
    "sympy",
    "networkx",
    "pydantic",
    "jinja2",
    "rich",
)
Extent = Literal["standard_library", "scientific", "all"]
EXTENTS: dict[str, tuple[str, ...]] = {"standard_library": (), "scientific": PACKAGES[:3], "all": PACKAGES}
"""Which packages are read besides the standard library."""
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
    """One text with the name of what it came from."""

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
    documents: Extent = "all",
    *,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> list[Document]:
    """The documentation of this Python installation as documents, read once and then kept in the cache directory.

    Args:
        documents: ``"standard_library"`` (about 2 MB, two seconds), ``"scientific"``: with numpy, scipy and matplotlib
            (about 10 MB, six seconds), or ``"all"``: with every dependency (20-30 MB, half a minute the first time).
        cache: directory of the cache; None: :func:`cache_directory`.
        progress: called with ("reading documentation", files read, files in all).

    Returns:
        Documents in a fixed order, without repeated paragraphs.

    Raises:
        ValueError: ``documents`` is no such name, or the installation holds no source files (a frozen or stripped
            Python): give a text file instead.
    """
    if documents not in EXTENTS:
        raise ValueError(f"documents must be one of {', '.join(map(repr, EXTENTS))}, got {documents!r}.")
    packages = EXTENTS[documents]
    path = (cache or cache_directory()) / "python_docs" / f"{_installation(packages)}.jsonl"
    if (kept := _read(path)) is not None:
        return kept
    found = list(_collect(packages, progress))
    if not found:
        raise ValueError(
            "this Python installation carries no readable source files, so it has no documentation to read; "
            "give a text file or directory instead (corpus.source: PATH, or --text PATH)."
        )
    lines = [json.dumps({"name": item.name, "text": item.text}, ensure_ascii=False) for item in found]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    atomic_write(path, json.dumps({"sha256": digest}) + "\n" + "\n".join(lines) + "\n")
    return found


def _read(path: Path) -> list[Document] | None:
    """A cached corpus, or None when there is none or its content is not what was written."""
    try:
        head, _, body = path.read_text(encoding="utf-8").partition("\n")
        expected = json.loads(head)["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    body = body.removesuffix("\n")
    if hashlib.sha256(body.encode()).hexdigest() != expected:
        return None
    # not splitlines(): the prose holds characters that it takes for line ends
    return [Document(**json.loads(line)) for line in body.split("\n")]


def _installation(packages: tuple[str, ...]) -> str:
    """Name of the cache entry: everything that decides what text will be found."""
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
        found = importlib.util.find_spec(package)  # looks, and imports nothing: none of these is a submodule
        if found is not None and found.origin is not None:
            yield package, Path(found.origin).parent


def _sources(root: Path) -> list[Path]:
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in _SKIPPED_FOLDERS)
        found += [Path(folder) / name for name in sorted(names) if name.endswith(".py")]
    return found


def _docstrings(path: Path) -> list[str]:
    """Documentation strings of a module, its classes and functions, in the order of the source."""
    try:
        source = path.read_text(encoding="utf-8")
        if '"""' not in source and "'''" not in source:
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(source)
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):
        return []
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text is not None and len(text) >= MINIMUM_DOCSTRING:
                found.append((getattr(node, "lineno", 0), text))
    return [text for _, text in sorted(found, key=lambda item: item[0])]


def _without_repeats(text: str, seen: set[bytes]) -> str:
    """The paragraphs of a text that did not occur before; what is left must still be worth a docstring."""
    kept = []
    for paragraph in text.split("\n\n"):
        key = hashlib.blake2b(" ".join(paragraph.split()).encode("utf-8", "replace"), digest_size=12).digest()
        if key not in seen:
            seen.add(key)
            kept.append(paragraph)
    left = "\n\n".join(kept).strip("\n")
    # surrogates from escapes in other people's strings cannot be encoded
    left = left.encode("utf-8", "replace").decode("utf-8")
    return left if len(left) >= MINIMUM_DOCSTRING else ""
