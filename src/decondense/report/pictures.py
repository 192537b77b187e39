"""The figures of the page and the files of figures beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

from decondense.compare import VALIDATION, Comparison, Study
from decondense.compare.quantity import METRIC_TITLES
from decondense.figures import comparison as draw
from decondense.figures.style import COLUMN, export, render
from decondense.report.selection import MOST_SHOWN, only, shown_arms, shown_in_words

SECTIONS = ("loss", "profiles", "maps", "differences", "cost", "size", "rates")


@dataclass(frozen=True)
class Picture:
    """A figure of the page."""

    name: str
    caption: str
    svg: str
    wide: bool = False
    width: float = 0.0
    """Inches."""


def inline_svg(figure: Figure, name: str, title: str) -> str:
    """A figure as SVG that can stand among others in one page: its ids carry ``name``, and it has a title."""
    text = render(figure, "svg").decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    head = text[: text.index(">") + 1]
    box = re.search(r'viewBox="[^"]+"', head)
    assert box is not None
    start = f'<svg {box[0]} xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    return start + f'role="img" aria-label="{escape(title)}">' + text[len(head) :].strip()


def _only(study: Study, arms: Sequence[str]) -> Study:
    """The study as if it had some of its arms alone."""
    cells = {place: cell for place, cell in study.cells.items() if cell.arm in arms}
    return replace(study, arms=list(arms), cells=cells)


@dataclass
class Pictures:
    """The figures of a page by section, drawn one after the other, and the files written for papers.

    Of more than 13 arms the extremes are drawn (:func:`decondense.report.selection.shown_arms`); captions say so.
    """

    study: Study
    comparison: Comparison | None
    folder: Path
    sections: dict[str, list[Picture]] = field(default_factory=lambda: {name: [] for name in SECTIONS})
    files: list[Path] = field(default_factory=list)
    few: str = ""

    def __post_init__(self) -> None:
        self.whole, self.compared = self.study, self.comparison
        if len(self.study.arms) <= MOST_SHOWN:
            return
        if self.comparison is None:
            kept: tuple[str, ...] = tuple(self.study.arms[:MOST_SHOWN])
            self.few = f"Shown: the first {MOST_SHOWN} of {len(self.study.arms)} arms."
        else:
            kept, self.few = shown_arms(self.comparison), shown_in_words(self.comparison)
            self.comparison = only(self.comparison, kept)
        self.study = _only(self.study, kept)

    def draw(self) -> Pictures:
        """All that the rows allow, in the order of the page."""
        self._losses()
        self._profiles()
        self._sizes()
        self._maps()
        self._differences()
        self._training()
        return self

    def _show(self, section: str, name: str, caption: str, figure: Figure, *, wide: bool = False) -> None:
        caption = f"{caption} {self.few}".rstrip()
        picture = Picture(name, caption, inline_svg(figure, name, caption), wide, figure.get_figwidth())
        self.sections[section].append(picture)

    def _write(self, name: str, figure: Figure) -> None:
        self.files.extend(export(figure, self.folder / name))

    @property
    def _many(self) -> bool:
        return len(self.study.arms) > draw.MOST_BANDS

    @property
    def _band(self) -> str:
        return "" if self._many else "; the band spans the seeds"

    @property
    def _baseline(self) -> str:
        name = self.study.baseline or ""
        return self.study.labels.get(name, name)

    def _losses(self) -> None:
        study, comparison = self.study, self.comparison
        lines = "mean over seeds" if self._many else "thin lines are seeds"
        captions: dict[draw.Panel, str] = {
            "training": f"Training loss, mean over seeds{self._band}.",
            "validation": f"Validation loss at the evaluated checkpoints, mean over seeds{self._band}.",
            "difference": f"Paired difference of the validation loss to {self._baseline}: {lines}, below zero is "
            "better.",
        }
        trained = [cell for cell in study.cells.values() if cell.status == "finished" and not cell.untrained]
        panels: list[draw.Panel] = []
        if any(cell.steps for cell in trained):
            panels.append("training")
        if any(VALIDATION in cell.scores for cell in trained):
            panels.append("validation")
            if comparison is not None and comparison.speed:
                panels.append("difference")
        if not panels:
            return
        whole = draw.loss_curves(study, panels)
        if self._many:  # one legend of many arms is enough
            self._show("loss", "loss", " ".join(captions[panel] for panel in panels), whole, wide=True)
        else:
            names = {
                "training": "training-loss",
                "validation": "validation-loss",
                "difference": "validation-difference",
            }
            for panel in panels:
                self._show("loss", names[panel], captions[panel], draw.loss_curves(study, [panel]))
        self._write("loss_curves", whole)

    def _profiles(self) -> None:
        study, steps = self.study, draw.times(self.study)
        if not steps:
            return
        whole = draw.profiles(study, steps)
        if self._many:
            self._show("profiles", "profiles", "Mean cosine by layer, mean over seeds.", whole, wide=True)
        else:
            for step in steps:
                caption = f"Mean cosine by layer, {draw.when(study, step)}{self._band}."
                self._show("profiles", f"profile-{step}", caption, draw.profiles(study, [step]))
        self._write("mean_cosine_by_layer", whole)

    def _sizes(self) -> None:
        comparison = self.comparison
        if comparison is None or comparison.size is None:
            return
        caption = (
            "Condensation against the number of parameters, one line per family of models; bars are one standard "
            "deviation over seeds."
        )
        figure = draw.size_trend(comparison)
        self._show("size", "size", caption, figure, wide=True)
        self._write("condensation_by_size", figure)
        for place, family in enumerate(comparison.size.families, 1):
            drawn = draw.family(self.whole, comparison, family)
            if drawn is not None:
                caption = (
                    f"{family}: cosines of all pairs of tokens by layer, from the smallest to the largest model, and "
                    "the rank correlation of the mean cosine with depth. Pooled over passages and seeds."
                )
                self._show("size", f"family-{place}", caption, drawn, wide=True)
                self._write(f"family_{place}", drawn)

    def _maps(self) -> None:
        study, comparison = self.study, self.comparison
        if self.few:  # one page of maps: each takes seconds and hundreds of kilobytes
            kept = shown_arms(self.compared, draw.MOST_MAPS) if self.compared else study.arms[: draw.MOST_MAPS]
            study = _only(study, kept)
        sized = comparison.size if comparison is not None else None
        in_families = {point.arm for point in sized.points} if sized is not None else set()
        # what was not trained does not change over training; models of a family have their maps among the sizes
        moving = [arm for arm in study.arms if not any(cell.untrained for cell in study.of_arm(arm))]
        arms = [
            arm for arm in moving or study.arms if draw.histograms(study, arm) and (moving or arm not in in_families)
        ]
        if not draw.map_times(study, arms):
            return
        pages = [arms[first : first + draw.MOST_MAPS] for first in range(0, len(arms), draw.MOST_MAPS)]
        caption = (
            "Cosines of all pairs of tokens by layer, over training: colour is density (on a square-root scale), the "
            "dashed line the mean. Pooled over passages and seeds."
        )
        for place, page in enumerate(pages, 1):
            figure = draw.heat_maps(study, page, among=arms)
            number = [str(place)] if len(pages) > 1 else []
            self._show("maps", "-".join(["heat-maps", *number]), caption, figure, wide=True)
            self._write("_".join(["heat_maps", *number]), figure)

    def _differences(self) -> None:
        comparison = self.comparison
        if comparison is None or not comparison.treated:
            return
        dots = "Small dots are seeds, bars 95 % intervals; filled markers: detected after correction."
        if comparison.validation is not None and comparison.validation.differences:
            figure = draw.forest([comparison.validation], comparison, xlabel="Δ validation loss (nats/token)")
            caption = f"Difference of the validation loss to {self._baseline}. {dots}"
            self._show("differences", "forest-validation", caption, figure)
            self._write("difference_validation_loss", figure)
        if comparison.layers is not None and comparison.layers.differences:
            figure = draw.layer_differences(comparison)
            caption = f"Difference of the mean cosine to {self._baseline} by layer, with pointwise 95 % intervals."
            self._show("differences", "forest-layers", caption, figure, wide=figure.get_figwidth() > COLUMN)
            self._write("difference_mean_cosine", figure)
        benchmarks = [t for t in comparison.tasks if (t.task, t.metric) != VALIDATION and t.differences]
        for metric in dict.fromkeys(task.metric for task in benchmarks):
            tasks = [task for task in benchmarks if task.metric == metric]
            means = [m.measure for m in comparison.means if m.metric == metric and m.measure.differences]
            names = [task.task for task in tasks] + ["mean"] * len(means)
            title = METRIC_TITLES.get(metric, metric)
            figure = draw.forest([*tasks, *means], comparison, xlabel=f"Δ {title}", names=names)
            slug = re.sub(r"[^A-Za-z0-9]+", "-", metric)
            caption = f"Difference in {title} to {self._baseline} by task. {dots}"
            self._show("differences", f"forest-{slug}", caption, figure, wide=figure.get_figwidth() > COLUMN)
            self._write(f"difference_tasks_{slug}", figure)

    def _training(self) -> None:
        comparison = self.comparison
        if comparison is None:
            return
        if any(any(c.step_wall_ms) for c in comparison.cost):
            caption = "Median optimizer step of each run (dots), and the ratio to the baseline."
            figure = draw.cost(comparison)
            self._show("cost", "cost-step", caption, figure)
            self._write("cost", figure)
        if comparison.trials:
            caption = (
                "Loss on the documents set aside for the choice against the learning rate: filled markers are the "
                "chosen rates, crosses at the top are trials that failed."
            )
            figure = draw.trials(comparison)
            self._show("rates", "learning-rates", caption, figure)
            self._write("learning_rates", figure)
