"""The loss in a model's output, whatever its shape."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from decondense.attaching.checks import AttachError


def returned_loss(output: Any) -> tuple[Any, Tensor] | None:
    """Place and value of the loss: the entry ``loss``, or the only scalar with a gradient; None if there is none."""
    scalars = list(_scalars(output))
    return scalars[0] if len(scalars) == 1 else None


def tensors(output: Any) -> Iterable[Tensor]:
    """The tensors of an output that carry a gradient."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]


def with_loss(output: Any, place: Any, loss: Tensor) -> Any:
    """The output with ``loss`` at ``place``."""
    if isinstance(output, Tensor):
        return loss
    if isinstance(output, tuple) and not hasattr(output, "_replace"):
        return tuple(loss if here == place else value for here, value in enumerate(output))
    if isinstance(output, (list, dict)):
        output[place] = loss
    elif isinstance(output, tuple):
        return output._replace(**{output._fields[place]: loss})  # type: ignore[attr-defined]
    else:
        setattr(output, place, loss)
    return output


def share_of_step(batch: Mapping[str, Any], micro_batches: int | None, shifts_labels: bool) -> Tensor | float:
    """This micro-batch's share of the tokens that transformers divides the sum of the cross-entropy by."""
    items, labels = batch.get("num_items_in_batch"), batch.get("shift_labels")
    if items is None:
        return 1.0
    if micro_batches is not None:
        return 1 / micro_batches
    if labels is None:
        labels = batch.get("labels")
        if labels is None:
            raise AttachError(
                "the model received num_items_in_batch without labels, so the token share of this micro-batch is "
                "unknown; use attach_trainer(trainer)."
            )
        if shifts_labels:
            labels = labels[..., 1:]
    share: Tensor = (labels != -100).sum() / items
    return share


def shifts_labels(core: nn.Module) -> bool:
    """Whether transformers' Trainer counts this model's labels without the first: causal ones that have a loss_type."""
    loss_type = getattr(core, "loss_type", None)
    if loss_type is None:
        return False
    import transformers
    from packaging.version import Version
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    # before that release it counted every model's labels unshifted
    return Version(transformers.__version__) >= Version("5.10.1") and LOSS_MAPPING.get(loss_type) is ForCausalLMLoss


def _scalars(output: Any) -> Iterable[tuple[Any, Tensor]]:
    if isinstance(output, dict):
        items: Iterable[tuple[Any, Any]] = [("loss", output.get("loss"))]
    elif isinstance(output, (tuple, list)):
        items = enumerate(output)
    elif isinstance(output, Tensor):
        items = [(0, output)]
    else:
        items = [("loss", getattr(output, "loss", None))]
    return [
        (key, value) for key, value in items if isinstance(value, Tensor) and value.ndim == 0 and value.requires_grad
    ]
