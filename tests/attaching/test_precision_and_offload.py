"""Activations that autograd keeps elsewhere and linear layers in fp8: the gradient is that of the loss written out."""

from __future__ import annotations

import contextlib

import pytest
import torch
from attach_helpers import block_outputs, dispersion, gradients, greatest_difference, tiny, tokens

from decondense import attach
from decondense.blocks import find_blocks

WEIGHT = 0.7


def written_out(model, ids) -> dict[str, torch.Tensor]:
    kept, hooks = block_outputs(find_blocks(model).modules)
    loss = model(input_ids=ids, labels=ids).loss
    for hook in hooks:
        hook.remove()
    (loss + WEIGHT * dispersion(kept)).backward()
    return gradients(model)


def copies():
    """What an offload to another memory does: the tensor that comes back is not the one that was kept."""
    count = [0]

    def pack(tensor: torch.Tensor):
        count[0] += 1
        return tensor.detach().numpy().copy()

    return torch.autograd.graph.saved_tensors_hooks(pack, torch.from_numpy), count


@pytest.mark.parametrize("checkpoints", [None, True, False], ids=["plain", "reentrant", "not reentrant"])
@pytest.mark.parametrize("where", ["save_on_cpu", "copies"])
def test_activations_kept_elsewhere(where: str, checkpoints: bool | None) -> None:
    ids = tokens(2, 6)
    expected = written_out(tiny(), ids)
    model, count = tiny(), [1]
    if checkpoints is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpoints})
    hooks: contextlib.AbstractContextManager[object] = torch.autograd.graph.save_on_cpu()
    if where == "copies":
        hooks, count = copies()
    with attach(model, WEIGHT), hooks:
        model(input_ids=ids, labels=ids).loss.backward()
    assert count[0] > 0
    assert greatest_difference(gradients(model), expected) < 1e-10


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_fp8_linear_layers(recipe: str) -> None:
    """torchao's training layers, emulated: products of the rounded numbers, in the blocks alone as torchao advises."""
    float8 = pytest.importorskip("torchao.float8")

    def made() -> torch.nn.Module:
        config = float8.Float8LinearConfig.from_recipe_name(recipe)
        object.__setattr__(config, "emulate", True)
        model = tiny(dtype=torch.float32)
        float8.convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: "layers." in name)
        return model

    ids = tokens(4, 12)  # 48 tokens: fp8 wants multiples of 16
    expected, model = written_out(made(), ids), made()
    assert sum(type(module).__name__ == "Float8Linear" for module in model.modules()) == 3 * 7
    with attach(model, WEIGHT):
        model(input_ids=ids, labels=ids).loss.backward()
    got, unrounded = gradients(model), written_out(tiny(dtype=torch.float32), ids)
    assert greatest_difference(got, expected) < 1e-5
    assert greatest_difference(got, unrounded) > 1e-4, "the layers round"
