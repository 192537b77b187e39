"""The alarm of a watch: its rule, on rows of whole studies too, and what it does in each kind of training."""

from __future__ import annotations

import gzip
import json
import math
import sys
import warnings
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from decondense import CondensationCallback
from decondense.measuring import Alarm, Alert, CondensationWarning, CondensationWatch, lightning_callback

ROWS = Path(__file__).parents[2] / "benchmarks" / "results" / "studies"
LIMIT = {"mean_cosine": 0.9}
SURE = {"mean_cosine": -1.0}  # every reading is above it


def build() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_embd=16, n_layer=3, n_head=2, n_positions=8, initializer_range=0.3)
    config.bos_token_id = config.eos_token_id = None
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"
    return model


class Texts(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.ids = torch.randint(0, 32, (64, 8), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


# ---- the rule --------------------------------------------------------------------------------------------------------


def raised(values: list[float], **options: Any) -> list[int]:
    """The steps, from 1, at which readings of these values raise the alarm."""
    alarm = Alarm(LIMIT, **options)
    return [s for s, value in enumerate(values, 1) if alarm.read(s, {"condensation/mean_cosine": value})]


@pytest.mark.parametrize(
    ("values", "options", "steps"),
    [
        ([0.95] * 6, {"grace": 0}, [3]),  # once, not at each of the readings that follow
        ([0.95, 0.95, 0.5, 0.95, 0.95, 0.9], {"grace": 0}, [6]),  # at the threshold counts
        ([0.95, 0.95, math.nan, 0.95, 0.95], {"grace": 0}, []),
        ([0.95] * 6, {"grace": 2}, [5]),
        ([0.95] * 6, {"grace": 0, "patience": 1}, [1]),
        ([0.95] * 102, {}, []),
        ([0.95] * 103, {}, [103]),
        ([0.8999] * 200, {}, []),
    ],
)
def test_the_rule(values: list[float], options: dict[str, Any], steps: list[int]) -> None:
    assert raised(values, **options) == steps


def test_each_number_has_its_own_count() -> None:
    alarm = Alarm({"mean_cosine": 0.9, "norm/block_02": 100.0}, patience=2, grace=0)
    numbers = {"condensation/mean_cosine": 0.95, "condensation/norm/block_02": 1.0}
    assert alarm.read(10, numbers) == []
    assert alarm.read(20, numbers) == [Alert("mean_cosine", 0.95, 0.9, 20, 2)]
    numbers["condensation/norm/block_02"] = 250.0
    assert alarm.read(30, numbers) == []
    assert [alert.metric for alert in alarm.read(40, numbers)] == ["norm/block_02"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alarm": {}}, "map names to thresholds"),
        ({"alarm": 0.9}, "map names to thresholds"),
        ({"alarm": {"mean_cosine": math.nan}}, "finite"),
        ({"alarm": {"mean_cosine": True}}, "finite"),
        ({"alarm": {"mean_cosine": 90}}, "between -1 and 1"),
        ({"alarm": LIMIT, "action": "halt"}, "action of an alarm"),
        ({"alarm": LIMIT, "patience": 0}, "patience"),
        ({"alarm": LIMIT, "grace": -1}, "grace"),
    ],
)
def test_what_cannot_be_an_alarm_is_refused_before_training(options: dict[str, Any], message: str) -> None:
    for make in (lambda: CondensationWatch(build(), **options), lambda: CondensationCallback(**options),
                 lambda: lightning_callback(**options)):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            make()


def test_a_number_that_the_model_does_not_have_is_refused() -> None:
    for name in ("mean_cosine/block_04", "cosine", "condensation/mean_cosine"):
        with pytest.raises(ValueError, match="Known: mean_cosine/embedding"):
            CondensationWatch(build(), alarm={name: 0.5})
    for name in ("mean_cosine/block_03", "deep_half", "spearman", "norm/embedding"):
        CondensationWatch(build(), alarm={name: 0.5}).close()


# ---- whole studies ---------------------------------------------------------------------------------------------------


PULLED_TOGETHER = {"opposite", "straightness", "profile-condensed"}
"""Arms of the committed studies that raise the cosine on purpose."""


def studies() -> tuple[dict[Any, dict[int, float]], dict[Any, dict[int, float]]]:
    """By run of the committed studies: mean cosine of the blocks, and held-out loss, by step."""
    cosines: dict[Any, dict[int, float]] = defaultdict(dict)
    losses: dict[Any, dict[int, float]] = defaultdict(dict)
    for path in sorted(ROWS.glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                if not line.startswith(('{"kind":"profile"', '{"kind":"eval"')):
                    continue
                row = json.loads(line)
                run = (path.name, row["arm"], row["seed"])
                if row["kind"] == "profile":
                    cosines[run][row["step"]] = float(np.mean(row["mean_cosine"][1:]))
                elif row["metric"] == "loss":
                    losses[run][row["step"]] = row["value"]
    return cosines, losses


def alarms(course: Mapping[int, float], **options: Any) -> list[int]:
    alarm = Alarm(LIMIT, **options)
    return [s for s in sorted(course) if alarm.read(s, {"condensation/mean_cosine": course[s]})]


def test_no_alarm_in_healthy_studies_and_one_in_the_runs_that_broke() -> None:
    """Tens of the healthy runs pass 0.9 early and leave it again; what stays there has a worse loss than at first."""
    cosines, losses = studies()
    broken = {run for run, loss in losses.items() if 0 in loss and loss[max(loss)] > loss[0]}
    pulled = {run: course for run, course in cosines.items() if run[1] in PULLED_TOGETHER}
    healthy = {
        run: course for run, course in cosines.items() if run not in broken and run not in pulled and len(course) > 1
    }
    assert len(healthy) >= 100
    assert not any(alarms(course) for course in healthy.values())
    # the count alone, from the first step on
    assert not any(alarms(course, grace=0) for course in healthy.values())
    # the grace alone
    assert not any(alarms(course, patience=1) for course in healthy.values())
    # neither: this is what they are for
    assert sum(bool(alarms(course, patience=1, grace=0)) for course in healthy.values()) > 20
    # states that are pulled together on purpose stay there though the loss falls
    assert sum(bool(alarms(course, patience=2, grace=50)) for course in pulled.values()) == 9
    condensed = {run for run in cosines if run not in pulled and alarms(cosines[run], patience=2, grace=50)}
    assert {run[1] for run in condensed} == {"active-forgetting"}
    assert len(condensed) == 3
    assert condensed <= broken


# ---- training --------------------------------------------------------------------------------------------------------


def test_a_planted_collapse_is_noticed_within_patience_readings() -> None:
    """A small training whose loss is turned after a while to reward equal directions."""
    model = build().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    ids, alerts, courses = Texts().ids, [], []
    with CondensationWatch(model, every=1, alarm=LIMIT, action=alerts.append, patience=4, grace=5) as watch:
        for step in range(80):
            output = model(input_ids=ids[:8], labels=ids[:8], output_hidden_states=True)
            unit = torch.nn.functional.normalize(torch.stack(output.hidden_states[1:]), dim=-1)
            loss = output.loss if step < 20 else -unit.mean(dim=2).square().sum(dim=-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            courses.append(watch.step()["condensation/mean_cosine"])
            if alerts:
                break
    above = [step for step in range(1, len(courses) + 1) if courses[step - 1] >= 0.9]
    assert max(courses[:20]) < 0.9
    assert above[:4] == list(range(above[0], above[0] + 4))
    assert alerts == [Alert("mean_cosine", courses[-1], 0.9, above[0] + 3, 4)]


def test_a_plain_loop_is_told_to_stop() -> None:
    model, ids = build().train(), Texts().ids[:2]
    with CondensationWatch(model, every=2, alarm=SURE, action="stop", patience=2, grace=2) as watch:
        seen, flags = [], []
        for _ in range(7):
            model(input_ids=ids, labels=ids).loss.backward()
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                numbers = watch.step()
            seen += [w.category for w in told]
            flags.append((bool(numbers), "condensation/alarm" in numbers, watch.should_stop))
    # read at steps 1, 3, 5, 7; the first lies in the grace
    assert flags == [(True, False, False), (False, False, False), (True, False, False), (False, False, False),
                     (True, True, True), (False, False, True), (True, False, True)]  # fmt: skip
    assert seen == [CondensationWarning]
    with CondensationWatch(model, alarm=SURE) as watch:
        model(input_ids=ids)
        with pytest.raises(ValueError, match="read\\(step\\)"):
            watch.read()


def train(folder: Path, **options: Any) -> Trainer:
    torch.manual_seed(7)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=9, logging_steps=2, per_device_train_batch_size=4, report_to=[],
        use_cpu=True, disable_tqdm=True, save_strategy="no", warmup_steps=2,
    )  # fmt: skip
    trainer = Trainer(build(), arguments, train_dataset=Texts())
    if options:
        CondensationCallback.add_to(trainer, **options)
    trainer.train()
    return trainer


def test_the_trainer_stops_at_the_logged_step(tmp_path: Path) -> None:
    options = {"alarm": SURE, "patience": 2, "grace": 3}
    with pytest.warns(CondensationWarning, match="Training stops"):
        trainer = train(tmp_path, action="stop", **options)
    assert trainer.state.global_step == 6  # 2 lies in the grace, 4 and 6 are the two readings
    assert [row["step"] for row in trainer.state.log_history if "condensation/alarm" in row] == [6]
    alerts: list[Alert] = []
    assert train(tmp_path, action=alerts.append, **options).state.global_step == 9
    assert [alert.step for alert in alerts] == [6]
    with warnings.catch_warnings():
        warnings.simplefilter("error", CondensationWarning)
        train(tmp_path, alarm=SURE)  # 100 steps of grace without being asked


def test_an_alarm_changes_no_bit_of_the_training(tmp_path: Path) -> None:
    plain = train(tmp_path)
    state = torch.get_rng_state()
    with pytest.warns(CondensationWarning):
        alarmed = train(tmp_path, alarm=SURE, patience=1, grace=0)
    assert torch.equal(state, torch.get_rng_state())
    for one, other in zip(plain.model.parameters(), alarmed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_lightning_stops(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = build()

        def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
            return self.model(**batch).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    trainer = lightning.Trainer(
        max_steps=9, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        default_root_dir=tmp_path,
        callbacks=[lightning_callback(every=1, alarm=SURE, action="stop", patience=3, grace=1)],
    )  # fmt: skip
    with pytest.warns(CondensationWarning):
        trainer.fit(Module(), torch.utils.data.DataLoader(Texts(), batch_size=4))
    assert trainer.global_step == 4


def test_an_active_run_of_trackio_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "runs"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    trackio = pytest.importorskip("trackio")
    for name, module in list(sys.modules.items()):  # imported before, it has another directory
        if name.startswith("trackio") and hasattr(module, "TRACKIO_DIR"):
            monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "runs")
    (tmp_path / "runs").mkdir(exist_ok=True)
    plain = train(tmp_path)
    options = {"alarm": SURE, "patience": 1, "grace": 5}
    with pytest.warns(CondensationWarning):
        train(tmp_path, **options)  # no run is active: nobody to tell
    trackio.init(project="watched", name="run", embed=False)
    try:
        with pytest.warns(CondensationWarning):
            watched = train(tmp_path, **options)
    finally:
        trackio.finish()
    (alert,) = trackio.Api().alerts("watched")
    assert (alert["level"], alert["title"]) == ("warn", "Condensation: mean_cosine")
    assert "step 6" in alert["text"]
    for one, other in zip(plain.model.parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(one, other)
