"""Frameworks on top of torch and transformers. Each test skips where its framework is not installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import types
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from attach_helpers import block_outputs, dispersion, gradients, greatest_difference, tiny, tokens
from target_oracle import by_the_book, mean_cosines
from trainer_helpers import PLAIN_SGD, examples, make_trainer, weights

from decondense import attach, attach_trainer
from decondense.attaching import AttachError, attached

WEIGHT = 2.0


# ---- TRL -----------------------------------------------------------------------------------------------------------


def sft_trainer(folder, model=None, lengths=(12, 5, 9, 2, 7, 12, 3, 4), dataset=None, **settings):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    defaults = {
        **PLAIN_SGD,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_length": 12,
        "loss_type": "nll",
    }
    rows = [row["input_ids"] for row in examples(list(lengths))] if dataset is None else [r.tolist() for r in dataset]
    data = Dataset.from_list([{"input_ids": row} for row in rows])
    return trl.SFTTrainer(
        tiny() if model is None else model,
        args=trl.SFTConfig(str(folder), **{**defaults, **settings}),
        train_dataset=data,
        processing_class=tokenizer(),
    )


def tokenizer():
    from tokenizers import Tokenizer as Fast
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 64)}}, unk_token="<pad>")
    return PreTrainedTokenizerFast(tokenizer_object=Fast(words), pad_token="<pad>", eos_token="</s>")


def dispersion_part(folder, *, part=True, model=None, **settings):
    """What the dispersion loss adds to one step of SGD, and the trainer."""
    found = []
    for weight in (WEIGHT, 0.0):
        trainer = sft_trainer(folder, model() if model else None, **settings)
        attach_trainer(trainer, weight)
        trainer.train()
        found.append((weights(trainer.model), trainer))
    return {name: found[0][0][name] - found[1][0][name] for name in found[0][0]}, found[0][1]


def expected_part(documents: list[list[int]]) -> dict[str, torch.Tensor]:
    """-0.5 x gradient of WEIGHT x the mean over the documents, each in a row of its own."""
    model = tiny()
    per_document = []
    for document in documents:
        if len(document) > 1:
            kept, hooks = block_outputs(list(model.model.layers))
            model(input_ids=torch.tensor([document]))
            per_document.append(dispersion(kept))
            for hook in hooks:
                hook.remove()
    (WEIGHT * torch.stack(per_document).mean()).backward()
    found = gradients(model)
    return {name: -0.5 * found.get(name, torch.zeros_like(p)) for name, p in model.named_parameters()}


def test_trl_ignores_the_models_loss_and_attach_notices(tmp_path):
    trainer = sft_trainer(tmp_path, max_steps=5)
    attach(trainer.model)
    with pytest.raises(AttachError, match=r"use attach_trainer\(trainer\)|no loss to add to"):
        trainer.train()


@pytest.mark.parametrize("cut", [(8, 1), (1, 8), (2, 4)])
def test_trl_one_step_however_it_is_cut(tmp_path, cut):
    size, steps = cut
    got, trainer = dispersion_part(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps)
    documents = [row["input_ids"] for row in examples([12, 5, 9, 2, 7, 12, 3, 4])]
    assert greatest_difference(got, expected_part(documents)) < 1e-7
    logged = trainer.state.log_history[0]
    assert "dispersion/block_03" in logged
    assert logged["loss"] - WEIGHT * logged["dispersion"] == pytest.approx(logged["cross_entropy"], abs=1e-5)


@pytest.mark.parametrize(
    "settings", [{"packing": True, "packing_strategy": "bfd"}, {"padding_free": True, "max_length": None}]
)
def test_trl_packed_documents_are_sequences(tmp_path, settings):
    """All documents of a packed row, each with its own pairs; without attention between them the parts add up."""
    trainer = sft_trainer(tmp_path, per_device_train_batch_size=8, **settings)
    seen = []

    def look(module, arguments, keywords):
        seen.append({key: value for key, value in keywords.items() if torch.is_tensor(value)})

    trainer.model.register_forward_pre_hook(look, with_kwargs=True)
    handle = attach_trainer(trainer, WEIGHT)
    trainer.train()
    assert len(seen) == 1
    assert "position_ids" in seen[0]
    starts = seen[0]["position_ids"] == 0
    assert starts.sum() == 8
    assert torch.isfinite(torch.tensor(trainer.state.log_history[0]["dispersion"]))
    # the value is the mean over the eight documents, whose states come out of the packed forward
    handle.detach()
    model = tiny()
    kept, hooks = block_outputs(list(model.model.layers))
    inputs = {k: v for k, v in seen[0].items() if k in ("input_ids", "position_ids", "attention_mask")}
    model(**inputs, use_cache=False)  # with a cache transformers would let the documents see each other
    for hook in hooks:
        hook.remove()
    documents = []
    for row in range(starts.shape[0]):
        first = [*starts[row].nonzero().flatten().tolist(), starts.shape[1]]
        documents += [(row, list(range(a, b))) for a, b in pairwise(first) if b - a > 1]
    mask = seen[0].get("attention_mask")
    if mask is not None:
        documents = [(row, [p for p in places if mask[row, p]]) for row, places in documents]
    assert trainer.state.log_history[0]["dispersion"] == pytest.approx(dispersion(kept, [documents]).item(), abs=1e-6)


def test_trl_with_lora_and_checkpointing(tmp_path):
    peft = pytest.importorskip("peft")

    def wrapped():
        torch.manual_seed(0)
        return peft.get_peft_model(tiny(), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))

    one, _ = dispersion_part(tmp_path, model=wrapped, gradient_accumulation_steps=8)
    other, _ = dispersion_part(
        tmp_path,
        model=wrapped,
        per_device_train_batch_size=8,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    assert greatest_difference(one, other) < 1e-6
    assert max(value.abs().max() for name, value in one.items() if "lora_B" in name) > 1e-6


# ---- PEFT ----------------------------------------------------------------------------------------------------------


def test_a_merged_model_is_not_silently_missed():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny(), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    attach(model)
    merged = model.merge_and_unload().train()
    with pytest.raises(AttachError, match="outside the forward of the model"):
        merged(input_ids=tokens(), labels=tokens())


def test_prefix_tuning_disperses_the_real_tokens():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        tiny("gpt2", dtype=torch.float32), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    with attach(model, WEIGHT) as handle:
        mask = torch.ones(4, 12, dtype=torch.long)
        model(input_ids=tokens(), labels=tokens(), attention_mask=mask).loss.backward()
        assert handle.pop()["dispersion"] < 0


# ---- Liger ---------------------------------------------------------------------------------------------------------

_LIGER = """
import sys; sys.path.insert(0, {folder!r})
import torch
from attach_helpers import gradients, greatest_difference, tiny, tokens
from decondense import attach
from decondense.attaching import AttachError
from liger_kernel.transformers import apply_liger_kernel_to_llama

batch = {{"input_ids": tokens(2, 6), "labels": tokens(2, 6)}}
found = []
for patched in (False, True):
    if patched:  # Liger patches classes of transformers for the whole process, hence the process of its own
        apply_liger_kernel_to_llama(rope=False, rms_norm=False, swiglu=False, cross_entropy=False)
    model = tiny("llama", dtype=torch.float32)
    with attach(model, 2.0):
        out = model(**batch)
        out.loss.backward()
    assert (out.logits is None) == patched
    found.append((out.loss.item(), gradients(model)))
assert abs(found[0][0] - found[1][0]) < 1e-5, found
assert greatest_difference(found[0][1], found[1][1]) < 1e-5
with attach(model, 2.0, gradient_ratio_every=1) as handle:
    handle.set_progress(0, 1)
    try:
        model(**batch)
    except AttachError as error:
        assert "Liger" in str(error)
        print("exact")
"""


@pytest.mark.skipif(
    not (importlib.util.find_spec("liger_kernel") and importlib.util.find_spec("triton")), reason="needs liger-kernel"
)
def test_liger_fused_cross_entropy():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    code = _LIGER.format(folder=str(Path(__file__).parents[1] / "helpers"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout.strip() == "exact", done.stderr[-2000:]


# ---- Lightning -----------------------------------------------------------------------------------------------------


def lightning_fit(tmp_path, callback, *, accumulate=1, batch=8, max_steps=1, resume=None, learning_rate=0.5):
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny()
            self.rows = []

        def training_step(self, batch, batch_idx):
            loss = self.model(input_ids=batch, labels=batch).loss
            self.log("loss", loss, on_step=True)
            return loss

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.model(input_ids=batch, labels=batch).loss)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=learning_rate)

    class Keep(lightning.loggers.logger.DummyLogger):
        rows: list = []  # noqa: RUF012

        def log_metrics(self, metrics, step=None):
            self.rows.append((step, metrics))

    module, logger = Module(), Keep()
    logger.rows = []
    loader = torch.utils.data.DataLoader(tokens(8, 12), batch_size=batch)
    trainer = lightning.Trainer(
        max_steps=max_steps,
        accumulate_grad_batches=accumulate,
        callbacks=[] if callback is None else [callback],
        accelerator="cpu",
        logger=logger,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, loader, loader, ckpt_path=resume)
    return module, logger.rows


@pytest.mark.filterwarnings("ignore")
def test_lightning(tmp_path):
    pytest.importorskip("lightning.pytorch")
    from decondense.integrations.lightning import DispersionCallback

    model, ids = tiny(), tokens(8, 12)
    kept, hooks = block_outputs(list(model.model.layers))
    loss = model(input_ids=ids, labels=ids).loss
    for hook in hooks:
        hook.remove()
    (loss + WEIGHT * dispersion(kept)).backward()
    expected = {name: value - 0.5 * gradients(model)[name] for name, value in weights(model).items()}
    for accumulate, batch in ((1, 8), (4, 2)):
        module, rows = lightning_fit(tmp_path, DispersionCallback(WEIGHT), accumulate=accumulate, batch=batch)
        assert greatest_difference(weights(module.model), expected) < 1e-7
        logged = {key: value for _, row in rows for key, value in row.items()}
        assert logged["cross_entropy"] == pytest.approx(loss.item(), abs=1e-6)
        assert logged["dispersion"] == pytest.approx(dispersion(kept).item(), abs=1e-5)
        assert "dispersion/block_01" in logged
        assert attached(module.model) is None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cut", [(1, 8), (4, 2)])
def test_lightning_ends_a_step_when_its_optimizer_steps(tmp_path, cut):
    pytest.importorskip("lightning.pytorch")

    from decondense.integrations.lightning import DispersionCallback

    model, ids, target = tiny(), tokens(8, 12), [0.02, 0.4, -0.01]
    kept, hooks = block_outputs(list(model.model.layers))
    model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    expected = by_the_book(0.5, target, np.array([mean_cosines(kept, [12] * 8)] * 5))
    settings = {"accumulate": cut[0], "batch": cut[1], "learning_rate": 0.0}
    callback = DispersionCallback(0.5, target=target)
    keys = [f"dispersion_weight/block_0{number}" for number in (1, 2, 3)]
    _, rows = lightning_fit(tmp_path, callback, max_steps=3, **settings)
    logged = [[row[key] for key in keys] for _, row in rows if keys[0] in row]
    np.testing.assert_allclose(logged, expected[:3], rtol=1e-6)  # Lightning logs float32
    other = DispersionCallback(0.5, target=target)
    other.load_state_dict(callback.state_dict())
    _, rows = lightning_fit(tmp_path, other, max_steps=2, **settings)
    logged = [[row[key] for key in keys] for _, row in rows if keys[0] in row]
    np.testing.assert_allclose(logged, expected[3:5], rtol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_lightning_state_and_module(tmp_path):
    pytest.importorskip("lightning.pytorch")
    from decondense.config import WeightSchedule
    from decondense.integrations.lightning import DispersionCallback

    callback = DispersionCallback(0.5, schedule=WeightSchedule(kind="linear"))
    _, rows = lightning_fit(tmp_path, callback, max_steps=4, learning_rate=0.0)
    logged = [row["dispersion_weight"] for _, row in rows if "dispersion_weight" in row]
    assert logged == pytest.approx([0.5, 0.375, 0.25, 0.125])
    state = callback.state_dict()
    assert state["config"]["weight"] == 0.5
    assert state["step"] == 3
    other = DispersionCallback(0.4, schedule=WeightSchedule(kind="linear"))
    other.load_state_dict(state)
    with pytest.raises(AttachError, match=r"weight: saved 0\.5, now 0\.4"):
        lightning_fit(tmp_path, other)
    with pytest.raises(AttachError, match=r"no module 'net'.*It has: model"):
        lightning_fit(tmp_path, DispersionCallback(module="net"))


def lightning_manual(callback, *, optimizers, every=1, loader_length=8, resume=None, log_every=1, **settings):
    """A fit with manual optimization; optimizer k steps in each (every ** k)-th batch. Weights seen and rows logged."""
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.model = tiny()
            self.seen = []

        def training_step(self, batch, batch_idx):
            chosen = self.optimizers()
            chosen = chosen if isinstance(chosen, list) else [chosen]
            loss = self.model(input_ids=batch, labels=batch).loss
            self.seen.append(callback.handle.weight)
            self.manual_backward(loss)
            for number, optimizer in enumerate(chosen):
                if (batch_idx + 1) % every**number == 0:
                    optimizer.step()
                    optimizer.zero_grad()

        def configure_optimizers(self):
            groups = list(self.parameters())
            return [torch.optim.SGD(groups[k::optimizers], lr=0.0) for k in range(optimizers)]

    rows: list = []

    class Keep(lightning.loggers.logger.DummyLogger):
        def log_metrics(self, metrics, step=None):
            rows.append(metrics)

    module = Module()
    trainer = lightning.Trainer(
        callbacks=[callback],
        accelerator="cpu",
        logger=Keep(),
        log_every_n_steps=log_every,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **settings,
    )
    loader = torch.utils.data.DataLoader(tokens(loader_length, 6), batch_size=1)
    trainer.fit(module, loader, ckpt_path=resume)
    return module, [row for row in rows if "dispersion" in row], trainer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("optimizers", [1, 2, 3])
@pytest.mark.parametrize("limit", ["epochs", "steps", "both"])
def test_lightning_with_several_optimizers_follows_the_schedule_per_batch(optimizers, limit):
    """Lightning's global_step and max_steps count the steps of every optimizer; its epochs count batches."""
    pytest.importorskip("lightning.pytorch")
    from decondense.config import WeightSchedule
    from decondense.integrations.lightning import DispersionCallback

    settings = {
        "epochs": {"max_epochs": 2, "loader_length": 4},
        "steps": {"max_steps": 8 * optimizers, "max_epochs": -1},
        "both": {"max_steps": 8 * optimizers, "max_epochs": 5, "loader_length": 4},
    }[limit]
    callback = DispersionCallback(weight=1.0, schedule=WeightSchedule(kind="linear", until=1.0))
    module, rows, _ = lightning_manual(callback, optimizers=optimizers, **settings)
    expected = [1 - batch / 8 for batch in range(8)]
    assert module.seen == pytest.approx(expected)
    assert [row["dispersion_weight"] for row in rows] == pytest.approx(expected)
    assert all("cross_entropy" in row for row in rows)


@pytest.mark.filterwarnings("ignore")
def test_lightning_optimizers_that_take_turns():
    """Steps in every batch and in every third: the end is met in proportion, the log keeps Lightning's pace."""
    pytest.importorskip("lightning.pytorch")
    from decondense.config import WeightSchedule
    from decondense.integrations.lightning import DispersionCallback

    callback = DispersionCallback(weight=1.0, schedule=WeightSchedule(kind="linear", until=1.0))
    module, rows, trainer = lightning_manual(
        callback, optimizers=2, every=3, loader_length=9, max_epochs=-1, max_steps=12, log_every=3
    )
    assert trainer.global_step == 12
    assert len(module.seen) == 9
    assert module.seen[0] == 1.0
    assert module.seen[3::3] == pytest.approx([1 - 4 / 12, 1 - 8 / 12])  # after 3 and 6 batches: 4 and 8 steps
    assert len(rows) == 3


@pytest.mark.filterwarnings("ignore")
def test_lightning_without_an_end_refuses_a_schedule_and_takes_a_constant():
    lightning = pytest.importorskip("lightning.pytorch")
    from decondense.config import WeightSchedule
    from decondense.integrations.lightning import DispersionCallback

    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(tokens(3, 6))

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny()

        def training_step(self, batch, batch_idx):
            return self.model(input_ids=batch, labels=batch).loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    def fit(callback):
        trainer = lightning.Trainer(
            max_epochs=1,
            callbacks=[callback],
            accelerator="cpu",
            logger=False,
            log_every_n_steps=0,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(Module(), torch.utils.data.DataLoader(Endless(), batch_size=1))

    fit(DispersionCallback(weight=0.5))
    with pytest.raises(AttachError, match="needs the length of training"):
        fit(DispersionCallback(weight=0.5, schedule=WeightSchedule(kind="linear")))


# ---- Accelerate ----------------------------------------------------------------------------------------------------


def test_accelerate_loop_with_mixed_precision():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # the trainers of other tests have chosen float32
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    try:
        model = tiny(dtype=torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loader = torch.utils.data.DataLoader(tokens(8, 12), batch_size=2)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        with attach(model, WEIGHT) as handle:
            before = weights(model)
            for ids in loader:
                with accelerator.accumulate(model):
                    accelerator.backward(model(input_ids=ids, labels=ids).loss)
                    optimizer.step()
                    optimizer.zero_grad()
            assert handle.pop()["dispersion"] < 0
        assert greatest_difference(weights(model), before) > 0
    finally:
        accelerator.free_memory()
        AcceleratorState._reset_state(reset_partial_state=True)


# ---- Axolotl -------------------------------------------------------------------------------------------------------

AXOLOTL = {"dispersion": {"weight": 0.3, "layers": "deep", "loss": {"tau": 0.5}, "schedule": {"kind": "cosine"}}}


def test_axolotl_plugin_through_its_plugin_manager(tmp_path):
    base = pytest.importorskip("axolotl.integrations.base")
    from axolotl.utils.dict import DictDefault

    manager = base.PluginManager()
    manager.register("decondense.integrations.axolotl.DispersionPlugin")
    assert manager.get_input_args() == ["decondense.integrations.axolotl.DispersionArgs"]
    trainer = make_trainer(tmp_path, max_steps=2)
    cfg = DictDefault(AXOLOTL)
    manager.cfg = cfg
    manager.post_trainer_create(cfg, trainer)
    handle = attached(trainer.model)
    assert (handle.config.weight, handle.layers, handle.config.loss.tau) == (0.3, [1, 2], 0.5)
    assert handle.config.schedule.kind == "cosine"
    trainer.train()
    assert {"dispersion/block_03", "cross_entropy"} <= trainer.state.log_history[0].keys()


def test_axolotl_arguments_and_errors(tmp_path, monkeypatch):
    """Against the documented interface, where axolotl is not installed: BasePlugin is all that is taken from it."""
    if not importlib.util.find_spec("axolotl"):
        base = types.ModuleType("axolotl.integrations.base")
        base.BasePlugin = object
        for name in ("axolotl", "axolotl.integrations"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.setitem(sys.modules, "axolotl.integrations.base", base)
    from decondense.integrations.axolotl import DispersionArgs, DispersionPlugin

    assert DispersionArgs(**AXOLOTL).dispersion["layers"] == "deep"
    assert DispersionArgs().dispersion == {}
    plugin = DispersionPlugin()
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match="Did you mean 'layers'"):
        plugin.post_trainer_create({"dispersion": {"layer": "deep"}}, trainer)
    plugin.post_trainer_create({"dispersion": None}, trainer)
    assert attached(trainer.model).config.weight == 0.1


# ---- LLaMA-Factory -------------------------------------------------------------------------------------------------


def test_llamafactory_through_run_exp(tmp_path, monkeypatch):
    """Against the documented interface: ``run_exp(args, callbacks)`` builds a Trainer with these callbacks."""
    called = {}

    def run_exp(args=None, callbacks=None):
        trainer = make_trainer(tmp_path, max_steps=2)
        for callback in callbacks:
            trainer.add_callback(callback)
        trainer.train()
        called.update(args=args, history=trainer.state.log_history, model=trainer.model)

    tuner = types.ModuleType("llamafactory.train.tuner")
    tuner.run_exp = run_exp
    for name in ("llamafactory", "llamafactory.train"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "llamafactory.train.tuner", tuner)

    from decondense.integrations.llamafactory import main

    config = tmp_path / "config.yaml"
    config.write_text("stage: sft\nmodel_name_or_path: x\ndispersion:\n  weight: 0.3\n  layers: deep\n")
    main([str(config)])
    assert called["args"] == {"stage": "sft", "model_name_or_path": "x"}
    assert called["history"][0]["dispersion_weight"] == 0.3
    logged = called["history"][0]
    assert logged["loss"] - 0.3 * logged["dispersion"] == pytest.approx(logged["cross_entropy"], abs=1e-5)
    assert "dispersion/block_02" in logged
    assert attached(called["model"]) is None

    config.write_text("stage: dpo\ndispersion: {}\n")
    with pytest.raises(ValueError, match="use pt or sft"):
        main([str(config)])
    config.write_text("stage: sft\n")
    with pytest.raises(ValueError, match="no 'dispersion:' section"):
        main([str(config)])
    config.write_text("dispersion:\n  wieght: 1\n")
    with pytest.raises(ValueError, match="Did you mean 'weight'"):
        main([str(config)])
    with pytest.raises(ValueError, match="usage"):
        main([])


def test_plugins_are_thin():
    import decondense.integrations as here

    for name in ("axolotl", "llamafactory"):
        with open(os.path.join(here.__path__[0], f"{name}.py"), encoding="utf-8") as file:
            assert len(file.readlines()) < 60
