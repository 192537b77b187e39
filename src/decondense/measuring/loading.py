"""Load a model and its tokenizer: :mod:`decondense.models` under the name from which it is often imported."""

from __future__ import annotations

from pathlib import Path

from decondense.checkpoints import locate
from decondense.models import DTYPES, check_complete, load_model, why_not
from decondense.tokenizers import load_tokenizer

__all__ = ["DTYPES", "check_complete", "check_source", "load_model", "load_tokenizer", "why_not"]


def check_source(source: str | Path) -> None:
    """Refuse a source that can be neither a model directory nor a hub id; nothing is loaded.

    Raises:
        ValueError: no such directory, no model in it, weights only as pickles, or a name that is not a hub id.
    """
    locate(source)
