"""What a study tries and trains, where it lies, and whose a directory is: without training anything."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from decondense.config import ConfigError, StudyConfig
from decondense.records import Row, append_rows, make_row, read_rows, rows_hash, write_rows
from decondense.studies.devices import gpus
from decondense.studies.directory import (
    Progress,
    collect,
    make_below,
    open_directory,
    opened_corpus,
    reset_failed,
    resolved_arm,
    study_corpus,
    study_of,
    sweep_of,
    task_end,
    trial_rows,
)
from decondense.studies.plan import Setting, Task, settings_of, tasks, trial_folder
from decondense.training.claim import claim
from studies.conftest import SMALL, small_study

GRID = {"learning_rates": [0.003, 0.001], "warmups": [0.5, 0.0], "max_grad_norms": [1.0, 0.5], "seeds": [77, 78]}


def ended(task: Task, loss: float | None) -> None:
    """What a trial leaves behind: its score and its end."""
    cell = {"study": task.study.name, "study_fingerprint": "f", "arm": task.arm, "seed": task.seed}
    rows = [
        make_row("run", **cell, status="finished" if loss is not None else "failed", config={"a": 1}, steps=task.steps)
    ]
    if loss is not None:
        score = {"task": "validation", "metric": "loss", "higher_is_better": False, "items": 1}
        scores = [make_row("eval", **cell, step=task.steps, tokens=1, value=loss, **score)]
        rows = [*scores, {**rows[0], "rows_hash": rows_hash(scores)}]
    write_rows(task.rows, rows)


def test_every_arm_gets_every_setting_on_every_seed_in_a_folder_of_its_own(tmp_path) -> None:
    fixed = {"name": "fixed", "warmup": 0.25}
    study = small_study(sweep=GRID, arms=[{"name": "cross-entropy"}, fixed, {"name": "own", "learning_rate": 0.1}])
    trials = [task for task in tasks(study, tmp_path) if task.kind == "trial"]
    expected = set(itertools.product((0.001, 0.003), (0.0, 0.5), (0.5, 1.0), (77, 78)))
    tried = [
        (t.setting.learning_rate, t.setting.warmup, t.setting.max_grad_norm, t.seed)
        for t in trials
        if t.arm == "cross-entropy" and t.setting
    ]
    assert set(tried) == expected
    assert len(tried) == len(expected)
    assert {t.setting.warmup for t in trials if t.arm == "fixed" and t.setting} == {None}
    assert {t.arm for t in trials} == {"cross-entropy", "fixed"}
    assert len({t.folder for t in trials}) == len(trials) == 16 + 8
    for trial in trials:
        (arm,) = trial.study.arms
        assert trial.setting is not None
        assert trial.study.train.learning_rate == arm.learning_rate == trial.setting.learning_rate
        assert arm.max_grad_norm == trial.setting.max_grad_norm
    cells = [task for task in tasks(study, tmp_path) if task.kind == "cell" and task.arm == "fixed"]
    assert set(cells[0].needs) == {t.folder for t in trials if t.arm == "fixed"}


@pytest.mark.parametrize("rates", [(0.001, 0.00100000001), (1e-7, 1.0000001e-7), (0.3, 0.1 + 0.2), (1.0, 1.0000004)])
def test_two_rates_never_share_a_folder(rates: tuple[float, float], tmp_path: Path) -> None:
    assert trial_folder(tmp_path, "a", rates[0]) != trial_folder(tmp_path, "a", rates[1])
    assert trial_folder(tmp_path, "a", Setting(0.1, rates[0])) != trial_folder(tmp_path, "a", Setting(0.1, rates[1]))
    assert trial_folder(tmp_path, "a", Setting(0.1, 0.5)) != trial_folder(tmp_path, "a", Setting(0.1, None, 0.5))
    assert trial_folder(tmp_path, "a", 0.003).name == "0.003", "as directories of earlier releases call it"


@pytest.mark.parametrize(("steps", "run", "fraction"), [(300, 1000, 0.1), (40, 60, 0.5), (None, 60, 0.3), (7, 9, 0.7)])
def test_a_short_trial_has_the_warm_up_steps_of_the_run(steps: int | None, run: int, fraction: float, tmp_path) -> None:
    train = {**SMALL["train"], "steps": run, "warmup": fraction}
    for sweep in ({}, {"warmups": [fraction, 0.05]}):
        study = small_study(sweep={"learning_rates": [0.1, 0.2], "steps": steps, **sweep}, train=train)
        trials = [task for task in tasks(study, tmp_path) if task.kind == "trial"]
        if sweep:
            trials = [task for task in trials if task.setting and task.setting.warmup == fraction]
        for trial in trials:
            (arm,) = trial.study.arms
            assert trial.steps == (steps or run)
            assert arm.warmup is not None
            assert round(arm.warmup * trial.steps) == round(fraction * run)
    share = small_study(sweep={"learning_rates": [0.1, 0.2], "steps": 5, "warmup_unit": "fraction"}, train=train)
    (trial, *_) = [task for task in tasks(share, tmp_path) if task.kind == "trial"]
    assert trial.study.train.warmup == fraction


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"learning_rates": [0.1]}, "at least two settings"),
        ({"learning_rates": [0.1, 0.2], "warmups": [1.0]}, "below 1"),
        ({"learning_rates": [0.1, 0.2], "warmups": [0.1, 0.1]}, "warmups must be different"),
        ({"learning_rates": [0.1, 0.2], "max_grad_norms": [0]}, "max_grad_norms must be different positive"),
        ({"learning_rates": [0.1, 0.2], "seeds": [5, 5]}, "different non-negative"),
        ({"learning_rates": [0.1, 0.2], "seeds": [5, 0]}, "one of the study's seeds"),
        ({"learning_rates": [0.1, 0.2], "steps": 3, "warmups": [0.4]}, r"warm-up of 3 steps .*sweep\.steps above 3"),
    ],
)
def test_sweeps_that_decide_nothing_are_refused(sweep: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small_study(sweep=sweep)


def test_the_setting_with_the_least_mean_is_chosen_marked_and_used(tmp_path) -> None:
    study = small_study(sweep=GRID)
    listed = tasks(study, tmp_path)
    trials = [task for task in listed if task.kind == "trial" and task.arm == "dispersion"]
    losses = {}
    for number, trial in enumerate(trials):
        # a setting that is best on one seed and failed on the other is not chosen
        assert trial.setting is not None
        first, failing = trial.seed == 77, trial.setting == Setting(0.001, 0.0, 0.5)
        loss = None if failing and not first else 1.0 if failing else 5.0 - (number * 7 % 11) / 10
        losses.setdefault(trial.setting, []).append(loss)
        ended(trial, loss)
        if number == 3:
            assert sweep_of(listed, "dispersion").chosen is None
            assert not any(row["chosen"] for row in trial_rows(study, listed))
    means = {setting: sum(values) / 2 for setting, values in losses.items() if None not in values}
    best = min(means, key=lambda setting: means[setting])
    rows = [row for row in trial_rows(study, listed) if row["arm"] == "dispersion"]
    assert len(rows) == 16
    chosen = {(row["learning_rate"], row["warmup"], row["max_grad_norm"], row["seed"]) for row in rows if row["chosen"]}
    assert chosen == {(best.learning_rate, best.warmup, best.max_grad_norm, seed) for seed in (77, 78)}
    arm = resolved_arm(study, "dispersion", listed)
    assert (arm.learning_rate, arm.warmup, arm.max_grad_norm) == (best.learning_rate, best.warmup, best.max_grad_norm)
    assert arm.dispersion == study.arm("dispersion").dispersion
    assert [row for row in collect(study, tmp_path) if row["arm"] == "dispersion"] == rows


@pytest.mark.parametrize(
    ("best", "edge"),
    [
        (Setting(0.01, 0.1), {"learning_rate": "smallest"}),
        (Setting(0.02, 0.3), {"warmup": "largest"}),
        (Setting(0.03, 0.0), {"learning_rate": "largest"}),  # nothing lies below no warm-up
        (Setting(0.02, 0.1), {}),
    ],
)
def test_a_choice_at_the_edge_of_the_grid_is_flagged(best: Setting, edge: dict[str, str], tmp_path) -> None:
    study = small_study(sweep={"learning_rates": [0.01, 0.02, 0.03], "warmups": [0, 0.1, 0.3]})
    listed = tasks(study, tmp_path)
    for task in listed:
        if task.kind == "trial":
            ended(task, 1.0 if task.setting == best else 2.0)
    for row in trial_rows(study, listed):
        is_best = (row["learning_rate"], row["warmup"]) == (best.learning_rate, best.warmup)
        assert (row["chosen"], row["edge"]) == (is_best, edge if is_best else {})


def test_a_repeated_failure_is_forgotten_before_anything_starts(tmp_path) -> None:
    study = small_study(sweep={"learning_rates": [0.01, 0.02]})
    listed = tasks(study, tmp_path)
    trials = [task for task in listed if task.kind == "trial"]
    ended(trials[0], None)
    ended(trials[1], 2.0)
    for task in trials[2:]:
        ended(task, None)
    assert resolved_arm(study, trials[0].arm, listed).learning_rate == 0.02
    assert reset_failed(listed) == [trials[0], *trials[2:]]
    assert sweep_of(listed, trials[0].arm).chosen is None, "cells wait for the trial that is repeated"
    assert trials[1].rows.exists()
    assert settings_of(study, study.arms[0]) == [Setting(0.01), Setting(0.02)]


def test_a_trial_whose_score_was_changed_is_tried_again(tmp_path) -> None:
    study = small_study(sweep={"learning_rates": [0.01, 0.02]})
    listed = tasks(study, tmp_path)
    first, second = (task for task in listed if (task.kind, task.arm) == ("trial", study.arms[0].name))
    ended(first, 2.0)
    ended(second, 1.0)
    progress = Progress(listed)
    assert progress.state(first.folder).ended
    assert sweep_of(listed, first.arm).chosen == second.setting
    write_rows(first.rows, [{**row, "value": 0.5} if row["kind"] == "eval" else row for row in read_rows(first.rows)])
    assert sweep_of(listed, first.arm).chosen is None
    assert task_end(first.folder) is None
    assert {p.state(first.folder).status for p in (progress, Progress(listed))} == {"waiting"}


def test_progress_follows_the_rows_and_their_replacement(tmp_path) -> None:
    study = small_study()
    (task, *_) = listed = tasks(study, tmp_path)
    progress = Progress(listed)
    assert {state.status for state in progress.states()} == {"waiting"}
    cell = {"study": "demo", "study_fingerprint": "f", "arm": task.arm, "seed": 0}

    def row(step: int) -> Row:
        return make_row("step", **cell, step=step, tokens=1, loss=step / 10, learning_rate=0.1)

    started = make_row("run", **cell, status="started", config={"a": 1})
    write_rows(task.rows, [started, row(2), row(4)])
    state = progress.states()[0]
    assert (state.status, state.step, state.loss) == ("running", 4, 0.4)
    write_rows(task.rows, [started, row(2)])
    assert progress.states()[0].step == 2
    task.rows.write_text("damaged\n")
    assert progress.states()[0].status == "waiting"


def test_progress_reads_only_what_is_new(tmp_path) -> None:
    (task, *_) = listed = tasks(small_study(), tmp_path)
    cell = {"study": "demo", "study_fingerprint": "f", "arm": task.arm, "seed": 0}

    def rows(*numbers: int) -> list[Row]:
        return [make_row("step", **cell, step=n, tokens=n, loss=1.0, learning_rate=0.1) for n in numbers]

    progress = Progress(listed)
    append_rows(task.rows, rows(*range(200)))
    assert progress.state(task.folder).step == 199
    begin = task.rows.read_bytes()[:4000]
    with task.rows.open("r+b") as handle:  # whoever reads the file from its start finds no row there
        handle.write(b"\0" * 4000)
    append_rows(task.rows, rows(200))
    for _ in range(2):
        assert progress.states()[0].step == 200
    append_rows(task.rows, [make_row("run", **cell, status="finished", config={})])
    assert not progress.state(task.folder).ended, "what has ended is read as a whole"
    with task.rows.open("r+b") as handle:
        handle.write(begin)
    assert progress.state(task.folder).ended
    assert [state.ended for state in progress.states()].count(True) == 1


def documents(folder: Path, count: int = 40) -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number}.txt").write_text(f"document {number}: " + " ".join(str(n * number) for n in range(60)))
    return folder


def local_study(text: Path, **changes: object) -> StudyConfig:
    corpus = {"source": str(text), "vocab_size": 300, "held_out": 0.4}
    return small_study(**{"corpus": corpus, **changes})


def test_a_directory_names_folders_without_their_place_and_resumes(tmp_path) -> None:
    text = documents(tmp_path / "secret-project" / "text")
    study, out = local_study(text), tmp_path / "out"
    assert open_directory(study, out) == study
    corpus = study_corpus(study, out)
    for name in ("study.yaml", "corpus.json"):
        assert "secret-project" not in (out / name).read_text()
    assert str(corpus.path.parent) not in (out / "corpus.json").read_text()
    assert study_of(out) == study
    assert open_directory(study, out).fingerprint() == study.fingerprint()
    assert opened_corpus(out).content_hash == corpus.content_hash
    # as rows have it: names only, and a study all the same
    shown = StudyConfig.from_yaml(out / "study.yaml")
    assert shown.corpus.source == "text"


def test_a_moved_cache_is_followed_and_a_damaged_file_named(tmp_path, monkeypatch) -> None:
    study, out = local_study(documents(tmp_path / "text")), tmp_path / "out"
    open_directory(study, out)
    monkeypatch.setenv("DECONDENSE_CACHE", str(tmp_path / "one"))
    first = study_corpus(study, out)
    monkeypatch.setenv("DECONDENSE_CACHE", str(tmp_path / "two"))
    with pytest.raises(ConfigError, match=r"missing or damaged in the cache .*two"):
        opened_corpus(out)
    (tmp_path / "one").rename(tmp_path / "two")
    assert opened_corpus(out).content_hash == first.content_hash
    for damage in ("", "{", "[]", '{"content_hash": 3}', "{}", "null", "[" * 100_000):
        (out / "corpus.json").write_text(damage)
        for call in (lambda: opened_corpus(out), lambda: study_corpus(study, out)):
            with pytest.raises(ConfigError, match=r"corpus\.json is damaged: .* Remove it"):
                call()
    (out / "corpus.json").unlink()  # the remedy that the message names
    assert study_corpus(study, out).content_hash == first.content_hash


@pytest.mark.parametrize("text", ["", "[" * 100_000, '{"a":' * 100_000, "null", "[1]"])
def test_damaged_paths_of_this_machine_are_named_with_the_remedy(text: str, tmp_path) -> None:
    study, out = local_study(documents(tmp_path / "text")), tmp_path / "out"
    open_directory(study, out)
    (out / "local.json").write_text(text)
    with pytest.raises(ConfigError, match=r"local\.json is damaged: .*run the command .* in a new directory \(--out\)"):
        study_of(out)


CELL = "cells/cross-entropy/seed-0"


@pytest.mark.parametrize("name", ["study.yaml", ".study.lock", "cells", "cells/cross-entropy", CELL, f"{CELL}/lock"])
def test_what_is_in_the_way_is_named_with_the_remedy(name: str, tmp_path) -> None:
    """A directory where a file is needed, and a file where a directory is."""
    study = small_study(seeds=[0], until="decided", margin=0.1)
    if name != "study.yaml":
        open_directory(study, tmp_path)
    place = tmp_path / name
    place.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(("yaml", "lock")):
        place.mkdir()
    else:
        place.touch()

    def start() -> None:
        open_directory(study.model_copy(update={"margin": 0.2}), tmp_path)
        make_below(tmp_path, tmp_path / CELL)
        with claim(tmp_path / CELL):
            pass

    with pytest.raises(ValueError, match=f"{name}.*([Rr]emove it and run the same command again|choose another)"):
        start()


def test_a_wrong_first_command_does_not_keep_the_directory(tmp_path) -> None:
    wrong, out = local_study(tmp_path / "nowhere"), tmp_path / "out"
    open_directory(wrong, out)
    with pytest.raises(ValueError, match="nowhere"):
        study_corpus(wrong, out)
    right = local_study(documents(tmp_path / "text"))
    assert open_directory(right, out) == right
    # the other command, had it been running, would be told
    with pytest.raises(ConfigError, match="another study was started"):
        study_corpus(wrong.model_copy(update={"corpus": right.corpus, "seeds": (5,)}), out)
    study_corpus(right, out)
    with pytest.raises(ConfigError, match="holds another study"):
        open_directory(wrong, out)


@pytest.mark.parametrize(
    "changes",
    [
        {"evaluate": {**SMALL["evaluate"], "data_dir": "s3://bucket/x?token=passw0rd"}},
        {"arms": [{"name": "a", "model": {"pretrained": "https://u:passw0rd@h/m"}}, {"name": "cross-entropy"}]},
    ],
)
def test_credentials_are_refused_before_anything_is_written(changes: dict, tmp_path) -> None:
    with pytest.raises(ConfigError) as refusal:
        open_directory(small_study(**changes), tmp_path / "out")
    assert "passw0rd" not in str(refusal.value)
    assert "environment" in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_gpus_of_both_makers_are_counted(tmp_path, monkeypatch) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    assert gpus(tmp_path)[1] == []
    amd, nvidia = tmp_path / "amd", tmp_path / "nvidia"
    for node, units in enumerate((0, 0, 416, 416)):  # two processors, two GPUs
        folder = amd / "sys/class/kfd/kfd/topology/nodes" / str(node)
        folder.mkdir(parents=True)
        (folder / "properties").write_text(
            f"cpu_cores_count {0 if units else 64}\nsimd_count {units}\nmem_banks_count 1\n"
        )
    (nvidia / "dev").mkdir(parents=True)
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidiactl", "nvidia-uvm"):
        (nvidia / "dev" / name).touch()
    assert gpus(amd) == ("HIP_VISIBLE_DEVICES", ["0", "1"])
    assert gpus(nvidia) == ("CUDA_VISIBLE_DEVICES", ["0", "1", "2"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-8a")
    assert gpus(nvidia)[1] == ["2", "GPU-8a"]
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "1")
    assert gpus(amd)[1] == ["1"]
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "")
    assert gpus(amd)[1] == []
    assert json.dumps(gpus(nvidia)[1]) == '["2", "GPU-8a"]'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a: &a [1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\n"
            + "".join(
                f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n"
                for before, name in itertools.pairwise("bcdefghij")
            ),
            "expand to more than",
        ),
        ("a: &a [*a]", "alias contains itself"),
        ("a: " + "[" * 200 + "]" * 200, "levels deep"),
        ("a: " + "[" * 50_000, "YAML"),
    ],
)
def test_yaml_that_never_ends_is_refused(text: str, message: str, tmp_path) -> None:
    (tmp_path / "study.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        StudyConfig.from_yaml(tmp_path / "study.yaml")
