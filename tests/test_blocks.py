from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from attach_helpers import DECODERS, ENCODERS, block_outputs, dispersion, gradients, greatest_difference, tiny, tokens
from small_gpts import NanoChat, NanoGPT
from torch import nn

from decondense import attach
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


def block() -> nn.Module:
    return Plain(attention=Plain(projection=nn.Linear(2, 2)), mlp=nn.Linear(2, 2))


def layers(n: int) -> nn.ModuleList:
    return nn.ModuleList(block() for _ in range(n))


def test_a_path_names_the_blocks_of_any_module():
    model = Plain(first=layers(2), second=layers(3), chain=nn.Sequential(block(), block()))
    assert find_blocks(model, "second").modules == list(model.second)
    assert find_blocks(model, "chain").modules == list(model.chain)


def test_ambiguity_lists_the_candidates_and_the_remedy():
    with pytest.raises(BlocksError, match=r"'first' \(2 modules\), 'second' \(3 modules\).*blocks="):
        find_blocks(Plain(first=layers(2), second=layers(3)))


def test_no_list_at_all():
    with pytest.raises(BlocksError, match=r"no nn\.ModuleList"):
        find_blocks(nn.Linear(2, 2))


def test_a_wrong_path_is_corrected():
    with pytest.raises(BlocksError, match="Did you mean 'layers'"):
        find_blocks(Plain(layers=layers(2)), "layer")
    with pytest.raises(BlocksError, match="is a Plain"):
        find_blocks(Plain(layers=layers(2)), "layers.0")


def test_lists_inside_a_block_do_not_count():
    experts = nn.ModuleList(Plain(experts=layers(8)) for _ in range(3))
    assert len(find_blocks(Plain(layers=experts))) == 3


def test_a_dictionary_with_layer_numbers_is_a_list():
    numbered = nn.ModuleDict({str(number): block() for number in range(12)})
    assert find_blocks(Plain(layers=numbered)).modules == list(numbered.values())


@pytest.mark.parametrize("place", ["config", "args", "cfg", None])
@pytest.mark.parametrize("name", ["num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth"])
@pytest.mark.parametrize("as_dictionary", [False, True])
def test_among_several_lists_the_configured_number_of_layers_decides(place, name, as_dictionary):
    model = Plain(heads=layers(2), layers=layers(3), tails=layers(4))
    settings = {name: 3} if as_dictionary else SimpleNamespace(**{name: 3})
    if place is None:
        setattr(model, name, 3)
    else:
        setattr(model, place, settings)
    assert find_blocks(model).path == "layers"


def test_a_number_that_fits_two_lists_or_none_does_not_decide():
    for number in (3, 5):
        model = Plain(first=layers(3), second=layers(3), third=layers(2))
        model.n_layer = number
        with pytest.raises(BlocksError, match=rf"n_layer = {number} does not decide"):
            find_blocks(model)


def singles() -> dict[str, nn.Module]:
    three = range(3)
    return {
        "embeddings": nn.ModuleDict({str(number): nn.Embedding(4, 2) for number in three}),
        "norms": nn.ModuleList(nn.RMSNorm(2) for _ in three),
        "heads": nn.ModuleList(nn.Linear(2, 4) for _ in three),
        "own": nn.ModuleList(Plain() for _ in three),
        "parametrized": nn.ModuleList(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)) for _ in three),
        "compiled": nn.ModuleList(torch.compile(nn.Linear(2, 2), backend="eager") for _ in three),
    }


def test_lists_of_single_layers_are_not_blocks():
    model = Plain(**singles(), layers=layers(3))
    assert find_blocks(model).path == "layers"
    for name, single in singles().items():
        with pytest.raises(BlocksError, match=rf"hold single layers: '{name}'"):
            find_blocks(Plain(**{name: single}))
    assert find_blocks(model, "heads").modules == list(model.heads)  # the user's word counts


def test_single_layers_with_adapters_are_single_layers():
    peft = pytest.importorskip("peft")
    model = Plain(heads=nn.ModuleList(nn.Linear(2, 2) for _ in range(3)), layers=layers(3))
    adapted = peft.inject_adapter_in_model(peft.LoraConfig(r=1, target_modules=["heads.0", "heads.2"]), model)
    assert any(True for _ in adapted.heads[0].children())
    assert find_blocks(adapted).path == "layers"


def test_a_sequential_of_blocks_is_named():
    model = Plain(embed=nn.Embedding(4, 2), trunk=Plain(chain=nn.Sequential(block(), block(), block())))
    with pytest.raises(BlocksError, match=r"nn\.Sequential that holds them: blocks='trunk\.chain'"):
        find_blocks(model)
    assert len(find_blocks(model, "trunk.chain")) == 3


@pytest.mark.parametrize("kind", [lambda parts: nn.ModuleList(parts.values()), nn.ModuleDict])
def test_a_list_of_parts_has_no_state_to_observe(kind):
    """Pairs of attention and feed-forward in a list (x-transformers' way): no module returns the state of a layer."""
    nested = nn.ModuleList(kind({"attention": Plain(q=nn.Linear(2, 2)), "mlp": nn.Linear(2, 2)}) for _ in range(4))
    for blocks in (None, "layers"):
        with pytest.raises(BlocksError, match=r"'layers' is a nested list: .* no forward") as caught:
            find_blocks(Plain(layers=nested), blocks)
        assert "wrap the parts" in str(caught.value)


def test_nested_lists_name_the_list_that_serves():
    model = Plain(stages=nn.ModuleList([layers(2), layers(4)]))
    with pytest.raises(BlocksError, match=r"'stages\.0' \(2 modules\), 'stages\.1' \(4 modules\)"):
        find_blocks(model)
    assert len(find_blocks(model, "stages.1")) == 4


def test_lists_in_members_without_a_forward_are_named():
    model = nn.Module()
    block = nn.TransformerEncoderLayer(8, 2, 8)
    model.stages = nn.ModuleList(nn.ModuleDict({"body": nn.ModuleList([block, block])}) for _ in range(2))
    with pytest.raises(BlocksError, match=r"nested list.*blocks='stages\.0\.body'.*'stages\.1\.body' \(2 modules\)"):
        find_blocks(model)


@pytest.mark.parametrize("sizes", [(2, 4), (3, 1, 2), (6,)])
def test_stages_are_told_from_blocks_by_the_number_of_layers(sizes):
    model = Plain(stages=nn.ModuleList(Plain(body=Plain(layers=layers(n))) for n in sizes))
    assert len(find_blocks(model)) == len(sizes)  # nothing says otherwise
    model.num_layers = 6
    with pytest.raises(BlocksError, match=r"num_layers = 6") as caught:
        find_blocks(model)
    for place, n in enumerate(sizes):
        assert f"'stages.{place}.body.layers' ({n} modules)" in str(caught.value)
    assert len(find_blocks(model, "stages")) == len(sizes)
    model.num_layers = 7  # a model that was cut, or a number of something else
    assert len(find_blocks(model)) == len(sizes)


# ---- models of other code --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [NanoGPT, NanoChat])
def test_small_gpts_attach_without_a_path(kind):
    """The gradient of the added term is that of the hand-written loss on the states after each block."""
    model, ids = kind().double(), tokens(3, 7)
    assert find_blocks(model).path == "transformer.h"
    kept, hooks = block_outputs(list(model.transformer.h))
    plain = model.loss(ids)
    (plain + 0.7 * dispersion(kept)).backward()
    expected = gradients(model)
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    with attach(model, 0.7) as handle:
        total = model.loss(ids)
        total.backward()
    assert total.item() == pytest.approx((plain + 0.7 * dispersion(kept)).item(), abs=1e-12)
    assert handle.last.item() == pytest.approx(dispersion(kept).item(), abs=1e-6)
    assert greatest_difference(gradients(model), expected) < 1e-9


def test_small_gpts_and_their_final_norm():
    model = NanoGPT()
    assert find_final_norm(find_blocks(model)) is model.transformer.ln_f
    with pytest.raises(BlocksError, match="no final norm"):  # nanochat's norm is a function
        find_final_norm(find_blocks(NanoChat()))


def test_litgpt():
    model = pytest.importorskip("litgpt.model")
    config = pytest.importorskip("litgpt.config").Config(
        name="tiny", block_size=16, vocab_size=64, padded_vocab_size=64, n_layer=3, n_head=2, n_embd=16
    )
    gpt, ids = model.GPT(config).double(), tokens(3, 7)
    kept, hooks = block_outputs(list(gpt.transformer.h))
    gpt(ids)
    dispersion(kept).backward()
    expected = gradients(gpt)
    for hook in hooks:
        hook.remove()
    gpt.zero_grad()
    with attach(gpt) as handle:
        handle.defer = True  # litgpt computes its loss outside of the model
        gpt(ids)
        handle.take().backward()
    assert greatest_difference(gradients(gpt), expected) < 1e-9
    assert find_final_norm(find_blocks(gpt)) is gpt.transformer.ln_f


def test_fair_esm():
    """Batched as ESM-2 does it, tokens first inside; only where the blocks are is asked here."""
    esm = pytest.importorskip("esm.model.esm2")
    model = esm.ESM2(num_layers=3, embed_dim=20, attention_heads=2)
    found = find_blocks(model)
    assert found.path == "layers"
    assert len(found) == model.num_layers
    assert find_final_norm(found) is model.emb_layer_norm_after


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
