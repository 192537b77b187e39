"""Damaged profiles, entries and pages: one message that names the file, and nothing is written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from decondense.atlas import Atlas, Entry, EntryError, read_summary
from decondense.attaching.checks import AttachError
from decondense.attaching.target_values import resolve_target
from decondense.cli import main
from decondense.figures.condensation import heatmap_figure
from decondense.layers import FINAL_NORM, block
from decondense.measuring import Profile, measure_states
from decondense.report.atlas import card, write_page

INFO = {"name": "n", "model": "o/n", "source": "text", "step": 3, "model_type": "t", "text_hash": "h"}
WRONG: tuple[Any, ...] = (None, [], {}, 5, -1, 0.5, "x", True, [None], [[]], {"x": 1}, 10**29, 10**400, float("nan"))


@pytest.fixture(scope="module")
def profile() -> Profile:
    states = torch.randn(4, 4, 8, 6, generator=torch.Generator().manual_seed(0)) + 0.5
    return measure_states(states, final_norm=True, info={**INFO, "parameters": 1000}, metrics=["isoscore"])


@pytest.fixture
def document(profile: Profile, tmp_path: Path) -> dict[str, Any]:
    return dict(json.loads(profile.save(tmp_path / "whole").read_text()))


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every value, of lists only the first item."""
    if place:
        yield place
    items = value.items() if isinstance(value, dict) else list(enumerate(value))[:1] if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*place, key))


def changed(document: dict[str, Any], place: tuple[Any, ...], value: Any) -> dict[str, Any]:
    copy: dict[str, Any] = json.loads(json.dumps(document))
    inner: Any = copy
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return copy


def use(path: Path, folder: Path, key: str) -> None:
    """Everything that reads a profile's summary or an entry; figures only where they show the value."""
    Entry.read(path)
    if "summary" not in json.loads(path.read_text()):
        folder.mkdir(exist_ok=True)
        path.rename(folder / path.name)
        write_page(Atlas(folder))
        return
    summary = read_summary(path)
    card(summary)
    if key in ("histogram", "mean_cosine", "spearman", "kendall", "passages") and summary["histogram"]:
        heatmap_figure({**summary, "label": "n"}, kind="pooled")
    if summary.get("mean_cosine_others") and summary.get("all_layers"):
        resolve_target(str(path), [block(1), FINAL_NORM], 3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrong", WRONG, ids=lambda value: repr(value)[:12])
def test_no_value_of_a_profile_or_an_entry_is_more_than_an_error_that_names_the_file(
    document: dict[str, Any], tmp_path: Path, wrong: Any
) -> None:
    path = tmp_path / "damaged.json"
    path.write_text(json.dumps(document))
    entry = json.loads(Entry.read(path).to_json())
    refused = []
    for whole in (document, entry):
        for place in places(whole):
            path.write_text(json.dumps(changed(whole, place, wrong)))
            try:
                use(path, tmp_path / "atlas", str(place[-1]))
            except (EntryError, AttachError) as error:
                refused.append((place, str(error)))
    assert len(refused) > 10
    assert [place for place, message in refused if path.name not in message] == []


@pytest.mark.parametrize(
    ("place", "wrong", "key"),
    [
        (("info",), [], "info"),
        (("info",), None, "info"),
        (("info", "source"), {}, "info.source"),
        (("info", "parameters"), 10**29, "info.parameters"),
        (("info", "parameters"), 10**400, "info.parameters"),
        (("last",), [], "last"),
        (("last",), {}, "last.half"),
        (("mean_cosine",), [], "mean_cosine"),
        (("mean_cosine",), None, "mean_cosine"),
        (("mean_cosine",), 5, "mean_cosine"),
        (("spearman_interval",), 5, "spearman_interval"),
        (("histogram",), 5, "histogram"),
        (("histogram",), [[1, 2], [1, 2], [1, 2], [0, 0]], "histogram"),
        (("quantiles",), [[]], "quantiles"),
        (("all_layers",), {"blok 1": {"mean_cosine": 0.5}}, "all_layers"),
    ],
)  # fmt: skip
def test_the_commands_name_file_key_and_remedy_and_write_nothing(
    document: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    place: tuple[str, ...],
    wrong: Any,
    key: str,
) -> None:
    path = tmp_path / "p" / "profile.json"
    path.parent.mkdir()
    path.write_text(json.dumps(changed(document, ("summary", *place), wrong)))
    for command in (["atlas", "add", str(path.parent), "--atlas", str(tmp_path / "atlas")], ["card", str(path)]):
        assert main(command) == 2
        said = "".join(capsys.readouterr().err.split())
        assert "".join(str(path if "card" in command else path.parent).split()) + f":{key}" in said
        assert "Measureagain" in said
        assert "_Info" not in said
    assert not (tmp_path / "atlas").exists()
    assert [file.name for file in path.parent.iterdir()] == ["profile.json"]


def test_the_largest_and_the_smallest_model_share_a_page(profile: Profile, tmp_path: Path) -> None:
    entry = Entry.from_summary(profile.summary())
    entries = [entry.model_copy(update={"model": f"m{size}", "parameters": size}) for size in (1, 10**18)]
    atlas = Atlas(tmp_path)
    atlas.add(entries)
    assert write_page(atlas).is_file()


def test_a_name_that_cannot_be_printed_is_named_with_the_file_unless_it_is_replaced(
    document: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(changed(document, ("summary", "info", "source"), "a\x1b[2J")))
    with pytest.raises(EntryError, match=rf"{path}: text: .*--text-name"):
        read_summary(path)
    assert Entry.read(path, text="replaced").text == "replaced"


# ---- the page --------------------------------------------------------------------------------------------------------

REPORT = '<meta name="generator" content="decondense 1.0"><footer>Made by decondense 1.0 from rows alone.</footer>'


@pytest.mark.parametrize("held", ["<h1>My site</h1>", "", REPORT, None], ids=["site", "empty", "report", "directory"])
def test_a_page_of_someone_else_is_not_overwritten(
    profile: Profile, tmp_path: Path, capsys: pytest.CaptureFixture[str], held: str | None
) -> None:
    page = tmp_path / "site" / "index.html"
    page.parent.mkdir()
    page.mkdir() if held is None else page.write_text(held)
    profile.save(tmp_path / "p")
    for command in (["add", str(tmp_path / "p.json")], ["show"]):
        assert main(["atlas", *command, "--atlas", str(page.parent)]) == 2
        assert "index.html is not the page of an atlas" in " ".join(capsys.readouterr().err.split())
    assert list(page.parent.iterdir()) == [page]
    assert page.is_dir() if held is None else page.read_text() == held


def test_the_page_of_an_earlier_version_is_made_anew(profile: Profile, tmp_path: Path) -> None:
    atlas = Atlas(tmp_path)
    atlas.add([Entry.from_summary(profile.summary())])
    page = write_page(atlas, title="Any title")
    fresh = write_page(atlas).read_text()
    earlier = fresh.replace('content="decondense ', 'content="decondense 0.').replace(
        "by decondense ", "by decondense 0"
    )
    page.write_text(earlier)
    assert write_page(atlas).read_text() == fresh != earlier


def test_without_entries_there_is_no_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["atlas", "show", "--atlas", str(tmp_path)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "has no entries; add one: decondense atlas add PROFILE" in " ".join(shown.err.split())
    assert not list(tmp_path.iterdir())
