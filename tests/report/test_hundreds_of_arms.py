"""More arms than can be drawn: figures, terminal and sentences show the extremes, the tables all."""

from __future__ import annotations

from pathlib import Path

import pytest
from synthetic import study

from decondense.compare import Comparison, Study, compare
from decondense.figures.comparison import MOST_MAPS
from decondense.report import headline, summary, terminal_table
from decondense.report.pictures import Pictures
from decondense.report.selection import MOST_SHOWN, only, shown_arms, shown_in_words

TREATED = [f"arm-{number}" for number in range(40)]
EFFECTS = {"cross-entropy": 0.0} | {arm: -0.1 * (place + 1) for place, arm in enumerate(TREATED)}


@pytest.fixture(scope="module")
def data() -> Study:
    return Study.from_rows(study(EFFECTS, documents=3))


@pytest.fixture(scope="module")
def found(data: Study) -> Comparison:
    return compare(data)


def test_the_extremes_are_shown(found: Comparison) -> None:
    assert shown_arms(found) == ("cross-entropy", *TREATED[:6], *TREATED[-6:])
    assert shown_arms(found, MOST_MAPS) == ("cross-entropy", *TREATED[:2], *TREATED[-3:])
    assert "40 arms: the 6 with the lowest and the 6 with the highest" in shown_in_words(found)
    few = only(found, TREATED[: MOST_SHOWN - 1])
    assert shown_arms(few) == few.arms
    assert shown_in_words(few) == ""
    assert few.validation is not None
    assert found.validation is not None
    # nothing is computed anew: the p-values are corrected over all arms
    assert few.validation.differences == found.validation.differences[: MOST_SHOWN - 1]


def test_what_is_printed_does_not_grow_with_the_arms(found: Comparison) -> None:
    table = terminal_table(found)
    assert table.notes == (shown_in_words(found),)
    again = terminal_table(only(found, shown_arms(found)))
    assert (table.rows, again.notes) == (again.rows, ())
    assert len({row[1] for row in headline(found).rows}) == 41  # type: ignore[union-attr]
    text = summary(found)
    assert len(text) < 4000
    assert "others" in text


@pytest.mark.parametrize("compared", [True, False])
def test_what_is_drawn_does_not_grow_with_the_arms(data: Study, found: Comparison, compared: bool) -> None:
    pictures = Pictures(data, found if compared else None, Path())
    assert len(pictures.study.arms) == MOST_SHOWN
    assert {arm for arm, _ in pictures.study.cells} == set(pictures.study.arms)
    assert "of 40 arms" in pictures.few or "of 41 arms" in pictures.few
    assert len(data.arms) == 41
