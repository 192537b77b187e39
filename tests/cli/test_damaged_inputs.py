"""Damaged models, places that cannot be written to, strange names, Ctrl-C: one message each, and no traceback."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from decondense.cli import main

WORDS = 64
OPTIONS = ["--passages", "4", "--words", "30", "40", "--tokens", "16"]
ANSI = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a small model that loads, and a text."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    from decondense.seeding import fence

    root = tmp_path_factory.mktemp("home")
    with fence():
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=WORDS, n_embd=16, n_layer=2, n_head=2, n_positions=32, tie_word_embeddings=False)
        config.bos_token_id = config.eos_token_id = None
        GPT2LMHeadModel(config).save_pretrained(root / "model")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(root / "model")
    (root / "text.txt").write_text(" ".join(f"w{(i * 7 + i * i) % WORDS}" for i in range(2000)))
    return root


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, ANSI.sub("", captured.out), " ".join(ANSI.sub("", captured.err).split())


def measure(capsys: pytest.CaptureFixture[str], home: Path, *arguments: object) -> tuple[int, str, str]:
    return run(capsys, "measure", "--text", home / "text.txt", *OPTIONS, *arguments)


def damaged(home: Path, place: Path, change: Callable[[Path], object]) -> Path:
    shutil.copytree(home / "model", place)
    change(place)
    return place


def settings(**changes: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return change


def cut(name: str, length: int) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:length])


def noise(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(bytes(range(255, 0, -1)) * 40)


BROKEN = {
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    "header cut": (cut("model.safetensors", 100), "its weights are damaged"),
    "data cut": (cut("model.safetensors", 20_000), "its weights are damaged"),
    "empty weights": (cut("model.safetensors", 0), "its weights are damaged"),
    "noise for weights": (noise("model.safetensors"), "its weights are damaged"),
    "configuration cut": (cut("config.json", 20), "config.json"),
    "configuration a list": (lambda folder: (folder / "config.json").write_text("[]"), "model_type"),
    "configuration empty": (lambda folder: (folder / "config.json").write_text("{}"), "model_type"),
    "unknown architecture": (settings(model_type="nope"), "nope"),
    "wrong type": (settings(n_layer="two"), "n_layer"),
    "wrong width": (settings(n_embd=32), "shapes of its weights do not match its config.json"),
    "wrong heads": (settings(n_head=7), "num_heads"),
    "more layers than weights": (settings(n_layer=4), "weights lack 24 of the tensors"),
    "tokenizer cut": (cut("tokenizer.json", 100), "the tokenizer in damaged cannot be loaded"),
    "tokenizer of a wrong type": (
        lambda folder: (folder / "tokenizer_config.json").write_text(
            json.dumps({**json.loads((folder / "tokenizer_config.json").read_text()), "model_max_length": "long"})
        ),
        "the tokenizer in damaged cannot be loaded",
    ),
    "tokenizer gone": (lambda folder: [file.unlink() for file in folder.glob("tokenizer*")], "--tokenizer"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_damaged_model_is_named_with_its_damage(what: str, home: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    change, said = BROKEN[what]
    damaged(home, tmp_path / "damaged", change)
    status, _, err = measure(capsys, home, "damaged")
    assert status == 2
    assert said in err
    assert "damaged" in err
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"], "a refused command must leave nothing behind"


def test_what_can_be_known_to_fail_fails_before_anything_is_read(home: Path, tmp_path: Path, capsys) -> None:
    status, _, err = run(capsys, "measure", tmp_path / "nowhere", "--text", tmp_path / "no-text")
    assert status == 2
    assert "nowhere" in err
    (tmp_path / "file").write_text("")
    for place in ("file", "file/below"):
        status, _, err = run(
            capsys, "measure", home / "model", "--text", tmp_path / "no-text", "--out", tmp_path / place
        )
        assert status == 2
        assert str(tmp_path / place) in err
        assert "--out" in err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_place_that_takes_no_files_is_refused(home: Path, capsys) -> None:
    if not Path("/proc/self").is_dir():
        pytest.skip("no /proc")
    status, _, err = measure(capsys, home, home / "model", "--out", "/proc/decondense")
    assert status == 2
    assert "/proc/decondense cannot hold the results" in err


@pytest.mark.parametrize("name", ["with space/ünï cødé", "br[ack]ets [/red]", "[bold]", "-dash"])
def test_strange_names_are_kept_as_they_are(name: str, home: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(home / "model", tmp_path / "model" / name)
    status, out, err = measure(capsys, home, f"--out=out/{name}", f"--text={home / 'text.txt'}", f"model/{name}")
    assert status == 0, err
    assert (tmp_path / "out" / name / "profile.json").is_file()
    assert f"results: out/{name}" in out
    assert f"{Path(name).name}: 4 passages" in out


def test_one_passage_has_no_interval(home: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "short.txt").write_text("w1 w2 w3 w4 w5")
    status, out, _ = run(
        capsys, "measure", home / "model", "--text", tmp_path / "short.txt", "--each", "--out", tmp_path / "out"
    )
    assert status == 0
    assert "one passage has no interval" in out
    assert "nan.." not in out


def in_a_process(home: Path, cwd: Path, *arguments: object, **changes: str) -> subprocess.Popen[str]:
    """``decondense`` as a user starts it, without the test run's offline switches unless ``changes`` sets them."""
    environment = {key: value for key, value in os.environ.items() if not key.endswith("_OFFLINE")}
    return subprocess.Popen(
        [sys.executable, "-m", "decondense", *map(str, arguments)],
        cwd=cwd,
        env={**environment, "HF_HOME": str(home / "cache"), **changes},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a test run in the background has Ctrl-C ignored, and its children would inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_a_hub_out_of_reach_is_said_without_half_a_minute_of_attempts(home: Path, tmp_path: Path) -> None:
    # a port that nobody listens on: refused at once, and tried again and again by the libraries, with a log of it
    source = [home / "model", "--tokenizer", "nobody/nothing", "--text", home / "text.txt", *OPTIONS]
    process = in_a_process(home, tmp_path, "measure", *source, HF_ENDPOINT="http://127.0.0.1:9")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "nobody/nothing" in err
    assert "--tokenizer" in err
    assert "Retrying" not in err
    assert err.strip().count("\n") == 0, "one message"


@pytest.mark.slow
def test_a_download_that_was_interrupted(home: Path, tmp_path: Path) -> None:
    """A cache in the hub's layout whose weights never arrived."""
    repository = tmp_path / "hub" / "models--nobody--half"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "abc.incomplete").write_bytes(b"\0" * 100)
    shutil.copy(home / "model" / "config.json", snapshot)
    source = ["nobody/half", "--text", home / "text.txt", *OPTIONS]
    process = in_a_process(home, tmp_path, "measure", *source, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "the model nobody/half cannot be loaded" in err
    assert "does not appear to have a file named model.safetensors" in err
    assert "Traceback" not in err


def test_a_full_disk_in_the_middle(home: Path, tmp_path: Path, capsys) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # no file may grow beyond 1 kB
    try:
        status, _, err = measure(capsys, home, home / "model", "--out", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 2
    assert "File too large" in err
    assert "free some space" in err
    assert not [path for path in (tmp_path / "out").rglob("*") if path.stat().st_size], "a file is whole or not there"


def test_ctrl_c_says_what_is_left(home: Path, tmp_path: Path) -> None:
    process = in_a_process(home, tmp_path, "measure", home / "model", "--text", "-", "--out", "out")
    assert process.stdin is not None
    process.stdin.write("w1 " * 200_000)  # more than a pipe holds: when it is through, the command is reading
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "interrupted" in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_where_no_task_was_scored_another_model_may_be_evaluated(tmp_path: Path) -> None:
    """A model that did not load, mended: its directory is not that of another model."""
    from decondense.evaluate.catalogue import EvaluationError
    from decondense.evaluate.harness import _open_directory

    _open_directory(tmp_path, "mine", {"model": "damaged"})
    (tmp_path / "tasks").mkdir()
    _open_directory(tmp_path, "mine", {"model": "mended"})
    assert json.loads((tmp_path / "evaluation.json").read_text())["settings"] == {"model": "mended"}
    (tmp_path / "tasks" / "piqa.json").write_text("{}")
    with pytest.raises(EvaluationError, match="holds the results of mine"):
        _open_directory(tmp_path, "mine", {"model": "another"})
    (tmp_path / "evaluation.json").write_text('{"model": "mi')
    with pytest.raises(EvaluationError, match=r"evaluation\.json is damaged.* choose another directory"):
        _open_directory(tmp_path, "mine", {"model": "mended"})


def test_what_the_system_refuses_outside_python_is_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """safetensors and tokenizers raise types of their own; here a file cannot be made in a folder that is missing."""
    import torch
    from safetensors.torch import save_file

    def fail(*arguments: object, **options: object) -> None:
        save_file({"a": torch.zeros(2)}, tmp_path / "missing" / "a.safetensors")

    monkeypatch.setattr("decondense.studies.load_study", fail)
    assert main(["study", "demo", "--dry-run"]) == 2
    assert "No such file or directory" in capsys.readouterr().err
