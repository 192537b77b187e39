"""The tables of the studies that start from a pretrained model."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import claims  # noqa: E402
import mid_training  # noqa: E402
from study_rows import FOLDER, committed  # noqa: E402


def test_a_mean_over_tasks_is_that_of_the_paired_items() -> None:
    generator = np.random.default_rng(0)
    one, other, means, errors = {}, {}, [], []
    for task, count in (("a", 40), ("b", 25)):
        first, second = generator.random(count), generator.random(count)
        one[task] = {f"{task}{i}": (first[i], 1.0) for i in range(count)}
        other[task] = {f"{task}{i}": (second[i], 1.0) for i in reversed(range(count))}
        one[task]["only here"] = (99.0, 1.0)
        difference = first - second
        means.append(difference.mean())
        errors.append(difference.std(ddof=1) / math.sqrt(count))
    mean, error = mid_training.task_mean(one, other)
    assert mean == pytest.approx(np.mean(means))
    assert error == pytest.approx(math.hypot(*errors) / 2)


def test_heavy_items_weigh_more() -> None:
    """Weights 3 and 1 on two of three items: the weighted mean, and the standard error of a weighted mean."""
    mean, error = mid_training.task_mean({"a": {"x": (1.0, 3.0), "y": (0.0, 1.0), "z": (0.5, 0.0)}})
    assert mean == pytest.approx(0.75)
    assert error == pytest.approx(math.sqrt(1.5 * (0.75**2 * 0.25**2 + 0.25**2 * 0.75**2)))


def test_the_claims_on_a_condensed_start_are_judged_by_the_pretrained_one() -> None:
    """Where a study judges in the place of another, its own rows decide and the text names it."""
    for (study, scale), used in claims.INSTEAD.items():
        f = committed(used, scale)
        assert (f is None) == (not (FOLDER / f"{used}-{scale}.jsonl.gz").exists())
        mine = [claim for claim in claims.CLAIMS if claim.study == study]
        assert mine
        expected = {} if f is None else claims.verdicts(f, mine)
        found = claims.judged(scale)
        for claim in mine:
            text, verdict = found[study, claim.published]
            if f is None:
                assert (text, verdict) == ("not run", "not run")
            else:
                assert (text, verdict) == (f"`{used}`: {expected[claim.published][0]}", expected[claim.published][1])
