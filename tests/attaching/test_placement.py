"""``placement="block"``: the gradients of ``placement="output"``, and no gradient computed before its block's turn."""

from __future__ import annotations

import contextlib
import gc

import pytest
import torch
from attach_helpers import gradients, greatest_difference, tiny, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint

from decondense import attach
from decondense.attaching import AttachError, Part

WEIGHT = 0.7


def masked(rows: int = 4, length: int = 12) -> dict[str, torch.Tensor]:
    ids = tokens(rows, length)
    mask = (torch.arange(length) < torch.tensor([length, 7, 1, 4])[:rows, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def both(train, family="llama", **settings):
    """What ``train(model, handle)`` leaves in the gradients, for each placement."""
    found = []
    for placement in ("output", "block"):
        model = tiny(family)
        with attach(model, WEIGHT, placement=placement, **settings) as handle:
            values = train(model, handle)
        found.append((gradients(model), values, handle))
    (first, values, _), (second, others, _) = found
    assert values == pytest.approx(others, rel=1e-12)
    control = tiny(family)
    control(**masked()).loss.backward()
    assert greatest_difference(gradients(control), first) > 1e-6
    return greatest_difference(first, second)


def one_step(model, handle):
    loss = model(**masked()).loss
    loss.backward()
    return [loss.item(), handle.last.item()]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"layers": [0, -1]},
        {"final_norm": True, "embedding": True},
        {"within": "batch", "form": "hinge"},
        {"impl": "reference"},
        {"gradient": "recompute"},
    ],
)
def test_same_loss_and_gradients(settings):
    assert both(one_step, **settings) < 1e-12


@pytest.mark.parametrize("family", ["gpt2", "bert", "mamba"])
def test_families(family):
    assert both(one_step, family) < 1e-12


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_count_each_layer_once(reentrant):
    def train(model, handle):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        values = [value for _ in range(2) for value in one_step(model, handle)]
        return [*values, handle.pop()["dispersion"]]

    assert both(train) < 1e-12


def test_two_forwards_before_one_backward_under_checkpoints():
    def train(model, handle):
        model.gradient_checkpointing_enable({"use_reentrant": False})
        batch = masked()
        losses = [model(**{k: v[rows] for k, v in batch.items()}).loss for rows in (slice(0, 2), slice(2, 4))]
        (losses[0] + 3 * losses[1]).backward()
        return [loss.item() for loss in losses]

    assert both(train) < 1e-12


def test_scaling_accumulation_and_deferred_values():
    def train(model, handle):
        handle.defer = True
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        found = []
        for part in range(2):
            batch = {key: value[2 * part : 2 * part + 2] for key, value in masked().items()}
            loss = model(**batch).loss
            total, count = handle.take_sum_and_count()
            scaler.scale(loss / 2 + handle.weight * total / 3).backward()
            found += [total.item(), count.item()]
        return found

    assert both(train) < 1e-9  # of gradients that are 1024 times as large


def test_targets_weigh_each_layer():
    def train(model, handle):
        for step in range(3):
            handle.set_progress(step)
            model.zero_grad()
            model(**masked()).loss.backward()
        assert len(set(handle._controller.relative_L.tolist())) > 1
        return [float(handle.last), handle.weight]

    assert both(train, target=[0.5, 0.0, -0.3]) < 1e-12


def test_random_pairs_are_drawn_again_alike_in_a_recomputation():
    def gradient(checkpointed):
        model = tiny()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with attach(model, WEIGHT, placement="block", pairs="subset", subset_size=4):
            for _ in range(2):
                model(**masked()).loss.backward()
        return gradients(model)

    assert greatest_difference(gradient(False), gradient(True)) < 1e-12


def test_gradient_ratio_and_a_second_backward():
    def train(model, handle):
        handle.set_progress(0)
        loss = model(**masked()).loss
        loss.backward(retain_graph=True)
        loss.backward()
        return [handle.pop()["dispersion_gradient_ratio"]]

    assert both(train, gradient_ratio_every=1) < 1e-12


def test_a_backward_that_does_not_use_the_loss_adds_nothing():
    model, batch = tiny(), masked()
    model(**batch).logits.square().mean().backward()
    expected = gradients(model)
    model.zero_grad()
    with attach(model, WEIGHT, placement="block"):
        model(**batch).logits.square().mean().backward()
    assert greatest_difference(gradients(model), expected) == 0


def test_watching_and_evaluation_change_nothing():
    model, batch = tiny(), masked()
    model(**batch).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    with attach(model, 0.0, placement="block") as handle:
        model(**batch).loss.backward()
        assert handle.pop()["dispersion"] < 0
    assert greatest_difference(gradients(model), expected) == 0


@pytest.mark.slow
def test_a_compiled_model_falls_back_to_the_output():
    def train(model, handle):
        loss = torch.compile(model, backend="eager")(**masked()).loss
        loss.backward()
        return [loss.item()]

    assert both(train) < 1e-12


class Stage(nn.Module):
    """Blocks that write their output in place of their input's sum, and return it in a tuple."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))

    def forward(self, tokens):
        for layer in self.layers:
            tokens = checkpoint(layer, tokens, use_reentrant=False) + tokens
        return tokens


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_a_stage_without_a_loss_is_told_the_scale_and_the_divisor(scale):
    """Two stages in one process, by hand: as one model."""
    torch.manual_seed(0)
    stages = [Stage().double(), Stage().double()]
    whole = nn.Module()
    whole.layers = nn.ModuleList([*stages[0].layers, *stages[1].layers])
    whole.forward = lambda tokens: _run(whole.layers, tokens)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    with attach(whole, WEIGHT, [1, 2]) as handle:
        handle.defer = True
        loss = whole(x).square().mean()
        total, _ = handle.take_sum_and_count()
        (scale * (loss + WEIGHT * total / 5)).backward()
    expected = gradients(whole)
    whole.zero_grad()
    handles = [attach(stage, WEIGHT, [1, 2], part=Part(2 * at, 4)) for at, stage in enumerate(stages)]
    assert [handle.layers for handle in handles] == [[1], [2]]
    for handle in handles:
        handle.scale, handle.sequences = scale, 5
    (scale * stages[1](stages[0](x)).square().mean()).backward()
    assert greatest_difference(gradients(whole), expected) < 1e-12
    assert [list(handle.pop())[2:] for handle in handles] == [["dispersion/block_02"], ["dispersion/block_03"]]


def _run(layers, tokens):
    for layer in layers:
        tokens = layer(tokens) + tokens
    return tokens


def test_a_stage_without_a_chosen_block_is_left_alone():
    model = Stage()
    with attach(model, layers="deep", part=Part(0, 4)) as handle:
        model(torch.randn(2, 5, 8)).sum().backward()
        assert handle.layers == []
        assert handle.pop() == {}


@pytest.mark.parametrize(
    ("part", "settings", "message"),
    [
        (Part(3, 4), {}, "do not fit into 4"),
        (Part(-1, 4), {}, "do not fit"),
        (Part(0, 4), {"target": 0.1}, "a target"),
        (Part(0, 4), {"within": "world"}, "all ranks"),
        (Part(0, 4), {"gradient_ratio_every": 1}, "gradient_ratio_every"),
        (None, {"placement": "blocks"}, "Did you mean 'block'"),
    ],
)
def test_what_a_part_cannot_have(part, settings, message):
    with pytest.raises((AttachError, ValueError), match=message):
        attach(Stage(), part=part, **settings)


def peak_bytes(placement: str, blocks: int) -> int:
    """Greatest number of bytes that backward holds beyond what the forward left."""
    model = tiny("llama", num_hidden_layers=blocks)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = {name: value.repeat(16, 1) for name, value in masked().items()}
    with attach(model, WEIGHT, placement=placement, gradient="recompute"):
        loss = model(**batch).loss
        gc.collect()
        with torch.profiler.profile(profile_memory=True) as profile, contextlib.suppress(AttributeError):
            loss.backward()
    peak = total = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    return peak


def test_the_gradients_of_the_layers_do_not_wait_for_their_turn():
    """At the output all layers' gradients are made first; at the blocks one at a time."""
    state = 64 * 12 * 32 * 8
    growth = {name: peak_bytes(name, 12) - peak_bytes(name, 4) for name in ("output", "block")}
    parameters = growth["block"]  # gradients of the parameters of eight blocks more
    assert growth["output"] - parameters > 4 * state, growth
