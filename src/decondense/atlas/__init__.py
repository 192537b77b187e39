"""What a profile means: a scale, a verdict compared with other models, and an atlas of measured models.

Everything is computed from the readable summary of a profile (``profile.json``), without torch. An :class:`Entry` holds
one model on one text; the references that the package ships are entries too.
"""

from __future__ import annotations

from decondense.atlas.collection import Atlas
from decondense.atlas.entry import Entry, EntryError, read_summary
from decondense.atlas.references import find_reference, references
from decondense.atlas.verdict import SCALE, Comparison, Disagreement, Verdict, judge, level, relate
from decondense.atlas.words import caution, describe, sentences

__all__ = [
    "SCALE",
    "Atlas",
    "Comparison",
    "Disagreement",
    "Entry",
    "EntryError",
    "Verdict",
    "caution",
    "describe",
    "find_reference",
    "judge",
    "level",
    "read_summary",
    "references",
    "relate",
    "sentences",
]
