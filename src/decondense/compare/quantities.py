"""The registry of the quantities by which every study is compared.

A new quantity is defined in its own file (or with related ones, as in :mod:`decondense.compare.profiles`) and listed
here; its tables, tests, figures and JSON follow from :class:`~decondense.compare.quantity.Quantity`. Scores of tasks
and cosines of single layers depend on the rows, so they are created as needed.
"""

from __future__ import annotations

from decondense.compare import profiles
from decondense.compare.quantity import Place, Quantity

QUANTITIES: dict[str, Quantity] = {
    quantity.id: quantity
    for quantity in (profiles.BLOCKS, profiles.LAST, profiles.DEEP, profiles.SPEARMAN, profiles.KENDALL)
}


def shown_in(place: Place) -> tuple[Quantity, ...]:
    """The quantities shown in a place, in the order of the registry."""
    return tuple(quantity for quantity in QUANTITIES.values() if place in quantity.shown)
