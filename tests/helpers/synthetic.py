"""Rows of studies that never ran, built through ``records.make_row`` so that they obey the schema.

The losses follow simple curves plus seeded noise; nothing here imitates the code under test.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from decondense.records import Row, make_row

LAYERS = ["embedding", *(f"block {number}" for number in range(1, 6)), "final norm"]
POINTS = (0.0, 0.1, 0.25, 0.5, 1.0)
TOKENS_A_STEP = 2048
BINS = 128


def digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def config(
    arms: Sequence[str], seeds: Sequence[int], *, baseline: str = "cross-entropy", steps: int = 300, **over: Any
) -> dict[str, Any]:
    return {
        "name": "synthetic",
        "title": "A study that never ran",
        "question": "Does dispersion lower the held-out loss of a small model?",
        "scale": "tiny",
        "baseline": baseline,
        "arms": [{"name": arm, "label": None} for arm in arms],
        "seeds": list(seeds),
        "train": {"steps": steps},
        **over,
    }


def histogram(mean: float, rng: np.random.Generator, *, pairs: int = 4096) -> list[int]:
    """Counts of cosines with about this mean, 128 equal bins on [-1, 1]."""
    width = 0.05 + 0.15 * (1 - abs(mean))
    values = np.clip(rng.normal(mean, width, pairs), -1, 1 - 1e-9)
    return np.histogram(values, bins=BINS, range=(-1, 1))[0].tolist()


def cosines(arm: str, progress: float, rng: np.random.Generator) -> list[float]:
    """Mean cosine by layer: condensation peaks early and is then relieved; dispersion arms stay low."""
    depth = np.linspace(0, 1, len(LAYERS))
    peak = 0.1 + 0.85 * np.exp(-(((progress - 0.15) / 0.35) ** 2)) + 0.25 * progress
    height = peak * (0.35 if "dispersion" in arm else 1.0)
    return np.clip(0.02 + height * depth**1.3 + rng.normal(0, 0.01, len(LAYERS)), -0.2, 0.99).tolist()


def cell(
    arm: str,
    seed: int,
    *,
    configuration: Mapping[str, Any],
    effect: float,
    steps: int = 300,
    documents: int = 60,
    seed_sd: float = 0.02,
    document_sd: float = 0.05,
    step_ms: float = 100.0,
    status: str = "finished",
    log_every: int = 10,
    study: str = "synthetic",
    fingerprint: str = "f" * 16,
    tasks: Mapping[str, float] | None = None,
    task_items: int = 200,
) -> list[Row]:
    """All rows of one cell: ``effect`` is what the arm adds to the final validation loss of 5.4."""
    common = {"study": study, "study_fingerprint": fingerprint, "arm": arm, "seed": seed}
    shared = np.random.default_rng([7, seed])  # what both arms of a seed have in common
    own = np.random.default_rng([int(digest(arm), 16) % 2**32, seed])
    texts = np.random.default_rng(99)  # what all cells have in common
    offset = shared.normal(0, 0.03)
    bias = own.normal(0, seed_sd)
    hardness = texts.normal(0, 0.4, documents)
    weights = texts.integers(50, 900, documents).astype(float)
    taste = own.normal(0, document_sd, documents)
    hashes = {
        "init_hash": digest("init", seed),
        "order_hash": digest("order", seed),
        "corpus_hash": digest("corpus"),
    }
    rows = [
        make_row(
            "run",
            **common,
            status="started",
            config=configuration,
            parameters=1_738_752,
            **hashes,
            provenance={
                "time": "2026-01-01T00:00:00+00:00",
                "python": "3.12.1",
                "platform": "Linux-6",
                "cpu": "A processor <with> marks",
                "cores": 2,
                "versions": {"decondense": "0.1.0", "torch": "2.13.0", "numpy": "2.4.0"},
                "commit": "abcdef123456",
                "command": "decondense demo --out out",
                "device": "cpu",
            },
        )
    ]

    def loss(step: int) -> float:
        progress = step / steps
        start, end = 8.32, 5.4 + effect * min(1.0, 4 * progress) + bias
        return end + offset + (start - end) * np.exp(-6 * progress) - (start - end) * np.exp(-6) * progress

    def items_at(step: int) -> np.ndarray[Any, Any]:
        centre = np.average(hardness + taste, weights=weights)
        return loss(step) + hardness + taste - centre

    for step in sorted({round(point * steps) for point in POINTS}):
        tokens = step * TOKENS_A_STEP
        rng = np.random.default_rng([int(digest(arm, step), 16) % 2**32, seed])
        means = cosines(arm, step / steps, rng)
        rows.append(
            make_row(
                "profile",
                **common,
                step=step,
                tokens=tokens,
                layers=LAYERS,
                mean_cosine=means,
                spearman=0.9,
                kendall=0.8,
                passages=32,
                passage_tokens=128,
                histogram=[histogram(mean, rng) for mean in means],
            )
        )
        rows.append(
            make_row(
                "eval",
                **common,
                step=step,
                tokens=tokens,
                task="validation",
                metric="loss",
                value=float(np.average(items_at(step), weights=weights)),
                higher_is_better=False,
                items=documents,
            )
        )
    for step in range(log_every, steps + 1, log_every):
        rows.append(
            make_row(
                "step",
                **common,
                step=step,
                tokens=step * TOKENS_A_STEP,
                loss=loss(step) - 0.05 + float(own.normal(0, 0.04)),
                learning_rate=3e-3,
                gradient_norm=1.0,
                dispersion=-0.4 if "dispersion" in arm else None,
                dispersion_weight=0.1 if "dispersion" in arm else None,
                timing={"wall_ms": step_ms, "cpu_ms": step_ms},
            )
        )
    for number, value in enumerate(items_at(steps)):
        rows.append(
            make_row(
                "eval_item",
                **common,
                step=steps,
                task="validation",
                metric="loss",
                item=digest("document", number),
                value=float(value),
                weight=float(weights[number]),
            )
        )
    for task, rate in (tasks or {}).items():
        difficulty = np.random.default_rng(int(digest(task), 16) % 2**32).random(task_items)
        correct = (difficulty < rate + 0.02 * own.normal()).astype(float)
        flips = own.random(task_items) < 0.1
        correct = np.where(flips, 1 - correct, correct)
        for number, value in enumerate(correct):
            rows.append(
                make_row(
                    "eval_item",
                    **common,
                    step=steps,
                    task=task,
                    metric="acc",
                    item=digest(task, number),
                    value=float(value),
                )
            )
        rows.append(
            make_row(
                "eval",
                **common,
                step=steps,
                tokens=steps * TOKENS_A_STEP,
                task=task,
                metric="acc",
                value=float(correct.mean()),
                higher_is_better=True,
                items=task_items,
            )
        )
    if status in ("finished", "failed"):
        rows.append(
            make_row(
                "run",
                **common,
                status=status,
                config=configuration,
                steps=steps,
                tokens=steps * TOKENS_A_STEP,
                parameters=1_738_752,
                final_hash=digest("final", arm, seed),
                error="the loss became NaN at step 120" if status == "failed" else None,
                timing={
                    "train_wall_s": steps * step_ms / 1000,
                    "step_wall_ms": step_ms,
                    "step_cpu_ms": step_ms * 0.98,
                    "peak_rss_bytes": 6e8,
                },
                provenance={"time": "2026-01-01T00:01:00+00:00"},
                **hashes,
            )
        )
    return rows


def study(
    effects: Mapping[str, float] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    *,
    change: Callable[[Row], Row | None] | None = None,
    step_ms: Mapping[str, float] | None = None,
    tasks: Mapping[str, Mapping[str, float]] | None = None,
    **keywords: Any,
) -> list[Row]:
    """Rows of a whole study; ``change`` edits or drops single rows."""
    effects = effects if effects is not None else {"cross-entropy": 0.0, "dispersion": -0.2}
    steps = keywords.get("steps", 300)
    configuration = config(list(effects), seeds, steps=steps, baseline=next(iter(effects)))
    rows = [
        row
        for arm, effect in effects.items()
        for seed in seeds
        for row in cell(
            arm,
            seed,
            configuration=configuration,
            effect=effect,
            step_ms=(step_ms or {}).get(arm, 100.0 + seed),
            tasks=(tasks or {}).get(arm),
            **keywords,
        )
    ]
    if change is None:
        return rows
    return [changed for row in rows if (changed := change(dict(row))) is not None]


def with_arms(rows: Sequence[Row], arms: Mapping[str, Mapping[str, Any]], **over: Any) -> list[Row]:
    """The rows with fields added to the entries of some arms, and to the whole configuration."""
    changed = []
    for row in rows:
        if row["kind"] == "run":
            entries = [{**entry, **arms.get(entry["name"], {})} for entry in row["config"]["arms"]]
            row = {**row, "config": {**row["config"], "arms": entries, **over}}
        changed.append(row)
    return changed


def trial(
    arm: str,
    values: Mapping[float, float | None],
    *,
    chosen: float | None = None,
    seed: int = 1000,
    study: str = "synthetic",
    fingerprint: str = "f" * 16,
) -> list[Row]:
    """Trials of an arm: learning rate -> loss, or None when it failed; the least loss is chosen unless told."""
    finished = {rate: value for rate, value in values.items() if value is not None}
    if chosen is None and finished:
        chosen = min(finished, key=lambda rate: finished[rate])
    return [
        make_row(
            "trial",
            study=study,
            study_fingerprint=fingerprint,
            arm=arm,
            seed=seed,
            status="failed" if value is None else "finished",
            learning_rate=rate,
            steps=100,
            value=value,
            chosen=rate == chosen,
            error="the loss became NaN at step 7" if value is None else None,
        )
        for rate, value in values.items()
    ]


def measured_study(
    models: Mapping[str, float],
    seeds: Sequence[int] = (0, 1, 2),
    *,
    change: Callable[[Row], Row | None] | None = None,
) -> list[Row]:
    """Rows of a study that trains nothing: hub ids with their numbers of parameters; later ones are less condensed.

    An arm is called as the part of its id after the slash.
    """
    starts = {start.rsplit("/", 1)[-1]: start for start in models}
    configuration = config(
        list(starts), seeds, baseline=next(iter(starts)), title="Models that were never loaded", measure={"tokens": 512}
    )
    configuration["arms"] = [
        {"name": name, "label": None, "untrained": True, "model": {"pretrained": start}}
        for name, start in starts.items()
    ]
    rows: list[Row] = []
    for place, (name, start) in enumerate(starts.items()):
        parameters = models[start]
        for seed in seeds:
            common = {"study": "synthetic", "study_fingerprint": "f" * 16, "arm": name, "seed": seed}
            rng = np.random.default_rng([place, seed])
            means = np.clip(
                np.linspace(0.1, 0.9 / (1 + place), len(LAYERS)) + rng.normal(0, 0.02, len(LAYERS)), -1, 1
            ).tolist()
            told = {"config": configuration, "parameters": int(parameters), "init_hash": digest("weights", name)}
            rows.append(make_row("run", **common, status="started", **told))
            rows.append(
                make_row(
                    "profile",
                    **common,
                    step=0,
                    tokens=0,
                    layers=LAYERS,
                    mean_cosine=means,
                    spearman=0.95 - 0.1 * place + 0.01 * seed,
                    kendall=0.85 - 0.1 * place + 0.01 * seed,
                    passages=32,
                    passage_tokens=512,
                    histogram=[histogram(mean, rng) for mean in means],
                )
            )
            rows.append(make_row("run", **common, status="finished", steps=0, tokens=0, **told))
    if change is None:
        return rows
    return [changed for row in rows if (changed := change(dict(row))) is not None]
