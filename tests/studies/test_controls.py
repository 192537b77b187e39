"""Arms that are controls: noise of equal norm, another optimizer, batch, weight decay or tying; targets from models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from decondense.atlas import read_summary
from decondense.attaching import attach
from decondense.config import ArmConfig, ConfigError, PreparedConfig, TrainConfig
from decondense.models import build_model
from decondense.records import Row
from decondense.seeding import seed_everything
from decondense.studies import run_study
from decondense.studies.plan import tasks
from decondense.studies.runner import cell_folder, open_directory, opened_corpus, study_corpus
from decondense.training import muon
from decondense.training.hf import run_cell
from decondense.training.treatments.gradient_noise import GradientNoise
from studies.conftest import SMALL, Interrupted, small_study, stable_rows, stop_after
from studies.test_treatments import at_step

FLAT = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_inner": 64}


@pytest.fixture
def model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    flat = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_layer=3, n_embd=16, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0, **flat)
    ).train()


IDS = torch.arange(48).reshape(6, 8)


def state_gradients(model: GPT2LMHeadModel, noise: GradientNoise | None, weight: float = 3.0) -> list[torch.Tensor]:
    """What the dispersion loss alone sends into the states of blocks 2 and 3, [batch, tokens, width] each."""
    states: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, inputs: object, output: object) -> torch.Tensor:
        leaf = (output[0] if isinstance(output, tuple) else output).detach().requires_grad_()
        states.append(leaf)
        return (leaf, *output[1:]) if isinstance(output, tuple) else leaf

    # blocks are cut from each other, so that each state's gradient is its own loss's
    hooks = [model.transformer.h[place].register_forward_hook(keep) for place in (1, 2)]
    with attach(model, weight, layers=(1, 2)) as handle:
        handle.defer = True
        handle.branch = noise
        model(input_ids=IDS)
        taken = handle.take()
    for hook in hooks:
        hook.remove()
    return list(torch.autograd.grad(weight * taken, states))


def test_noise_has_the_norm_of_each_sequences_gradient_and_no_direction(model) -> None:
    before = torch.get_rng_state()
    exact = state_gradients(model, None)
    noise = GradientNoise(seed=3)
    noise.on_step_begin(*at_step(5))
    drawn = state_gradients(model, noise)
    for own, other in zip(exact, drawn, strict=True):
        torch.testing.assert_close(own.norm(dim=(1, 2)), other.norm(dim=(1, 2)), rtol=1e-5, atol=0)
        cosine = torch.nn.functional.cosine_similarity(own.flatten(1), other.flatten(1))
        assert cosine.abs().max() < 5 / (8 * 16) ** 0.5
    both = torch.stack([entry / entry.norm(dim=(1, 2), keepdim=True) for entry in drawn]).flatten()
    assert both.mean().abs() < 4 / both.numel() ** 0.5 / (8 * 16) ** 0.5
    correlation = torch.nn.functional.cosine_similarity(drawn[0].flatten(1), drawn[1].flatten(1))
    assert correlation.abs().max() < 5 / (8 * 16) ** 0.5  # layers draw for themselves
    assert torch.equal(before, torch.get_rng_state())
    # a resumed run draws the same; another step, rank or micro-batch does not
    noise.on_step_begin(*at_step(5))
    assert all(map(torch.equal, state_gradients(model, noise), drawn))
    assert not torch.equal(state_gradients(model, noise)[0], drawn[0])
    noise.on_step_begin(*at_step(6))
    assert not torch.equal(state_gradients(model, noise)[0], drawn[0])
    other = GradientNoise(seed=3, rank=1)
    other.on_step_begin(*at_step(5))
    assert not torch.equal(state_gradients(model, other)[0], drawn[0])


def test_noise_stays_off_tokens_that_are_not_real_and_off_the_cross_entropy() -> None:
    noise = GradientNoise(seed=0)
    z = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    masked = torch.where(mask.bool().unsqueeze(-1), noise(z, mask), 0.0)
    (gradient,) = torch.autograd.grad((masked**2).sum() + 7 * z.sum(), z)
    assert (gradient[:, 3:] == 7).all()
    assert (gradient[1] == 7).all()
    assert (gradient[0, :3] - 7).norm() == pytest.approx(float(2 * z[0, :3].detach().norm()), rel=1e-5)


@pytest.mark.parametrize(
    ("arm", "words"),
    [
        ({"gradient_noise": {}}, "takes its norm from the dispersion loss"),
        ({"gradient_noise": {}, "dispersion": {"target": 0.1}}, "cannot follow dispersion.target"),
        ({"untrained": True, "batch_size": 4}, "untrained; batch_size would"),
    ],
)
def test_arms_that_make_no_sense_are_refused(arm: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ArmConfig.parse({"name": "a", **arm}, where="x")


def ends(rows: list[Row]) -> dict[str, Row]:
    return {row["arm"]: row for row in rows if row["kind"] == "run" and row["status"] == "finished"}


@pytest.mark.slow
def test_controls_are_arms_that_pair_and_resume(tmp_path) -> None:
    arms = [
        {"name": "cross-entropy"},
        {"name": "noise", "dispersion": {"weight": 1.0}, "gradient_noise": {}},
        {"name": "centring", "dispersion": {"weight": 1.0, "loss": {"form": "centring"}}},
        {"name": "decay", "weight_decay": 0.2},
        {"name": "batch", "batch_size": 8},
        {"name": "muon", "optimizer": "muon", "dispersion": {"target": 0.1}},
        {"name": "untied", "model": {"overrides": {"tie_word_embeddings": False}}},
    ]
    study = small_study(arms=arms)
    rows = run_study(study, tmp_path / "whole", workers=0)
    ended = ends(rows)
    assert len({row["order_hash"] for row in ended.values()}) == 1
    assert len({row["init_hash"] for name, row in ended.items() if name != "untied"}) == 1
    assert ended["untied"]["init_hash"] != ended["muon"]["init_hash"]
    assert len({row["final_hash"] for row in ended.values()}) == len(arms)
    assert {row["tokens"] for row in ended.values()} == {8 * 4 * 32}
    assert {name: row["steps"] for name, row in ended.items() if row["steps"] != 8} == {"batch": 4}
    points = {row["arm"]: [] for row in rows}
    for row in rows:
        if row["kind"] == "eval":
            points[row["arm"]].append(row["tokens"])
    assert set(map(tuple, points.values())) == {(0, 512, 1024)}

    out = tmp_path / "resumed"
    open_directory(study, out)
    study_corpus(study, out)
    for name in ("noise", "muon"):
        with pytest.raises(Interrupted):
            run_cell(study, study.arm(name), 0, opened_corpus(out), cell_folder(out, name, 0), watch=stop_after(5))
    again = [row for row in run_study(study, out, workers=0) if row["arm"] in ("noise", "muon")]
    assert stable_rows(again) == stable_rows([row for row in rows if row["arm"] in ("noise", "muon")])
    assert any(row["timing"]["resumed_from_steps"] for row in again if row.get("status") == "finished")


def test_a_batch_that_cannot_read_the_same_sequences_is_refused() -> None:
    for batch, words in ((5, "does not divide the 8 x 4 sequences"), (64, "does not divide")):
        with pytest.raises(ConfigError, match=words):
            small_study(arms=[{"name": "cross-entropy"}, {"name": "other", "batch_size": batch}])
    train = {**SMALL["train"], "micro_batch_size": 4}
    with pytest.raises(ConfigError, match="batch_size 2 must be a multiple of micro_batch_size 4"):
        small_study(train=train, arms=[{"name": "cross-entropy"}, {"name": "small", "batch_size": 2}])
    arms = [{"name": "cross-entropy"}, {"name": "large", "batch_size": 8}]
    with pytest.raises(ConfigError, match="does not divide the 12 sequences of a trial"):
        small_study(arms=arms, sweep={"learning_rates": [1e-3, 2e-3], "steps": 3})


def test_trials_of_an_arm_with_a_batch_of_its_own_read_as_much() -> None:
    arms = [{"name": "cross-entropy"}, {"name": "large", "batch_size": 8}]
    study = small_study(arms=arms, sweep={"learning_rates": [1e-3, 2e-3], "steps": 4})
    steps = {(task.kind, task.arm): task.steps for task in tasks(study, Path("out"))}
    assert steps == {
        ("trial", "cross-entropy"): 4, ("trial", "large"): 2, ("cell", "cross-entropy"): 8, ("cell", "large"): 4,
    }  # fmt: skip


def test_untied_embeddings_leave_every_other_weight_as_it_was() -> None:
    start = small_study(arms=[{"name": "cross-entropy"}]).model
    weights = []
    for tied in (True, False):
        own = start.model_copy(update={"overrides": {**start.overrides, "tie_word_embeddings": tied}})
        seed_everything(0, "initial weights")
        weights.append(build_model(own, 512, 32, 0).state_dict())
    one, other = weights
    assert one["lm_head.weight"].data_ptr() == one["transformer.wte.weight"].data_ptr()
    assert not torch.equal(other["lm_head.weight"], other["transformer.wte.weight"])
    shared = [name for name in one if name != "lm_head.weight"]
    assert all(torch.equal(one[name], other[name]) for name in shared)


# ---- Muon


def optimizers(model: GPT2LMHeadModel, train: TrainConfig) -> tuple[muon.MuonWithAdamW, list[torch.optim.Optimizer]]:
    """The one optimizer, and torch's two by hand on a copy's parameters."""
    import copy

    twin = copy.deepcopy(model)
    decay = {name for name, p in model.named_parameters() if p.dim() > 1}
    own = muon.optimizer_of(model, train, decay)
    assert isinstance(own, muon.MuonWithAdamW)
    inner = [p for name, p in twin.named_parameters() if ".h." in name and p.dim() == 2]
    outer = [p for name, p in twin.named_parameters() if ".h." not in name and p.dim() == 2]
    rest = [p for p in twin.parameters() if p.dim() < 2]
    rate = train.muon_learning_rate or train.learning_rate
    groups = [{"params": outer, "weight_decay": train.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    by_hand = [
        torch.optim.Muon(inner, lr=rate, weight_decay=train.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=train.learning_rate, betas=train.betas),
    ]
    return own, [*by_hand, twin]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch without Muon")
@pytest.mark.parametrize("rate", [None, 0.01])
def test_matrices_of_the_blocks_take_muon_and_the_rest_adamw(model, rate: float | None) -> None:
    own, (inner, outer, twin) = optimizers(model, TrainConfig(optimizer="muon", muon_learning_rate=rate))
    kinds = {id(p): group["optimizer"] for group in own.param_groups for p in group["params"]}
    assert len(kinds) == sum(1 for _ in model.parameters())
    assert {name for name, p in model.named_parameters() if kinds[id(p)] == "muon"} == {
        f"transformer.h.{block}.{part}.weight"
        for block in range(3)
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    for step in range(4):
        for net, used in ((model, [own]), (twin, [inner, outer])):
            net(input_ids=IDS, labels=IDS).loss.backward()
            for optimizer in used:
                optimizer.step()
                optimizer.zero_grad()
        if step == 1:  # a checkpoint in between changes nothing
            state = own.state_dict()
            own, _ = optimizers(model, TrainConfig(optimizer="muon", muon_learning_rate=rate))
            own.load_state_dict(state)
    for left, right in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(left, right)


def test_muon_is_refused_where_it_cannot_be(model, monkeypatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(ConfigError, match=r"muon needs torch 2\.9 or newer.*upgrade torch, or use adamw"):
        muon.optimizer_of(model, TrainConfig(optimizer="muon"), ())
    with pytest.raises(ConfigError, match="muon_learning_rate has no effect without optimizer: muon"):
        TrainConfig.parse({"muon_learning_rate": 0.1}, where="train")
    with pytest.raises(ConfigError, match=r"arm 'a'.*muon_learning_rate has no effect"):
        small_study(arms=[{"name": "cross-entropy"}, {"name": "a", "muon_learning_rate": 0.1}])
    study = small_study(train={**SMALL["train"], "optimizer": "muon", "muon_learning_rate": 0.1})
    plain = study.arm("dispersion").model_copy(update={"optimizer": "adamw"})
    assert study.train_of(plain).muon_learning_rate is None


# ---- targets from prepared models


PREPARED = {
    "teacher": {"model": {"architecture": "gpt2", "overrides": {**FLAT, "n_layer": 3}}, "train": SMALL["train"]},
    "random": {"model": {"architecture": "gpt2", "overrides": FLAT}, "train": SMALL["train"], "untrained": True},
    "condensed": {
        "model": {"architecture": "gpt2", "overrides": FLAT},
        "train": SMALL["train"],
        "dispersion": {"weight": -3.0, "loss": {"form": "mean_cosine"}},
    },
}


@pytest.mark.slow
def test_a_target_is_the_profile_of_a_prepared_model(tmp_path) -> None:
    arms = [
        {"name": "cross-entropy"},
        {"name": "controlled", "dispersion": {"target": "prepared:teacher"}},
        *(
            {"name": name, "dispersion": {"target": f"prepared:{name}", "loss": {"form": "profile"}}}
            for name in ("random", "condensed")
        ),
    ]
    study = small_study(arms=arms, prepared=PREPARED)
    assert study.prepared_of(study.arm("random")) == ["random"]
    out = tmp_path / "study"
    rows = run_study(study, out, workers=0)
    assert set(ends(rows)) == {"cross-entropy", "controlled", "random", "condensed"}
    means = {}
    for name in PREPARED:
        profile = read_summary(out / "prepared" / name / "final")
        written = [json.loads(line) for line in (out / "prepared" / name / "rows.jsonl").read_text().splitlines()]
        (*_, last) = [row for row in written if row["kind"] == "profile"]
        assert profile["mean_cosine"] == pytest.approx(last["mean_cosine"])
        means[name] = sum(profile["mean_cosine_others"][1:]) / len(profile["mean_cosine_others"][1:])
    assert means["condensed"] > max(means["random"], means["teacher"])
    assert "prepared:teacher" in (out / "study.yaml").read_text()

    # moved, and resumed there: the targets are what counts, not where they lie
    moved = tmp_path / "moved"
    open_directory(study, moved)
    study_corpus(study, moved)
    (out / "prepared").rename(moved / "prepared")
    folders = {name: moved / "prepared" / name / "final" for name in PREPARED}
    arm, folder = study.arm("controlled"), cell_folder(moved, "controlled", 0)
    with pytest.raises(Interrupted):
        run_cell(study, arm, 0, opened_corpus(moved), folder, watch=stop_after(5), prepared=folders)
    again = tmp_path / "again"
    moved.rename(again)
    resumed = [row for row in run_study(study, again, workers=0) if row["arm"] == "controlled"]
    assert stable_rows(resumed) == stable_rows([row for row in rows if row["arm"] == "controlled"])


def test_prepared_models_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="dispersion has no effect on an untrained model"):
        PreparedConfig.parse({"untrained": True, "dispersion": {}}, where="prepared.a")
    with pytest.raises(ConfigError, match="cannot use another model"):
        PreparedConfig.parse({"dispersion": {"target": "prepared:b"}}, where="prepared.a")
    with pytest.raises(ConfigError, match=r"unknown prepared model 'teachr'.*Did you mean 'teacher'"):
        small_study(
            arms=[{"name": "cross-entropy"}, {"name": "a", "dispersion": {"target": "prepared:teachr"}}],
            prepared=PREPARED,
        )
