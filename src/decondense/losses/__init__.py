r"""Dispersion objectives: one function, one module, every form (:data:`FORMS`).

>>> import torch
>>> from decondense import dispersion_loss
>>> z_BTD = torch.eye(4, 8).unsqueeze(0)  # one sequence of four orthogonal tokens: theta = pi/2, so -1/(2 tau)
>>> round(float(dispersion_loss(z_BTD, tau=1.0)), 4)
-0.5

Shape suffixes: ``B`` sequences, ``T`` tokens, ``D`` features; ``U`` segments, which are sequences or the documents of
packed sequences.

Every loss is a mean over the segments that have at least two real tokens; :func:`sum_and_count` returns the numerator
and denominator of that mean, so that you can divide by a global count. Only ``z_BTD`` is differentiated, and only once
(``impl="reference"``: any number of times); its gradient has the dtype of ``z_BTD``. All statistics are float32
(float64 for float64 input), inside autocast too.
"""

from decondense.forms import COMPAT, FORMS, FormInfo
from decondense.losses.forms import form_info
from decondense.losses.functional import dispersion_loss, sum_and_count
from decondense.losses.module import DispersionLoss

__all__ = ["COMPAT", "FORMS", "DispersionLoss", "FormInfo", "dispersion_loss", "form_info", "sum_and_count"]
