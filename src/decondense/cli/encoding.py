"""What is printed where the output's encoding lacks a character: signs by their plain form, the rest by its code."""

from __future__ import annotations

import codecs
import sys

_PLAIN = {
    **dict.fromkeys("−–—─━", "-"),
    **dict.fromkeys("│┃", "|"),
    **{"×": "x", "±": "+/-", "Δ": "d", "…": "...", "→": "->", "←": "<-", "≤": "<=", "≥": ">=", "†": "*", "’": "'"},
    **{"τ": "tau", "ρ": "rho", "·": "."},
}
_NAME = "decondense.plain"
_NAME_OF_FILES = "decondense.plain_or_bytes"


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(_PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in text), error.end


def _plain_or_bytes(error: UnicodeError) -> tuple[str | bytes, int]:
    """As surrogateescape writes the bytes of a file's name, and every other character as :func:`_plain` does."""
    if isinstance(error, UnicodeEncodeError) and "\udc80" <= error.object[error.start] <= "\udcff":
        return bytes([ord(error.object[error.start]) - 0xDC00]), error.start + 1
    if isinstance(error, UnicodeEncodeError):
        error.end = error.start + 1
    return _plain(error)


def print_in_any_encoding() -> None:
    """Let standard output and standard error take every character; a finished run must not end at an en dash."""
    codecs.register_error(_NAME, _plain)
    codecs.register_error(_NAME_OF_FILES, _plain_or_bytes)
    names = {"strict": _NAME, "backslashreplace": _NAME, "surrogateescape": _NAME_OF_FILES}  # the last: the C locale's
    for stream in (sys.stdout, sys.stderr):
        errors = names.get(getattr(stream, "errors", None) or "")
        if errors and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=errors)
