"""Reads JSON files that hold one object and that a kill, a disk or a hand may have damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from decondense.records.schema import RecordError


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        RecordError: the file cannot be read, or holds anything else; the message names the file and the reason. The
            remedy depends on the file, so the caller adds it.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RecordError(f"{path} cannot be read ({error.strerror or error}).") from error
    except RecursionError as error:
        raise RecordError(f"{path} is damaged: not valid JSON (nested too deeply).") from error
    except ValueError as error:
        raise RecordError(f"{path} is damaged: not valid JSON ({error}).") from error
    if not isinstance(found, dict):
        raise RecordError(f"{path} is damaged: not a JSON object.")
    return found
