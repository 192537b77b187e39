"""GGUF files through the one loader: the same model as its safetensors, or one clear message."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("gguf")
from gguf_file import TEXT, write_pair
from model_folders import bomb, code, save_model

from decondense.checkpoints import ModelError, locate
from decondense.config import DistillationConfig, ModelConfig
from decondense.evaluate.catalogue import EvaluationError
from decondense.evaluate.harness import _fingerprint, check_model
from decondense.measuring import measure
from decondense.models import build_model, load_config, load_model, load_network
from decondense.tokenizers import load_tokenizer


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_pair(tmp_path_factory.mktemp("gguf"))


@pytest.mark.parametrize("packed", [False, True], ids=["f32", "q8_0"])
def test_a_gguf_file_is_the_model_of_the_same_weights(tmp_path: Path, packed: bool) -> None:
    file, whole = write_pair(tmp_path, packed=packed)
    ours, tokenizer = load_model(file)
    theirs, words = load_model(whole)
    assert tokenizer is not None
    assert words is not None
    state = theirs.state_dict()
    assert {key: bool(torch.equal(value, state[key])) for key, value in ours.state_dict().items()} == dict.fromkeys(
        state, True
    )
    assert type(ours) is type(theirs)
    assert ours.training is False
    assert tokenizer.get_vocab() == words.get_vocab()
    assert tokenizer(TEXT)["input_ids"] == words(TEXT)["input_ids"]
    texts = [TEXT[shift:] for shift in (0, 3, 9)]
    mine, reference = (measure(model, words, texts, tokens=32) for model in (ours, theirs))
    assert (mine.cosine == reference.cosine).all()
    assert mine.info["model"] == str(file)


def test_a_folder_with_one_gguf_is_that_file_and_what_lies_beside_it_is_not_read(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    file, whole = pair
    folder, marker = tmp_path / "one", tmp_path / "ran"
    folder.mkdir()
    shutil.copy(file, folder)
    bomb(folder / "pytorch_model.bin", marker)
    code(folder / "mine.py", marker)
    (folder / "config.json").write_text(json.dumps({"model_type": "x", "auto_map": {"AutoConfig": "mine.Config"}}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["mine.Words", None]}}))
    assert locate(folder) == (str(folder / file.name), None)
    model, tokenizer = load_model(folder)
    assert tokenizer is not None
    assert torch.equal(model.lm_head.weight, load_network(whole).lm_head.weight)
    assert not marker.exists()


def test_a_folder_with_safetensors_is_these_and_one_with_several_files_is_refused(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    file, _ = pair
    save_model(tmp_path / "both")
    shutil.copy(file, tmp_path / "both")
    assert load_config(tmp_path / "both").model_type == "gpt2"
    (tmp_path / "two").mkdir()
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(file, tmp_path / "two" / name)
    with pytest.raises(ModelError, match=r"2 GGUF files; name one of them: a\.gguf, b\.gguf"):
        locate(tmp_path / "two")


def test_a_start_a_teacher_and_a_saved_copy(pair: tuple[Path, Path], tmp_path: Path) -> None:
    from decondense.training.treatments.distillation import Teacher

    file, whole = pair
    model = build_model(ModelConfig(pretrained=str(file)), 288, 64, 0)
    assert model.dtype == torch.float32
    ids = torch.arange(32).reshape(2, 16)
    before = model(input_ids=ids, labels=ids).loss
    before.backward()
    assert model.lm_head.weight.grad is not None
    model.save_pretrained(tmp_path / "saved")
    again = load_network(tmp_path / "saved", head="causal")
    assert torch.equal(again(input_ids=ids, labels=ids).loss, before)
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    words = load_tokenizer(whole)
    assert words is not None
    assert Teacher(DistillationConfig(teacher=str(file)), words).model.dtype == torch.float32


def test_benchmarks_know_a_gguf_by_its_content(pair: tuple[Path, Path], tmp_path: Path) -> None:
    file, _ = pair
    assert check_model(str(file)) == str(file.resolve())
    shutil.copy(file, tmp_path / "copy.gguf")
    other = tmp_path / "copy.gguf"
    assert len(_fingerprint(str(file))) == 16
    same = _fingerprint(str(other))
    other.write_bytes(other.read_bytes()[:-1] + b"\x01")
    assert _fingerprint(str(other)) != same
    assert check_model("owner/name:folder/model.Q4_1.gguf") == "owner/name:folder/model.Q4_1.gguf"
    (tmp_path / "text.gguf").write_text("none")
    with pytest.raises(EvaluationError, match="not a GGUF file"):
        check_model(str(tmp_path / "text.gguf"))


def test_names_on_the_hub() -> None:
    assert locate("owner/name:model.gguf") == ("owner/name:model.gguf", None)
    assert locate("owner/name@v1.2:sub/model.gguf") == ("owner/name:sub/model.gguf", "v1.2")
    assert locate("owner/name:model.gguf", "main") == ("owner/name:model.gguf", "main")


# ---- refused ---------------------------------------------------------------------------------------------------------


def test_a_file_that_is_no_gguf_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    for name, content in {
        "text.gguf": b"weights",
        "empty.gguf": b"",
        "pointer.gguf": b"version https://git-lfs",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ModelError, match=rf"{name} is not a GGUF file: it begins with .*download it again"):
            locate(tmp_path / name)
    (tmp_path / "m-00001-of-00003.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"one of 3 parts; merge them first"):
        locate(tmp_path / "m-00001-of-00003.gguf")
    with pytest.raises(ModelError, match=r"there is no file .*absent\.gguf"):
        locate(tmp_path / "absent.gguf")


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_named_with_its_architecture(pair: tuple[Path, Path], tmp_path: Path, share: float) -> None:
    file, _ = pair
    data = file.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ModelError, match=r"cut\.gguf.*'llama'.*truncated or damaged.*download it again"):
        load_model(cut)


def test_an_architecture_that_transformers_does_not_read(tmp_path: Path) -> None:
    file, _ = write_pair(tmp_path, arch="mamba9")
    with pytest.raises(ModelError, match=r"tiny\.gguf.*'mamba9'.*safetensors"):
        load_model(file)


def test_without_the_package_the_message_names_the_extra(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError, match=r'pip install "decondense\[gguf\]"'):
        load_model(pair[0])
