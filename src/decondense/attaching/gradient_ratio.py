"""How strong the added term is: the norm of its gradient divided by that of the model's own loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from decondense.attaching.checks import AttachError


def gradient_ratio(root: nn.Module, loss: Tensor, extra: Tensor) -> Tensor:
    r"""``|grad of extra| / |grad of loss|`` over the parameters of this rank; two extra backward passes.

    Raises:
        AttachError: sharded parameters, or a loss that cannot be differentiated twice.
    """
    parameters = [parameter for parameter in root.parameters() if parameter.requires_grad]
    if any(type(parameter).__name__ == "DTensor" or hasattr(parameter, "_local_tensor") for parameter in parameters):
        raise AttachError("gradient_ratio_every does not work with sharded parameters (FSDP); omit it.")
    if "Liger" in _node_names(loss):
        raise AttachError(
            "gradient_ratio_every does not work with Liger's fused cross-entropy, whose backward can run only "
            "once; omit it."
        )
    try:
        norms = [
            _norm(torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)) for term in (extra, loss)
        ]
    except RuntimeError as error:
        if "memory" in str(error):  # a trainer may start again with smaller batches
            raise
        raise AttachError(
            f"gradient_ratio_every needs a second backward pass, which failed ({error}). Reentrant checkpointing "
            "and compiled models do not allow it; omit it."
        ) from error
    return norms[0] / norms[1]


def _norm(gradients: Sequence[Tensor | None]) -> Tensor:
    return torch.stack([gradient.float().square().sum() for gradient in gradients if gradient is not None]).sum().sqrt()


def _node_names(tensor: Tensor) -> str:
    seen, todo = {tensor.grad_fn}, [tensor.grad_fn]
    while todo:
        node = todo.pop()
        fresh = {parent for parent, _ in node.next_functions} - seen if node is not None else set()
        seen |= fresh
        todo.extend(fresh)
    return " ".join(node.name() for node in seen if node is not None)
