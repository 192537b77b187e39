r"""Muon for the matrices of the blocks, AdamW for everything else, as one optimizer.

Muon (Jordan et al. 2024; arXiv:2502.16982) replaces the momentum of a matrix by the nearest semi-orthogonal one, so
that every direction of its row space moves alike. It is torch's own :class:`torch.optim.Muon` with its defaults
(momentum 0.95, Nesterov, 5 Newton-Schulz iterations) and ``adjust_lr_fn="match_rms_adamw"``: the update of an A x B
matrix is

.. math:: \Delta W = -0.2\, \gamma \sqrt{\max(A, B)}\; \mathrm{NS}_5(\tilde B_t) - \gamma \lambda W,

of about the root mean square of AdamW's. A parameter that packs several matrices (GPT-2's query, key and value) counts
as one. Embeddings, head, norms, biases and stacked expert weights keep AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

from decondense.blocks import find_blocks
from decondense.config import ConfigError, TrainConfig

_KIND = "optimizer"


class MuonWithAdamW(torch.optim.Optimizer):
    """Two optimizers over one list of groups and one state, so that schedules and checkpoints see a single one."""

    def __init__(self, adamw: torch.optim.Optimizer, muon: torch.optim.Optimizer) -> None:
        self._parts = {"adamw": adamw, "muon": muon}
        groups = [{**group, _KIND: kind} for kind, part in self._parts.items() for group in part.param_groups]
        super().__init__(groups, {})

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for kind, part in self._parts.items():
            # loading a checkpoint or moving a parameter to another group makes new lists
            part.param_groups = [group for group in self.param_groups if group[_KIND] == kind]
            part.state = self.state
            part.step()
        return loss


def optimizer_of(model: nn.Module, train: TrainConfig, decay: Collection[str]) -> torch.optim.Optimizer:
    """The optimizer of ``train.optimizer: muon``.

    Args:
        model: what is trained.
        train: rates, betas and weight decay.
        decay: names of the parameters that decay.

    Raises:
        ConfigError: this torch has no Muon.
    """
    muon = getattr(torch.optim, "Muon", None)
    if muon is None:
        raise ConfigError(
            "train.optimizer: muon needs torch 2.9 or newer, which has torch.optim.Muon (this is "
            f"{torch.__version__}); upgrade torch, or use adamw."
        )
    inside = {id(parameter) for block in find_blocks(model).modules for parameter in block.parameters()}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            matrix = parameter.dim() == 2 and id(parameter) in inside
            groups.setdefault((matrix, name in decay), []).append(parameter)

    def of(matrix: bool) -> list[dict[str, Any]]:
        return [
            {"params": groups[matrix, decays], "weight_decay": train.weight_decay if decays else 0.0}
            for decays in (True, False)
            if (matrix, decays) in groups
        ]

    if not of(True) or not of(False):
        raise ConfigError(
            "train.optimizer: muon needs trainable matrices in the blocks and other trainable parameters, and this "
            "model has only one of the two; use adamw."
        )
    rate = train.learning_rate if train.muon_learning_rate is None else train.muon_learning_rate
    return MuonWithAdamW(
        torch.optim.AdamW(of(False), lr=train.learning_rate, betas=train.betas),
        muon(of(True), lr=rate, adjust_lr_fn="match_rms_adamw"),
    )
