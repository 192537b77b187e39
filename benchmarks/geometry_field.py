"""What independent work reports on the same question, how far it was read, and what the committed rows say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pipes import pipe_table

import numpy as np

from decondense.compare import Cell, profiles
from decondense.report import number
from geometry import all_doses, differing_at_equal_cosine, names, same_sign
from study_rows import committed, mean


@dataclass(frozen=True)
class Work:
    """One independent source."""

    link: str
    reports: str
    read: str
    ours: Callable[[], str]


def _arxiv(number: str, title: str) -> str:
    return f"[{title}](https://arxiv.org/abs/{number}), arXiv {number}"


def _pull(repository: str, number: int) -> str:
    return f"[{repository} #{number}](https://github.com/{repository}/pull/{number})"


def _equal() -> str:
    n, differing = differing_at_equal_cosine()
    return (
        f"In {len(differing)} of {n} studies an arm has the reference's cosine and another loss "
        "([above](#the-same-cosine-another-loss)). Doubling batch size or weight decay are arms of "
        "[one study](results.md#what-causes-the-gain)."
    )


def _signs() -> str:
    return (
        f"Arms of one model, not models: the correlation has this sign in every seed of {len(same_sign(1))} of "
        f"{len(all_doses())} studies ([above](#dose-and-response))."
    )


def _opposite() -> str:
    return (
        "No arm of ours lowers the isotropy on purpose: a weight cannot be negative. Less cosine goes with more loss "
        f"in every seed of: {names(same_sign(-1))}."
    )


def _over_training() -> str:
    f = committed("fig4")
    if f is None:
        return "Not run."

    def of(cell: Cell) -> list[float]:
        curve = [profiles.blocks(cell.profiles[step]) for step in sorted(cell.profiles)]
        values = [value for value in curve if value is not None]
        return [values[0], float(np.max(values)), values[-1]]

    start, top, end = (mean(list(column)) for column in zip(*map(of, f.cells("cross-entropy")), strict=True))
    return (
        f"By another measure: with cross-entropy (`fig4`) the mean cosine of the blocks goes from {number(start, 2)} "
        f"to {number(top, 2)} and back to {number(end, 2)}. A third phase would lie beyond these runs."
    )


WORKS = (
    Work(
        _arxiv("2602.20433", "Disentangling Geometry, Performance, and Training in Language Models"),
        "108 OLMo-style models under controlled variation. Effective rank and other measures of the unembedding matrix "
        "and of the last layer follow the training choices (batch size, weight decay); none predicts performance "
        "reliably, and a low rank comes with late saturation without causing it.",
        "abstract",
        _equal,
    ),
    Work(
        _arxiv("2506.24106", "On the Predictive Power of Representation Dispersion in Language Models"),
        "Over models of several families and over domains, a larger mean cosine distance between hidden vectors goes "
        "with a lower perplexity; a term that pushes vectors apart in training lowers it.",
        "abstract and README of its code",
        _signs,
    ),
    Work(
        _arxiv("2305.19358", "Stable Anisotropic Regularization"),
        "*Less* isotropy helps most of the tasks and models tried, and the mean cosine is a poor measure of isotropy.",
        "abstract",
        _opposite,
    ),
    Work(
        _arxiv("2509.23024", "Tracing the Representation Geometry of Language Models"),
        "Pre-training has three phases: collapse during warm-up, growth of the effective rank, then a consolidation "
        "along few directions that comes *with* better downstream scores.",
        "abstract and project page",
        _over_training,
    ),
    Work(
        _arxiv("2404.07647", "Why do small language models underperform?"),
        "Models narrower than about 1000 tend to degenerate representations late in training, with worse scores; the "
        "cause named is the rank of the output layer.",
        "abstract",
        lambda: "Nothing: our runs end long before that.",
    ),
    Work(
        _pull("openai/parameter-golf", 1841),
        "A penalty on correlated hidden features, 3 seeds: 1.1413 against 1.1400 bits per byte at equal wall-clock. "
        "Its author reports a lead at equal steps that the 6 % slower steps use up.",
        "pull request; self-reported",
        lambda: "Equal time beside equal tokens: [other regularisers](results.md#the-regularisers-of-other-fields).",
    ),
    Work(
        _pull("openai/parameter-golf", 1556),
        "A floor under the spectrum raises the effective rank from 424 to 445 of 512 and gains nothing (1.4352 against "
        "1.4326, one run each); an earlier gain came from comparing a compiled run with one that was not.",
        "pull request; self-reported",
        lambda: "A study compiles no arm, so that this cannot happen within a pair.",
    ),
    Work(
        _pull("openai/parameter-golf", 894),
        "Straighter hidden trajectories: curvature falls 160-fold; 0.0046 bits per byte better after 1670 steps, "
        "0.0005 worse after 4900.",
        "pull request; self-reported",
        lambda: (
            "Leads after 10 % of training and at the end: [Results](results.md#an-accelerator-or-a-better-end-point)."
        ),
    ),
    Work(
        "[modded-nanogpt](https://github.com/KellerJordan/modded-nanogpt), "
        "[#178](https://github.com/KellerJordan/modded-nanogpt/pull/178), "
        "[#337](https://github.com/KellerJordan/modded-nanogpt/pull/337)",
        "Two auxiliary *targets* (more tokens, a token's prefix) are records with a t-test over 10 to 14 runs. Track 3 "
        "holds data, batch and architecture fixed and counts steps to a loss of 3.28. No entry is a loss on the "
        "geometry of hidden states, as far as a search of them by name shows (August 2026).",
        "pull requests and rules of track 3",
        lambda: "Not entered.",
    ),
)


def field() -> str:
    lines = [[work.link, work.reports, work.read, work.ours()] for work in WORKS]
    return pipe_table(("work", "what it reports", "what we read of it", "what our rows say"), lines)


TABLES: dict[str, Callable[[], str]] = {"geometry-field": field}
