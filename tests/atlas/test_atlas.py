"""The scale, the verdict, the shipped references, the atlas and its page; none of it needs torch."""

from __future__ import annotations

import copy
import json
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import kendalltau, spearmanr

from decondense.atlas import (
    SCALE,
    Atlas,
    Entry,
    EntryError,
    caution,
    find_reference,
    judge,
    level,
    read_summary,
    references,
    relate,
    sentences,
)
from decondense.atlas.verdict import RULES
from decondense.cli import main
from decondense.report.atlas import card, write_page


def summary(mean_cosine: list[float], **info: Any) -> dict[str, Any]:
    """The summary of a profile whose mean cosines are these, embedding first."""
    depth = range(len(mean_cosine))
    half = max(1, (len(mean_cosine) - 1) // 2)
    constant = len(set(mean_cosine)) == 1
    names = ["embedding", *(f"block {n}" for n in depth[1:]), "final norm"]
    return {
        "layers": [*names[: len(mean_cosine) - 1], "final norm"],
        "mean_cosine": mean_cosine,
        "spearman": None if constant else float(spearmanr(mean_cosine, depth).statistic),
        "kendall": None if constant else float(kendalltau(mean_cosine, depth).statistic),
        "passages": 100,
        "passage_tokens": 512,
        "histogram": np.eye(len(mean_cosine), 128, 64, dtype=int).tolist(),
        "last": {"half": float(np.mean(mean_cosine[-half:]))},
        "final": "after",
        "all_layers": {
            name: {"mean_cosine": c, "norm": 1.0}
            for name, c in zip(names, [*mean_cosine, mean_cosine[-1]], strict=True)
        },
        "info": {"model": "m", "name": "m", "model_type": None, "parameters": 1000, "source": "embedded", **info},
    }  # fmt: skip


def profile(folder: Path, found: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "profile.json").write_text(json.dumps({"format": 1, "summary": found}))
    return folder


# ---- the scale and the verdict ---------------------------------------------------------------------------------------


def test_the_mean_cosine_is_the_share_that_all_tokens_have_in_common() -> None:
    """What the scale rests on: mean of all cosines = squared length of the mean unit vector = 1 - variance."""
    z = np.random.default_rng(0).normal(size=(40, 9)) + 0.7
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    mu = float((unit @ unit.T).mean())
    assert mu == pytest.approx(float(np.linalg.norm(unit.mean(axis=0)) ** 2), abs=1e-12)
    assert 1 - mu == pytest.approx(float(((unit - unit.mean(axis=0)) ** 2).sum(axis=1).mean()), abs=1e-12)


@pytest.mark.parametrize(
    ("cosine", "expected"),
    [(-0.3, "low"), (0.199, "low"), (0.2, "moderate"), (0.5, "high"), (0.7999, "high"), (0.8, "severe"), (1, "severe")],
)
def test_levels(cosine: float, expected: str) -> None:
    assert level(cosine) == expected
    assert all(low < high for (_, low), (_, high) in pairwise(SCALE))
    assert SCALE[-1][1] == math.inf


@pytest.mark.parametrize(
    ("cosines", "expected", "trend", "apart"),
    [
        ([0.01, 0.02, 0.03, 0.04, 0.05], "low", "rises", {"rises_but_low"}),
        ([0.1, 0.4, 0.6, 0.7, 0.72], "high", "rises", set()),
        ([0.9, 0.9, 0.9, 0.9, 0.9], "severe", "none", set()),
        ([0.95, 0.9, 0.88, 0.86, 0.85], "severe", "falls", {"high_without_rise"}),
        ([0.0, 0.3, 0.6, 0.9, 0.3], "high", "rises", {"last_layer_apart"}),
        ([0.4, 0.3, 0.2, 0.1, 0.05], "low", "falls", set()),
    ],
)
def test_verdicts(cosines: list[float], expected: str, trend: str, apart: set[str]) -> None:
    verdict = judge(summary(cosines))
    assert (verdict.level, verdict.trend, {d.id for d in verdict.disagreements}) == (expected, trend, apart)
    assert verdict.deep_half == pytest.approx((cosines[-1] + cosines[-2]) / 2)
    assert verdict.last == cosines[-1]
    assert verdict.comparison is None  # of 1000 parameters nothing is known
    assert len(sentences(verdict)) == 3
    json.dumps(verdict.to_dict(), allow_nan=False)


def test_the_rules_that_need_more_than_the_means() -> None:
    found = summary([0.0, 0.05, 0.1, 0.1, 0.1])
    found["all_layers"]["block 4"]["mean_cosine"] = 0.4
    found["mean_cosine_others"] = found["mean_cosine"]
    found["quantiles"] = [[-0.5, -0.2, -0.1, 0.3, 0.9]] * 5
    found["metrics"] = {"explainable_variance": [0.1, 0.2, 0.3, 0.7, 0.9]}
    apart = {d.id: (d.first, d.second) for d in judge(found).disagreements}
    assert apart["norm_moves_last"] == (0.4, 0.1)
    assert apart["few_pairs"] == pytest.approx((0.1, -0.1))
    assert apart["one_axis"] == pytest.approx((0.1, 0.8))
    assert set(apart) == {"rises_but_low", "norm_moves_last", "few_pairs", "one_axis"} <= set(RULES)
    assert all(f"{number:.2f}"[-2:] in sentences(judge(found))[2] for pair in apart.values() for number in pair)


def test_the_number_shown_has_the_level_that_is_said() -> None:
    """0.4969 is moderate; shown as 0.50 it would contradict the scale."""
    shown = re.search(r"mean cosine (\S+) in", sentences(judge(summary([0.0, 0.3, 0.4, 0.4969, 0.4969])))[0])
    assert shown is not None
    assert level(float(shown[1])) == "moderate"


# ---- references ------------------------------------------------------------------------------------------------------


def test_shipped_references() -> None:
    known = references()
    assert len({(e.model, e.text) for e in known}) == len(known) > 20
    assert all(e.source and (e.deep_half, e.last, e.spearman) != (None, None, None) for e in known)
    assert find_reference("qwen2.5-0.5b").spearman == 0.95  # figure 2, read off
    published = {e.family: e for e in known if e.approximate}
    assert {"GPT2", "Qwen2.5", "Qwen3", "bloom"} <= set(published)
    for name in ("Qwen2.5", "bloom"):  # larger models of a family are less condensed
        family = sorted((e for e in known if e.family == name and e.approximate), key=lambda e: e.parameters or 0)
        assert family[0].spearman > family[-1].spearman  # type: ignore[operator]


@pytest.mark.parametrize(
    ("info", "model", "relation"),
    [
        ({"name": "Qwen2.5-Math-1.5B", "parameters": 1_540_000_000, "model_type": "qwen2"}, "Qwen2.5-1.5B", "family"),
        ({"name": "owner/bloom-560m", "parameters": 559_000_000, "model_type": "bloom"}, "bloom-560m", "model"),
        ({"name": "mine", "parameters": 9_000_000_000, "model_type": "qwen3"}, "Qwen3-8B", "architecture"),
        ({"name": "mine", "parameters": 3_000_000_000, "model_type": "xyz"}, "Qwen2.5-3B", "size"),
        # a name that only begins like a family's is not one of it
        ({"name": "Qwen2-57B", "parameters": 57_000_000_000, "model_type": "qwen2_moe"}, "Qwen2.5-72B", "size"),
        ({"name": "mine", "parameters": 10_000, "model_type": "xyz"}, None, None),
    ],
)
def test_the_nearest_reference(info: dict[str, Any], model: str | None, relation: str | None) -> None:
    found = judge(summary([0.1, 0.2, 0.3, 0.4, 0.5], **info)).comparison
    assert (found and found.reference.model, found and found.relation) == (model, relation)


@pytest.mark.parametrize(
    ("text", "tokens", "text_hash", "cautious"),
    [
        ("wikitext", 512, None, False),  # what the command calls wikitext-103
        ("embedded", 512, None, True),
        ("wikitext-103", 256, None, True),
        ("wikitext-103", 512, "other", False),  # the reference does not know its passages
    ],
)
def test_another_text_is_never_passed_over(text: str, tokens: int, text_hash: str | None, cautious: bool) -> None:
    found = summary([0.1, 0.2, 0.3, 0.4, 0.5], source=text, text_hash=text_hash)
    found["passage_tokens"] = tokens
    verdict = judge(found, find_reference("GPT2"))
    assert verdict.comparison is not None
    assert bool(caution(verdict.comparison, verdict.text)) == cautious
    assert ("a hint, not a test" in sentences(verdict)[1]) == cautious


def test_passages_are_told_apart_by_their_hash() -> None:
    entry = Entry.from_summary(summary([0.1, 0.2, 0.3], text_hash="a", source="train.txt"))
    assert relate(entry, entry).same_passages is True
    other = entry.model_copy(update={"text_hash": "b"})
    assert (relate(entry, other).same_text, relate(entry, other).same_passages) == (True, False)
    assert "different passages" in caution(relate(entry, other), "train.txt")
    renamed = entry.model_copy(update={"text": "a copy"})
    assert not caution(relate(entry, renamed), "train.txt")


def test_a_reference_on_the_other_side_of_the_norm_is_refused() -> None:
    before = {**summary([0.1, 0.2, 0.3]), "final": "before"}
    with pytest.raises(EntryError, match="--final after"):
        judge(before, find_reference("GPT2"))
    assert judge(before).comparison is None  # and never taken by itself
    with pytest.raises(EntryError, match="Did you mean 'GPT2-large'"):
        find_reference("GPT2-lrge")


# ---- files -----------------------------------------------------------------------------------------------------------


def test_an_atlas_is_added_to_compared_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    atlas = tmp_path / "atlas"
    for name, size, top in (("a-1", 10**8, 0.8), ("a-2", 10**9, 0.4)):
        folder = profile(tmp_path / name, summary([0.1, 0.2, top, top], name=name, parameters=size))
        assert main(["atlas", "add", str(folder), "--atlas", str(atlas), "--family", "a"]) == 0
    kept = {path.name: path.read_bytes() for path in atlas.iterdir()}
    assert set(kept) == {"a-1--embedded.json", "a-2--embedded.json", "index.html"}
    # a name that is taken is refused, with nothing changed
    assert main(["atlas", "add", str(tmp_path / "a-1"), str(tmp_path / "a-2"), "--atlas", str(atlas)]) == 2
    assert {path.name: path.read_bytes() for path in atlas.iterdir()} == kept
    assert main(["atlas", "add", str(tmp_path / "a-1"), "--atlas", str(atlas), "--replace", "--family", "a"]) == 0
    assert main(["atlas", "show", "--atlas", str(atlas)]) == 0
    assert {path.name: path.read_bytes() for path in atlas.iterdir()} == kept  # equal entries, equal page
    capsys.readouterr()
    assert main(["atlas", "compare", "a-1", "a-2", "--atlas", str(atlas)]) == 0
    shown = capsys.readouterr().out
    assert "+0.400" in shown
    assert "hint" not in shown
    assert main(["atlas", "compare", "a-1", "GPT2", "--atlas", str(atlas)]) == 0
    assert "hint" in capsys.readouterr().out
    assert main(["atlas", "compare", "a-1", "a-9", "--atlas", str(atlas)]) == 2


def test_names_that_differ_in_case_or_punctuation_collide(tmp_path: Path) -> None:
    entry = Entry.from_summary(summary([0.1, 0.2, 0.3]), model="org/Model 1")
    atlas = Atlas(tmp_path)
    atlas.add([entry])
    for name in ("org:model-1", "ORG/MODEL 1"):
        with pytest.raises(EntryError, match="exists"):
            atlas.add([entry.model_copy(update={"model": name})])
    two = [entry.model_copy(update={"model": name}) for name in ("x y", "x-y")]
    with pytest.raises(EntryError, match="twice"):
        atlas.add(two)
    assert len(list(tmp_path.iterdir())) == 1
    up = entry.model_copy(update={"model": "../../up", "text": ".."})
    assert [path.parent for path in atlas.add([up])] == [tmp_path]


HOSTILE = "<img src=x onerror=alert(1)>'\"&|`</script>"


def test_hostile_names_are_text_on_the_page_and_in_the_card(tmp_path: Path) -> None:
    found = summary([0.1, 0.2, 0.6], name=HOSTILE, source=HOSTILE)
    atlas = Atlas(tmp_path)
    atlas.add([Entry.from_summary(found, family=HOSTILE, source=HOSTILE)])
    page = write_page(atlas).read_text()
    assert "<img" not in page
    assert page.count("<script") == page.count("</script") == 1
    assert 'http-equiv="Content-Security-Policy" content="default-src \'none\'' in page
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)
    assert "<img" not in card(found).replace("\\<img", "")
    with pytest.raises(EntryError, match="cannot be printed"):
        Entry.from_summary(summary([0.1, 0.2]), model="a\x1b[2J")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda e: e | {"deep_half": 1.5}, "deep_half"),
        (lambda e: e | {"final": "all"}, "final"),
        (lambda e: e | {"unknown": 1}, "unknown"),
        (lambda e: {k: v for k, v in e.items() if k != "text"}, "text"),
        (lambda e: [e], "holds a list"),
        (lambda e: e | {"format": 2}, "format"),
    ],
)
def test_damaged_entries_are_named(tmp_path: Path, damage: Any, message: str) -> None:
    path = Atlas(tmp_path).add([Entry.from_summary(summary([0.1, 0.2, 0.3]))])[0]
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(EntryError, match=rf"(?s){re.escape(str(path))}.*{message}"):
        Atlas(tmp_path).entries()


def test_a_card_is_markdown_with_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = profile(tmp_path / "p", summary([0.1, 0.2, 0.3, 0.44], name="mine"))
    assert main(["card", str(folder), "--reference", "GPT2"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("## Embedding condensation\n")
    assert "| mean cosine, last layer | 0.440 |" in text
    assert "GPT2" in text
    assert (folder / "condensation.png").read_bytes().startswith(b"\x89PNG")
    found = copy.deepcopy(read_summary(folder))
    found["histogram"] = None  # measured without one: no picture, and none is named
    assert main(["card", str(profile(tmp_path / "q", found))]) == 0
    assert "![" not in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "q").iterdir()] == ["profile.json"]


def test_folders_of_this_machine_are_in_no_entry(tmp_path: Path) -> None:
    path = profile(tmp_path / "p", summary([0.1, 0.2], name=None, model="/home/me/m", source="/home/me/text.txt"))
    text = Entry.read(path).to_json()
    assert "/home" not in text
    assert (Entry.read(path).model, Entry.read(path).text) == ("m", "text.txt")
