"""Nothing that comes with a model runs unasked, whatever answers on standard input."""

from __future__ import annotations

import ast
import io
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from model_folders import IGNORED, REFUSED, bomb, code, edit, save_model, unknown_architecture, write_text

from decondense.checkpoints import ModelError
from decondense.cli import main
from decondense.config import ConfigError, CorpusConfig, DistillationConfig, ModelConfig
from decondense.models import build_model, empty_model, load_config, load_model, load_network
from decondense.tokenizers import load_tokenizer, vocabulary_of

SOURCE = Path(__file__).resolve().parents[2] / "src" / "decondense"


@pytest.fixture(autouse=True)
def everything_is_answered_with_yes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 10_000))
    monkeypatch.setenv("DECONDENSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.mark.parametrize("kind", REFUSED)
def test_code_that_would_be_needed_is_refused(kind: str, tmp_path: Path) -> None:
    from decondense.training.treatments.distillation import Teacher

    change, word = REFUSED[kind]
    folder, marker = tmp_path / "hostile", tmp_path / "ran"
    save_model(folder)
    change(folder, marker)
    student = load_tokenizer(folder)
    with pytest.raises(ModelError, match=word):
        load_model(folder)
    with pytest.raises(ModelError, match=word):
        load_network(folder, head="causal")
    with pytest.raises(ConfigError, match=word):
        build_model(ModelConfig(pretrained=str(folder)), 64, 16, 0)
    with pytest.raises(ConfigError, match=word):
        Teacher(DistillationConfig(teacher=str(folder)), student)
    assert not marker.exists()


@pytest.mark.parametrize("kind", IGNORED)
def test_code_that_is_not_needed_does_not_run(kind: str, tmp_path: Path) -> None:
    from decondense.training.treatments.distillation import Teacher

    folder, marker = tmp_path / "hostile", tmp_path / "ran"
    plain = save_model(folder)
    IGNORED[kind](folder, marker)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, tokenizer = load_model(folder)
    assert tokenizer is not None
    assert tokenizer("w3 w1")["input_ids"] == [3, 1]
    told = [item for item in caught if "custom code, which is not run" in str(item.message)]
    assert len(told) == (kind == "known architecture")
    warnings.simplefilter("ignore")
    for other in (model, build_model(ModelConfig(pretrained=str(folder)), 64, 16, 0), empty_model(load_config(folder))):
        assert type(other) is type(plain)
    Teacher(DistillationConfig(teacher=str(folder)), tokenizer)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    assert not marker.exists()


def test_a_vocabulary_with_code_does_not_run(tmp_path: Path) -> None:
    from decondense.corpora.packed import prepare

    folder, marker = tmp_path / "words", tmp_path / "ran"
    save_model(folder)
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        (folder / name).unlink(missing_ok=True)
    IGNORED["tokenizer"](folder, marker)
    corpus = CorpusConfig(source=str(write_text(tmp_path / "t.jsonl")), tokenizer=str(folder), held_out=0.2)
    try:
        assert prepare(corpus, cache=tmp_path / "cache").vocabulary == 64
    except ConfigError as error:
        assert "custom code" in str(error)  # noqa: PT017 - either is right, running it is not
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore::decondense.corpora.columns.TextWarning")
def test_a_data_set_with_a_script_does_not_run_it(tmp_path: Path) -> None:
    from decondense.corpora.passages import sample_passages

    folder, marker = tmp_path / "rows", tmp_path / "ran"
    folder.mkdir()
    write_text(folder / "train.jsonl")
    code(folder / "rows.py", marker)
    with_script = [*_passages(sample_passages, folder)]
    assert not marker.exists()
    (folder / "rows.py").unlink()
    assert with_script in ([], [*_passages(sample_passages, folder)])


def _passages(sample, folder: Path) -> list[str]:
    try:
        return sample(str(folder), count=2, words=(20, 30), seed=0)
    except ValueError:
        return []


def test_measure_says_it_in_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "hostile")
    unknown_architecture(tmp_path / "hostile", tmp_path / "ran")
    text = write_text(tmp_path / "t.jsonl")
    status = main(["measure", str(tmp_path / "hostile"), "--text", str(text), "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert status == 2
    assert "custom code, which is not run here" in " ".join(error.split())
    assert "[y/N]" not in error
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("verb", ["study", "train"])
def test_a_start_says_it_in_one_message(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "hostile"
    save_model(folder)
    study = {
        **{"name": "s", "title": "s", "question": "q?", "baseline": "a", "seeds": [0]},
        "arms": [{"name": "a"}, {"name": "b", "dispersion": {}}],
        "corpus": {"source": str(write_text(tmp_path / "t.jsonl")), "tokenizer": str(folder), "held_out": 0.2},
        "model": {"pretrained": str(folder)},
        "train": {"steps": 2, "batch_size": 2, "max_seq_length": 32},
        "evaluate": {"validation_tokens": 200, "passages": 2, "passage_tokens": 16},
    }
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(study))
    unknown_architecture(folder, tmp_path / "ran")
    more = ["--arm", "a", "--seed", "0"] if verb == "train" else ["--workers", "0"]
    status = main([verb, str(tmp_path / "s.yaml"), "--out", str(tmp_path / "out"), *more])
    error = capsys.readouterr().err
    assert status != 0
    assert "Traceback" not in error
    assert "[y/N]" not in error
    assert not (tmp_path / "ran").exists()


def test_evaluate_says_it_in_one_message(tmp_path: Path) -> None:
    """The harness runs in a process of its own, with the standard input of the command."""
    pytest.importorskip("lm_eval")
    save_model(tmp_path / "hostile")
    unknown_architecture(tmp_path / "hostile", tmp_path / "ran")
    data = tmp_path / "data" / "piqa"
    data.mkdir(parents=True)
    row = '{"goal": "w1", "sol1": "w2", "sol2": "w3", "label": 0}\n'
    (data / "validation.jsonl").write_text(row * 2)
    read, write = os.pipe()
    os.write(write, b"y\n" * 1000)
    os.close(write)
    command = ["evaluate", tmp_path / "hostile", "--tasks", "piqa", "--data-dir", data.parent, "--out", tmp_path / "o"]
    done = subprocess.run(
        [sys.executable, "-m", "decondense", *map(str, command)], stdin=read, capture_output=True, text=True
    )
    os.close(read)
    text = " ".join((done.stdout + done.stderr).split())
    assert done.returncode != 0
    assert "custom code, which is not run here" in text
    assert "--trust-remote-code" in text
    assert "[y/N]" not in text
    assert not (tmp_path / "ran").exists()


def test_code_runs_when_the_user_says_so(tmp_path: Path) -> None:
    save_model(tmp_path / "own")
    unknown_architecture(tmp_path / "own", tmp_path / "ran")
    model, _ = load_model(tmp_path / "own", trust_remote_code=True, head="causal")
    assert type(model).__name__ == "Model"
    assert (tmp_path / "ran").exists(), "the folders of these tests would do harm if they could"


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_pickle_in_these_tests_would_run(tmp_path: Path) -> None:
    import pickle

    bomb(tmp_path / "bomb", tmp_path / "ran")
    pickle.loads((tmp_path / "bomb").read_bytes())
    assert (tmp_path / "ran").exists()


# ---- no other call sites ---------------------------------------------------------------------------------------------

ALLOWED = {
    "from_pretrained": {"models.py", "tokenizers.py"},
    "load_dataset": {"corpora", "evaluate/worker/tasks.py"},
    "load_dataset_builder": {"corpora"},
    "load_from_disk": {"corpora"},
    "get_dataset_config_names": {"corpora"},
    "get_dataset_split_names": {"corpora"},
    "for_model": {"models.py", "studies"},  # a name, no file
}
MAY_RUN_CODE = {*ALLOWED} - {"load_from_disk", "for_model"}
FORBIDDEN = {
    *("torch.load", "pickle.load", "pickle.loads", "yaml.unsafe_load", "yaml.full_load", "joblib.load"),
    *("np.load", "numpy.load"),
}


def _calls() -> list[tuple[Path, ast.Call, str]]:
    calls = []
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                calls.append((path, node, ast.unparse(node.func)))
    return calls


def _options_that_say_it(path: Path) -> set[str]:
    """The names of a file's mappings that may hold trust_remote_code, for ``**name``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value and "'trust_remote_code'" in ast.unparse(node):
            found |= {ast.unparse(target) for target in getattr(node, "targets", None) or [node.target]}
    return found


def test_only_the_loader_loads() -> None:
    seen = set()
    for path, node, name in _calls():
        place = path.relative_to(SOURCE)
        last = name.rpartition(".")[2]
        if last in ALLOWED:
            seen.add(last)
            assert {str(place), place.parts[0]} & ALLOWED[last], f"{place}:{node.lineno} calls {name}"
        if last in MAY_RUN_CODE and "PeftModel" not in name:
            said = {item.arg for item in node.keywords if item.arg}
            spread = {ast.unparse(item.value) for item in node.keywords if not item.arg}
            assert "trust_remote_code" in said or spread & _options_that_say_it(path), (
                f"{place}:{node.lineno} leaves it open whether code runs"
            )
        if name in ("np.load", "numpy.load"):
            assert not any(item.arg == "allow_pickle" and ast.unparse(item.value) != "False" for item in node.keywords)
        elif name in FORBIDDEN:
            # restricted to tensors it runs nothing (our own random states)
            safe = any(item.arg == "weights_only" and ast.unparse(item.value) == "True" for item in node.keywords)
            assert (name, safe) == ("torch.load", True), f"{place}:{node.lineno} reads a pickle"
        if last.startswith("AutoConfig") or name.startswith("transformers.Auto"):
            assert place.name in ("models.py", "tokenizers.py"), f"{place}:{node.lineno} calls {name}"
    assert seen == set(ALLOWED)


def test_the_configuration_of_a_model_may_be_edited_and_still_loads(tmp_path: Path) -> None:
    """The changes above are what is refused, not that something was changed."""
    save_model(tmp_path / "plain")
    edit(tmp_path / "plain" / "config.json", attn_implementation="eager", note="edited")
    model, tokenizer = load_model(tmp_path / "plain")
    assert vocabulary_of(tokenizer) == 64
    assert model.config._attn_implementation == "eager"
