"""The loss as a module without parameters: :class:`DispersionLoss`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from decondense.config import LossConfig, LossOptions
from decondense.losses.functional import configured_sum_and_count, show_options
from decondense.seeding import generator as named_generator

if TYPE_CHECKING:
    from typing_extensions import Unpack


class DispersionLoss(nn.Module):
    """:func:`dispersion_loss` as a module without parameters: ``loss = DispersionLoss(tau=0.3); loss(z_BTD, mask_BT)``.

    Takes the fields of :class:`decondense.config.LossConfig` as keywords, checks them once, and has its own generator
    for random pairs and directions, seeded with ``seed``.

    Raises:
        ValueError: for an unknown keyword or name (with the closest known one), an option out of range, and a
            combination that cannot be computed.
    """

    def __init__(self, **options: Unpack[LossOptions]) -> None:
        super().__init__()
        self.config = LossConfig.parse(dict(options), where="DispersionLoss()")
        self._generator: torch.Generator | None = None

    @classmethod
    def from_config(cls, config: LossConfig) -> DispersionLoss:
        """Build the module that a configuration describes."""
        return cls(**config.model_dump())

    @property
    def generator(self) -> torch.Generator:
        """The module's own generator, drawn from by random pairs and directions only."""
        if self._generator is None:
            self._generator = named_generator(self.config.seed, "dispersion loss")
        return self._generator

    def sum_and_count(
        self,
        z_BTD: Tensor,
        mask_BT: Tensor | None = None,
        segments_BT: Tensor | None = None,
        teacher_BTE: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Sum of the segment losses and number of segments with at least two real tokens: two 0-dim tensors."""
        generator = self.generator if self.config.draws else None
        return configured_sum_and_count(self.config, z_BTD, mask_BT, segments_BT, generator, teacher_BTE)

    def forward(
        self,
        z_BTD: Tensor,
        mask_BT: Tensor | None = None,
        segments_BT: Tensor | None = None,
        teacher_BTE: Tensor | None = None,
    ) -> Tensor:
        """Mean over the segments with at least two real tokens, a 0-dim tensor; see :func:`dispersion_loss`."""
        total, count = self.sum_and_count(z_BTD, mask_BT, segments_BT, teacher_BTE)
        return total / count.clamp(min=1)

    def extra_repr(self) -> str:
        """The form, its options, and every other choice that is not the default."""
        c = self.config
        changed = [name for name, field in LossConfig.model_fields.items() if getattr(c, name) != field.default]
        return ", ".join(f"{name}={getattr(c, name)!r}" for name in dict.fromkeys(["form", *c.info.uses, *changed]))

    def __getstate__(self) -> dict[str, Any]:
        # a torch.Generator cannot be pickled or deep-copied; its state can
        state = self.__dict__.copy()
        own = state.pop("_generator")
        state["_generator_state"] = None if own is None else own.get_state()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        own = state.pop("_generator_state")
        super().__setstate__({**state, "_generator": None})  # type: ignore[no-untyped-call]
        if own is not None:
            self.generator.set_state(own)


show_options(DispersionLoss, LossOptions)
