"""Profiles as tables: one row per layer, or one row per model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from decondense.config import MeasureConfig
from decondense.formatting import NONE, count, fitting, interval, number, plural
from decondense.measuring.profile import Kind, Profile
from decondense.measuring.sinks import SINK_NORM
from decondense.table import Entry, Table

_QUANTILES = (0.05, 0.5, 0.95)


def layer_table(profile: Profile) -> Table:
    """One row for every measured state: means with intervals, norms, quantiles and side metrics."""
    quantiles = [f"{100 * q:.0f} %" for q in _QUANTILES] if profile.pooled is not None else []
    columns = ("layer", "mean cosine", "95 % interval", "mean cosine i!=j", "norm", *quantiles, *profile.metric_names)
    whole = profile.with_all_layers()
    low, high = whole.interval("mean_cosine")
    shares = whole.quantiles(_QUANTILES) if profile.pooled is not None else None
    sides = [whole.metric(name) for name in profile.metric_names]
    rows: list[tuple[Entry, ...]] = []
    for i, name in enumerate(profile.all_layers):
        cells = [
            _number(whole.mean_cosine[i]),
            _interval(low[i], high[i]),
            _number(whole.mean_cosine_others[i]),
            _number(whole.norms[i]),
        ]
        if shares is not None:
            cells += [_number(value) for value in shares[i].tolist()]
        cells += [_number(float(values[i])) for values in sides]
        rows.append((name, *cells))
    return Table("layers", "", columns, tuple(rows))


def terminal_layers(profile: Profile) -> Table:
    """The columns of :func:`layer_table` that a terminal has room for: no side metrics."""
    hidden = {"mean cosine i!=j", *profile.metric_names}
    table = layer_table(profile)
    return table.select([column for column in table.columns if column not in hidden])


def model_table(profiles: Sequence[tuple[str, Profile]]) -> Table:
    """One row for every model: size, first, last and mean-of-the-last-half cosine, rank correlations with intervals."""
    columns = ("model", "parameters", "layers", "passages", "embedding", "last layer", "last half", "Spearman",
               "95 % interval", "Kendall", "95 % interval of Kendall")  # fmt: skip
    rows: list[tuple[Entry, ...]] = []
    for label, profile in profiles:
        size = profile.info.get("parameters")
        rows.append(
            (
                label,
                (NONE if size is None else f"{size:,}", size),
                (str(len(profile.layers) - 1), len(profile.layers) - 1),
                (str(profile.n_passages), profile.n_passages),
                _number(profile.mean_cosine[0]),
                _number(profile.mean_cosine[-1]),
                _number(profile.last()),
                _number(profile.spearman),
                _interval(*profile.interval("spearman")),
                _number(profile.kendall),
                _interval(*profile.interval("kendall")),
            )
        )
    return Table("models", "", columns, tuple(rows))


def _number(value: float) -> Entry:
    return (fitting(value), float(value))


def _interval(low: float, high: float) -> Entry:
    """Without signs: most of these bounds are positive."""
    low, high = float(low), float(high)
    return NONE if math.isnan(low) else (f"[{number(low)}, {number(high)}]", (low, high))


def sink_lines(profile: Profile) -> list[str]:
    """Lines about the sink tokens and the numbers with and without them; empty if there are none."""
    if profile.sinks is None or not profile.sinks.count.any():
        return []
    found = profile.sinks.by_layer(profile.all_layers)
    rows = [profile.all_layers.index(entry["layer"]) for entry in found]
    positions = profile.sinks.positions.sum(axis=0)
    commonest = ", ".join(str(at) for at in (-positions).argsort(kind="stable")[:3] if positions[at])
    spans = f"{found[0]['layer']} to {found[-1]['layer']}" if len(found) > 1 else found[0]["layer"]
    most = max(found, key=lambda entry: int(entry["passages"]))
    kept = profile.without_sinks()
    return [
        f"sink tokens (norm > {SINK_NORM:g} x the passage's median): {plural(len(rows), 'state')}, {spans}; in up to "
        f"{most['passages']} of {plural(profile.n_passages, 'passage')}; most common positions: {commonest}.",
        "with and without them: "
        + "; ".join(
            f"{name} {number(ours, 2, sign=sign)} and {number(theirs, 2, sign=sign)}"
            for name, sign, ours, theirs in (
                ("mean cosine of the deep half", False, profile.last(), kept.last()),
                ("Spearman", True, profile.spearman, kept.spearman),
                ("Kendall", True, profile.kendall, kept.kendall),
            )
        )
        + ".",
    ]


def metric_tables(profile: Profile, columns: int = 6) -> list[Table]:
    """The side metrics of :func:`layer_table`, a few per table, with names that break between words."""
    table, names = layer_table(profile), profile.metric_names
    parts = [table.select(["layer", *names[i : i + columns]]) for i in range(0, len(names), columns)]
    return [replace(part, columns=tuple(column.replace("_", " ") for column in part.columns)) for part in parts]


def between_table(profile: Profile, name: str) -> Table:
    """A metric between layers: one row and one column for each layer of the depth."""
    matrix = profile.between_layers(name).tolist()
    rows = tuple((layer, *map(_number, values)) for layer, values in zip(profile.layers, matrix, strict=True))
    return Table(name, "", ("layer", *profile.layers), rows)


def terminal_models(profiles: Sequence[tuple[str, Profile]]) -> Table:
    """The columns of :func:`model_table` that a terminal has room for."""
    columns = ("model", "size", "first", "last", "last half", "Spearman", "95 % interval", "Kendall")
    rows: list[tuple[Entry, ...]] = []
    for label, profile in profiles:
        means = (profile.mean_cosine[0], profile.mean_cosine[-1], profile.last())
        low, high = profile.interval("spearman")
        bounds = NONE if math.isnan(low) else interval((float(low), float(high)), 2)
        size = count(profile.info["parameters"], short=True)
        trend = (number(profile.spearman, 2, sign=True), bounds, number(profile.kendall, 2, sign=True))
        rows.append((label, size, *map(_number, means), *trend))
    return Table("models", "", columns, tuple(rows))


def as_mapping(profile: Profile, *, bins: int = MeasureConfig().bins) -> dict[str, Any]:
    """A profile as the plain arrays that ``decondense.figures.condensation`` takes."""
    result: dict[str, Any] = {
        "label": profile.info.get("model", "model"),
        "layers": profile.layers,
        "mean_cosine": profile.mean_cosine,
        "spearman": profile.spearman,
        "kendall": profile.kendall,
        "spearman_interval": profile.interval("spearman"),
        "kendall_interval": profile.interval("kendall"),
        "parameters": profile.info.get("parameters"),
        "passages": profile.n_passages,
    }
    kinds: tuple[Kind, ...] = ("pooled", "averaged")
    for kind in kinds:
        try:
            result[kind] = profile.histogram(kind, bins=bins)[0]
        except ValueError:
            result[kind] = None
    return result
