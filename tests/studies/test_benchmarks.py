from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from decondense.evaluate import EvaluationError
from decondense.studies import run_study
from studies.conftest import SMALL, small_study

pytestmark = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")


@pytest.mark.slow
def test_a_study_scores_its_final_checkpoints_once(tmp_path: Path) -> None:
    (tmp_path / "data" / "lambada_openai").mkdir(parents=True)
    rows = [{"text": f"the number of the word is {number}"} for number in range(6)]
    (tmp_path / "data" / "lambada_openai" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = {**SMALL["evaluate"], "tasks": ["lambada_openai"], "limit": 4, "data_dir": str(tmp_path / "data")}
    study = small_study(evaluate=asked)
    found = run_study(study, tmp_path / "out", workers=0)
    for arm in study.arms:
        mine = [row for row in found if row["arm"] == arm.name and row.get("task") == "lambada_openai"]
        assert [row["kind"] for row in mine] == ["eval", *["eval_item"] * 4]
        assert {row["step"] for row in mine} == {study.train.steps}
        assert mine[0]["notes"][0] == "limited to the first 4 items"
    missing = small_study(evaluate={**asked, "tasks": ["ten"]})
    with pytest.raises(EvaluationError, match=r"lacks 1[0-9] of the files"):
        run_study(missing, tmp_path / "other", workers=0)
    assert not (tmp_path / "other").exists(), "refused before anything is trained"
