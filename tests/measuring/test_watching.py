"""Condensation while training: exact, cheap, and without any effect on the training."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from measure_oracle import cosines
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from decondense import CondensationCallback
from decondense.measuring import CondensationWatch
from decondense.measuring.watching import batch_means

V, T, L = 64, 16, 3


def build(**options: object) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=V, n_embd=32, n_layer=L, n_head=4, n_positions=T, initializer_range=0.2, **options)
    config.bos_token_id = config.eos_token_id = None
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"
    return model


class Texts(torch.utils.data.Dataset):
    def __init__(self, length: int = 64) -> None:
        self.ids = torch.randint(0, V, (length, T), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def expected(model: nn.Module, ids: torch.Tensor) -> list[float]:
    """Mean cosines of the embedding and of every block's output."""
    seen: list[torch.Tensor] = []
    blocks = model.transformer.h
    handles = [blocks[0].register_forward_pre_hook(lambda m, args, kw: seen.append(args[0]), with_kwargs=True)]
    handles += [
        b.register_forward_hook(lambda m, a, out: seen.append(out if isinstance(out, torch.Tensor) else out[0]))
        for b in blocks
    ]
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return [float(np.mean([cosines(z).mean() for z in state])) for state in seen]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_batch_means(dtype: torch.dtype) -> None:
    z = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 9, 5)) + 0.5).to(dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    cosine, norm = batch_means(z)
    assert float(cosine) == pytest.approx(np.mean([cosines(s.double()).mean() for s in z]), abs=tolerance)
    assert float(norm) == pytest.approx(float(z.double().norm(dim=-1).mean()), rel=1e-6)
    mask = torch.zeros(3, 9)
    mask[0, :4] = mask[1, 5:] = mask[2, :1] = 1  # the last sequence has one token and no pairs
    cosine, norm = batch_means(z, mask)
    pairs = [cosines(z[0, :4].double()).mean(), cosines(z[1, 5:].double()).mean()]
    assert float(cosine) == pytest.approx(np.mean(pairs), abs=tolerance)
    assert float(norm) == pytest.approx(float(z.double().norm(dim=-1)[mask.bool()].mean()), rel=1e-6)
    assert float(batch_means(z, torch.zeros(3, 9))[0]) == 0


def test_plain_loop() -> None:
    model = build(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).double().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = Texts().ids.split(4)[:7]
    read = {}
    with CondensationWatch(model, every=3) as watch:
        for step, ids in enumerate(batches, 1):
            means = expected(model.eval(), ids)
            model.train()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if numbers := watch.step():
                read[step] = (numbers, means)
    assert list(read) == [1, 4, 7]
    for numbers, means in read.values():
        names = ["embedding", *(f"block_{i:02d}" for i in range(1, L + 1))]
        actual = [numbers[f"condensation/mean_cosine/{name}"] for name in names]
        np.testing.assert_allclose(actual, means, atol=1e-12)
        assert numbers["condensation/mean_cosine"] == pytest.approx(np.mean(means[1:]))
        assert -1 <= numbers["condensation/spearman"] <= 1
        assert numbers["condensation/norm/embedding"] > 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(ValueError, match="at least 1 step"):
        CondensationWatch(model, every=0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_is_not_a_second_pass(reentrant: bool) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=L, num_attention_heads=4)
    model = LlamaForCausalLM(config).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    ids = Texts().ids[:4]
    with CondensationWatch(model, every=1) as watch:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        numbers = watch.step()
    assert sum(key.startswith("condensation/mean_cosine/") for key in numbers) == L + 1


def test_evaluation_is_not_watched() -> None:
    model = build().eval()
    with CondensationWatch(model) as watch:
        model(input_ids=Texts().ids[:2])
        with torch.no_grad():
            model.train()(input_ids=Texts().ids[:2])
        assert watch.read() == {}


class Tracker(TrainerCallback):
    """Stands where W&B, TensorBoard or trackio stand: sees what is logged when it is its turn."""

    def __init__(self) -> None:
        self.seen: list[dict] = []

    def on_log(self, args: object, state: object, control: object, logs: dict | None = None, **_: object) -> None:
        self.seen.append(dict(logs or {}))


def train(folder: Path, *, how: str | None, accumulation: int = 1) -> tuple[Trainer, Tracker]:
    torch.manual_seed(7)
    tracker = Tracker()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=5,
        logging_steps=2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=accumulation,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    callbacks = [CondensationCallback()] if how == "argument" else []
    trainer = Trainer(build(), arguments, train_dataset=Texts(), callbacks=[tracker, *callbacks])
    if how == "front":
        CondensationCallback.add_to(trainer)
    trainer.train()
    return trainer, tracker


def test_trainer_logs_to_every_tracker(tmp_path: Path) -> None:
    trainer, tracker = train(tmp_path, how="front", accumulation=2)
    logged = [row for row in tracker.seen if "loss" in row]
    assert len(logged) == 2
    for row in logged:
        assert 0 <= row["condensation/mean_cosine"] <= 1
        assert f"condensation/mean_cosine/block_{L:02d}" in row
    history = [row for row in trainer.state.log_history if "condensation/spearman" in row]
    assert [row["step"] for row in history] == [2, 4]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in trainer.model.modules())


def test_as_an_argument_it_reaches_the_history(tmp_path: Path) -> None:
    trainer, tracker = train(tmp_path, how="argument")
    assert not any("condensation/spearman" in row for row in tracker.seen)
    assert [row["step"] for row in trainer.state.log_history if "condensation/spearman" in row] == [2, 4]


def test_watched_training_is_the_unwatched_one_bit_for_bit(tmp_path: Path) -> None:
    watched, _ = train(tmp_path / "a", how="front")
    state = torch.get_rng_state()
    unwatched, _ = train(tmp_path / "b", how=None)
    assert torch.equal(state, torch.get_rng_state())
    for one, other in zip(watched.model.parameters(), unwatched.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_lightning(tmp_path: Path) -> None:
    pytest.importorskip("lightning.pytorch")
    import lightning.pytorch as lightning

    from decondense.measuring import lightning_callback

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = build()

        def training_step(self, batch: dict, index: int) -> torch.Tensor:
            return self.model(**batch).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    module = Module()
    trainer = lightning.Trainer(
        max_steps=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
        callbacks=[lightning_callback(every=1)],
    )
    trainer.fit(module, torch.utils.data.DataLoader(Texts(), batch_size=4))
    assert 0 <= float(trainer.callback_metrics["condensation/mean_cosine"]) <= 1


@pytest.mark.slow
def test_cost_of_a_watched_pass() -> None:
    """One watched pass in fifty stays under 0.5 % of step time: a watched step may cost a quarter more at most."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=4096, n_embd=256, n_layer=12, n_head=4, n_positions=256)
    model = GPT2LMHeadModel(config).train()
    ids = torch.randint(0, 4096, (4, 256), generator=torch.Generator().manual_seed(0))
    with CondensationWatch(model, every=1) as watch:
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for number in range(12):
            watched = number % 2 == 0
            watch._armed = watched
            start = time.perf_counter()
            model(input_ids=ids, labels=ids).loss.backward()
            watch.read()
            seconds[watched].append(time.perf_counter() - start)
    assert min(seconds[True]) <= 1.25 * min(seconds[False])
