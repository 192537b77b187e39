"""Which axis holds the tokens, whose tokens they are: attach, measure and the watch agree, or all refuse."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from attach_helpers import angular, tiny
from torch import nn

from decondense import attach, measure
from decondense.attaching import AttachError
from decondense.blocks import find_blocks
from decondense.measuring import CondensationWatch
from decondense.sequences import SequencesError

V, D = 40, 16


class Encoder(nn.Module):
    """torch's encoder as a language model; the ids are [batch, tokens], or [tokens, batch] as in torch's tutorial."""

    def __init__(self, *, batch_first: bool, ids_first: bool = False, argument: str = "input_ids") -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(D, 2, 24, dropout=0.0, batch_first=batch_first)
        self.embed = nn.Embedding(V, D)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(D, V)
        self.transposes = batch_first == ids_first
        self.batch_first = batch_first

    def run(self, ids, padding, labels):
        h = self.embed(ids)
        h = self.encoder(h.transpose(0, 1) if self.transposes else h, src_key_padding_mask=padding)
        h = self.head(h.transpose(0, 1) if self.transposes else h)
        loss = nn.functional.cross_entropy(h.flatten(0, 1), labels.flatten()) if labels is not None else None
        return {"loss": loss, "logits": h}


class Named(Encoder):
    def forward(self, input_ids, src_key_padding_mask=None, labels=None):
        return self.run(input_ids, src_key_padding_mask, labels)


class Unnamed(Encoder):
    def forward(self, src, src_key_padding_mask=None, labels=None):
        return self.run(src, src_key_padding_mask, labels)


class OwnBlock(nn.Module):
    """Attention that does not say which axis it takes for the tokens."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.mix = nn.Linear(D, 3 * D)

    def forward(self, x):
        q, k, v = self.mix(x.transpose(0, 1) if self.axis == 0 else x).chunk(3, -1)
        h = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + (h.transpose(0, 1) if self.axis == 0 else h)


class Own(nn.Module):
    """Blocks of one's own; ``x`` says nothing about its layout. Counts its calls in a buffer and has dropout."""

    def __init__(self, axis: int, ids_axis: int = 1) -> None:
        super().__init__()
        self.axis, self.ids_axis = axis, ids_axis
        self.embed = nn.Embedding(V, D)
        self.layers = nn.ModuleList(OwnBlock(axis) for _ in range(2))
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(D, V)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, labels=None):
        self.calls += 1
        h = self.embed(x)
        h = h.transpose(0, 1) if self.axis != self.ids_axis else h
        for layer in self.layers:
            h = layer(h)
        h = self.head(self.dropout(h.transpose(0, 1) if self.axis != self.ids_axis else h))
        return None if labels is None else nn.functional.cross_entropy(h.flatten(0, 1), labels.flatten())


def ids_of(batch: int, tokens: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(1, V, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def own_values(model, call, sequences, tokens_first):
    """Mean over layers and sequences of the loss, and the mean cosine after each block, in float64 by hand."""
    kept: dict[int, torch.Tensor] = {}
    modules = find_blocks(model).modules
    hooks = [
        m.register_forward_hook(lambda _m, _a, out, i=i: kept.__setitem__(i, out[0] if isinstance(out, tuple) else out))
        for i, m in enumerate(modules)
    ]
    with torch.no_grad():
        call()
    for hook in hooks:
        hook.remove()
    losses, cosines = [], []
    for i in range(len(modules)):
        z = kept[i].transpose(0, 1) if tokens_first else kept[i]
        parts = [z[row][places].double() for row, places in sequences]
        losses.append(torch.stack([angular(part) for part in parts]).mean())
        unit = [part / part.norm(dim=-1, keepdim=True) for part in parts]
        cosines.append(sum(float((u @ u.T).mean()) for u in unit) / len(parts))
    return float(torch.stack(losses).mean()), cosines


def attached_value(model, call, **keywords):
    with attach(model, 1.0, **keywords) as handle:
        call()
    return float(handle.last)


def watched(model, call, **keywords):
    with CondensationWatch(model, every=1, **keywords) as watch:
        call()
        numbers = watch.step()
    return [value for key, value in numbers.items() if key.startswith("condensation/mean_cosine/block")]


def all_rows(batch, tokens):
    return [(row, torch.arange(tokens)) for row in range(batch)]


@pytest.mark.parametrize("kind", [Named, Unnamed])
@pytest.mark.parametrize("ids_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("shape", [(3, 9), (5, 5), (9, 3)])
def test_torchs_encoder_in_every_layout(kind, batch_first, ids_first, shape):
    if kind is Named and ids_first:
        pytest.skip("input_ids are [batch, tokens] by convention")
    torch.manual_seed(0)
    model = kind(batch_first=batch_first, ids_first=ids_first).double().train()
    ids = ids_of(*shape)
    padding = torch.zeros(shape, dtype=torch.bool)
    padding[0, -1:] = True
    given = ids.T if ids_first else ids

    def call():
        return model(given, padding, labels=given)

    sequences = [(row, (~padding[row]).nonzero()[:, 0]) for row in range(shape[0])]
    loss, cosines = own_values(model, call, sequences, not batch_first)
    assert attached_value(model, call) == pytest.approx(loss, abs=1e-12)
    assert watched(model, call) == pytest.approx(cosines, abs=1e-12)
    profile = measure(model, input_ids=ids)
    _, plain = own_values(model.eval(), lambda: model(given), all_rows(*shape), not batch_first)
    assert profile.at("before").mean_cosine[1:] == pytest.approx(plain, abs=1e-9)


@pytest.mark.parametrize("ids_axis", [0, 1])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", [(4, 7), (6, 6)])
def test_own_blocks_are_settled_by_a_probe_that_changes_nothing(axis, ids_axis, shape):
    torch.manual_seed(0)
    model = Own(axis, ids_axis).double().train()
    model.layers[0].eval()  # a mode of its own stays
    ids = ids_of(*shape)
    given = ids if ids_axis == 1 else ids.T
    loss, cosines = own_values(model, lambda: model(given), all_rows(*shape), axis == 0)
    modes = [m.training for m in model.modules()]
    model.calls.zero_()
    twin = copy.deepcopy(model)

    torch.manual_seed(1)
    plain = twin(given, labels=given)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    with attach(model, 1.0) as handle:
        got = model(given, labels=given)
        assert torch.equal(torch.get_rng_state(), state)
        assert got.item() - plain.item() == pytest.approx(loss, abs=1e-12)
        assert handle.pop()["cross_entropy"] == pytest.approx(plain.item(), rel=1e-6)
        assert float(model.calls) == 1
        assert [m.training for m in model.modules()] == modes
    assert watched(model, lambda: model(given, labels=given)) == pytest.approx(cosines, abs=1e-12)
    assert measure(model, input_ids=ids).mean_cosine[1:] == pytest.approx(cosines, abs=1e-9)


def test_the_layout_may_be_stated():
    torch.manual_seed(0)
    model = Own(0).train()
    ids = ids_of(3, 8)
    expected, _ = own_values(model, lambda: model(ids), all_rows(3, 8), True)
    assert attached_value(model, lambda: model(ids, labels=ids), tokens_first=True) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(AttachError, match="tokens_first=True"):
        attached_value(model, lambda: model(ids, labels=ids), tokens_first=False)
    with pytest.raises(ValueError, match="tokens_first=True"):
        measure(model, input_ids=ids, tokens_first=False)
    with pytest.raises(SequencesError, match="tokens_first=True"):
        watched(model, lambda: model(ids, labels=ids), tokens_first=False)


def test_a_probe_that_fails_is_a_refusal_with_the_remedy():
    class Strict(Own):
        def forward(self, x, labels=None):
            assert self.training, "only for training"
            return super().forward(x, labels)

    torch.manual_seed(0)
    model, ids = Strict(0).train(), ids_of(5, 5)
    with pytest.raises(AttachError, match=r"(?s)only for training.*Pass tokens_first"):
        attached_value(model, lambda: model(ids, labels=ids))


def test_square_batches_in_a_compiled_graph():
    class Named(Own):
        def forward(self, input_ids, labels=None):
            return super().forward(input_ids, labels)

    torch.manual_seed(0)
    model = Named(0).train()
    model.dropout.p = 0.0
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    wide, square = ids_of(3, 8), ids_of(5, 5)
    expected, _ = own_values(model, lambda: model(wide), all_rows(3, 8), True)
    with attach(model, 1.0, impl="reference") as handle:
        compiled(wide, labels=wide)
        assert float(handle.last) == pytest.approx(expected, abs=1e-5)
        with pytest.raises(Exception, match="inside a compiled graph"):
            compiled(square, labels=square)
    torch._dynamo.reset()


def test_xlnet():
    """Token ids [batch, tokens], blocks [tokens, batch, width]; square batches too."""
    from transformers import XLNetConfig, XLNetLMHeadModel

    torch.manual_seed(0)
    model = XLNetLMHeadModel(
        XLNetConfig(vocab_size=V, d_model=D, n_layer=2, n_head=2, d_inner=24, dropout=0.0, mem_len=None)
    ).train()
    for shape in ((3, 7), (6, 6)):
        ids = ids_of(*shape)
        mask = torch.ones(shape, dtype=torch.long)
        mask[0, 4:] = 0

        def call(ids=ids, mask=mask):
            return model(input_ids=ids, attention_mask=mask, labels=ids)

        sequences = [(row, mask[row].nonzero()[:, 0]) for row in range(shape[0])]
        loss, cosines = own_values(model, call, sequences, True)
        assert attached_value(model, call) == pytest.approx(loss, abs=1e-5)
        assert watched(model, call) == pytest.approx(cosines, abs=1e-5)
        profile = measure(model, input_ids=ids)
        _, plain = own_values(model.eval(), lambda ids=ids: model(input_ids=ids), all_rows(*shape), True)
        assert profile.mean_cosine[1:] == pytest.approx(plain, abs=1e-5)
        model.train()


def qwen_vl():
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": V,
        "hidden_size": D,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    vision = {
        "depth": 1,
        "hidden_size": D,
        "intermediate_size": 24,
        "num_heads": 2,
        "out_hidden_size": D,
        "fullatt_block_indexes": [0],
    }
    tokens = {"image_token_id": 36, "video_token_id": 37, "vision_start_token_id": 38, "vision_end_token_id": 39}
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
    ).train()


@pytest.mark.parametrize("leading", [None, 3, 4])
def test_packed_documents_under_rotary_positions_of_a_vision_model(leading):
    model = qwen_vl()
    ids = torch.randint(3, 36, (2, 11), generator=torch.Generator().manual_seed(5))
    cuts = [[4, 7], [6, 3, 2]]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in cuts])
    if leading is not None:
        positions = positions.expand(leading, 2, 11)
    sequences = []
    for row, lengths in enumerate(cuts):
        starts = torch.tensor([0, *lengths]).cumsum(0)
        sequences += [(row, torch.arange(int(a), int(b))) for a, b in pairwise(starts)]

    def call():
        return model(input_ids=ids, position_ids=positions, labels=ids)

    loss, cosines = own_values(model, call, sequences, False)
    assert attached_value(model, call) == pytest.approx(loss, abs=1e-5)
    assert watched(model, call) == pytest.approx(cosines, abs=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["prompt", "p-tuning"])
def test_prompt_tuning_is_refused_with_its_name(kind, masked):
    peft = pytest.importorskip("peft")
    config = {
        "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "p-tuning": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
    }[kind]
    model = peft.get_peft_model(tiny(dtype=torch.float32), config).train()
    ids = ids_of(4, 10)
    batch = {"input_ids": ids, "labels": ids, **({"attention_mask": torch.ones_like(ids)} if masked else {})}
    with pytest.raises(AttachError, match=rf"adds 3 positions.*\({type(config).__name__}"):
        attached_value(model, lambda: model(**batch))
    with pytest.raises(SequencesError, match="adds 3 positions"):
        watched(model, lambda: model(**batch))
    with pytest.raises(ValueError, match="tokens"):
        measure(model, input_ids=ids)


class Changing(nn.Module):
    """Blocks whose states are not those of the tokens given."""

    def __init__(self, change) -> None:
        super().__init__()
        self.change = change
        self.embed = nn.Embedding(V, D)
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(2))

    def forward(self, input_ids, labels=None):
        h = self.change(self.embed(input_ids))
        for layer in self.layers:
            h = layer(h)
        return h.square().mean()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: nn.functional.pad(h, (0, 0, 0, 2)), "adds 2 positions"),
        (lambda h: h[:, ::2], "drops or merges positions"),
        (lambda h: h.reshape(2, -1, D), "reshapes the batch"),
        (lambda h: h.repeat(2, 1, 1), "number of sequences"),
        (lambda h: h.flatten(0, 1), r"shape \(32, 16\)"),
        (lambda h: h[:, None].expand(-1, 3, -1, -1), r"Four dimensions"),
    ],
)
def test_states_of_other_tokens_are_refused_with_their_cause(change, message):
    torch.manual_seed(0)
    model, ids = Changing(change).train(), ids_of(4, 8)
    with pytest.raises(AttachError, match=message):
        attached_value(model, lambda: model(ids), blocks="layers")
    with pytest.raises(SequencesError, match=message):
        watched(model, lambda: model(ids), blocks="layers")


def test_a_call_without_tokens_is_refused():
    class Images(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(6, 6)])

        def forward(self, pixel_values):
            return self.layers[0](pixel_values.flatten(1, 2)).mean()

    model = Images().train()
    with pytest.raises(AttachError, match=r"no argument that holds its tokens.*pixel_values"):
        attached_value(model, lambda: model(torch.randn(2, 3, 4, 6)), blocks="layers")


def test_padding_that_the_model_tells_from_its_ids():
    """As fair-esm does: no mask, tokens equal to the embedding's padding_idx are padding."""

    class Esm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(V, D, padding_idx=1)
            layer = nn.TransformerEncoderLayer(D, 2, 24, dropout=0.0)
            self.layers = nn.ModuleList([layer, copy.deepcopy(layer)])

        def forward(self, tokens):
            h = self.embed(tokens).transpose(0, 1)
            for layer in self.layers:
                h = layer(h, src_key_padding_mask=tokens == 1)
            return h.square().mean()

    torch.manual_seed(0)
    model, ids = Esm().double().train(), ids_of(3, 9) % (V - 2) + 2
    ids[1, 5:] = 1
    sequences = [(0, torch.arange(9)), (1, torch.arange(5)), (2, torch.arange(9))]
    loss, cosines = own_values(model, lambda: model(ids), sequences, True)
    assert attached_value(model, lambda: model(ids)) == pytest.approx(loss, abs=1e-12)
    assert watched(model, lambda: model(ids)) == pytest.approx(cosines, abs=1e-12)


@pytest.mark.parametrize("given", [None, "pattern"])
def test_padding_that_the_embedding_declares_where_no_mask_tells(given):
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(V, D, padding_idx=0)
            layer = nn.TransformerEncoderLayer(D, 2, 24, dropout=0.0, batch_first=True)
            self.layers = nn.ModuleList([layer, copy.deepcopy(layer)])

        def forward(self, x, mask=None):
            h = self.embed(x)
            for layer in self.layers:
                h = layer(h, mask)
            return h.square().mean()

    torch.manual_seed(0)
    model, ids = Own().double().train(), ids_of(3, 9) % (V - 1) + 1
    ids[1, 5:] = 0
    mask = None if given is None else torch.ones(9, 9, dtype=torch.bool).triu(1)
    sequences = [(0, torch.arange(9)), (1, torch.arange(5)), (2, torch.arange(9))]
    loss, cosines = own_values(model, lambda: model(ids, mask), sequences, False)
    assert attached_value(model, lambda: model(ids, mask)) == pytest.approx(loss, abs=1e-12)
    assert watched(model, lambda: model(ids, mask)) == pytest.approx(cosines, abs=1e-12)


def test_the_decoder_of_an_encoder_decoder_is_watched_with_its_own_tokens():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=V,
            d_model=D,
            d_kv=8,
            d_ff=24,
            num_layers=2,
            num_heads=2,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
    ).train()
    ids, labels = ids_of(3, 9), ids_of(3, 5)
    labels[2, 3:] = -100
    sequences = [(0, torch.arange(5)), (1, torch.arange(5)), (2, torch.arange(3))]

    def call():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)

    _, cosines = own_values(model, call, sequences, False)
    assert watched(model, call) == pytest.approx(cosines, abs=1e-5)
