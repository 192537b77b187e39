"""Damaged profiles and stored states: a ValueError that names the file, and nothing private in what is written."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_models import TEXT, save

from decondense import Profile
from decondense.atlas import Atlas, Entry
from decondense.cli import main
from decondense.measuring import measure_states
from decondense.measuring.dumps import StateFiles

L, N, D, P = 3, 8, 6, 2
METRICS = ["isoscore", "corpus_stable_rank", "cka"]


def states(count: int = P) -> torch.Tensor:
    return torch.randn(count, L + 1, N, D, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The directory of a profile with every kind of array."""
    measure_states(states(), final_norm=False, metrics=METRICS).save(tmp_path / "p" / "profile")
    return tmp_path / "p"


def arrays(folder: Path) -> dict[str, Any]:
    with np.load(folder / "profile.npz") as stored:
        return {name: stored[name] for name in stored.files}


# ---- profiles --------------------------------------------------------------------------------------------------------

CHANGES: dict[str, Callable[[Any], Any]] = {
    "gone": lambda values: None,
    "flat": lambda values: values.reshape(-1),
    "longer": lambda values: np.concatenate([np.atleast_1d(values)] * 2),
    "one more axis": lambda values: values[..., None],
    "text": lambda values: values.astype(str),
    "objects": lambda values: values.astype(object),
    "empty": lambda values: np.atleast_1d(values)[:0],
}


@pytest.mark.parametrize("how", CHANGES)
def test_an_array_that_does_not_fit_is_an_error_that_names_the_profile(saved: Path, how: str) -> None:
    whole = arrays(saved)
    needed = {"lengths", "cosine", "cosine_others", "norm", "norm_sd", "norm_max"}
    assert needed < set(whole)
    for name, values in whole.items():
        other = CHANGES[how](values)
        if other is not None and other.shape == values.shape and other.dtype == values.dtype:
            continue  # flat already
        kept = {key: value for key, value in whole.items() if key != name} | ({} if other is None else {name: other})
        np.savez(saved / "profile.npz", **kept)
        if other is None and name not in needed and not name.startswith("moments:"):
            Profile.load(saved).summary()  # optional
            continue
        with pytest.raises(ValueError, match=r"profile\.json and its \.npz are not a readable profile .*measure again"):
            Profile.load(saved)
    np.savez(saved / "profile.npz", **whole, surplus=np.ones(3))
    with pytest.raises(ValueError, match=r"not a readable profile .*surplus"):
        Profile.load(saved)


@pytest.mark.parametrize("key", ["all_layers", "no_averaged", "final", "last_block", "summary"])
@pytest.mark.parametrize("wrong", [None, 5, [], {}, ["blok 1"], "x" * 9, ["logits"] * (L + 1)], ids=str)
def test_a_readable_part_that_does_not_fit_is_an_error_too(saved: Path, key: str, wrong: Any) -> None:
    if (key, wrong) == ("no_averaged", "x" * 9):
        return  # any text is a reason
    document = json.loads((saved / "profile.json").read_text())
    (saved / "profile.json").write_text(json.dumps(document | {key: wrong}))
    with pytest.raises(ValueError, match=r"profile\.json and its \.npz are not a readable profile"):
        Profile.load(saved)


def test_an_archive_that_unpacks_to_very_much_is_refused_before_it_is_read(saved: Path) -> None:
    """In a process of its own, whose peak memory tells."""
    with (
        zipfile.ZipFile(saved / "profile.npz", "a", zipfile.ZIP_DEFLATED) as archive,
        archive.open("surplus.npy", "w", force_zip64=True) as member,
    ):
        np.lib.format.write_array_header_1_0(member, {"descr": "<f8", "fortran_order": False, "shape": (1 << 27,)})
        for _ in range(1 << 7):
            member.write(bytes(1 << 23))
    assert (saved / "profile.npz").stat().st_size < 2 << 20
    script = f"""
        import resource
        from decondense import Profile
        import torch
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            Profile.load({str(saved)!r})
        except ValueError as error:
            assert "unpacks to" in str(error), error
        else:
            raise SystemExit("read")
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < (200 << 20) // 1024


# ---- stored states ---------------------------------------------------------------------------------------------------


def dump(folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    for number, passage in enumerate(states()):
        np.save(folder / f"p{number}.npy", passage.numpy())
    manifest = {"layout": "passages", "layers": [0, 1, 2, 3], "final_norm": False, "model": "o/n", "source": "text"}
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))
    return folder


def header(text: str) -> bytes:
    line = text.encode() + b" " * (64 - (len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(line).to_bytes(2, "little") + line + bytes(64)


SHAPE = "{'descr': '<f4', 'fortran_order': False, 'shape': (%s), }"


def _archive(file: Path) -> None:
    with file.open("wb") as handle:
        np.savez(handle, a=np.ones(3))


def _directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(header(SHAPE % ("4, 8, " + "9" * 25))),
        lambda file: file.write_bytes(header(SHAPE % "4, -8, -6")),
        lambda file: file.write_bytes(header("(" * 40)),
        lambda file: file.write_bytes(header("(" * 9000)),
        lambda file: file.write_bytes(header("{'descr': [], 'fortran_order': False, 'shape': ()}")),
        lambda file: file.write_bytes(b"\x93NUMPY"),
        lambda file: file.write_bytes(b""),
        lambda file: np.save(file, np.ones((L + 1, N, D), dtype=np.longdouble)),
        lambda file: np.save(file, np.ones((L + 1, N, D), dtype=np.complex64)),
        lambda file: np.save(file, np.ones((L + 1, N, D), dtype=[("a", "<f4")])),
        _archive,
        _directory,
    ],
)
def test_a_damaged_array_is_named_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], object]
) -> None:
    folder = dump(tmp_path / "states")
    damage(folder / "p1.npy")
    assert main(["measure", "--states", str(folder), "--out", str(tmp_path / "out")]) == 2
    assert str(folder / "p1.npy") in capsys.readouterr().err.replace("\n", "")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["directory", "noise"])
def test_damaged_safetensors_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    folder = dump(tmp_path / "states", layout="vllm")
    save_file({"hidden_states": states()[0].transpose(0, 1).contiguous()}, folder / "a.safetensors")
    file = folder / "b.safetensors"
    file.mkdir() if damage == "directory" else file.write_bytes(b"\xff" * 100)
    assert main(["measure", "--states", str(folder), "--out", str(tmp_path / "out")]) == 2
    assert str(file) in capsys.readouterr().err.replace("\n", "")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parameters": 10**400}, "parameters"),
        ({"parameters": 0}, "parameters"),
        ({"model": "a\x1b[2J"}, "model"),
        ({"model": "a\ud800"}, "model"),
        ({"source": "a\nb"}, "source"),
        ({"source": "a" * 201}, "source"),
        ({"layers": [0], "layout": "layers", "files": ["p0.npy"]}, "holds the state of one layer"),
    ],
)
def test_a_manifest_that_no_result_can_have_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], said: str
) -> None:
    folder = dump(tmp_path / "states", **changes)
    assert main(["measure", "--states", str(folder), "--out", str(tmp_path / "out")]) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert said in err
    assert str(folder) in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["[" * 100_000, '{"layers": ' + "[" * 100_000, "\xff", "", "9" * 5000])
def test_an_unreadable_manifest_is_named(tmp_path: Path, text: str) -> None:
    folder = dump(tmp_path / "states")
    (folder / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"manifest\.json.*A complete one"):
        StateFiles(folder)


def test_digits_of_every_script_are_part_of_a_name(tmp_path: Path) -> None:
    folder = dump(tmp_path / "states")
    (folder / "p0.npy").rename(folder / "p1²3.npy")
    assert len(StateFiles(folder)) == P


# ---- nothing private -------------------------------------------------------------------------------------------------


def written(folder: Path) -> str:
    return "".join(path.read_text() for path in folder.rglob("*") if path.suffix in (".json", ".md", ".csv", ".html"))


def test_folders_and_credentials_of_a_manifest_are_in_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = "https://user:secret@host/corpus?key=secret"
    folder = dump(tmp_path / "states", model="/home/someone/models/mine", source=url)
    out = tmp_path / "out"
    assert main(["measure", "--states", str(folder), "--out", str(out), "--json"]) == 0
    shown = capsys.readouterr()
    for text in (written(out), shown.out.replace(str(out), ""), shown.err):
        assert "secret" not in text
        assert "/home" not in text
    info = Profile.load(out).info
    assert (info["model"], info["source"], info["name"]) == ("mine", "https://host/corpus", "mine")
    given = measure_states(states(), final_norm=False, info={"model": "/home/me/m", "source": url, "more": ["/home/x"]})
    given.save(tmp_path / "given")
    info = Profile.load(tmp_path / "given").info
    assert (info["model"], info["source"], info["more"]) == ("m", "https://host/corpus", ["x"])
    assert given.info["model"] == "/home/me/m"  # in memory it is what was given


def test_folders_of_a_model_and_a_text_are_in_no_file_and_the_results_can_still_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "private" / "mine", 16)
    text = tmp_path / "private" / "text.txt"
    text.write_text(TEXT)
    out, atlas = tmp_path / "out", tmp_path / "atlas"
    source = ["--dataset", str(text), "--passages", "4", "--words", "60", "80", "--tokens", "32"]
    assert main(["measure", str(tmp_path / "private" / "mine"), *source, "--out", str(out)]) == 0
    assert "private" not in written(out)
    info = Profile.load(out).info
    assert (info["model"], info["source"], info["name"]) == ("mine", "text.txt", "mine")
    assert main(["atlas", "add", str(out), "--atlas", str(atlas)]) == 0
    capsys.readouterr()
    assert main(["card", str(out), "--reference", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "mine: 4 passages" in shown
    assert "private" not in written(atlas) + shown
    assert Atlas(atlas).find("mine") == Entry.read(out)
    # a profile that an earlier version wrote, with whole paths, gives the same entry
    document = json.loads((out / "profile.json").read_text())
    document["summary"]["info"] |= {"model": str(tmp_path / "private" / "mine"), "source": str(text)}
    (out / "profile.json").write_text(json.dumps(document))
    assert Atlas(atlas).find("mine") == Entry.read(out)
    assert "private" not in written(out) or Profile.load(out).save(out / "profile")
    assert "private" not in written(out)


def test_a_text_whose_name_no_result_can_have_is_refused_before_it_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "mine", 16)
    assert main(["measure", str(tmp_path / "mine"), "--text", "a\x1b[2J.txt", "--out", str(tmp_path / "out")]) == 2
    assert "cannot be printed" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
