from __future__ import annotations

import copy
import math
import pickle
import warnings

import pytest
import torch
from attach_helpers import (
    DECODERS,
    ENCODERS,
    angular,
    block_outputs,
    dispersion,
    gradients,
    greatest_difference,
    mean_residual,
    tiny,
    tokens,
)
from torch import nn

from decondense import attach
from decondense.attaching import AttachError, DispersionHandle, attached
from decondense.blocks import find_blocks
from decondense.config import DispersionConfig, LossConfig, WeightSchedule

WEIGHT = 0.7


def by_hand(model, batch, *, weight=WEIGHT, layers=None, sequences=None, extra=None, **settings):
    """Gradients and dispersion of the loss written out beside the model."""
    modules = find_blocks(model).modules if extra is None else extra
    kept, hooks = block_outputs(modules)
    loss = model(**batch).loss
    for hook in hooks:
        hook.remove()
    states = kept if layers is None else [kept[layer] for layer in layers]
    value = dispersion(states, sequences, **settings)
    (loss + weight * value).backward()
    result = gradients(model)
    model.zero_grad()
    return result, value.item()


def by_attaching(model, batch, **keywords):
    with attach(model, **{"weight": WEIGHT, **keywords}) as handle:
        model(**batch).loss.backward()
    result = gradients(model)
    model.zero_grad()
    return result, float(handle.last)


@pytest.mark.parametrize("family", [*DECODERS, *ENCODERS])
def test_gradients_are_those_of_the_loss_written_out(family):
    model, ids = tiny(family), tokens()
    expected, value = by_hand(model, {"input_ids": ids, "labels": ids})
    got, last = by_attaching(model, {"input_ids": ids, "labels": ids})
    assert last == pytest.approx(value, abs=1e-12)
    assert greatest_difference(got, expected) < 1e-10
    assert mean_residual(got, expected) < 1e-10


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("layers", ["deep", "shallow", "last", [0, -1]])
def test_chosen_layers_and_implementations(impl, layers):
    model, ids = tiny(), tokens()
    chosen = {"deep": [1, 2], "shallow": [0], "last": [2]}.get(layers, [0, 2]) if isinstance(layers, str) else [0, 2]
    expected, value = by_hand(model, {"input_ids": ids, "labels": ids}, layers=chosen, tau=0.3)
    got, last = by_attaching(model, {"input_ids": ids, "labels": ids}, layers=layers, tau=0.3, impl=impl)
    assert last == pytest.approx(value, abs=1e-12)
    assert greatest_difference(got, expected) < 1e-10


def test_the_last_state_after_the_final_norm_on_request():
    model, ids = tiny(), tokens()
    modules = [*model.model.layers[:2], model.model.norm]
    expected, value = by_hand(model, {"input_ids": ids, "labels": ids}, extra=modules)
    got, last = by_attaching(model, {"input_ids": ids, "labels": ids}, final_norm=True)
    assert last == pytest.approx(value, abs=1e-12)
    assert greatest_difference(got, expected) < 1e-10
    with pytest.raises(AttachError, match="final_norm=True applies to the last block"):
        attach(model, layers=[0], final_norm=True)


def test_the_embedding_on_request():
    model, ids = tiny(), tokens()
    modules = [model.model.embed_tokens, *model.model.layers]
    expected, value = by_hand(model, {"input_ids": ids, "labels": ids}, extra=modules)
    with attach(model, WEIGHT, embedding=True) as handle:
        model(input_ids=ids, labels=ids).loss.backward()
        assert float(handle.last) == pytest.approx(value, abs=1e-12)
        assert list(handle.pop())[2:] == [
            f"dispersion/{x}" for x in ("embedding", "block_01", "block_02", "block_03")
        ] + ["cross_entropy"]
    assert greatest_difference(gradients(model), expected) < 1e-10


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_does_not_count(side):
    model, ids = tiny("gpt2"), tokens(3, 12)
    lengths = [12, 7, 1]
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, slice(0, length) if side == "right" else slice(12 - length, 12)] = 1
    labels = ids.masked_fill(mask == 0, -100)
    places = [mask[row].nonzero().flatten().tolist() for row in range(3)]
    sequences = [[(0, places[0]), (1, places[1])]]  # the one-token sequence has no pair
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    expected, value = by_hand(model, batch, sequences=sequences)
    got, last = by_attaching(model, batch)
    assert last == pytest.approx(value, abs=1e-12)
    assert greatest_difference(got, expected) < 1e-10


def test_pairs_across_the_sequences_of_a_batch():
    model, ids = tiny("gpt2"), tokens(3, 12)
    mask = torch.zeros_like(ids)
    for row, length in enumerate([12, 7, 1]):
        mask[row, :length] = 1
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    kept, hooks = block_outputs(list(model.transformer.h))
    loss = model(**batch).loss
    for hook in hooks:
        hook.remove()
    value = torch.stack([angular(z_BTD[mask.bool()]) for z_BTD in kept]).mean()
    (loss + WEIGHT * value).backward()
    expected = gradients(model)
    model.zero_grad()
    got, last = by_attaching(model, batch, within="batch")
    assert last == pytest.approx(value.item(), abs=1e-12)
    assert greatest_difference(got, expected) < 1e-10


@pytest.mark.parametrize("how", ["position_ids", "attention_mask", "both"])
def test_packed_documents_are_sequences_of_their_own(how):
    model, ids = tiny(), tokens(1, 14)
    lengths = [6, 5, 1, 2]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    numbers = torch.cat([torch.full((n,), i + 1) for i, n in enumerate(lengths)])[None]
    batch = {"input_ids": ids, "labels": ids}
    if how != "attention_mask":
        batch["position_ids"] = positions
    if how != "position_ids":
        batch["attention_mask"] = numbers
    starts = [0, 6, 11, 12]
    documents = [[(0, list(range(s, s + n))) for s, n in zip(starts, lengths, strict=True) if n > 1]]
    expected, value = by_hand(model, batch, sequences=documents)
    got, last = by_attaching(model, batch)
    assert last == pytest.approx(value, abs=1e-12)
    assert greatest_difference(got, expected) < 1e-10


def test_masks_are_looked_at_once_away_from_the_processor():
    """What happens on a GPU, where each look would wait for the device; here the same code on the processor."""
    ids = tokens(2, 6)
    plain, numbered = torch.ones(2, 6, dtype=torch.long), torch.tensor([[1, 1, 1, 2, 2, 2]] * 2)
    for first in (plain, numbered):
        model = tiny()
        with attach(model, WEIGHT) as handle:
            value = {}
            for looks_once in (False, True):
                handle._reader.sequences.looks_once = looks_once
                model(input_ids=ids, labels=ids, attention_mask=first).loss.backward()
                value[looks_once] = float(handle.last)
            assert value[True] == value[False]
            assert handle.pop()
            other = numbered if first is plain else plain
            model(input_ids=ids, labels=ids, attention_mask=other).loss.backward()
            if first is numbered:  # the careful way is right for both kinds
                assert handle.pop()
            else:
                with pytest.raises(AttachError, match="masks of one kind"):
                    handle.pop()


@pytest.mark.parametrize("kind", ["tuple", "nanogpt", "scalar", "namespace", "named tuple", "list"])
def test_outputs_of_every_shape(kind):
    import types
    from collections import namedtuple

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            loss = x.square().mean()
            return {
                "tuple": (loss, x),
                "nanogpt": (x, loss),
                "list": [loss, x],
                "scalar": loss,
                "namespace": types.SimpleNamespace(loss=loss, logits=x),
                "named tuple": namedtuple("Output", "loss logits")(loss, x),
            }[kind]

    torch.manual_seed(0)
    model = Model().double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    kept, hooks = block_outputs(list(model.layers))
    model(x)
    expected = kept[1].square().mean() + WEIGHT * dispersion(kept)
    for hook in hooks:
        hook.remove()
    with attach(model, WEIGHT, blocks="layers"):
        out = model(x)
    loss = out if kind == "scalar" else out[1] if kind == "nanogpt" else out.loss if kind == "namespace" else out[0]
    assert type(out).__name__ == {"scalar": "Tensor", "namespace": "SimpleNamespace", "named tuple": "Output"}.get(
        kind, "list" if kind == "list" else "tuple"
    )
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)


# ---- the handle ----------------------------------------------------------------------------------------------------


def test_values_for_the_log():
    model, ids = tiny(), tokens()
    with attach(model, 0.2, layers="deep") as handle:
        assert handle.pop() == {}
        values = []
        for seed in (0, 1, 2):
            model(input_ids=tokens(seed=seed), labels=ids)
            values.append(float(handle.last))
        logged = handle.pop()
        assert handle.pop() == {}
    assert list(logged) == [
        "dispersion",
        "dispersion_weight",
        "dispersion/block_02",
        "dispersion/block_03",
        "cross_entropy",
    ]
    assert logged["dispersion"] == pytest.approx(sum(values) / 3, abs=1e-6)
    assert logged["dispersion_weight"] == 0.2
    assert (logged["dispersion/block_02"] + logged["dispersion/block_03"]) / 2 == pytest.approx(logged["dispersion"])


def test_representation_says_what_is_attached():
    model = tiny("gpt2")
    handle = attach(model, 0.25, layers="deep", tau=0.5, impl="chunked", schedule=WeightSchedule(kind="linear"))
    handle.set_progress(1, 2)
    assert repr(handle) == (
        "DispersionHandle(layers=block 2, block 3 of 3 blocks at 'transformer.h', form='angular', tau=0.5, "
        "weight=0.25 (now 0.125), impl='chunked', attached)"
    )
    handle.detach()
    assert "detached" in repr(handle)


def snapshot(model: nn.Module) -> list:
    """Everything that attaching might leave behind on the modules."""
    return [
        (
            name,
            sorted(vars(module)),
            *(list(getattr(module, hooks)) for hooks in vars(module) if "hooks" in hooks),
        )
        for name, module in model.named_modules()
    ]


def test_detaching_gives_the_model_back():
    model, ids = tiny(), tokens()
    before, weights = snapshot(model), copy.deepcopy(model.state_dict())
    plain = model(input_ids=ids, labels=ids).loss.item()
    handle = attach(model, embedding=True, final_norm=True)
    assert snapshot(model) != before
    assert model.state_dict().keys() == weights.keys()
    assert model(input_ids=ids, labels=ids).loss.item() != plain
    handle.detach()
    handle.detach()
    assert snapshot(model) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert model(input_ids=ids, labels=ids).loss.item() == plain


def test_an_exception_inside_the_context_detaches():
    model = tiny()
    with pytest.raises(ZeroDivisionError), attach(model):
        raise ZeroDivisionError
    assert attached(model) is None


def test_attaching_twice_is_refused_and_names_the_first():
    model = tiny()
    with attach(model, layers="last"):
        with pytest.raises(AttachError, match=r"already has a dispersion loss: .*block 3 of 3.*detach\(\)"):
            attach(model)
        with pytest.raises(AttachError, match="already"):
            attach(torch.compile(model, backend="eager"))
    attach(model).detach()


def test_evaluation_and_generation_are_left_alone():
    model, ids = tiny("gpt2"), tokens()
    model.eval()
    plain = model(input_ids=ids, labels=ids)
    written = model.generate(ids[:1], max_new_tokens=4, do_sample=False)
    with attach(model, 5.0) as handle:
        got = model(input_ids=ids, labels=ids)
        assert torch.equal(got.loss, plain.loss)
        assert got.keys() == plain.keys()
        assert torch.equal(model.generate(ids[:1], max_new_tokens=4, do_sample=False), written)
        model.train()
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids, labels=ids).loss, plain.loss)
        model.generate(ids[:1], max_new_tokens=4, do_sample=False)
        assert handle.pop() == {}


def test_a_copied_model_carries_a_loss_of_its_own():
    model, ids = tiny(), tokens()
    handle = attach(model)
    twin = copy.deepcopy(model)
    assert attached(twin) is not handle
    twin(input_ids=ids, labels=ids).loss.backward()
    assert handle.pop() == {}
    assert attached(twin).pop()
    attached(twin).detach()
    assert attached(model) is handle
    assert attached(pickle.loads(pickle.dumps(model))) is not None


def test_saved_weights_do_not_know_of_it(tmp_path):
    model = tiny()
    with attach(model):
        model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    assert greatest_difference(model.state_dict(), again.state_dict()) == 0


def test_deferred_values_are_taken_by_hand():
    model, ids = tiny(), tokens()
    expected, value = by_hand(model, {"input_ids": ids, "labels": ids})
    with attach(model, WEIGHT) as handle:
        handle.defer = True
        loss = model(input_ids=ids, labels=ids).loss
        taken = handle.take()
        assert handle.take() is None
        (loss + handle.weight * taken).backward()
        assert taken.item() == pytest.approx(value, abs=1e-12)
        model(input_ids=ids)
        with pytest.raises(AttachError, match="two training forwards for one loss"):
            model(input_ids=ids)
    assert greatest_difference(gradients(model), expected) < 1e-10


# ---- weight and schedule -------------------------------------------------------------------------------------------


def test_weight_zero_watches_and_adds_nothing():
    model, ids = tiny("gpt2", resid_pdrop=0.1, embd_pdrop=0.1), tokens()
    torch.manual_seed(7)
    plain = model(input_ids=ids, labels=ids).loss
    plain.backward()
    expected, state = gradients(model), torch.get_rng_state()
    model.zero_grad()
    torch.manual_seed(7)
    with attach(model, 0.0, pairs="grouped", group_size=4) as handle:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert torch.equal(loss, plain)
        assert torch.equal(torch.get_rng_state(), state)
        assert greatest_difference(gradients(model), expected) == 0
        assert handle.pop()["dispersion"] < 0


def test_the_schedule_moves_the_weight():
    model, ids = tiny(), tokens()
    schedule = WeightSchedule(kind="linear", warmup=0.2, until=0.6)
    with attach(model, 0.5, schedule=schedule) as handle:
        with pytest.raises(AttachError, match="set_progress"):
            model(input_ids=ids, labels=ids)
        weights = []
        for step in range(10):
            handle.set_progress(step, 10)
            weights.append(handle.weight)
            model(input_ids=ids, labels=ids).loss.backward()
            values = handle.pop()
            # a weight of zero costs nothing: nothing is computed
            assert (values == {}) == (handle.weight == 0)
        assert weights == pytest.approx([0, 0.25, 0.5, 0.375, 0.25, 0.125, 0, 0, 0, 0])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({}, [1, 1, 1, 1, 1]),
        ({"kind": "linear"}, [1, 0.75, 0.5, 0.25, 0]),
        ({"kind": "cosine"}, [1, 0.8535534, 0.5, 0.1464466, 0]),
        ({"kind": "cosine", "final": 0.2}, [1, 0.8828427, 0.6, 0.3171573, 0.2]),
        ({"warmup": 0.5}, [0, 0.5, 1, 1, 1]),
        ({"until": 0.5}, [1, 1, 0, 0, 0]),
        ({"until": 0.5, "final": 0.1}, [1, 1, 0.1, 0.1, 0.1]),
        ({"until_step": 3}, [1, 1, 1, 0, 0]),
        ({"warmup_steps": 2}, [0, 0.5, 1, 1, 1]),
        ({"kind": "linear", "warmup_steps": 1, "until_step": 3}, [0, 1, 0.5, 0, 0]),
    ],
)
def test_schedule_factors(schedule, expected):
    made = WeightSchedule(**schedule)
    assert [made.factor(step, 4) for step in range(5)] == pytest.approx(expected, abs=1e-7)
    assert made.is_constant == (expected == [1] * 5)
    assert WeightSchedule.parse(made.model_dump(mode="json"), where="test") == made


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"warmup": 0.6, "until": 0.5}, "lies after"),
        ({"warmup": 0.1, "warmup_steps": 3}, "give one of them"),
        ({"until": 0.1, "until_step": 3}, "give one of them"),
        ({"warmup_steps": 5, "until_step": 3}, "lies after"),
        ({"kind": "cosin"}, "constant"),
    ],
)
def test_schedules_that_make_no_sense(schedule, message):
    with pytest.raises(ValueError, match=message):
        WeightSchedule(**schedule)


def test_state_goes_on_where_it_stood():
    schedule = WeightSchedule(kind="cosine")
    with attach(tiny(), 0.5, schedule=schedule) as first:
        first.set_progress(30, 100)
        state, weight = first.state_dict(), first.weight
    with attach(tiny(), 0.5, schedule=schedule) as second:
        second.load_state_dict(state)
        assert second.weight == weight < 0.5
    with (
        attach(tiny(), 0.4, schedule=schedule) as third,
        pytest.raises(AttachError, match=r"weight: saved 0\.5, now 0\.4"),
    ):
        third.load_state_dict(state)


def test_random_pairs_are_a_function_of_seed_and_step():
    ids = tokens(2, 24)

    def values(seed, steps, resume_at=None):
        model = tiny()
        handle = attach(model, pairs="subset", subset_size=6, seed=seed)
        found = []
        for step in range(steps):
            if step == resume_at:
                state = handle.state_dict()
                handle.detach()
                handle = attach(model, pairs="subset", subset_size=6, seed=seed)
                handle.load_state_dict(state)
            handle.set_progress(step, steps)
            for _ in range(2):
                model(input_ids=ids, labels=ids).loss.backward()
                found.append(float(handle.last))
        return found

    first = values(0, 3)
    assert len(set(first)) == 6  # every micro-batch draws anew
    assert values(0, 3) == first
    assert values(0, 3, resume_at=2) == first
    assert values(1, 3) != first


# ---- numbers -------------------------------------------------------------------------------------------------------


def test_autocast_computes_the_loss_in_float32():
    model, ids = tiny(dtype=torch.float32), tokens()
    with attach(model, WEIGHT) as handle:
        model(input_ids=ids, labels=ids)
        full = float(handle.last)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert handle.last.dtype == torch.float32
        assert float(handle.last) == pytest.approx(full, abs=2e-3)


def test_a_bfloat16_model():
    model, ids = tiny(), tokens()
    with attach(model, WEIGHT) as handle:
        model(input_ids=ids, labels=ids)
        full = float(handle.last)
        handle.detach()
    model = model.bfloat16()
    with attach(model, WEIGHT) as handle:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert loss.dtype == torch.float32
        assert float(handle.last) == pytest.approx(full, abs=5e-3)
        assert all(p.grad.dtype == torch.bfloat16 for p in model.parameters() if p.grad is not None)


def test_grad_scaler_scales_both_terms():
    model, ids = tiny(dtype=torch.float32), tokens()
    expected, _ = by_attaching(model, {"input_ids": ids, "labels": ids})
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with attach(model, WEIGHT), torch.autocast("cpu", torch.float16, enabled=False):
        scaler.scale(model(input_ids=ids, labels=ids).loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert greatest_difference(gradients(model), expected) < 1e-6


def test_gradient_ratio_is_that_of_the_two_gradients():
    model, ids = tiny(), tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    plain = gradients(model)
    model.zero_grad()
    both, _ = by_hand(model, {"input_ids": ids, "labels": ids})
    norm = (
        sum((both[n] - plain[n]).square().sum() for n in both).sqrt()
        / sum(g.square().sum() for g in plain.values()).sqrt()
    )
    with attach(model, WEIGHT, gradient_ratio_every=2) as handle:
        with pytest.raises(AttachError, match="set_progress"):
            model(input_ids=ids, labels=ids)
        logs = []
        for step in range(4):
            handle.set_progress(step, 4)
            model(input_ids=ids, labels=ids).loss.backward()
            logs.append(handle.pop())
            if step == 0:
                assert greatest_difference(gradients(model), both) < 1e-10  # measuring did not change the gradient
    assert ["dispersion_gradient_ratio" in log for log in logs] == [True, False, True, False]
    assert logs[0]["dispersion_gradient_ratio"] == pytest.approx(norm.item(), rel=1e-5)


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_settings_are_checked():
    model = tiny()
    with pytest.raises(ValueError, match="Did you mean 'tau'"):
        attach(model, tua=1.0)
    with pytest.raises(ValueError, match="Did you mean 'angular'"):
        attach(model, form="angulr")
    with pytest.raises(ValueError, match="Did you mean 'deep'"):
        attach(model, layers="deeep")
    with pytest.raises(ValueError, match="layer 3 does not exist"):
        attach(model, layers=[3])
    with pytest.raises(ValueError, match="weight"):
        attach(model, math.nan)
    with pytest.raises(AttachError, match="also weight, tau"):
        attach(model, 0.3, config=DispersionConfig(), tau=0.5)
    assert attached(model) is None


def test_configuration_object_and_keywords_mean_the_same():
    config = DispersionConfig(weight=0.3, layers=(0, 2), loss=LossConfig(tau=0.5, pairs="grouped"), seed=3)
    with attach(tiny(), config=config) as handle:
        assert handle.config == config
    with attach(tiny(), 0.3, [0, 2], tau=0.5, pairs="grouped", seed=3) as handle:
        assert handle.config == config
    assert DispersionConfig.parse(config.model_dump(mode="json"), where="test") == config


def test_a_trainer_that_discards_the_loss_is_noticed():
    model, ids = tiny(), tokens()
    attach(model)
    for _ in range(3):
        model(input_ids=ids, labels=ids).logits.logsumexp(-1).mean().backward()
    with pytest.raises(AttachError, match="were discarded without a gradient"):
        model(input_ids=ids, labels=ids)


def test_losses_that_wait_for_a_common_backward_are_not_discarded():
    model, ids = tiny(), tokens()
    attach(model)
    for _ in range(2):
        sum(model(input_ids=ids, labels=ids).loss for _ in range(6)).backward()
    for _ in range(2):  # two forwards in vain, then one in earnest
        model(input_ids=ids, labels=ids)
    model(input_ids=ids, labels=ids).loss.backward()
    for _ in range(2):
        model(input_ids=ids, labels=ids)
    model(input_ids=ids, labels=ids).loss.backward()


def test_no_labels_no_loss():
    with attach(tiny()) as handle, pytest.raises(AttachError, match="no loss to add to"):
        handle._blocks.root(input_ids=tokens())


def test_forward_beside_the_attached_model():
    model = tiny()
    with attach(model), pytest.raises(AttachError, match="outside the forward of the model"):
        model.model(input_ids=tokens())


def test_shared_layers_are_refused():
    model = tiny("albert", dtype=torch.float32, embedding_size=16)
    with attach(model), pytest.raises(AttachError, match="ran twice"):
        model(input_ids=tokens(), labels=tokens())


def test_a_block_that_does_not_run_is_missed():
    model = tiny("opt", layerdrop=1.0)
    with attach(model), pytest.raises(AttachError, match="no hidden state was seen at block 1"):
        model(input_ids=tokens(), labels=tokens())


def test_encoder_decoder_models_are_refused():
    from transformers import T5Config, T5ForConditionalGeneration

    with torch.device("meta"):
        model = T5ForConditionalGeneration(T5Config(num_layers=2, d_model=16, num_heads=2, d_kv=8, d_ff=16))
    with pytest.raises(AttachError, match="encoder-decoder"):
        attach(model)


def test_data_parallel_is_refused():
    with pytest.raises(AttachError, match="use DDP or FSDP2"):
        attach(nn.DataParallel(tiny()))


def test_flat_outputs_are_refused():
    class Images(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Conv2d(1, 1, 1)])

        def forward(self, x):
            return self.layers[0](x).mean()

    with attach(model := Images(), blocks="layers"), pytest.raises(AttachError, match=r"\(2, 1, 3, 3\)"):
        model(torch.zeros(2, 1, 3, 3))


class Checkpointed(nn.Module):
    """Blocks behind torch's own checkpoint function, so that their hooks run inside the recomputation."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=self.use_reentrant)
        return x.square().mean()


def test_reentrant_checkpoints_that_cut_the_graph():
    model = Checkpointed(use_reentrant=True)
    with attach(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(AttachError, match="enable_input_require_grads"):
            model(torch.zeros(2, 5, 8))
        model(torch.randn(2, 5, 8, requires_grad=True)).backward()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_hooks_inside_the_recomputation(use_reentrant):
    torch.manual_seed(0)
    model = Checkpointed(use_reentrant).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    state, states = x, []
    for layer in model.layers:
        state = layer(state)
        states.append(state)
    (state.square().mean() + WEIGHT * dispersion(states)).backward()
    expected = {**gradients(model), "input": x.grad.clone()}
    model.zero_grad()
    x.grad = None
    with attach(model, WEIGHT):
        model(x).backward()
    assert greatest_difference({**gradients(model), "input": x.grad}, expected) < 1e-12


def test_layers_without_trained_parameters_below():
    model = tiny()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.2" in name)
    with attach(model, layers=[0]), pytest.raises(AttachError, match="Choose deeper layers"):
        model(input_ids=tokens(), labels=tokens())
    with attach(model, layers="all"):
        model(input_ids=tokens(), labels=tokens()).loss.backward()


def test_tensor_parallel_weights_are_refused():
    class Mesh:
        mesh_dim_names = ("dp_shard", "tp")

        def __getitem__(self, name):
            return self

        def size(self):
            return 2

    model = tiny()
    model.lm_head.weight.device_mesh = Mesh()
    with pytest.raises(AttachError, match="mesh dimension 'tp'"):
        attach(model)
    Mesh.mesh_dim_names = ("dp_replicate", "dp_shard")
    attach(model).detach()


def test_handle_type():
    with attach(tiny(), 0.1) as handle:
        assert isinstance(handle, DispersionHandle)
        assert handle.layers == [0, 1, 2]
        assert handle.is_attached
    assert not handle.is_attached
