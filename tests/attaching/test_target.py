"""The controller behind ``target=``: what it holds, how it moves, its state, its input."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from attach_helpers import block_outputs, dispersion, gradients, greatest_difference, tiny, tokens
from target_oracle import by_the_book, mean_cosines
from trainer_helpers import examples, make_trainer, pad, weights

from decondense import DispersionCallback, attach, attach_trainer, measure
from decondense.atlas import Entry, references
from decondense.attaching import AttachError
from decondense.attaching.target import HIGHEST, LOWEST, RATE, Controller
from decondense.blocks import find_blocks
from decondense.config import ArmConfig, ConfigError, DispersionConfig, WeightSchedule
from decondense.config.titan import Dispersion

KEYS = ("block_01", "block_02", "block_03")
LENGTHS = [12, 5, 9, 2, 7, 12, 1, 4]


def zipf(step: int, rows: int = 16, length: int = 16) -> torch.Tensor:
    """Independent tokens by Zipf's law: a model learns their frequencies, and its states condense (cosine .99)."""
    share = 1 / torch.arange(1, 62, dtype=torch.float64)
    generator = torch.Generator().manual_seed(step)
    return 3 + torch.multinomial(share, rows * length, True, generator=generator).view(rows, length)


def at_rest(family: str):
    """A float32 model; positions are not learned, since with them GPT-2 spreads its states without any help."""
    model = tiny(family, dtype=torch.float32)
    if family == "gpt2":
        model.transformer.wpe.weight.requires_grad_(False).zero_()
    return model


def train(model, target, steps, *, lr=3e-3, layers="last", weight=0.1, data=zipf, **settings):
    """Adam, a log each step: values by key."""
    optimizer, rows = torch.optim.AdamW(model.parameters(), lr=lr), []
    with attach(model, weight, layers, target=target, **settings) as handle:
        for step in range(steps):
            handle.set_progress(step)
            ids = data(step)
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            handle.end_step()
            rows.append(handle.pop())
    return {key: np.array([row[key] for row in rows]) for key in rows[0]}


# ---- what it holds ---------------------------------------------------------------------------------------------------


STREAMS = 3
"""Independent data of one run each: a run's own path also depends on how the processor rounds."""


def held(family: str, target: float, steps: int) -> np.ndarray:
    """Mean cosines of 40 steps each, over the target, ``[streams, steps / 40]``."""
    found = []
    for stream in range(STREAMS):
        run = train(at_rest(family), target, steps, data=lambda step, s=stream: zipf(step + 1000 * s))
        cosine = run["dispersion_cosine"]
        assert cosine[:30].max() > 0.8
        found.append(cosine.reshape(-1, 40).mean(axis=1) / target)
    return np.array(found)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "target"), [("llama", 0.1), ("qwen3", 0.1), ("llama", 0.05)])
def test_the_target_is_reached_and_held_without_oscillation(family, target):
    """A cosine that would be .99 comes within 5 % of its target and stays.

    The criterion, in each of three streams of data: over the last 160 of 400 steps the mean cosine is within 5 % of the
    target, and in each 40 of them within 10 %; and the cosine, which comes from above, has in no 40 steps been more
    than 15 % below the target. A GPT-2 is no case of this: once kept from condensing it stays below its target by
    itself, as a test below shows.
    """
    found = held(family, target, 400)
    assert found[:, -4:].mean(axis=1) == pytest.approx(1, abs=0.05)
    assert found[:, -4:] == pytest.approx(np.ones((STREAMS, 4)), abs=0.1)
    assert found.min() > 0.85


@pytest.mark.slow
def test_without_its_second_term_the_rule_oscillates(monkeypatch):
    """The same criterion tells the rule from the integral term alone, which ends at half the target and below."""
    monkeypatch.setattr("decondense.attaching.target.BRAKE", 0.0)
    assert (held("llama", 0.1, 240).min(axis=1) < 0.6).all()


@pytest.mark.slow
def test_a_model_that_stays_below_without_help_is_let_go():
    """A GPT-2 that was kept from condensing at the start does not condense later.

    The criterion, in each of three streams of data: over the last 200 of 400 steps the mean cosine is below the target,
    no 40 of them are above it by more than 15 %, and the weight ends below a third of its start, having been above ten
    times its start.
    """
    for stream in range(STREAMS):
        found = train(at_rest("gpt2"), 0.1, 400, data=lambda step, s=stream: zipf(step + 1000 * s))
        cosine = found["dispersion_cosine"][200:]
        assert cosine.mean() < 0.1
        assert cosine.reshape(5, 40).mean(axis=1).max() < 0.115
        assert found["dispersion_weight"].max() > 1
        assert found["dispersion_weight"][-40:].mean() < 0.033


def test_a_layer_below_its_target_is_let_go():
    found = train(tiny(), 0.9, 40, lr=0.0, layers="all", data=lambda step: tokens(8, 12, step))
    for key in KEYS:
        assert found[f"dispersion_cosine/{key}"].max() < 0.4
        # the logarithm falls by RATE times the error, which is between -1 and -0.5
        weight = found[f"dispersion_weight/{key}"]
        assert weight[0] * math.exp(-RATE * 39) < weight[-1] < weight[0] * math.exp(-0.5 * RATE * 39)


# ---- the rule --------------------------------------------------------------------------------------------------------


def test_weights_follow_the_rule_between_their_ends():
    generator = np.random.default_rng(0)
    targets, steps = [0.3, 0.0, -0.05], 400
    drift = np.concatenate([np.full(200, 1.0), np.full(200, -1.0)])[:, None]
    cosines = np.clip(targets + 0.1 * drift + 0.05 * generator.standard_normal((steps, 3)), -1, 1)
    cosines[17] = np.nan  # diverged: the weights stand still
    controller = Controller(0.1, targets, torch.device("cpu"))
    found = [controller.log_L.exp().numpy().copy()]
    for c in cosines:
        controller.ended = False
        controller._pending += torch.tensor([*(5 * c), 5.0])
        controller.end_step()
        controller.end_step()  # once a step
        found.append(controller.log_L.exp().numpy().copy())
    expected = by_the_book(0.1, targets, cosines)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert expected.max() == pytest.approx(0.1 * HIGHEST)
    assert expected.min() == pytest.approx(0.1 * LOWEST)


@pytest.mark.parametrize("cut", [(8, 1), (2, 4), (1, 8)])
@pytest.mark.parametrize("tie", ["trainer", "loop"])
def test_one_update_a_step_from_all_micro_batches(tmp_path, cut, tie):
    """Weights after one step are the rule's of the mean cosine over all sequences, however the batch is cut."""
    size, micro_batches = cut
    model = tiny()
    batch = pad(examples(LENGTHS))
    kept, hooks = block_outputs(list(model.model.layers))
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    for hook in hooks:
        hook.remove()
    cosines = mean_cosines(kept, LENGTHS)
    target = [0.02, 0.4, -0.01]
    if tie == "trainer":
        trainer = make_trainer(
            tmp_path, model, data=examples(LENGTHS), learning_rate=0.0, per_device_train_batch_size=size,
            gradient_accumulation_steps=micro_batches, max_steps=2, num_train_epochs=2,
        )  # fmt: skip
        handle = attach_trainer(trainer, 0.5, target=target)
        trainer.train()
        logged = trainer.state.log_history[1]
    else:
        handle = attach(model, 0.5, target=target)
        for step in range(2):
            handle.set_progress(step)
            for rows in range(0, 8, size):
                part = {name: value[rows : rows + size] for name, value in batch.items()}
                model(**part).loss.backward()
        handle.end_step()
        logged = handle.pop()
    expected = by_the_book(0.5, target, np.array([cosines] * 2))
    assert [logged[f"dispersion_weight/{key}"] for key in KEYS] == pytest.approx(expected[1], rel=1e-10)
    assert [logged[f"dispersion_cosine/{key}"] for key in KEYS] == pytest.approx(cosines, abs=1e-12)
    assert logged["dispersion_weight"] == pytest.approx(expected[1].mean())
    assert logged["dispersion_cosine"] == pytest.approx(np.mean(cosines))
    assert handle.weight == pytest.approx(expected[2].mean(), rel=1e-10)


@pytest.mark.parametrize("defer", [False, True])
def test_each_layer_has_its_own_weight_in_the_gradient(defer):
    model, ids = tiny(), tokens()
    handle = attach(model, 0.5, target=[0.9, 0.0, 0.03])
    for step in range(3):
        handle.set_progress(step)
        model(input_ids=ids, labels=ids).loss.backward()
    handle.set_progress(3)
    own = handle._controller.log_L.exp().tolist()
    assert np.ptp(np.log(own)) > 0.1
    model.zero_grad()
    handle.defer = defer
    loss = model(input_ids=ids, labels=ids).loss
    (loss + handle.weight * handle.take() if defer else loss).backward()
    found = gradients(model)
    handle.detach()
    model.zero_grad()
    kept, hooks = block_outputs(find_blocks(model).modules)
    loss = model(input_ids=ids, labels=ids).loss
    for hook in hooks:
        hook.remove()
    (loss + sum(weight * dispersion([z]) for weight, z in zip(own, kept, strict=True)) / 3).backward()
    assert greatest_difference(found, gradients(model)) < 1e-7  # transformers takes the cross-entropy in float32
    assert float(handle.last) == pytest.approx(dispersion(kept).item())


# ---- its state -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tie", [attach_trainer, DispersionCallback])
def test_a_resumed_run_is_uninterrupted(tmp_path, tie):
    def run(resume=None, target=0.01):
        model = tiny("gpt2", dtype=torch.float32, seed=0 if resume is None else 1, resid_pdrop=0.1)
        trainer = make_trainer(
            tmp_path, model, data=examples([12] * 8), max_steps=6, optim="adamw_torch", learning_rate=1e-2,
            save_strategy="steps", save_steps=4, gradient_accumulation_steps=2, per_device_train_batch_size=2,
        )  # fmt: skip
        settings = {"target": target, "pairs": "subset", "subset_size": 6}
        if tie is attach_trainer:
            attach_trainer(trainer, 0.5, **settings)
        else:
            trainer.add_callback(DispersionCallback(0.5, **settings))
        trainer.train(resume_from_checkpoint=resume)
        keys = ("loss", *(f"dispersion_{what}/{key}" for what in ("weight", "cosine") for key in KEYS))
        return [[row[key] for key in keys] for row in trainer.state.log_history if "loss" in row], weights(model)

    whole, resumed = run(), run(resume=str(tmp_path / "checkpoint-4"))
    assert resumed[0] == whole[0]
    assert len({row[1] for row in whole[0]}) == 6
    assert greatest_difference(resumed[1], whole[1]) == 0


@pytest.mark.parametrize("at", ["after the step", "before it ends", "amid its micro-batches"])
def test_the_state_goes_through_json(at):
    def steps(model, handle, optimizer, first, last):
        for step in range(first, last):
            handle.set_progress(step)
            for part in tokens(4, 12, step).split(2):
                model(input_ids=part, labels=part).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def begin():
        model = tiny("gpt2", dtype=torch.float32)
        return model, attach(model, 0.5, target=[0.3, 0.01, 0.01]), torch.optim.SGD(model.parameters(), lr=0.1)

    model, handle, optimizer = begin()
    steps(model, handle, optimizer, 0, 4)
    if at == "after the step":
        handle.end_step()
    saved = json.loads(json.dumps(handle.state_dict()))
    learned = {name: value.clone() for name, value in model.state_dict().items()}
    assert saved == json.loads(json.dumps(handle.state_dict()))  # asking changes nothing
    steps(model, handle, optimizer, 4, 6)
    again, other, optimizer = begin()
    again.load_state_dict(learned)
    other.load_state_dict(saved)
    if at == "amid its micro-batches":  # more of the same step
        for which in (handle, other):
            which.load_state_dict(saved)
            which.set_progress(3)
        ids = tokens(2, 12, 99)
        again.load_state_dict(model.state_dict())
        for which in (model, again):
            which(input_ids=ids, labels=ids).loss.backward()
    else:
        steps(again, other, optimizer, 4, 6)
    for which in (handle, other):
        which.end_step()
    assert other.state_dict() == handle.state_dict()
    assert greatest_difference(weights(again), weights(model)) == 0
    with pytest.raises(AttachError, match=r"has different settings \(target: saved \[0.3, 0.01, 0.01\], now 0.2\)"):
        attach(tiny("gpt2"), 0.5, target=0.2).load_state_dict(saved)


def test_a_profile_that_changed_is_noticed(tmp_path):
    model = tiny()
    path = measure(model, input_ids=tokens()).save(tmp_path / "profile")
    with attach(model, target=str(path)) as handle:
        saved = handle.state_dict()
    measure(tiny(seed=1), input_ids=tokens()).save(tmp_path / "profile")
    with pytest.raises(AttachError, match="the saved state has the targets"):
        attach(model, target=str(path)).load_state_dict(saved)


def test_restarting_forgets_the_weights():
    model, ids = tiny(), tokens()
    handle = attach(model, 0.5, target=0.0)
    for step in range(3):
        handle.set_progress(step)
        model(input_ids=ids, labels=ids).loss.backward()
    assert handle.weight > 0.5
    handle.restart()
    assert handle.weight == pytest.approx(0.5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_compiled_and_checkpointed_move_the_weights_alike(family):
    def run(how):
        torch._dynamo.reset()
        model = tiny(family)
        if how in (True, False):
            model.gradient_checkpointing_enable({"use_reentrant": how})
            model.enable_input_require_grads()
        handle = attach(model, 0.5, target=0.01, impl="reference")
        count = torch._dynamo.testing.CompileCounterWithBackend("eager")
        called, frames = torch.compile(model, backend=count) if how == "compiled" else model, []
        for step in range(5):
            handle.set_progress(step)
            ids = tokens(4, 12, step)
            called(input_ids=ids, labels=ids).loss.backward()
            frames.append(count.frame_count)
        assert frames[-1] == frames[2]  # a weight that moves does not compile again
        handle.end_step()
        return [*handle._controller.log_L.tolist(), *handle.pop().values()], gradients(model)

    plain, expected = run("plain")
    for how in ("compiled", True, False):
        found, gradient = run(how)
        assert found == pytest.approx(plain, rel=1e-6)
        assert greatest_difference(gradient, expected) < 1e-10


# ---- where targets come from -----------------------------------------------------------------------------------------


def targets_of(target, blocks=6, **settings):
    with attach(tiny(num_hidden_layers=blocks), target=target, **settings) as handle:
        return handle.targets


def test_a_profile_is_interpolated_over_relative_depth(tmp_path):
    model, ids = tiny("llama"), tokens(6, 12)
    path = measure(model, input_ids=ids).save(tmp_path / "profile")
    kept, hooks = block_outputs([*model.model.layers, model.model.norm])
    model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    first = mean_cosines([model.model.embed_tokens(ids)], [12] * 6)
    *before, after = mean_cosines(kept, [12] * 6)
    depth = np.arange(1, 7) / 6
    for name in (str(path), path, str(path.parent)):
        assert targets_of(name) == pytest.approx(np.interp(depth, np.arange(4) / 3, [*first, *before]), abs=1e-6)
    # the state after the final norm for the last layer alone
    normed = np.interp(1, np.arange(4) / 3, [*first, *before[:-1], after])
    found = targets_of(path, final_norm=True, embedding=True)
    assert found == pytest.approx(
        [*first, *np.interp(depth[:-1], np.arange(4) / 3, [*first, *before]), normed], abs=1e-6
    )
    # an entry of an atlas has one last state, and its cosines include the pairs of a token with itself
    entry = tmp_path / "entry.json"
    entry.write_text(Entry.read(path).to_json())
    assert targets_of(str(entry), layers=[0, 3]) == pytest.approx(
        np.interp(depth[[0, 3]], np.arange(4) / 3, [*first, *before]), abs=1e-6
    )
    assert targets_of(str(entry), layers="last", final_norm=True) == pytest.approx([after], abs=1e-6)
    with pytest.raises(
        AttachError, match="no state at the depth of block 5 before the final norm; attach with final_norm=True"
    ):
        targets_of(str(entry), layers=[4, 5])


def test_a_reference_gives_its_deep_half():
    [deep] = [entry.deep_half for entry in references() if entry.model == "stories260K"]
    assert targets_of("stories260k", layers="deep") == pytest.approx([(512 * deep - 1) / 511] * 3)
    with pytest.raises(
        AttachError, match="mean of the deep half only, which does not apply to block 1, block 2, block 3"
    ):
        targets_of("stories260K")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (1.01, "target 1.01 is not a mean cosine"),
        (-1.5, "target -1.5 is not a mean cosine"),
        (math.nan, "target nan is not a mean cosine"),
        ([0.1, math.inf, 0.1], "target inf is not a mean cosine"),
        ([], "target is empty"),
        ([0.1, 0.2], r"target has 2 values for 6 layers \(block 1, .*, block 6\)"),
        ("SmolLM2-135M", "no reference 'SmolLM2-135M'. Did you mean 'SmolLM2-135M-Instruct Q4_1'"),
        ("GPT2-xl", "target 'GPT2-xl': this reference has no mean cosine .* These have: SmolLM2-135M-Instruct Q4_1"),
        ("missing/profile.json", "no file missing/profile.json; expected profile.json"),
        ("profile.npz", "no file profile.json; expected profile.json"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "no reference 'HuggingFaceTB/SmolLM2-135M-Instruct'"),
    ],
)
def test_targets_that_are_none(target, message):
    with pytest.raises((AttachError, ConfigError), match=message):
        targets_of(target)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": 0.0}, "weight 0 cannot be adapted to a target"),
        ({"weight": -0.1}, "weight -0.1 cannot be adapted to a target"),
        ({"schedule": WeightSchedule(kind="linear")}, "schedule and target both set the weight"),
    ],
)
def test_what_does_not_go_with_a_target(settings, message):
    with pytest.raises(ConfigError, match=message):
        attach(tiny(), target=0.1, **settings)


def test_a_profile_without_its_first_tokens_is_refused(tmp_path):
    path = measure(tiny(), input_ids=tokens(), skip_tokens=2).save(tmp_path / "profile")
    with pytest.raises(AttachError, match="measured without the first 2 tokens"):
        targets_of(path)


def test_steps_must_be_known():
    model, ids = tiny(), tokens()
    with attach(model, target=0.1), pytest.raises(AttachError, match=r"call handle.set_progress\(step\) before each"):
        model(input_ids=ids, labels=ids)
    with (
        attach(model, schedule=WeightSchedule(kind="linear")) as handle,
        pytest.raises(AttachError, match="number of steps"),
    ):
        handle.set_progress(0)


@pytest.mark.parametrize("target", [None, 0.1, (0.1, 0.2), "profile.json"])
def test_the_flat_section_of_torchtitan_holds_it(target):
    config = DispersionConfig(target=target)
    assert Dispersion.of(config).config() == config


def test_a_negative_weight_gives_the_opposite_gradient():
    model, ids = tiny(), tokens()

    def gradient(weight):
        model.zero_grad()
        with attach(model, weight):
            model(input_ids=ids, labels=ids).loss.backward()
        return gradients(model)

    up, down, plain = gradient(0.5), gradient(-0.5), gradient(0.0)
    for name, value in plain.items():
        torch.testing.assert_close(up[name] + down[name], 2 * value, atol=1e-7, rtol=0)
    assert greatest_difference(up, plain) > 1e-4


# ---- forms that aim at cosines ---------------------------------------------------------------------------------------


def test_the_profile_form_has_a_target_for_each_layer():
    model, ids, targets = tiny(), tokens(), [0.1, 0.2, 0.3]
    with attach(model, 0.7, target=targets, form="profile", schedule=WeightSchedule(kind="linear")) as handle:
        handle.set_progress(1, 2)  # half of the weight
        model(input_ids=ids, labels=ids).loss.backward()
    found = gradients(model)
    model.zero_grad()
    kept, hooks = block_outputs(find_blocks(model).modules)
    loss = model(input_ids=ids, labels=ids).loss
    for hook in hooks:
        hook.remove()
    terms = []
    for z_BTD, target in zip(kept, targets, strict=True):
        unit = torch.nn.functional.normalize(z_BTD, dim=-1)
        cosine_BTT = (unit @ unit.mT)[:, ~torch.eye(12, dtype=torch.bool)]
        terms.append((cosine_BTT.mean(dim=1) - target).square().mean())
    (loss + 0.35 * torch.stack(terms).mean()).backward()
    assert greatest_difference(found, gradients(model)) < 1e-7
    with pytest.raises(ConfigError, match=r"target and loss.target_cosine set the same thing"):
        attach(model, target=0.1, form="profile", target_cosine=0.2)


@pytest.mark.parametrize("blocks", [2, 3, 7])
def test_gram_compares_with_the_teachers_state_at_the_same_depth(blocks):
    model, ids = tiny(), tokens()
    teacher = tiny("gpt2", num_hidden_layers=blocks, hidden_size=16, seed=3, resid_pdrop=0.5)
    before = torch.get_rng_state()
    with attach(model, 0.7, form="gram", teacher=teacher) as handle:
        model(input_ids=ids, labels=ids).loss.backward()
    assert torch.equal(before, torch.get_rng_state())
    assert teacher.training
    assert not gradients(teacher)
    found = gradients(model)
    model.zero_grad()
    own, hooks = block_outputs(find_blocks(model).modules)
    theirs, more = block_outputs(find_blocks(teacher).modules)
    loss = model(input_ids=ids, labels=ids).loss
    with torch.no_grad():
        teacher.eval()(input_ids=ids)
    for hook in (*hooks, *more):
        hook.remove()
    matched = {2: [0, 0, 1], 3: [0, 1, 2], 7: [1, 4, 6]}[blocks]  # 7/3 = 2.3, 14/3 = 4.7
    terms = []
    for z_BTD, place in zip(own, matched, strict=True):
        unit, other = (torch.nn.functional.normalize(x, dim=-1) for x in (z_BTD, theirs[place]))
        difference = (unit @ unit.mT - other @ other.mT)[:, ~torch.eye(12, dtype=torch.bool)]
        terms.append(difference.square().mean())
    (loss + 0.7 * torch.stack(terms).mean()).backward()
    assert greatest_difference(found, gradients(model)) < 1e-7
    assert float(handle.last) == pytest.approx(torch.stack(terms).mean().item())


@pytest.mark.parametrize("rows", [64, 64 + 1024, 64 + 1025, 4096])
def test_a_teacher_of_another_tokenizer_is_told_by_its_vocabulary(rows):
    """Models of one tokenizer pad their embeddings differently; their sizes are near each other all the same."""
    model = tiny(vocab_size=64)
    teacher = tiny(vocab_size=rows, seed=1)
    if rows <= 64 + 1024:
        with attach(model, form="gram", teacher=teacher):
            model(input_ids=tokens(), labels=tokens()).loss.backward()
    else:
        with pytest.raises(AttachError, match=f"teacher's embedding has {rows:,} rows and the model's has 64"):
            attach(model, form="gram", teacher=teacher)


def test_teachers_that_are_none():
    model = tiny()
    with pytest.raises(AttachError, match=r"form 'gram' needs a teacher: attach\(model, teacher=...\)"):
        attach(model, form="gram")
    with pytest.raises(AttachError, match="form 'angular' does not use a teacher"):
        attach(model, teacher=tiny(seed=1))
    with pytest.raises(AttachError, match="the teacher is the attached model"):
        attach(model, form="gram", teacher=model)
    with pytest.raises(ConfigError, match="form 'gram' follows a teacher; omit target"):
        attach(model, form="gram", teacher=tiny(seed=1), target=0.1)
    with pytest.raises(ConfigError, match="needs a teacher: add distillation to the same arm"):
        ArmConfig.parse({"name": "a", "dispersion": {"loss": {"form": "gram"}}}, where="study.yaml")


@pytest.mark.parametrize(("key", "value"), [("all_layers", None), ("all_layers", ...), ("mean_cosine_others", ...)])
def test_a_profile_that_lacks_what_a_target_needs_is_refused(tmp_path, key, value):
    path = measure(tiny(), input_ids=tokens()).save(tmp_path / "profile")
    document = json.loads(path.read_text())
    summary = document["summary"]
    if value is ...:
        del summary[key]
    else:
        summary[key] = value
    path.write_text(json.dumps(document))
    with pytest.raises(AttachError, match=r"lacks the mean cosines .* measure again"):
        attach(tiny(), target=str(path))
