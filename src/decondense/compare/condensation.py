"""Condensation of the final checkpoints: by quantity, by layer, by arm, and against model size."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

from decondense.compare.context import Context, common
from decondense.compare.results import (
    FEWEST_MODELS,
    SIZE_QUANTITIES,
    ArmCondensation,
    Layers,
    Measure,
    SizeCorrelation,
    SizePoint,
    SizeTrend,
    Values,
)
from decondense.compare.statistics import Difference
from decondense.compare.study import Cell, Study
from decondense.config import PREPARED


def measures(context: Context) -> tuple[Measure, ...]:
    """The quantities of condensation of the final checkpoints, with their paired differences."""

    def blocks(cell: Cell) -> float | None:
        profile = cell.final_profile()
        return float(np.mean(profile["mean_cosine"][1:])) if profile and len(profile["mean_cosine"]) > 1 else None

    def last(cell: Cell) -> float | None:
        profile = cell.final_profile()
        return float(profile["mean_cosine"][-1]) if profile else None

    wanted = [
        ("mean cosine, all blocks", blocks, "cosine"),
        ("mean cosine, last layer", last, "cosine"),
        ("Spearman of mean cosine with depth", _trend_of("spearman"), ""),
        ("Kendall of mean cosine with depth", _trend_of("kendall"), ""),
    ]
    # less condensation is what the method aims at, but it is no good in itself: no direction
    found = (context.measure(name, of, unit=unit) for name, of, unit in wanted)
    return tuple(measure for measure in found if measure.values)


def by_arm(context: Context) -> tuple[ArmCondensation, ...]:
    """Condensation of each arm's final checkpoints."""
    found = []
    for arm in context.arms:
        cells = [context.cells[arm, seed] for seed in context.seeds if (arm, seed) in context.cells]
        blocks = {len(profile["mean_cosine"]) - 1 for cell in cells if (profile := cell.final_profile())}
        if not blocks:
            continue
        depth = min(blocks)
        widths = {str(n): n for n in range(1, 6) if n <= depth} | {"L/2": max(1, depth // 2)}
        last = {name: context.values(arm, _last_of(n)) for name, n in widths.items()}
        found.append(
            ArmCondensation(
                arm=arm,
                parameters=common(cell.said("parameters") for cell in cells),
                blocks=depth if len(blocks) == 1 else None,
                last={name: values for name, values in last.items() if values is not None},
                spearman=context.values(arm, _trend_of("spearman")),
                kendall=context.values(arm, _trend_of("kendall")),
            )
        )
    return tuple(found)


def size_trend(context: Context) -> SizeTrend | None:
    """Condensation against size, when arms have models of their own and these differ in size."""
    if not any(context.study.has_own_model(arm) for arm in context.arms):
        return None
    points = []
    for entry in by_arm(context):
        if entry.parameters is None:
            continue
        means = [None if v is None else v.mean for v in (entry.spearman, entry.kendall, entry.last.get("1"))]
        points.append(SizePoint(entry.arm, family_of(context.study, entry.arm), entry.parameters, *means))
    if len({point.parameters for point in points}) < 2:
        return None
    families = list(dict.fromkeys(point.family for point in points))
    groups = [(name, [p for p in points if p.family == name]) for name in families]
    wanted = [*groups, *([(None, points)] if len(families) > 1 else [])]
    correlations = []
    for family, group in wanted:
        for quantity in SIZE_QUANTITIES:
            pairs = [(p.parameters, value) for p in group if (value := p.value(quantity)) is not None]
            # two models always lie on a line
            if len({size for size, _ in pairs}) > 2:
                rho, p = _rank_correlation([float(size) for size, _ in pairs], [value for _, value in pairs])
                correlations.append(SizeCorrelation(family, quantity, len(pairs), rho, p))
    return SizeTrend(tuple(points), tuple(correlations))


def layers(context: Context) -> Layers | None:
    """Mean cosine of every layer of the final checkpoints, with paired differences."""
    profiles = {place: cell.final_profile() for place, cell in context.cells.items()}
    labels = Counter(tuple(profile["layers"]) for profile in profiles.values() if profile)
    if not labels:
        return None
    names = labels.most_common(1)[0][0]
    values: dict[str, list[Values]] = {}
    differences: dict[str, list[Difference]] = {}
    for number, label in enumerate(names):

        def of(cell: Cell, number: int = number) -> float | None:
            profile = cell.final_profile()
            return float(profile["mean_cosine"][number]) if profile and tuple(profile["layers"]) == names else None

        measure = context.measure(f"mean cosine, {label}", of, unit="cosine")
        for entry in measure.values:
            values.setdefault(entry.arm, []).append(entry)
        for d in measure.differences:
            differences.setdefault(d.arm, []).append(d)
    return Layers(
        tuple(str(name) for name in names),
        {arm: tuple(entries) for arm, entries in values.items()},
        {arm: tuple(entries) for arm, entries in differences.items()},
    )


def _trend_of(name: str) -> Callable[[Cell], float | None]:
    def of(cell: Cell) -> float | None:
        profile = cell.final_profile()
        return float(profile[name]) if profile and profile[name] is not None else None

    return of


def _last_of(n: int) -> Callable[[Cell], float | None]:
    def of(cell: Cell) -> float | None:
        profile = cell.final_profile()
        return float(np.mean(profile["mean_cosine"][-n:])) if profile else None

    return of


def _rank_correlation(x: Sequence[float], y: Sequence[float]) -> tuple[float | None, float | None]:
    """Spearman's rho and its two-sided p: over all orders up to 8 pairs, by Student's t beyond, none below 5."""
    a, b = (stats.rankdata(values) - (len(x) + 1) / 2 for values in (x, y))
    scale = math.sqrt(float(a @ a) * float(b @ b))
    if scale == 0:
        return None, None
    rho = float(a @ b) / scale
    if len(x) < FEWEST_MODELS:
        return rho, None
    if len(x) <= 8:
        orders = np.array(list(itertools.permutations(range(len(x)))))
        return rho, float(np.mean(np.abs(b[orders] @ a) >= abs(float(a @ b)) - 1e-9))
    return rho, float(stats.spearmanr(x, y).pvalue)


_SIZE_WORDS = re.compile(
    r"\d+(\.\d+)?[kmbt]|x{0,3}(small|large|xl)|nano|micro|mini|tiny|small|medium|base|big|large|huge", re.IGNORECASE
)
_TREATMENTS = {
    "dispersion": "dispersion",
    "noisy_embedding": "noisy embedding",
    "active_forgetting": "active forgetting",
    "distillation": "distillation",
}


def family_of(study: Study, arm: str) -> str:
    """What the arms of a family have in common besides their size: the architecture, and what is done to it.

    A start is a hub id or a folder: its name without what tells the size (``Qwen/Qwen3-0.6B-Base`` is of the family
    ``Qwen3-Base``).
    """
    entry, base = study.entry(arm), study.config.get("model") or {}
    own = entry.get("model") or {}
    start = own.get("start") or (None if own.get("architecture") else base.get("start"))
    if start and str(start).startswith(PREPARED):
        prepared = (study.config.get("prepared") or {}).get(str(start)[len(PREPARED) :], {}).get("model") or {}
        name = str(prepared.get("architecture") or start)
    elif start:
        words = str(start).rstrip("/").rsplit("/", 1)[-1].split("-")
        # the last "base" of a name says that a model was not tuned, not how large it is
        kept = [w for i, w in enumerate(words) if not _SIZE_WORDS.fullmatch(w) or (w.lower() == "base" and i > 1)]
        name = "-".join(kept) or "-".join(words)
    else:
        name = str(own.get("architecture") or base.get("architecture") or "model")
    treated = [words for key, words in _TREATMENTS.items() if entry.get(key) is not None]
    return " + ".join([name, *treated]) + (" (untrained)" if entry.get("untrained") and not study.measured else "")
