from __future__ import annotations

import gc
import json

import pytest
import torch
from attach_helpers import block_outputs, dispersion, gradients, greatest_difference, mean_residual, tiny
from torch.nn import functional
from trainer_helpers import examples, make_trainer, pad, weights
from transformers import Trainer, TrainerCallback

from decondense import DispersionCallback, attach, attach_trainer
from decondense.attaching import AttachError, attached
from decondense.blocks import find_blocks
from decondense.config import DispersionConfig, WeightSchedule
from decondense.losses import FORMS

LENGTHS = [12, 5, 9, 2, 7, 12, 1, 4]
WEIGHT = 2.0


def expected_step(family="llama", lengths=LENGTHS, weight=WEIGHT) -> dict[str, torch.Tensor]:
    """Weights after one step of SGD on CE over all tokens + weight * mean over all sequences that have a pair."""
    model = tiny(family)
    batch = pad(examples(lengths))
    kept, hooks = block_outputs(list(model.model.layers))
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    for hook in hooks:
        hook.remove()
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
    sequences = [[(row, list(range(n))) for row, n in enumerate(lengths) if n > 1]]
    (loss + weight * dispersion(kept, sequences)).backward()
    return {name: value - 0.5 * gradients(model)[name] for name, value in weights(model).items()}


def trained(folder, *, weight=WEIGHT, form="angular", **settings):
    trainer = make_trainer(folder, data=examples(LENGTHS), **settings)
    handle = attach_trainer(trainer, weight, form=form)
    trainer.train()
    handle.detach()
    return weights(trainer.model), trainer


@pytest.mark.parametrize("cut", [(1, 8), (8, 1), (2, 4), (4, 2), (3, 3)])
def test_one_step_is_the_gradient_however_the_batch_is_cut(tmp_path, cut):
    size, steps = cut
    got, trainer = trained(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps)
    expected = expected_step()
    assert greatest_difference(got, expected) < 1e-7  # transformers divides in float32
    assert mean_residual(got, expected) < 1e-8
    logged = trainer.state.log_history[0]
    assert logged["dispersion_weight"] == WEIGHT
    assert sum(logged[f"dispersion/block_0{i}"] for i in (1, 2, 3)) / 3 == pytest.approx(logged["dispersion"])
    assert logged["loss"] - WEIGHT * logged["dispersion"] == pytest.approx(
        make_trainer(tmp_path, data=examples(LENGTHS), per_device_train_batch_size=8).train().training_loss, abs=1e-4
    )


def test_dispersion_gradient_is_counted_once(tmp_path):
    """The naive addition comes out (accumulation steps) times too large; the multiple here is 1.000."""
    with_it, _ = trained(tmp_path, gradient_accumulation_steps=8)
    without, _ = trained(tmp_path, gradient_accumulation_steps=8, weight=0.0)
    expected, plain = expected_step(), expected_step(weight=0.0)
    wanted = torch.cat([(expected[n] - plain[n]).flatten() for n in expected])
    found = torch.cat([(with_it[n] - without[n]).flatten() for n in expected])
    assert (found @ wanted / (wanted @ wanted)).item() == pytest.approx(1.0, abs=1e-6)


def test_the_last_incomplete_step_of_an_epoch(tmp_path):
    """8 sequences, 3 micro-batches a step: the third step has two, and is the mean over those two."""
    trainer = make_trainer(
        tmp_path, data=examples(LENGTHS), gradient_accumulation_steps=3, max_steps=3, learning_rate=0.0
    )
    lengths, steps = [], []
    trainer.model.register_forward_pre_hook(
        lambda m, a, inputs: lengths.append(inputs["attention_mask"].sum().item()), with_kwargs=True
    )
    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(lambda *_: steps.append((len(lengths), gradients(trainer.model))))
    attach_trainer(trainer, WEIGHT)
    trainer.train()
    assert [n for n, _ in steps] == [3, 6, 8]
    by_length = {len(row["input_ids"]): row for row in examples(LENGTHS)}
    last = lengths[6:]
    assert 12 not in last  # two of the sequences have this length; the others are told by theirs
    batch = pad([by_length[n] for n in last])
    model = tiny()
    kept, hooks = block_outputs(list(model.model.layers))
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    for hook in hooks:
        hook.remove()
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
    sequences = [[(row, list(range(n))) for row, n in enumerate(last) if n > 1]]
    (loss + WEIGHT * dispersion(kept, sequences)).backward()
    assert greatest_difference(steps[2][1], gradients(model)) < 1e-6


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("cut", [(8, 1), (2, 4), (1, 8)])
def test_attached_inside_the_model_the_share_of_tokens_is_exact_for_equal_lengths(tmp_path, family, cut):
    """Models without loss_type (GPT-2) and masked-LM models have their labels counted unshifted by the Trainer."""
    data = examples([12] * 8)
    found = []
    for weight in (WEIGHT, 0.0):
        size, steps = cut
        trainer = make_trainer(
            tmp_path, tiny(family), data=data, per_device_train_batch_size=size, gradient_accumulation_steps=steps
        )
        with attach(trainer.model, weight):
            trainer.train()
        found.append(weights(trainer.model))
    model = tiny(family)
    kept, hooks = block_outputs(find_blocks(model).modules)
    batch = pad(data)
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    for hook in hooks:
        hook.remove()
    (WEIGHT * dispersion(kept)).backward()
    part = {name: found[0][name] - found[1][name] for name in gradients(model)}
    expected = {name: -0.5 * gradient for name, gradient in gradients(model).items()}
    assert greatest_difference(part, expected) < 1e-6
    assert mean_residual(part, expected) < 1e-6


@pytest.mark.parametrize("cut", [(8, 1), (2, 4)])
def test_label_smoothing(tmp_path, cut):
    """Trainer takes the labels out of the model, which then returns no loss; the dispersion part stays what it is."""
    size, steps = cut
    settings = {
        "label_smoothing_factor": 0.1,
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": steps,
    }
    with_it, _ = trained(tmp_path, **settings)
    without, _ = trained(tmp_path, weight=0.0, **settings)
    hard, soft = expected_step(), expected_step(weight=0.0)
    part = {name: with_it[name] - without[name] for name in hard}
    assert greatest_difference(part, {name: hard[name] - soft[name] for name in part}) < 1e-7


@pytest.mark.parametrize("form", sorted(name for name, info in FORMS.items() if not info.teacher))
def test_every_form_trains(tmp_path, form):
    """Ragged sequences, one of them without a pair: each form counts them as the trainer's tie does."""
    got, trainer = trained(
        tmp_path, form=form, weight=0.1, model=tiny(dtype=torch.float32), gradient_accumulation_steps=4
    )
    assert torch.isfinite(torch.tensor(trainer.state.log_history[0]["dispersion"]))
    assert all(torch.isfinite(value).all() for value in got.values())


@pytest.mark.parametrize("cut", [(1, 8), (2, 4), (3, 3)])
def test_a_model_whose_loss_the_trainer_divides_by_the_accumulation_steps(tmp_path, cut):
    size, steps = cut
    found = []
    for weight in (WEIGHT, 0.0):
        model = tiny()
        model.accepts_loss_kwargs = False
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        found.append(trained(tmp_path, model=model, weight=weight, **settings)[0])
    hard, soft = expected_step(), expected_step(weight=0.0)
    part = {name: found[0][name] - found[1][name] for name in hard}
    assert greatest_difference(part, {name: hard[name] - soft[name] for name in part}) < 1e-7


def test_compute_loss_func(tmp_path):
    def own_loss(outputs, labels, num_items_in_batch=None):
        total = functional.cross_entropy(
            outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
        )
        return total / num_items_in_batch

    got, _ = trained(tmp_path, loss_func=own_loss, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert greatest_difference(got, expected_step()) < 1e-7


def test_checkpointing_in_the_trainer(tmp_path):
    for reentrant in (True, False):
        got, _ = trained(
            tmp_path,
            gradient_accumulation_steps=4,
            per_device_train_batch_size=2,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        )
        assert greatest_difference(got, expected_step()) < 1e-7


def test_evaluation_is_untouched(tmp_path):
    data = examples([12, 6, 9, 3])
    losses = []
    for weight in (None, 5.0):
        trainer = make_trainer(tmp_path, data=data, learning_rate=0.0, per_device_eval_batch_size=2)
        handle = None if weight is None else attach_trainer(trainer, weight)
        trainer.train()
        losses.append(trainer.evaluate(data)["eval_loss"])
        if handle is not None:
            assert handle.pop() == {}
            assert "dispersion" not in trainer.state.log_history[-1]
    assert losses[0] == losses[1]


def test_detaching_gives_the_trainer_back(tmp_path):
    trainer = make_trainer(tmp_path)
    before, callbacks = set(vars(trainer)), list(trainer.callback_handler.callbacks)
    handle = attach_trainer(trainer)
    with pytest.raises(AttachError, match="already"):
        attach_trainer(trainer)
    handle.detach()
    assert set(vars(trainer)) == before
    assert trainer.callback_handler.callbacks == callbacks
    assert trainer.compute_loss.__func__ is type(trainer).compute_loss
    assert attached(trainer.model) is None


def test_a_trainer_with_its_own_method_gets_it_back(tmp_path):
    trainer = make_trainer(tmp_path)
    own = trainer.log = lambda logs, *a: None
    attach_trainer(trainer).detach()
    assert trainer.log is own


def test_the_schedule_follows_the_trainer(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=4, learning_rate=0.0)
    config = DispersionConfig(weight=1.0, schedule=WeightSchedule(kind="linear", until=0.5))
    attach_trainer(trainer, config=config)
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert [row.get("dispersion_weight") for row in logged] == [1.0, 0.5, None, None]


# ---- cross_entropy in the log ----------------------------------------------------------------------------------------


def smoothed(outputs, labels, num_items_in_batch=None):
    """A loss of the user's own, summed over tokens."""
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum", label_smoothing=0.2) / (
        num_items_in_batch
    )


CROSS_ENTROPY_CASES = {
    "one micro-batch": {"per_device_train_batch_size": 4},
    "three micro-batches, the last step has two": {"gradient_accumulation_steps": 3, "max_steps": 3},
    "logged every other step": {"per_device_train_batch_size": 2, "max_steps": 4, "logging_steps": 2},
    "first step too": {"max_steps": 5, "logging_steps": 3, "logging_first_step": True},
    "not by tokens": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "own_divisor": True},
    "label smoothing": {"gradient_accumulation_steps": 4, "label_smoothing_factor": 0.1},
    "own loss": {"gradient_accumulation_steps": 4, "loss_func": smoothed},
}


@pytest.mark.parametrize(
    ("tie", "case"),
    [("trainer", case) for case in CROSS_ENTROPY_CASES]
    # the callback refuses the last two: the model returns no loss
    + [("callback", case) for case in list(CROSS_ENTROPY_CASES)[:-2]],
)
def test_cross_entropy_is_the_loss_of_a_run_without_the_term(tmp_path, tie, case):
    settings = {"learning_rate": 0.0, "data": examples(LENGTHS), **CROSS_ENTROPY_CASES[case]}
    own_divisor = settings.pop("own_divisor", False)
    logged = []
    for attached_too in (False, True):
        model = tiny()
        if own_divisor:
            model.accepts_loss_kwargs = False
        trainer = make_trainer(tmp_path, model, **settings)
        if attached_too and tie == "trainer":
            attach_trainer(trainer, WEIGHT)
        elif attached_too:
            trainer.add_callback(DispersionCallback(WEIGHT))
        trainer.train()
        logged.append([row for row in trainer.state.log_history if "loss" in row])
    plain, watched = logged
    assert [row["cross_entropy"] for row in watched] == pytest.approx([row["loss"] for row in plain], abs=1e-6)
    assert all(abs(row["loss"] - row["cross_entropy"]) > 0.1 for row in watched)


@pytest.mark.parametrize("tie", ["trainer", "callback"])
def test_cross_entropy_is_logged_when_nothing_is_added(tmp_path, tie):
    """At weight 0, and after the schedule has come to 0."""
    for weight, schedule in ((0.0, {}), (1.0, {"kind": "linear", "until": 0.5})):
        trainer = make_trainer(tmp_path, max_steps=4, learning_rate=0.0)
        config = DispersionConfig(weight=weight, schedule=WeightSchedule(**schedule))
        if tie == "trainer":
            attach_trainer(trainer, config=config)
        else:
            trainer.add_callback(DispersionCallback(config=config))
        trainer.train()
        logged = [row for row in trainer.state.log_history if "loss" in row]
        assert [row["cross_entropy"] for row in logged[2:]] == pytest.approx([row["loss"] for row in logged[2:]])


# ---- runs that start again -------------------------------------------------------------------------------------------


class InOrder(Trainer):
    """Data in the order of the data set, whatever was drawn before."""

    def _get_train_sampler(self, *arguments):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Steps(TrainerCallback):
    """Gradients and number of hooks at each optimizer step of the last attempt."""

    def on_train_begin(self, args, state, control, **keywords):
        self.gradients, self.hooks = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **keywords):
        self.gradients.append(gradients(model))
        modules = list(model.modules())
        self.hooks.append(sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules))


def run_out_of_memory(model, most_rows, where, after):
    """Raise torch's error in the forward or the backward of batches that are too large, from a certain one on."""
    calls = []

    def refuse(*_):
        raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")

    def hook(module, arguments, output):
        state = output[0] if isinstance(output, tuple) else output
        calls.append(len(state))
        if len(state) > most_rows and len(calls) > after:
            if where == "forward":
                refuse()
            state.register_hook(refuse)

    model.model.layers[1].register_forward_hook(hook)


@pytest.fixture
def quick_collections():
    """Accelerate collects garbage at every start; objects of other tests need not be looked at."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("tie", ["trainer", "callback"])
@pytest.mark.parametrize(("where", "pairs"), [("forward", "subset"), ("backward", "all")])
@pytest.mark.usefixtures("quick_collections")
def test_a_run_that_finds_its_batch_size_equals_one_that_knew_it(tmp_path, tie, where, pairs):
    """Batches of 7, 6 and 5 do not fit, which shows after two micro-batches."""
    lengths = [12, 5, 9, 3, 7, 12, 4, 8] * 2 if tie == "trainer" else [12] * 16
    runs = []
    for size, find in ((4, False), (7, True)):
        model, steps = tiny(), Steps()
        run_out_of_memory(model, 4, where, after=2)
        trainer = make_trainer(
            tmp_path,
            model,
            cls=InOrder,
            data=examples(lengths),
            per_device_train_batch_size=size,
            auto_find_batch_size=find,
            gradient_accumulation_steps=2,
            max_steps=-1,
            num_train_epochs=2,
            logging_steps=2,
            learning_rate=0.0,
        )
        config = DispersionConfig.parse(
            {
                "weight": WEIGHT,
                "schedule": {"kind": "linear"},
                "gradient_ratio_every": 2,
                "loss": {"pairs": pairs, **({"subset_size": 3} if pairs == "subset" else {})},
            },
            where="test",
        )
        if tie == "trainer":
            attach_trainer(trainer, config=config)
        else:
            trainer.add_callback(DispersionCallback(config=config))
        trainer.add_callback(steps)
        trainer.train()
        runs.append((trainer.state.log_history, steps))
    (knew, its), (found, theirs) = runs
    assert len(found) == len(knew) == 3
    for before, after in zip(knew[:-1], found[:-1], strict=True):
        assert after == pytest.approx(before, abs=1e-9)
    assert [row["dispersion_weight"] for row in found[:-1]] == pytest.approx([WEIGHT * 0.75, WEIGHT * 0.25])
    assert theirs.hooks == its.hooks
    assert len(theirs.gradients) == len(its.gradients) == 4
    for before, after in zip(its.gradients, theirs.gradients, strict=True):
        assert greatest_difference(after, before) < 1e-12


@pytest.mark.parametrize("tie", ["trainer", "callback"])
def test_training_twice_logs_each_run_alone(tmp_path, tie):
    trainer = make_trainer(tmp_path, cls=InOrder, max_steps=3, logging_steps=2, learning_rate=0.0)
    if tie == "trainer":
        attach_trainer(trainer, WEIGHT)
    else:
        trainer.add_callback(DispersionCallback(WEIGHT))
    logged = []
    for _ in range(2):  # the third step is not logged: the second run must not count it
        trainer.train()
        logged.append([row for row in trainer.state.log_history if "loss" in row])
    assert len(logged[0]) == len(logged[1]) == 1
    assert logged[1][0] == pytest.approx(logged[0][0])


def test_gradient_ratio_in_the_log(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=4, gradient_accumulation_steps=2, learning_rate=0.0)
    attach_trainer(trainer, 0.3, gradient_ratio_every=2)
    trainer.train()
    logged = [row.get("dispersion_gradient_ratio") for row in trainer.state.log_history if "loss" in row]
    assert [value is not None for value in logged] == [True, False, True, False]
    assert all(0 < value < 1 for value in logged[::2])


def test_checkpoints_keep_the_settings_and_a_resume_notices_others(tmp_path):
    def make(**settings):
        return make_trainer(
            tmp_path, max_steps=4, save_strategy="steps", save_steps=2, data=examples(LENGTHS), **settings
        )

    trainer = make()
    attach_trainer(trainer, 0.3, schedule=WeightSchedule(kind="cosine"))
    trainer.train()
    whole = weights(trainer.model)
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    saved = state["stateful_callbacks"]["DispersionState"]["attributes"]["saved"]
    assert saved["config"]["weight"] == 0.3
    assert saved["config"]["schedule"]["kind"] == "cosine"

    for restore in (False, True):  # the Trainer can rebuild callbacks from the checkpoint; nothing changes
        resumed = make(restore_callback_states_from_checkpoint=restore)
        attach_trainer(resumed, 0.3, schedule=WeightSchedule(kind="cosine"))
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert greatest_difference(weights(resumed.model), whole) == 0

    other = make()
    attach_trainer(other, 0.4, schedule=WeightSchedule(kind="cosine"))
    with pytest.warns(UserWarning, match="differs from that of the checkpoint in these settings: weight"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_trainer_that_runs_the_model_twice_is_refused(tmp_path):
    from transformers import Trainer

    class Twice(Trainer):
        def compute_loss(self, model, inputs, **keywords):
            return super().compute_loss(model, inputs, **keywords) + super().compute_loss(model, inputs, **keywords)

    trainer = make_trainer(tmp_path, cls=Twice)
    attach_trainer(trainer)
    with pytest.raises(AttachError, match="two training forwards"):
        trainer.train()


def test_a_trainer_whose_model_is_replaced_is_noticed(tmp_path):
    trainer = make_trainer(tmp_path)
    attach_trainer(trainer)
    trainer.model = trainer.model_wrapped = tiny(seed=1)
    with pytest.raises(AttachError, match="without running the model"):
        trainer.train()


def test_a_trainer_that_changes_its_batches_is_noticed(tmp_path):
    from transformers import Trainer

    class Cutting(Trainer):
        def compute_loss(self, model, inputs, **keywords):
            return super().compute_loss(model, {k: v[:1] for k, v in inputs.items()}, **keywords)

    trainer = make_trainer(tmp_path, cls=Cutting, per_device_train_batch_size=4, data=examples([12, 12, 12, 12]))
    attach_trainer(trainer)
    with pytest.raises(AttachError, match="held 4 sequences, but the model saw 1"):
        trainer.train()


def test_what_is_no_trainer_is_refused():
    with pytest.raises(AttachError, match=r"use attach\(model\)"):
        attach_trainer(object())


def test_parallelism_that_cuts_sequences_is_refused(tmp_path):
    class Parallelism:
        cp_enabled = True

    trainer = make_trainer(tmp_path)
    trainer.accelerator.state.parallelism_config = Parallelism()
    try:
        with pytest.raises(AttachError, match="CP parallelism"):
            attach_trainer(trainer)
    finally:
        trainer.accelerator.state.parallelism_config = None


# ---- the callback, for launchers that hide the trainer -------------------------------------------------------------


@pytest.mark.parametrize("cut", [(8, 1), (2, 4), (1, 8), (3, 3)])
def test_callback(tmp_path, cut):
    """Exact where all micro-batches have the same number of sequences, ragged lengths or not."""
    size, steps = cut
    lengths = [12, 5, 9, 2, 7, 12, 3, 4]
    data = examples(lengths) if size != 3 else examples([*lengths, 6])
    trainer = make_trainer(tmp_path, data=data, per_device_train_batch_size=size, gradient_accumulation_steps=steps)
    trainer.add_callback(DispersionCallback(WEIGHT))
    trainer.train()
    assert (
        greatest_difference(weights(trainer.model), expected_step(lengths=[len(d["input_ids"]) for d in data])) < 1e-7
    )
    assert "dispersion/block_03" in trainer.state.log_history[0]
    assert attached(trainer.model) is None


def test_callback_refuses_label_smoothing(tmp_path):
    trainer = make_trainer(tmp_path, label_smoothing_factor=0.1)
    trainer.add_callback(DispersionCallback())
    with pytest.raises(AttachError, match="label smoothing"):
        trainer.train()
