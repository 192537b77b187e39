"""Condensation of the final checkpoints: by quantity, by layer, by arm, and against model size."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy import special

from decondense.compare import profiles
from decondense.compare.context import Context, common
from decondense.compare.quantities import shown_in
from decondense.compare.results import (
    FEWEST_MODELS,
    ArmCondensation,
    Layers,
    Measure,
    SizeCorrelation,
    SizePoint,
    SizeTrend,
    Values,
)
from decondense.compare.statistics import Difference, average_ranks
from decondense.compare.study import Study
from decondense.config import ArmConfig, StudyConfig


def measures(context: Context) -> tuple[Measure, ...]:
    """The quantities of condensation of the final checkpoints, with their paired differences."""
    every = (context.measure(quantity) for quantity in shown_in("summary"))
    return tuple(measure for measure in every if measure.values)


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
        last = {name: context.values(arm, profiles.last_of(n)) for name, n in widths.items()}
        found.append(
            ArmCondensation(
                arm=arm,
                parameters=common(cell.recorded("parameters") for cell in cells),
                blocks=depth if len(blocks) == 1 else None,
                last={name: values for name, values in last.items() if values is not None},
                spearman=context.values(arm, profiles.SPEARMAN.of),
                kendall=context.values(arm, profiles.KENDALL.of),
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
        known = {quantity.id: context.values(entry.arm, quantity.of) for quantity in shown_in("size")}
        values = {name: found for name, found in known.items() if found is not None}
        points.append(SizePoint(entry.arm, family_of(context.study, entry.arm), entry.parameters, values))
    if len({point.parameters for point in points}) < 2:
        return None
    families = list(dict.fromkeys(point.family for point in points))
    groups = [(name, [p for p in points if p.family == name]) for name in families]
    wanted = [*groups, *([(None, points)] if len(families) > 1 else [])]
    correlations = []
    for family, group in wanted:
        for quantity in shown_in("size"):
            pairs = [(p.parameters, value) for p in group if (value := p.value(quantity.id)) is not None]
            # two models always lie on a line
            if len({size for size, _ in pairs}) > 2:
                rho, p = _rank_correlation([float(size) for size, _ in pairs], [value for _, value in pairs])
                correlations.append(SizeCorrelation(family, quantity.id, len(pairs), rho, p))
    return SizeTrend(tuple(points), tuple(correlations))


def layers(context: Context) -> Layers | None:
    """Mean cosine of every layer of the final checkpoints, with paired differences."""
    finals = [cell.final_profile() for cell in context.cells.values()]
    labels = Counter(tuple(map(str, profile["layers"])) for profile in finals if profile)
    if not labels:
        return None
    names = labels.most_common(1)[0][0]
    values: dict[str, list[Values]] = {}
    differences: dict[str, list[Difference]] = {}
    for number, label in enumerate(names):
        measure = context.measure(profiles.state(number, label, names))
        for entry in measure.values:
            values.setdefault(entry.arm, []).append(entry)
        for d in measure.differences:
            differences.setdefault(d.arm, []).append(d)
    return Layers(
        names,
        {arm: tuple(entries) for arm, entries in values.items()},
        {arm: tuple(entries) for arm, entries in differences.items()},
    )


def _rank_correlation(x: Sequence[float], y: Sequence[float]) -> tuple[float | None, float | None]:
    """Spearman's rho and its two-sided p: over all orders up to 8 pairs, by Student's t beyond, none below 5."""
    a, b = (average_ranks(values) - (len(x) + 1) / 2 for values in (x, y))
    scale = math.sqrt(float(a @ a) * float(b @ b))
    if scale == 0:
        return None, None
    rho = float(a @ b) / scale
    if len(x) < FEWEST_MODELS:
        return rho, None
    if len(x) <= 8:
        orders = np.array(list(itertools.permutations(range(len(x)))))
        return rho, float(np.mean(np.abs(b[orders] @ a) >= abs(float(a @ b)) - 1e-9))
    t = math.inf if abs(rho) >= 1 else abs(rho) * math.sqrt((len(x) - 2) / (1 - rho**2))
    return rho, float(2 * special.stdtr(len(x) - 2, -t))


_SIZE_WORDS = re.compile(
    r"\d+(\.\d+)?[kmbt]|x{0,3}(small|large|xl)|nano|micro|mini|tiny|small|medium|base|big|large|huge", re.IGNORECASE
)


def family_of(study: Study, arm: str) -> str:
    """What the arms of a family have in common besides their size: the architecture, and what is done to it.

    A start is a hub id or a folder: its name without what tells the size (``Qwen/Qwen3-0.6B-Base`` is of the family
    ``Qwen3-Base``).
    """
    entry = study.arm_config(arm)
    if study.config is None or entry is None:
        return "model"
    treated = [treatment.title for treatment in entry.treatments.values()]
    untrained = " (untrained)" if entry.untrained and not study.measured else ""
    return " + ".join([_origin(study.config, entry), *treated]) + untrained


def _origin(config: StudyConfig, entry: ArmConfig) -> str:
    model = config.model_of(entry)
    if model.prepared is not None:
        return config.prepared[model.prepared].model.architecture
    if model.pretrained is None:
        return model.architecture
    words = model.pretrained.rstrip("/").rsplit("/", 1)[-1].split("-")
    # the last "base" of a name says that a model was not tuned, not how large it is
    kept = [w for i, w in enumerate(words) if not _SIZE_WORDS.fullmatch(w) or (w.lower() == "base" and i > 1)]
    return "-".join(kept) or "-".join(words)
