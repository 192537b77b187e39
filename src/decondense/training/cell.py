"""What the pieces of a run share: who the cell is, where its rows go, how its checkpoints are evaluated."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from decondense.config import SETTINGS, ArmConfig, StudyConfig
from decondense.corpora.packed import PackedCorpus
from decondense.evaluate import held_out_loss
from decondense.measuring import NotFiniteError, Profile, measure
from decondense.records import Row, append_rows, make_row, read_rows, rows_hash
from decondense.training.trainer import is_main_process


class Diverged(RuntimeError):
    """Training produced NaN or infinity; the message names the step and, where the states tell, the layer."""


class Cell:
    """What the pieces of a run share: who it is, where its rows go, how its checkpoints are evaluated."""

    def __init__(
        self,
        study: StudyConfig,
        arm: ArmConfig,
        seed: int,
        corpus: PackedCorpus,
        folder: Path,
        watch: Callable[[], None],
        prepared: Mapping[str, Path],
        with_profile: bool = False,
    ) -> None:
        self.with_profile = with_profile
        self.study, self.seed, self.corpus, self.folder, self.watch = study, seed, corpus, folder, watch
        self.arm = arm.located(prepared)
        self.model = study.model_of(arm)
        if (name := self.model.prepared) is not None:
            self.model = self.model.model_copy(update={"pretrained": str(prepared[name])})
        self.train = study.train_of(arm)
        self.setting = {name: getattr(self.train, name) for name in SETTINGS}
        self.tokens_per_step = self.train.batch_size * self.train.max_seq_length
        self.steps = 0 if arm.untrained else self.train.steps
        self.identity: dict[str, Any] = {
            "study": study.name,
            "study_fingerprint": study.fingerprint(),
            "arm": arm.name,
            "seed": seed,
        }
        self.rows_path = folder / "rows.jsonl"
        self.ignored: list[str] = []
        """Checkpoints and rows that could not be used, and why."""
        self.benchmarks: list[Row] = []
        """Of the final checkpoint; written together with the terminal row, so that they are there once."""

    def differs(self, row: Row) -> bool:
        """Whether a run row was written at another learning rate, warm-up or clipping; rows without them fit."""
        return any(row[name] is not None and row[name] != value for name, value in self.setting.items())

    def check_there(self) -> None:
        """Raise when the folder was removed: neither rows nor a checkpoint may make it again."""
        if is_main_process() and not self.folder.is_dir():
            raise RuntimeError(
                f"{self.folder} was removed while its run was training, so nothing is written there. Start the run "
                "again."
            )

    def write(self, *rows: Row) -> None:
        """Append rows; on the main process only."""
        self.watch()
        self.check_there()
        if is_main_process():
            append_rows(self.rows_path, rows)

    def end(self, row: Row) -> Row:
        """Append the scores of benchmarks and the terminal row, with the hash of the run's other rows."""
        if is_main_process():
            written = read_rows(self.rows_path) if self.rows_path.exists() else []
            row = {**row, "rows_hash": rows_hash([*written, *self.benchmarks])}
        self.write(*self.benchmarks, row)
        return row

    def evaluate(self, model: PreTrainedModel, step: int) -> None:
        """Condensation on held-out passages and held-out loss; the last step's is kept document by document.

        Raises:
            Diverged: states or losses are NaN or infinite. Other failures of the measurement raise their own errors.
        """
        settings = self.study.evaluate
        began = time.perf_counter()
        tokens = step * self.tokens_per_step
        documents = self.corpus.held_out_documents(
            settings.validation_tokens, part=settings.held_out_part, of_one=settings.document_tokens
        )
        try:
            profile = self.profile(model).to_row()
            scores = held_out_loss(model, documents, window=self.train.max_seq_length)
        except NotFiniteError as error:
            raise Diverged(f"step {step}: {error}") from error
        rows = [
            make_row("profile", **self.identity, step=step, tokens=tokens, **profile),
            make_row(
                "eval",
                **self.identity,
                step=step,
                tokens=tokens,
                task="validation",
                metric="loss",
                value=scores.mean,
                higher_is_better=False,
                items=len(scores.documents),
                timing={"wall_s": time.perf_counter() - began},
            ),
        ]
        if step == self.steps:
            rows += [
                make_row(
                    "eval_item",
                    **self.identity,
                    step=step,
                    task="validation",
                    metric="loss",
                    item=document.identity,
                    value=document.mean,
                    weight=float(document.tokens),
                )
                for document in scores.documents
            ]
        self.write(*rows)

    def profile(self, model: PreTrainedModel) -> Profile:
        """Condensation of a model on the study's held-out passages."""
        settings = self.study.evaluate
        ids = torch.from_numpy(self.corpus.passages(settings.passages, settings.passage_tokens).astype(np.int64))
        # the row has no use for matrices averaged over passages, which cost a float64 [T, T] a layer
        return measure(
            model,
            input_ids=ids,
            tokens=settings.passage_tokens,
            histograms=("pooled",),
            blocks=settings.blocks or self._blocks(),
            tokens_first=settings.tokens_first,
        )

    def _blocks(self) -> str | None:
        """Where the blocks are, as this arm's dispersion says, or that of another arm with the same model."""
        same = self.study.model_of(self.arm)
        arms = [self.arm, *(arm for arm in self.study.arms if self.study.model_of(arm) == same)]
        paths = [arm.dispersion.blocks for arm in arms if arm.dispersion is not None]
        return next((path for path in paths if path is not None), None)

    def diverged(self, model: PreTrainedModel, step: int, loss: float) -> Diverged:
        """Say at which step the loss became NaN or infinite, and in which layer when the states tell."""
        try:
            self.profile(model)
        except NotFiniteError as error:
            return Diverged(f"step {step}: {error}")
        return Diverged(f"step {step}: the training loss is {loss}, though the hidden states are finite.")


def device_name() -> str:
    """What this process trains on, for the rows."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
