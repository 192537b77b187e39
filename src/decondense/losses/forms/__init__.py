"""One file per form: its definition and how the engines compute it.

To add a form, add an entry to :data:`decondense.forms.FORMS` and a file of the same name here that defines ``FORM``.
"""

from __future__ import annotations

from importlib import import_module

from decondense.config import LossConfig, one_of
from decondense.forms import COMPAT, COMPAT_EPSILON, FORMS, FormInfo
from decondense.losses.form import Form

__all__ = ["COMPAT", "COMPAT_EPSILON", "FORMS", "FormInfo", "form_info", "form_of"]

_FORMS: dict[str, Form] = {name: import_module(f"{__name__}.{name}").FORM for name in FORMS}


def form_of(s: LossConfig) -> Form:
    """The form that the options name."""
    return _FORMS[s.form]


def form_info(name: str) -> FormInfo:
    """Return the :class:`FormInfo` of a name, or raise a ValueError that lists the names."""
    return FORMS[one_of("form", name, FORMS)]
