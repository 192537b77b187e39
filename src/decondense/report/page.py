"""One self-contained HTML page, with its figures and tables, from the rows alone (no torch)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypedDict

from decondense import __version__
from decondense.compare import CompareError, Comparison, Study, compare
from decondense.formatting import NONE, count, listed, probability, shortened
from decondense.outputs import check_output
from decondense.records import ItemRows, Row, atomic_write
from decondense.report.notes import notes_in_words
from decondense.report.pictures import Pictures
from decondense.report.selection import measures
from decondense.report.sentences import sentences
from decondense.report.tables import TABLES, all_tables


class ReportPaths(TypedDict):
    """What a report consists of."""

    report: Path
    figures: list[Path]
    tables: list[Path]


def _compared(study: Study, comparison: Comparison | None) -> list[str]:
    """What makes the arms of a seed comparable, in paragraphs."""
    if study.measured:
        return [
            "Models as they are: nothing was trained. A seed is one choice of passages, the same for every model; each "
            "model reads them with its own tokenizer. The hashes below are of the models' weights."
        ]
    others = [arm for arm in (comparison.arms if comparison else study.arms) if study.has_own_model(arm)]
    same = "every arm starts from the same weights and reads" if not others else "every arm reads"
    lines = [
        f"The final checkpoint of every run, fixed in advance. Within a seed, {same} the same sequences in the same "
        "order; the hashes below are of the initial weights, of the sequences in the order of reading and of the "
        f"corpus, and a comparison refuses runs in which {'they' if not others else 'the last two'} differ."
    ]
    if others:
        named = listed(shortened([study.labels[arm] for arm in others]))
        lines.append(
            f"{named}: different initial weights by design, so not paired by the same start. All other arms "
            "start from the same weights, which is checked."
        )
    return lines


def _limits(study: Study, comparison: Comparison | None) -> list[str]:
    lines = []
    if comparison is not None:
        n = max((d.n for m in measures(comparison) for d in m.differences), default=0)
        floor = next((d.p_sign_flip_smallest for m in measures(comparison) for d in m.differences if d.n == n), None)
        if n == 1 and comparison.measured:
            lines.append("One choice of passages: no interval and no test is possible.")
        elif n == 1:
            lines.append(
                "One seed: no interval and no test is possible; a difference of this size may be due to the seed alone."
            )
        elif floor is not None:
            lines.append(
                f"{n} seeds: the sign-flip test cannot give a p below {probability(floor)} with that many"
                + (
                    ", so it cannot detect anything here; the sentences of this report use the interval, which assumes "
                    "that the differences between seeds are approximately normally distributed."
                    if floor > 0.05
                    else "."
                )
            )
        if comparison.validation is not None and comparison.validation.differences:
            d = comparison.validation.differences[0]
            lines.append(f"The interval of the held-out loss shown: {d.interval_reason}.")
        scale = []
        if comparison.parameters:
            scale.append(f"{count(comparison.parameters)} parameters")
        if comparison.tokens:
            scale.append(f"{count(comparison.tokens)} training tokens")
        if scale:
            lines.append(
                f"The runs have {listed(scale)}: this report does not answer whether the same holds for larger "
                "models, other text or longer training."
            )
        if any(c.wall_ratio for c in comparison.cost):
            lines.append(
                "Times were measured on the machine named below and include the effect of other work on it, such as "
                "other runs of the study. CPU times are affected less."
            )
        lines.append(
            "A mean cosine says how alike hidden states are, not how good a model is."
            if comparison.measured
            else "The dispersion loss is designed to lower the mean cosine, so a lower mean cosine is no evidence that "
            "a model is better. The held-out scores are."
        )
        lines += notes_in_words(comparison)
    passages = {
        (p["passages"], p["passage_tokens"]) for cell in study.cells.values() for p in cell.profiles.values() if p
    }
    if passages:
        each = " and ".join(f"{count} passages of at most {tokens} tokens" for count, tokens in sorted(passages))
        lines.append(f"Condensation was measured on {each}; histograms pool all pairs of tokens within a passage.")
    return lines


def _provenance(study: Study) -> list[tuple[str, str]]:
    """Every provenance field, with all the values that the runs have."""
    fields: dict[str, dict[str, None]] = {}

    def take(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                take(f"{prefix}{key}.", item) if isinstance(item, dict) else take(f"{prefix}{key}", item)
        else:
            fields.setdefault(prefix, {})[str(value)] = None

    for cell in study.cells.values():
        for row in (cell.started, cell.run):
            take("", row.get("provenance", {}))
    shown = []
    for key, values in sorted(fields.items()):
        if key == "time":
            times = sorted(values)
            shown.append((key, times[0] if len(times) == 1 else f"{times[0]} to {times[-1]}"))
        else:
            shown.append((key, "; ".join(values)))
    return shown


def _command(study: Study) -> str:
    """The command that started the runs, as a user would type it."""
    for cell in study.cells.values():
        command = str(cell.started.get("provenance", {}).get("command") or "")
        if command.startswith("decondense "):
            return command
    # started from Python, or by a worker of an older version: the file says it all
    return f"decondense study {study.name}.yaml --out {study.name}  # {study.name}.yaml: the configuration below"


def _cells(study: Study) -> list[dict[str, str]]:
    shown = []
    for cell in study.cells.values():
        note = ""
        if cell.status == "failed":
            note = str(cell.run.get("error") or "no reason recorded")
        elif cell.status == "unfinished":
            note = f"last row at step {max([*cell.steps, *cell.profiles, 0])}"
        elif cell.resumed:
            note = f"resumed {cell.resumed} ×"
        shown.append(
            {
                "arm": study.labels[cell.arm],
                "seed": str(cell.seed),
                "status": cell.status,
                "init": str(cell.recorded("init_hash") or NONE),
                "order": str(cell.recorded("order_hash") or NONE),
                "corpus": str(cell.recorded("corpus_hash") or NONE),
                "final": str(cell.run.get("final_hash") or NONE),
                "note": note,
            }
        )
    return shown


def compare_if_possible(study: Study, baseline: str | None = None) -> tuple[Comparison | None, list[str]]:
    """The comparison of the existing pairs (None: there are none), and sentences on what is missing from it."""
    try:
        comparison = compare(study, baseline, incomplete="omit")
    except CompareError as error:
        return None, [error.reason, *map(str, error.faults)]
    return comparison, list(map(str, comparison.omitted))


def build_report(
    rows: Iterable[Row | ItemRows] | Study, out_dir: str | Path, *, baseline: str | None = None
) -> ReportPaths:
    """Write ``report.html``, ``figures/`` and ``tables/`` into ``out_dir``.

    Failed, unfinished or unpaired runs do not stop the report: the comparison omits them, and the page lists them.

    Args:
        rows: the rows of one study.
        out_dir: where the files go.
        baseline: the arm to compare with; default: the study's.

    Raises:
        CompareError: no rows of a run, or rows of more than one study.
    """
    study = rows if isinstance(rows, Study) else Study.from_rows(rows)
    if baseline is not None:
        study = dataclasses.replace(study, baseline=baseline)
    return write_report(study, *compare_if_possible(study), out_dir)


def write_report(study: Study, comparison: Comparison | None, problems: list[str], out_dir: str | Path) -> ReportPaths:
    """The report of a comparison that was made already (:func:`compare_if_possible`)."""
    out = Path(out_dir)
    check_output(out, "figures", "tables")
    pictures = Pictures(study, comparison, out / "figures").draw()
    tables = all_tables(comparison)
    written = [path for table in tables.values() for path in table.write(out / "tables")]
    page = render(
        "report.html",
        study=study,
        comparison=comparison,
        problems=problems,
        summary=sentences(comparison) if comparison is not None else [],
        tables={name: tables.get(name) for name in TABLES},
        pictures=pictures.sections,
        cells=_cells(study),
        compared=_compared(study, comparison),
        limits=_limits(study, comparison),
        provenance=_provenance(study),
        command=_command(study),
        configuration=study.config.to_yaml() if study.config else "",
        version=__version__,
        count=count,
    )
    path = out / "report.html"
    atomic_write(path, page)
    return {"report": path, "figures": pictures.files, "tables": written}


def render(template: str, **context: Any) -> str:
    """A page from this package's templates; everything is escaped except what a template marks as ``drawn``."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("decondense", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # the only text that is not escaped: pictures and tables that this package made itself, from escaped text
    environment.filters["drawn"] = Markup
    return environment.get_template(template).render(**context)
