from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainerControl, TrainerState, TrainingArguments

from decondense.config import TREATMENTS, ActiveForgettingConfig, ArmConfig, ModelConfig, NoisyEmbeddingConfig
from decondense.studies import run_study
from decondense.training.trainer import StudyTrainer, training_arguments
from decondense.training.treatments import Applied, preparation_of
from decondense.training.treatments.active_forgetting import ActiveForgetting, own_group
from decondense.training.treatments.noisy_embedding import NoisyEmbedding
from studies.conftest import Interrupted, small_study, stable_rows, stop_after


@pytest.fixture
def model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_layer=1, n_embd=16, n_head=2, n_positions=8, pad_token_id=3))


def at_step(step: int, last: int = 100) -> tuple[TrainingArguments, TrainerState, TrainerControl]:
    state = TrainerState()
    state.global_step, state.max_steps = step, last
    return TrainingArguments(output_dir="unused", report_to=[]), state, TrainerControl()


def test_noise_is_uniform_within_the_published_bound_and_only_in_training(model) -> None:
    noise = NoisyEmbedding(model, NoisyEmbeddingConfig(alpha=2.0), seed=0)
    embedding = model.get_input_embeddings()
    ids = torch.arange(8).repeat(400, 1)
    clean = embedding.weight[ids]
    before = torch.get_rng_state()
    noise.on_step_begin(*at_step(5))
    model.train()
    added = (embedding(ids) - clean).detach()
    bound = 2.0 / math.sqrt(8 * 16)
    assert added.abs().max() <= bound * (1 + 1e-5)
    assert added.std() == pytest.approx(bound / math.sqrt(3), rel=0.01)  # of a uniform distribution
    assert torch.equal(before, torch.get_rng_state())
    # a resumed run draws the same; the next step and another rank do not
    noise.on_step_begin(*at_step(5))
    assert torch.equal(embedding(ids) - clean, added)
    noise.on_step_begin(*at_step(6))
    assert not torch.equal(embedding(ids) - clean, added)
    model.eval()
    assert torch.equal(embedding(ids), clean)
    model.train()
    with torch.no_grad():
        assert torch.equal(embedding(ids), clean)
    noise.on_train_end(*at_step(6))
    assert torch.equal(embedding(ids), clean)


def test_forgetting_draws_zeroes_and_clears_at_every_period_but_the_last(model) -> None:
    forgetting = ActiveForgetting(model, ActiveForgettingConfig(every=4, std=0.5), seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    old = forgetting.weight.detach().clone()
    other = model.transformer.h[0].mlp.c_fc.weight
    moment = optimizer.state[other]["exp_avg"].clone()
    for step in (1, 3, 5):
        forgetting.on_step_end(*at_step(step), optimizer=optimizer)
        assert torch.equal(forgetting.weight, old)
    forgetting.on_step_end(*at_step(4), optimizer=optimizer)
    new = forgetting.weight.detach()
    assert not torch.equal(new, old)
    assert new.std() == pytest.approx(0.5, rel=0.1)
    assert torch.equal(new[3], torch.zeros(16))
    state = optimizer.state[forgetting.weight]
    assert all(float(value.abs().sum()) == 0 for value in state.values() if torch.is_tensor(value))
    assert torch.equal(optimizer.state[other]["exp_avg"], moment)
    held = forgetting.weight.detach().clone()
    forgetting.on_step_end(*at_step(100), optimizer=optimizer)
    assert torch.equal(forgetting.weight, held)


def test_the_embedding_has_a_rate_of_its_own(model) -> None:
    forgetting = ActiveForgetting(model, ActiveForgettingConfig(every=10, warmup=0.2), seed=0)
    factors = [forgetting.factor(step) for step in range(20)]
    assert factors[:10] == factors[10:]
    assert factors[2] == 1.0
    assert factors[0] < factors[1] < factors[2]
    assert factors[2:10] == sorted(factors[2:10], reverse=True)
    assert 0 < factors[9] <= 0.125
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.3)
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    own_group(optimizer, forgetting.weight)
    assert optimizer.param_groups[-1]["params"] == [forgetting.weight]
    assert optimizer.param_groups[-1]["weight_decay"] == 0.3
    assert sum(len(group["params"]) for group in optimizer.param_groups) == count


def test_baselines_are_arms_that_pair_and_resume(tmp_path) -> None:
    from decondense.studies.runner import cell_folder, open_directory, opened_corpus, study_corpus
    from decondense.training.hf import run_cell

    arms = [
        {"name": "cross-entropy"},
        {"name": "noise", "noisy_embedding": {"alpha": 5.0}},
        {"name": "forget", "active_forgetting": {"every": 3}},
        {"name": "all", "noisy_embedding": {}, "active_forgetting": {"every": 3}, "dispersion": {"target": 0.01}},
    ]
    study = small_study(arms=arms)
    rows = run_study(study, tmp_path / "whole", workers=0)
    ends = {row["arm"]: row for row in rows if row["kind"] == "run" and row["status"] == "finished"}
    assert len({row["init_hash"] for row in ends.values()}) == 1
    assert len({row["order_hash"] for row in ends.values()}) == 1
    assert len({row["final_hash"] for row in ends.values()}) == 4
    moved = [row["dispersion_weights"] for row in rows if row["kind"] == "step" and row["arm"] == "all"]
    assert all(set(weights) == {"block 1", "block 2"} for weights in moved)
    assert moved[-1]["block 2"] != moved[0]["block 2"]

    out = tmp_path / "resumed"
    open_directory(study, out)
    study_corpus(study, out)
    with pytest.raises(Interrupted):
        run_cell(study, study.arm("all"), 0, opened_corpus(out), cell_folder(out, "all", 0), watch=stop_after(5))
    again = run_study(study, out, workers=0)
    assert stable_rows(again) == stable_rows(rows)


def test_distillation_is_the_papers_formula_however_the_batch_is_cut(tmp_path) -> None:
    flat = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = {"architecture": "gpt2", "overrides": {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_inner": 64, **flat}}
    run_study(small_study(model=model, arms=[{"name": "cross-entropy"}]), tmp_path / "teacher", workers=0)
    teacher = str(tmp_path / "teacher" / "cells" / "cross-entropy" / "seed-0" / "final")

    arms = [{"name": "cross-entropy"}, {"name": "taught", "distillation": {"teacher": teacher, "temperature": 2.0}}]
    train = small_study().train.model_dump() | {"steps": 2, "log_every": 1, "checkpoint_every": 2}
    logged = {}
    for micro in (4, 1):
        study = small_study(model=model, arms=arms, train={**train, "micro_batch_size": micro})
        rows = run_study(study, tmp_path / f"micro-{micro}", workers=0)
        logged[micro] = [row for row in rows if row["kind"] == "step" and row["arm"] == "taught"]
    for whole, cut in zip(logged[4], logged[1], strict=True):
        assert cut["distillation"] == pytest.approx(whole["distillation"], rel=1e-5)
        assert cut["gradient_norm"] == pytest.approx(whole["gradient_norm"], rel=1e-4)

    # the first logged value, written out in float64: the student is still the initial model
    from transformers import AutoModelForCausalLM

    from decondense.corpora.packed import prepare
    from decondense.seeding import seed_everything
    from decondense.training.hf import build_model

    study = small_study(model=model)
    corpus = prepare(study.corpus)
    seed_everything(0, "initial weights")
    student = build_model(study.model, corpus.vocabulary, 32, corpus.tokenizer().eos_token_id).double().eval()
    taught_by = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64).eval()
    ids = torch.stack([torch.tensor(corpus.sequence(int(i), 32).astype("int64")) for i in corpus.order(0, 8, 32)[:4]])
    with torch.no_grad():
        p = torch.softmax(taught_by(input_ids=ids).logits[:, :-1] / 2, -1)
        log_q = torch.log_softmax(student(input_ids=ids).logits[:, :-1] / 2, -1)
    expected = -4 * (p * log_q).sum(-1).mean()
    assert logged[4][0]["distillation"] == pytest.approx(float(expected), rel=1e-5)


def test_a_teacher_of_another_tokenizer_or_no_teacher_is_refused(tmp_path) -> None:
    from decondense.config import ConfigError

    run_study(small_study(arms=[{"name": "cross-entropy"}]), tmp_path / "teacher", workers=0)
    teacher = str(tmp_path / "teacher" / "cells" / "cross-entropy" / "seed-0" / "final")
    corpus = small_study().corpus.model_dump() | {"vocab_size": 600}
    arms = [{"name": "cross-entropy"}, {"name": "taught", "distillation": {"teacher": teacher}}]
    with pytest.raises(ConfigError, match=r"different tokenizer than the student \(vocabularies of 512 and 600"):
        run_study(small_study(arms=arms, corpus=corpus), tmp_path / "other", workers=0)
    arms[1]["distillation"]["teacher"] = str(tmp_path / "nobody")
    with pytest.raises(ConfigError, match=r"nobody.*cannot be loaded"):
        run_study(small_study(arms=arms), tmp_path / "none", workers=0)


@pytest.mark.parametrize("name", TREATMENTS)
def test_every_registered_treatment_is_whole(name: str) -> None:
    options: dict[str, Any] = {"teacher": "a/b"} if name == "distillation" else {}
    needed: dict[str, Any] = {"dispersion": {}} if name == "gradient_noise" else {}
    arm = ArmConfig(name="arm", **{**needed, name: options})
    entry = arm.treatments[name]
    assert len(arm.treatments) == 1 + len(needed)
    assert type(entry) is TREATMENTS[name]
    assert list(inspect.signature(preparation_of(name)).parameters) == ["config", "trainer", "model", "cell"]
    assert [other.title for other in TREATMENTS.values()].count(entry.title) == 1
    with pytest.raises(ValueError, match=f"untrained; {name} would"):
        ArmConfig(name="arm", untrained=True, **{**needed, name: options})


def test_the_model_that_a_treatment_needs_is_prepared_and_paid_for() -> None:
    class Cost:
        steps, tokens = 10, 1000

        def forward(self, model: ModelConfig | None = None) -> float:
            return 1.0 if model is None else 7.0 * (model.pretrained == "prepared:big") * (model.revision == "main")

    taught = ArmConfig(name="a", distillation={"teacher": "prepared:big", "revision": "main"}, dispersion={})
    assert [name for entry in taught.treatments.values() for name in entry.prepared_models] == ["big"]
    assert [entry.extra_flops(Cost()) for entry in taught.treatments.values()] == [0.0, 7.0]
    there = taught.located({"big": Path("/there")})
    assert there.distillation is not None
    assert there.distillation.teacher == "/there"
    assert there.dispersion == taught.dispersion
    hub = ArmConfig(name="a", distillation={"teacher": "a/b"})
    assert hub.located({}) == hub


def test_the_trainer_asks_its_treatments_for_optimizer_and_schedule(model, tmp_path) -> None:
    arguments = training_arguments(small_study().train, tmp_path, 0)
    trainer = StudyTrainer(model=model, args=arguments, processing_class=None)
    forgetting = ActiveForgetting(model, ActiveForgettingConfig(every=4, warmup=0.5), seed=0)
    trainer.treatments["active_forgetting"] = forgetting
    trainer.create_optimizer_and_scheduler(8)
    assert trainer.optimizer is not None
    assert trainer.optimizer.param_groups[-1]["params"] == [forgetting.weight]
    (*others, own) = trainer.lr_scheduler.lr_lambdas
    assert [own(step) for step in range(8)] == 2 * [forgetting.factor(step) for step in range(4)]
    assert all(rate(7) != own(7) for rate in others)


@pytest.mark.parametrize("micro", [4, 2])
def test_a_loss_that_a_treatment_adds_is_weighted_and_logged_as_the_mean_of_the_step(model, tmp_path, micro) -> None:
    class Constant(Applied):
        loss_weight = 0.5

        def extra_loss(self, input_ids_BT, outputs):
            return outputs.logits.sum() * 0.0 + float(len(input_ids_BT))

    train = small_study().train.model_copy(update={"micro_batch_size": micro})
    trainer = StudyTrainer(model=model, args=training_arguments(train, tmp_path, 0), processing_class=None)
    trainer.treatments["constant"] = Constant()
    ids = torch.arange(8).repeat(micro, 1)
    steps = 4 // micro
    trainer.current_gradient_accumulation_steps = steps
    losses = [trainer.compute_loss(model, {"input_ids": ids, "labels": ids}) for _ in range(steps)]
    plain = trainer.losses["loss"]
    assert float(trainer.losses["constant"]) == pytest.approx(micro)
    assert float(sum(loss.detach() for loss in losses)) == pytest.approx(float(plain) + 0.5 * micro, rel=1e-5)
