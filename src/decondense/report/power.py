"""The number of seeds that a study needs, given the rows of a pilot or of an earlier study of the kind."""

from __future__ import annotations

import math

from scipy import special

from decondense.compare import Comparison, Difference, seeds_needed
from decondense.compare.sequential import seeds_to_decide
from decondense.compare.statistics import detectable
from decondense.config import StudyConfig
from decondense.formatting import NONE, number
from decondense.table import Entry, Table

_UNLUCKY = 0.8
"""Confidence of the upper limit of a standard deviation."""
_MOST = 1000
"""A study of more seeds until it is decided is none that anyone plans."""


def power_table(pilot: Comparison, study: StudyConfig) -> Table | None:
    """Power of ``study`` for the held-out loss with the spread over seeds that the arms of ``pilot`` had.

    Only the arms that both have, if there are any. None: the pilot has no difference with a spread.
    """
    held_out = pilot.validation
    known = [d for d in held_out.differences if d.sd and d.tested] if held_out is not None else []
    same = {arm.name for arm in study.arms}
    known = [d for d in known if d.arm in same] or known
    if not known:
        return None
    n, margin, arms = len(study.every_seed), study.margin, max(1, len(study.arms) - 1)
    few = f"{known[0].n} seeds" if len({d.n for d in known}) == 1 else "few seeds"
    rows = []
    for d in known:
        assert d.sd is not None
        smallest = detectable(d.sd, n, fixed=d.item_variance) if n > 1 else None
        row: list[Entry] = [
            pilot.labels[d.arm],
            (number(d.mean, sign=True), d.mean),
            (number(d.sd), d.sd),
            (number(smallest), smallest),
            _seeds(d, margin),
        ]
        if study.until is not None:
            count = seeds_to_decide(d.mean, d.sd, margin=margin, arms=arms, most=_MOST)
            row.append((NONE if count is None else str(count), count))
        rows.append(tuple(row))
    columns = [
        "arm",
        "difference",
        "SD over seeds",
        f"detectable, {n} seed{'s' if n > 1 else ''}",
        f"seeds for {margin:g}",
    ]
    text = (
        f"Power, from the held-out loss (nats/token) of {pilot.title or pilot.study}: the smallest true difference "
        f"that is detected in 80 % of studies, and the seeds that detect {margin:g} (in brackets: with the upper 80 % "
        f"limit of an SD of {few}). Before a correction for several arms."
    )
    if study.until is not None:
        columns.append("seeds until decided")
        text += " Until decided: if the difference and the SD stay the same."
    return Table("power", text, tuple(columns), tuple(rows))


def _seeds(d: Difference, margin: float) -> Entry:
    assert d.sd is not None
    # the SD that is not exceeded with confidence 0.8
    upper = d.sd * math.sqrt((d.n - 1) / special.chdtri(d.n - 1, _UNLUCKY))
    counts = [seeds_needed(sd, margin, fixed=d.item_variance) for sd in (d.sd, upper)]
    if counts[0] is None:
        return "none: too few documents"
    return f"{counts[0]} ({'more than 10,000' if counts[1] is None else counts[1]})", counts[0]
