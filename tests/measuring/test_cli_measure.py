"""The verb `measure` on saved models: files, figures, tables, and errors that exit with 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from tiny_models import TEXT, save

from decondense import Profile
from decondense.cli import main


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("zoo")
    for name, width in (("small", 16), ("large", 32)):
        save(root / name, width)
    for step in (0, 20, 100):
        save(root / "run" / f"checkpoint-{step}", 16)
    save(root / "mute", 16, tokenizer=False)
    (root / "empty").mkdir()
    (root / "text.txt").write_text(TEXT)
    return root


def run(zoo: Path, *arguments: object) -> int:
    source = ["--text", str(zoo / "text.txt"), "--passages", "4", "--words", "60", "80", "--tokens", "32"]
    return main(["measure", *source, *map(str, arguments)])


def test_one_model(zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(zoo, zoo / "small", "--out", tmp_path, "--metrics", "isoscore,hfc_lfc", "--logits") == 0
    shown = capsys.readouterr().out
    assert "final norm" in shown
    assert "Spearman of mean cosine and depth" in shown
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"profile.json", "profile.npz", "heatmap.png", "heatmap.pdf", "layers.md", "layers.csv"}
    profile = Profile.load(tmp_path)
    assert (profile.n_passages, profile.tokens) == (4, 32)
    assert set(profile.metrics) == {"isoscore", "hfc_lfc"}
    assert profile.all_layers[-1] == "logits"
    assert profile.info["source"].endswith("text.txt")
    with Image.open(tmp_path / "heatmap.png") as image:
        assert image.width > 800
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 20
    assert json.loads((tmp_path / "profile.json").read_text())["summary"]["layers"] == profile.layers


def test_family_pairs_and_checkpoints(zoo: Path, tmp_path: Path) -> None:
    both = (zoo / "large", zoo / "small")
    assert run(zoo, *both, "--family", "zoo", "--out", tmp_path / "f", "--heat-map", "pooled", "--bins", "64") == 0
    assert {"family.png", "family.pdf", "models.md", "models.csv", "small", "large"} == {
        path.name for path in (tmp_path / "f").iterdir()
    }
    assert (tmp_path / "f" / "small" / "heatmap.pdf").read_bytes().startswith(b"%PDF")
    assert run(zoo, *both, "--pairs", "--out", tmp_path / "p", "--palette", "cividis") == 0
    assert (tmp_path / "p" / "pairs.png").is_file()
    assert run(zoo, "--checkpoints", zoo / "run", "--out", tmp_path / "c") == 0
    assert (tmp_path / "c" / "checkpoints.png").is_file()
    lines = (tmp_path / "c" / "models.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines[1:]] == ["step 0", "step 20", "step 100"]
    assert Profile.load(tmp_path / "c" / "step-20").info["step"] == 20


def test_every_record_a_passage(zoo: Path, tmp_path: Path) -> None:
    records = [{"text": " ".join(["w1 w2 w3 w4"] * n)} for n in (2, 3, 5)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    arguments = ["measure", str(zoo / "small"), "--text", str(tmp_path / "rows.jsonl"), "--each", "--out"]
    assert main([*arguments, str(tmp_path / "out")]) == 0
    profile = Profile.load(tmp_path / "out")
    assert profile.lengths.tolist() == [8, 12, 20]
    assert "equal length" in profile.no_averaged
    assert (tmp_path / "out" / "heatmap.png").is_file()  # of all pairs instead


def test_a_tokenizer_from_elsewhere_and_offload(zoo: Path, tmp_path: Path) -> None:
    options = ["--tokenizer", zoo / "small", "--max-memory", "cpu=20KB", "--offload", tmp_path / "disk"]
    assert run(zoo, zoo / "mute", "--out", tmp_path / "m", *options) == 0
    assert run(zoo, zoo / "small", "--out", tmp_path / "s") == 0
    one, other = Profile.load(tmp_path / "m"), Profile.load(tmp_path / "s")
    assert abs(one.cosine - other.cosine).max() < 1e-6
    assert one.info["placement"] == ["cpu", "disk"]
    assert other.info["placement"] == ["cpu"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no model given"),
        (["{zoo}/empty"], "is not a model: it has no config.json"),
        (["{zoo}"], "There are models below it: large, mute, small"),
        (["{zoo}/text.txt"], "is a file; give the directory"),
        (["{zoo}/nothing"], "no model directory"),
        (["nobody/no-such-model"], "the hub cannot be reached or does not have it"),
        (["{zoo}/mute"], "comes without a tokenizer; name the right one with --tokenizer"),
        (["{zoo}/mute", "--tokenizer", "{zoo}/empty"], "no tokenizer at"),
        (["{zoo}/small", "--tokens", "65"], "longer than the 64 positions"),
        (["{zoo}/small", "--metrics", "isoscor"], "Did you mean 'isoscore'"),
        (["{zoo}/small", "--bins", "100"], "power of two"),
        (["{zoo}/small", "--heat-map", "averagd"], "Did you mean 'averaged'"),
        (["{zoo}/small", "--palette", "red"], "Did you mean 'reds'"),
        (["{zoo}/small", "--dtype", "float23"], "Did you mean"),
        (["{zoo}/small", "--pairs"], "even number of models"),
        (["{zoo}/small", "--checkpoints", "{zoo}/run"], "--checkpoints measures one run"),
        (["--checkpoints", "{zoo}/empty"], "has no checkpoints"),
        (["--checkpoints", "owner/name"], "--revisions A,B,C"),
        (["{zoo}/small", "--dataset", "imdb"], "either --dataset or --text"),
        (["{zoo}/small", "--max-memory", "8GiB"], "expected DEVICE=AMOUNT"),
    ],
)
def test_errors(
    zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    status = run(zoo, *(argument.format(zoo=zoo) for argument in arguments), "--out", tmp_path / "out")
    assert status == 2
    error = capsys.readouterr().err
    assert message in " ".join(error.split())
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_revisions_of_a_hub_model_are_ordered_by_step() -> None:
    from decondense.cli.inputs import named_models

    listed = [("owner/name@step20", 20), ("owner/name@stage1-step1000-tokens4B", 1000)]
    assert named_models(["owner/name"], None, "stage1-step1000-tokens4B, step20", False) == listed
    assert named_models([], "owner/name", "stage1-step1000-tokens4B,step20", False) == listed


def test_models_in_folders_of_one_name_are_told_apart(tmp_path) -> None:
    from decondense.cli.inputs import labels_of
    from decondense.cli.options import slug

    runs = [tmp_path / arm / "seed-0" / "final" for arm in ("a", "b")]
    assert labels_of([str(run) for run in runs]) == ["a", "b"]
    assert labels_of(["x/a/1/final", "x/b/1/final", "y/a/1/final"]) == ["x/a", "x/b", "y/a"]
    assert labels_of(["org/one", "org/two@step5"]) == ["one", "two@step5"]
    (tmp_path / "link").symlink_to(runs[0])
    for one, other in (("a", "a"), ("a", "a/"), ("a", "./b/../a"), (str(runs[0]), str(tmp_path / "link"))):
        with pytest.raises(ValueError, match="given twice"):
            labels_of(["c", one, other])
    # no two are the same folder, also where a file system does not tell upper from lower case
    for names in (["m x", "m-x"], ["a/m", "a/M"], ["x/m?", "x/m*", "x/m-2", "x/m"], ["p/m x", "q/m x", "q/m-x"]):
        assert len({slug(label).lower() for label in labels_of(names)}) == len(names)


def test_records_too_short_for_a_cosine_are_skipped_and_counted(
    zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def each(*texts: str | None) -> tuple[int, str, str]:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        arguments = ["measure", str(zoo / "small"), "--text", str(tmp_path / "rows.jsonl"), "--each"]
        status = main([*arguments, "--out", str(tmp_path / "out")])
        shown = capsys.readouterr()
        return status, shown.out, " ".join(shown.err.split())

    status, out, _ = each("w1 w2 w3", "w4", None, "w5 w6", " ", "w7")
    assert status == 0
    assert Profile.load(tmp_path / "out").n_passages == 2
    assert "2 of 6 records hold no text and are skipped" in out
    assert "2 of 4 records have fewer than two tokens and are skipped" in out
    status, _, err = each("w1", "w2")
    assert status == 2
    assert "all 2 records have fewer than two tokens" in err
    status, _, err = each(None, "")
    assert status == 2
    assert "holds no text" in err
    status = main(["measure", str(zoo / "small"), "--text", "https://me:secret@host/a?key=secret"])
    assert status == 2
    assert "secret" not in "".join(capsys.readouterr())
