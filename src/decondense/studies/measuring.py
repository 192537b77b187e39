"""One cell of a study that measures starts and trains nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decondense.config import ArmConfig, StudyConfig
from decondense.config.measure import first_passage
from decondense.records import (
    RecordError,
    Row,
    make_row,
    provenance,
    read_run,
    rows_hash,
    set_aside,
    terminal_row,
    write_rows,
)

if TYPE_CHECKING:
    from decondense.measuring import Profile


def measure_cell(
    study: StudyConfig,
    arm: ArmConfig,
    seed: int,
    folder: Path,
    watch: Callable[[], None],
    *,
    retry_failed: bool = False,
) -> Row:
    """One start of a measured study: its condensation on passages drawn with ``seed``, as rows like any cell's.

    A model that cannot be loaded or measured ends in a ``failed`` row with the reason: the other models are measured.

    Args:
        study: a study with ``measure``.
        arm: one of its arms.
        seed: one of its seeds.
        folder: the cell's own folder.
        watch: called after every batch; it may raise an exception to stop.
        retry_failed: measure failed models again.

    Returns:
        The cell's terminal row.

    Raises:
        CellBusy: another process holds the cell.
        ValueError: the text cannot be read, so no model can be measured.
    """
    from decondense.corpora.passages import sample_passages
    from decondense.stopping import stop_if_requested
    from decondense.training.cell import device_name
    from decondense.training.claim import claim

    assert study.measure is not None
    settings = study.measure
    path = folder / "rows.jsonl"
    identity = {"study": study.name, "study_fingerprint": study.fingerprint(), "arm": arm.name, "seed": seed}
    stopped: list[BaseException] = []

    def progress(*_: Any) -> None:
        try:
            watch()
            stop_if_requested()
        except BaseException as stop:  # whoever watches stops the run; that is no fault of the model's
            stopped.append(stop)
            raise

    with claim(folder):
        before = terminal_row(_rows_of(path))
        if before is not None and not (retry_failed and before["status"] == "failed"):
            return before
        watch()
        texts = sample_passages(
            settings.dataset,
            count=settings.passages,
            words=settings.passage_words,
            seed=first_passage(settings, seed),
        )
        common: dict[str, Any] = {**identity, "config": study.model_dump(mode="json"), "steps": 0}
        try:
            profile, parameters = _measured(study, arm, texts, progress)
        except Exception as error:
            if stopped:
                raise
            ended = make_row(
                "run", **common, status="failed", error=_reason(error), provenance=provenance(device=device_name())
            )
            write_rows(path, [ended])
            return ended
        measured = [make_row("profile", **identity, step=0, tokens=0, **profile.to_row())]
        ended = make_row(
            "run",
            **common,
            status="finished",
            parameters=parameters,
            tokens=0,
            rows_hash=rows_hash(measured),
            provenance=provenance(device=device_name()),
        )
        write_rows(path, [*measured, ended])
        profile.save(folder / "profile", sums="averaged" in settings.histograms)
        return ended


def _rows_of(path: Path) -> list[Row]:
    """The rows of an arm. A damaged file is set aside and named: the arm is then measured again."""
    if not path.exists():
        return []
    try:
        return read_run(path)
    except RecordError as error:
        print(f"{error} {set_aside(path)} and the model is measured again.", file=sys.stderr)
        return []


def _measured(
    study: StudyConfig, arm: ArmConfig, texts: list[str], progress: Callable[..., None]
) -> tuple[Profile, int]:
    """The profile of an arm's start, and its number of parameters."""
    import torch

    from decondense.checkpoints import ModelError
    from decondense.measuring import measure
    from decondense.models import load_model

    settings, start = study.measure, study.model_of(arm)
    assert settings is not None
    assert start.pretrained is not None
    model, tokenizer = load_model(start.pretrained, revision=start.revision)
    if tokenizer is None:
        raise ModelError(f"{start.pretrained} comes without a tokenizer; save the right one into its directory.")
    if torch.cuda.is_available():
        model.to("cuda")
    profile = measure(
        model,
        tokenizer,
        texts,
        tokens=settings.tokens,
        histograms=settings.histograms,
        metrics=settings.metrics,
        logits=settings.logits,
        blocks=settings.blocks,
        tokens_first=settings.tokens_first,
        batch_size=settings.batch_size,
        progress=progress,
    )
    return profile, sum(p.numel() for p in model.parameters())


def _reason(error: Exception) -> str:
    """The message of an error; with its type, unless the error is our own."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return f"out of memory: {error}"
    return str(error) if isinstance(error, ValueError) and str(error) else f"{type(error).__name__}: {error}"
