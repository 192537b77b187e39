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


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(_PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in text), error.end


def print_in_any_encoding() -> None:
    """Let standard output and standard error take every character; a finished run must not end at an en dash."""
    codecs.register_error(_NAME, _plain)
    for stream in (sys.stdout, sys.stderr):
        # surrogateescape, of the C locale, already takes the names of all files
        if getattr(stream, "errors", None) in ("strict", "backslashreplace") and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_NAME)
