"""The earlier name of :mod:`decondense.studies.cost`."""

from __future__ import annotations

from decondense.studies.cost import *  # noqa: F403
