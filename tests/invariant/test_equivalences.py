"""Runs that must be the same run, class by class. One process, float64 where the frameworks allow it."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from attach_helpers import gradients, greatest_difference, mean_residual, tiny, tokens
from trainer_helpers import examples, make_trainer, weights

from decondense import attach, attach_trainer
from decondense.config import WeightSchedule

WEIGHT = 0.7
DROPOUT = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}


def backward(model, batch, **keywords):
    """Gradients of one attached step."""
    with attach(model, WEIGHT, **keywords) as handle:
        model(**batch).loss.backward()
        value = float(handle.last)
    found = gradients(model)
    model.zero_grad()
    return found, value


def train(model, steps, weight, *, dtype_of_ids=torch.long, resume_at=None, schedule=None, **keywords):
    """A plain loop with AdamW; returns losses, weights and the random state."""
    torch.manual_seed(11)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = schedule or WeightSchedule()
    handle = None if weight is None else attach(model, weight, schedule=schedule, **keywords)
    losses = []
    for step in range(steps):
        if step == resume_at:
            saved = (model.state_dict(), optimizer.state_dict(), handle.state_dict(), torch.get_rng_state())
            saved = [dict(s) if isinstance(s, dict) else s for s in saved]
            handle.detach()
            model = tiny("gpt2", seed=99, **DROPOUT)
            model.load_state_dict(saved[0])
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            optimizer.load_state_dict(saved[1])
            handle = attach(model, weight, schedule=schedule, **keywords)
            handle.load_state_dict(saved[2])
            torch.set_rng_state(saved[3])
        if handle is not None:
            handle.set_progress(step, steps)
        ids = tokens(4, 12, seed=step)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if handle is not None:
        handle.detach()
    return losses, weights(model), torch.get_rng_state()


# ---- {weight 0} = {not attached} -----------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs", ["all", "grouped", "subset"])
def test_weight_zero_is_not_attached_bit_for_bit(pairs):
    plain = train(tiny("gpt2", **DROPOUT), 5, None)
    random = {} if pairs == "all" else {"group_size": 4, "subset_size": 4}
    zero = train(tiny("gpt2", **DROPOUT), 5, 0.0, pairs=pairs, **random)
    assert zero[0] == plain[0]
    assert all(torch.equal(zero[1][name], plain[1][name]) for name in plain[1])
    assert torch.equal(zero[2], plain[2])


def test_attached_does_not_move_the_random_state_either():
    for pairs in ("all", "grouped"):
        model, ids = tiny("gpt2", **DROPOUT), tokens()
        torch.manual_seed(3)
        model(input_ids=ids, labels=ids).loss.backward()
        state = torch.get_rng_state()
        torch.manual_seed(3)
        with attach(model, WEIGHT, pairs=pairs, group_size=4):
            model(input_ids=ids, labels=ids).loss.backward()
        assert torch.equal(torch.get_rng_state(), state)


def test_weight_zero_in_the_trainer(tmp_path):
    found = []
    for weight in (None, 0.0):
        trainer = make_trainer(tmp_path, tiny("gpt2", dtype=torch.float32, **DROPOUT), max_steps=4, optim="adamw_torch")
        if weight is not None:
            attach_trainer(trainer, weight)
        trainer.train()
        log = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        found.append((log, weights(trainer.model), torch.get_rng_state()))
    assert found[0][0] == found[1][0]
    assert greatest_difference(found[0][1], found[1][1]) == 0
    assert torch.equal(found[0][2], found[1][2])


# ---- accumulation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [1, 2, 4, 8])
def test_accumulation_in_a_plain_loop(cuts):
    ids = tokens(8, 12)
    whole, _ = backward(tiny(), {"input_ids": ids, "labels": ids})
    model = tiny()
    with attach(model, WEIGHT):
        for part in ids.chunk(cuts):
            (model(input_ids=part, labels=part).loss / cuts).backward()
    assert greatest_difference(gradients(model), whole) < 1e-7 / cuts**0.5  # the cross-entropy itself is float32
    assert mean_residual(gradients(model), whole) < 1e-8


# ---- checkpointing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "bloom", "opt"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(family, use_reentrant):
    batch = {"input_ids": tokens(), "labels": tokens()}
    torch.manual_seed(5)
    plain, value = backward(tiny(family), batch)
    model = tiny(family)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    torch.manual_seed(5)
    checkpointed, same = backward(model, batch)
    assert same == value
    assert greatest_difference(checkpointed, plain) < 1e-14
    assert mean_residual(checkpointed, plain) < 1e-14


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_with_dropout(use_reentrant):
    batch = {"input_ids": tokens(), "labels": tokens()}
    torch.manual_seed(5)
    plain, value = backward(tiny("gpt2", **DROPOUT), batch)
    model = tiny("gpt2", **DROPOUT)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    torch.manual_seed(5)
    checkpointed, same = backward(model, batch)
    assert same == value
    assert greatest_difference(checkpointed, plain) < 1e-14


# ---- compile -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "impl"),
    [
        ("llama", "chunked"),
        ("qwen3", "reference"),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in (("llama", "reference"), ("qwen3", "chunked"), ("olmo2", "reference"), ("olmo2", "chunked"))
        ),
    ],
)
def test_compiled_in_one_graph(family, impl):
    torch._dynamo.reset()
    batch = {"input_ids": tokens(), "labels": tokens()}
    if impl == "chunked":  # a compiled graph cannot look whether an integer mask numbers documents; the reference looks
        batch["attention_mask"] = torch.ones(4, 12, dtype=torch.long)
    plain, value = backward(tiny(family), batch, impl=impl)
    model = tiny(family)
    with attach(model, WEIGHT, impl=impl) as handle:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for _ in range(3):
            model.zero_grad()
            compiled(**batch).loss.backward()
        logged = handle.pop()
        assert logged["dispersion"] == pytest.approx(value, abs=1e-6)
    assert greatest_difference(gradients(model), plain) < 1e-12
    assert mean_residual(gradients(model), plain) < 1e-12


def test_a_moving_weight_does_not_recompile():
    torch._dynamo.reset()
    ids = tokens()
    model = tiny()
    count = torch._dynamo.testing.CompileCounterWithBackend("eager")
    with attach(model, WEIGHT, schedule=WeightSchedule(kind="cosine"), impl="reference") as handle:
        compiled = torch.compile(model, backend=count)
        frames = []
        for step in range(12):
            handle.set_progress(step, 20)
            compiled(input_ids=ids, labels=ids).loss.backward()
            if step % 4 == 3:
                handle.pop()
            frames.append(count.frame_count)
    assert frames[-1] == frames[3]


def test_compiled_blocks():
    torch._dynamo.reset()
    batch = {"input_ids": tokens(), "labels": tokens()}
    plain, _ = backward(tiny(), batch)
    model = tiny()
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")
    assert greatest_difference(backward(model, batch)[0], plain) < 1e-12


@pytest.mark.parametrize("tool", [attach, pytest.param(attach_trainer, marks=pytest.mark.slow)])
def test_compiled_in_the_trainer(tmp_path, tool):
    torch._dynamo.reset()
    found = []
    for settings in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        data = examples([12] * 8)
        trainer = make_trainer(
            tmp_path, max_steps=2, data=data, per_device_train_batch_size=2, gradient_accumulation_steps=2, **settings
        )
        handle = tool(trainer if tool is attach_trainer else trainer.model, WEIGHT)
        trainer.train()
        handle.detach()
        found.append(weights(trainer.model))
    torch._dynamo.reset()
    assert greatest_difference(found[0], found[1]) < 1e-6
    assert mean_residual(found[0], found[1]) < 1e-7


# ---- LoRA ----------------------------------------------------------------------------------------------------------


def lora(model, **settings):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **settings)
    wrapped = peft.get_peft_model(model, config).double()
    generator = torch.Generator().manual_seed(2)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:  # zero at the start, which would hide a missing gradient
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.1
    return wrapped


@pytest.mark.parametrize("order", ["after wrapping", "before wrapping"])
@pytest.mark.parametrize("layers", [None, [1]])
def test_lora_gradients_are_those_of_the_merged_model(order, layers):
    """dL/dA and dL/dB follow from dL/dW of the merged model, which is attached as any other."""
    batch = {"input_ids": tokens(), "labels": tokens()}
    model = tiny()
    handle = attach(model, WEIGHT) if order == "before wrapping" else None
    wrapped = lora(model, **({} if layers is None else {"layers_to_transform": layers}))
    handle = handle or attach(wrapped, WEIGHT)
    wrapped(**batch).loss.backward()
    value = float(handle.last)
    handle.detach()
    found = gradients(wrapped)
    adapters = {n: p.detach().clone() for n, p in wrapped.named_parameters() if "lora_" in n}
    merged = wrapped.merge_and_unload()
    merged.requires_grad_(True)
    whole, merged_value = backward(merged, batch)
    assert value == pytest.approx(merged_value, abs=1e-12)
    assert len(found) == (12 if layers is None else 4)
    for name, gradient in found.items():
        weight = whole[name.removeprefix("base_model.model.").split(".lora_")[0] + ".weight"]
        if "lora_A" in name:
            expected = adapters[name.replace("lora_A", "lora_B")].T @ weight
        else:
            expected = weight @ adapters[name.replace("lora_B", "lora_A")].T
        assert (gradient - expected * 8 / 2).abs().max() < 1e-10  # lora_alpha / r


# ---- masks and packing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_padded_is_unpadded(side, impl):
    ids = tokens(4, 9)
    plain, value = backward(tiny(), {"input_ids": ids, "labels": ids}, impl=impl)
    padding = torch.zeros(4, 3, dtype=torch.long)
    join = [ids, padding] if side == "right" else [padding, ids]
    padded = torch.cat(join, 1)
    mask = torch.cat([torch.ones_like(part) if part is ids else part for part in join], 1)
    labels = padded.masked_fill(mask == 0, -100)
    labels[:, 12 - 9 if side == "left" else 0] = -100  # the first token is not predicted, from padding neither
    batch = {"input_ids": padded, "attention_mask": mask, "labels": labels}
    # real tokens at their own positions, as generation does with left padding
    batch["position_ids"] = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    found, same = backward(tiny(), batch, impl=impl)
    assert same == pytest.approx(value, abs=1e-12)
    # the float32 cross-entropy of transformers is the coarser of the two terms
    assert greatest_difference(found, plain) < 1e-7
    assert mean_residual(found, plain) < 1e-7


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_packed_is_separate(impl):
    """A model without attention between documents: the loss of the packed row is that of the separate rows."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed = torch.nn.Embedding(64, 16)
            self.layers = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(2))
            self.double()

        def forward(self, input_ids, position_ids=None, attention_mask=None):
            x = self.embed(input_ids)
            for layer in self.layers:
                x = x + torch.tanh(layer(x))
            return types.SimpleNamespace(loss=x.sum() * 0)

    ids = tokens(1, 12)
    lengths = [5, 4, 3]
    packed, value = backward(
        Model(), {"input_ids": ids, "position_ids": torch.cat([torch.arange(n) for n in lengths])[None]},
        impl=impl, blocks="layers",
    )  # fmt: skip
    padded = torch.zeros(3, 5, dtype=torch.long)
    mask = torch.zeros(3, 5, dtype=torch.long)
    for row, part in enumerate(ids[0].split(lengths)):
        padded[row, : len(part)], mask[row, : len(part)] = part, 1
    separate, same = backward(Model(), {"input_ids": padded, "attention_mask": mask}, impl=impl, blocks="layers")
    assert same == pytest.approx(value, abs=1e-14)
    assert greatest_difference(packed, separate) < 1e-14
    assert mean_residual(packed, separate) < 1e-13


# ---- resume --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs", ["all", "grouped"])
def test_resumed_is_uninterrupted(pairs):
    settings = {"schedule": WeightSchedule(kind="cosine", warmup=0.2), "pairs": pairs, "group_size": 4}
    whole = train(tiny("gpt2", **DROPOUT), 8, 0.5, **settings)
    resumed = train(tiny("gpt2", **DROPOUT), 8, 0.5, resume_at=5, **settings)
    assert resumed[0] == whole[0]
    assert greatest_difference(resumed[1], whole[1]) == 0
    assert torch.equal(resumed[2], whole[2])


@pytest.mark.parametrize("pairs", ["all", "subset"])
def test_resumed_trainer_is_uninterrupted(tmp_path, pairs):
    def run(resume=None, **settings):
        model = tiny("gpt2", dtype=torch.float32, seed=0 if resume is None else 1, **DROPOUT)
        trainer = make_trainer(
            tmp_path,
            model,
            data=examples([12, 5, 9, 2, 7, 12, 3, 4]),
            max_steps=6,
            optim="adamw_torch",
            learning_rate=1e-2,
            save_strategy="steps",
            save_steps=4,
            gradient_accumulation_steps=2,
        )
        attach_trainer(trainer, 0.5, schedule=WeightSchedule(kind="linear"), pairs=pairs, subset_size=4)
        trainer.train(resume_from_checkpoint=resume)
        return [row["loss"] for row in trainer.state.log_history if "loss" in row], weights(trainer.model)

    whole, resumed = run(), run(resume=str(tmp_path / "checkpoint-4"))
    assert resumed[0] == whole[0]
    assert greatest_difference(resumed[1], whole[1]) == 0


# ---- chunked = reference -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [1.0, 0.3])
def test_fifty_steps_under_both_implementations(tau):
    """Lock-step: the same start and data, compared at every step; rounding differs, training must not."""
    reference = train(tiny("gpt2"), 50, WEIGHT, impl="reference", tau=tau)
    chunked = train(tiny("gpt2"), 50, WEIGHT, impl="chunked", tau=tau)
    differences = torch.tensor(reference[0]) - torch.tensor(chunked[0])
    assert differences.abs().max() < 1e-6
    assert abs(differences.mean()) < 1e-7
    # AdamW's first steps have the size of the learning rate however small a gradient is, so rounding grows there
    assert greatest_difference(reference[1], chunked[1]) < 1e-4
    assert mean_residual(reference[1], chunked[1]) < 1e-7


# ---- nothing global is patched -------------------------------------------------------------------------------------


def fingerprint() -> dict[str, dict[str, int]]:
    """Identity of everything defined in the modules of transformers, torch.nn and accelerate that are loaded."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.startswith(("transformers.", "torch.nn.", "accelerate.")) and isinstance(module, types.ModuleType):
            for key, value in list(vars(module).items()):
                if isinstance(value, type):
                    found[f"{name}.{key}"] = {k: id(v) for k, v in vars(value).items() if callable(v)}
                elif callable(value):
                    found[f"{name}.{key}"] = {"": id(value)}
    return found


def test_nothing_global_is_patched(tmp_path):
    def use():
        trainer = make_trainer(tmp_path, tiny("llama"), max_steps=2)
        handle = attach_trainer(trainer)
        trainer.train()
        return trainer, handle

    use()[1].detach()  # loads every module there is to load
    before = fingerprint()
    assert len(before) > 1000
    handle = use()[1]
    attached = fingerprint()
    handle.detach()
    after = fingerprint()
    for now in (attached, after):
        assert {key for key in before if now.get(key) != before[key]} == set()
