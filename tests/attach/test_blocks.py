from __future__ import annotations

import pytest
import torch
from attach_helpers import DECODERS, ENCODERS, tiny, tokens
from torch import nn

from decondense.blocks import BlocksError, find_blocks, find_final_norm, resolve_layers, unwrap


@pytest.mark.parametrize("family", [*DECODERS, *ENCODERS])
def test_every_family_has_its_three_blocks(family):
    model = tiny(family, dtype=torch.float32)
    found = find_blocks(model)
    assert len(found) == 3
    assert list(found.root.get_submodule(found.path).children()) == found.modules
    # they run in the listed order, each once, and return [batch, tokens, features] (or a tuple that starts with it)
    ran = []
    for number, block in enumerate(found.modules):
        block.register_forward_hook(lambda m, a, out, number=number: ran.append((number, out)))
    model(input_ids=tokens(2, 5))
    assert [number for number, _ in ran] == [0, 1, 2]
    for _, out in ran:
        assert (out[0] if isinstance(out, tuple) else out).shape == (2, 5, 32)


@pytest.mark.parametrize("family", [family for family in DECODERS if family != "mamba"])
def test_the_final_norm_is_what_the_last_hidden_state_has_passed(family):
    model = tiny(family, dtype=torch.float32).eval()
    norm = find_final_norm(find_blocks(model))
    kept = []
    norm.register_forward_hook(lambda m, a, out: kept.append(out))
    states = model(input_ids=tokens(2, 5), output_hidden_states=True).hidden_states
    assert torch.equal(states[-1], kept[0])


def test_post_norm_models_have_no_final_norm():
    with pytest.raises(BlocksError, match="final_norm=False"):
        find_final_norm(find_blocks(tiny("bert")))


def test_vision_language_models_give_the_language_blocks():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    text = LlamaConfig(**small, num_hidden_layers=3, vocab_size=64, num_key_value_heads=2)
    vision = CLIPVisionConfig(**small, num_hidden_layers=3, image_size=8, patch_size=4)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision))
    found = find_blocks(model)
    assert found.path == "model.language_model.layers"
    assert len(found) == 3


class Plain(nn.Module):
    def __init__(self, **lists: nn.Module) -> None:
        super().__init__()
        for name, value in lists.items():
            setattr(self, name, value)


def linears(n: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(2, 2) for _ in range(n))


def test_a_path_names_the_blocks_of_any_module():
    model = Plain(first=linears(2), second=linears(3), chain=nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    assert find_blocks(model, "second").modules == list(model.second)
    assert find_blocks(model, "chain").modules == list(model.chain)


def test_ambiguity_lists_the_candidates_and_the_remedy():
    with pytest.raises(BlocksError, match=r"'first' \(2 modules\), 'second' \(3 modules\).*blocks="):
        find_blocks(Plain(first=linears(2), second=linears(3)))


def test_no_list_at_all():
    with pytest.raises(BlocksError, match=r"no nn\.ModuleList"):
        find_blocks(nn.Linear(2, 2))


def test_a_wrong_path_is_corrected():
    with pytest.raises(BlocksError, match="Did you mean 'layers'"):
        find_blocks(Plain(layers=linears(2)), "layer")
    with pytest.raises(BlocksError, match="is a Linear"):
        find_blocks(Plain(layers=linears(2)), "layers.0")


def test_lists_inside_a_block_do_not_count():
    experts = nn.ModuleList(Plain(experts=linears(8)) for _ in range(3))
    assert len(find_blocks(Plain(layers=experts))) == 3


def test_a_dictionary_with_layer_numbers_is_a_list():
    layers = nn.ModuleDict({str(number): nn.Linear(2, 2) for number in range(12)})
    assert find_blocks(Plain(layers=layers)).modules == list(layers.values())


def test_among_several_lists_the_configured_number_of_layers_decides():
    class Config:
        num_hidden_layers = 3

    model = Plain(heads=linears(2), layers=linears(3))
    model.config = Config()
    assert find_blocks(model).path == "layers"


def test_wrappers_are_looked_through():
    model = tiny("llama")
    compiled = torch.compile(model, backend="eager")
    assert unwrap(compiled) is model
    assert find_blocks(compiled).root is model
    assert unwrap(nn.DataParallel(model)) is model


@pytest.mark.parametrize(
    ("spec", "n", "expected"),
    [
        ("all", 3, [0, 1, 2]),
        ("deep", 6, [3, 4, 5]),
        ("deep", 5, [2, 3, 4]),
        ("shallow", 6, [0, 1, 2]),
        ("shallow", 5, [0, 1]),
        ("deep", 1, [0]),
        ("shallow", 1, [0]),
        ("last", 6, [5]),
        ([-1, 0], 6, [0, 5]),
        ((2,), 6, [2]),
    ],
)
def test_layers(spec, n, expected):
    assert resolve_layers(spec, n) == expected


def test_deep_and_shallow_are_a_partition():
    for n in range(2, 20):
        assert resolve_layers("shallow", n) + resolve_layers("deep", n) == list(range(n))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("dep", "Did you mean 'deep'"),
        ([6], "layer 6 does not exist: the model has blocks 0 to 5"),
        ([-7], "layer -7 does not exist"),
        ([], "layers is empty"),
        ([0, -6], "twice"),
        ([True], "got True"),
        ([1.0], "got 1.0"),
    ],
)
def test_bad_layers(spec, message):
    with pytest.raises(ValueError, match=message):
        resolve_layers(spec, 6)
