"""The verb ``measure``: profiles, tables and figures of one model, a family, pairs, or the checkpoints of a run."""

from __future__ import annotations

import contextlib
import re
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from decondense.cli import options

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

    from decondense.measuring import Profile

_WHAT = "What is measured"
_FIGURE = "Figures and files"


def measure_command(
    models: Annotated[
        list[str] | None,
        typer.Argument(help=f"Model directory or {options.ID_HELP}; several are compared.", metavar="MODEL..."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Directory of the results. Default: decondense-measure-NAME.")
    ] = None,
    family: Annotated[
        str | None,
        typer.Option(
            "--family", help="The models are a family of this name: also draw it over size.", rich_help_panel=_FIGURE
        ),
    ] = None,
    pairs: Annotated[
        bool,
        typer.Option(
            "--pairs", help="The models are pairs (base distilled base distilled ...).", rich_help_panel=_FIGURE
        ),
    ] = False,
    checkpoints: Annotated[
        str | None,
        typer.Option(
            "--checkpoints",
            help="A training run: a directory of checkpoint-N folders, or a hub id with --revisions.",
            rich_help_panel=_FIGURE,
        ),
    ] = None,
    revisions: Annotated[
        str | None,
        typer.Option(
            "--revisions",
            help="Revisions of the hub id, separated by commas (step1000,step2000,...).",
            rich_help_panel=_FIGURE,
        ),
    ] = None,
    heat_map: Annotated[
        str, typer.Option("--heat-map", help="averaged (as published) or pooled (all pairs).", rich_help_panel=_FIGURE)
    ] = "averaged",
    palette: Annotated[
        str, typer.Option("--palette", help="reds or cividis (colour-blind-safe).", rich_help_panel=_FIGURE)
    ] = "reds",
    dataset: options.Dataset = None,
    text: options.Text = None,
    each: options.Each = False,
    split: options.Split = "train",
    field: options.Field = None,
    passages: options.Passages = None,
    words: options.Words = None,
    seed: options.PassageSeed = None,
    tokens: options.Tokens = None,
    metrics: Annotated[
        str | None, typer.Option("--metrics", help="Side metrics, separated by commas, or all.", rich_help_panel=_WHAT)
    ] = None,
    bins: Annotated[
        int | None,
        typer.Option("--bins", help="Bins of the heat map, a power of two. Default: 128.", rich_help_panel=_WHAT),
    ] = None,
    final: Annotated[
        str,
        typer.Option(
            "--final", help="The last layer: after (as published) or before the final norm.", rich_help_panel=_WHAT
        ),
    ] = "after",
    logits: Annotated[bool, typer.Option("--logits", help="Measure the logits too.", rich_help_panel=_WHAT)] = False,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size", min=1, help="Passages of a forward pass. Default: what fits.", rich_help_panel=options.MODEL
        ),
    ] = None,
    tokenizer: options.Tokenizer = None,
    blocks: Annotated[
        str | None, typer.Option("--blocks", help="Dotted path of the list of blocks.", rich_help_panel=options.MODEL)
    ] = None,
    dtype: options.Dtype = "auto",
    device_map: Annotated[
        str | None,
        typer.Option(
            "--device-map",
            help="auto: spread over GPUs, memory and disk. Default: one GPU, else CPU.",
            rich_help_panel=options.MODEL,
        ),
    ] = None,
    max_memory: Annotated[
        list[str] | None,
        typer.Option(
            "--max-memory",
            help="Budget a device for --device-map, e.g. 0=20GiB, cpu=8GiB.",
            rich_help_panel=options.MODEL,
        ),
    ] = None,
    offload: Annotated[
        Path | None,
        typer.Option("--offload", help="Directory for layers that fit in no memory.", rich_help_panel=options.MODEL),
    ] = None,
    eight_bit: Annotated[
        bool, typer.Option("--8bit", help="8-bit weights (needs bitsandbytes).", rich_help_panel=options.MODEL)
    ] = False,
) -> None:
    """Measure embedding condensation: how alike a model's token vectors become, layer by layer."""
    from rich.console import Console

    from decondense.cli.display import Display
    from decondense.config import MeasureConfig, one_of
    from decondense.measuring.loading import check_source
    from decondense.measuring.metrics import resolve_metrics
    from decondense.measuring.running import MeasureError
    from decondense.privacy import without_credentials

    defaults = MeasureConfig()
    one_of("heat map", heat_map, ("averaged", "pooled"))
    one_of("palette", palette, ("reds", "cividis"))
    one_of("place of the last layer", final, ("after", "before"))
    chosen_metrics = [name.strip() for name in (metrics or "").split(",") if name.strip()]
    resolve_metrics(chosen_metrics)  # a mistyped name costs nothing before a model is loaded
    bins = MeasureConfig.parse({"bins": bins or defaults.bins}, where="--bins").bins
    names = _names(models or [], checkpoints, revisions, pairs)
    if text is not None and dataset is not None:
        raise MeasureError("give either --dataset or --text, not both.")
    labels = _labels([source for source, _ in names])
    folder = out or Path(f"decondense-measure-{options.slug(family or _short(checkpoints or names[0][0]))}")
    # everything that can be known to fail fails before texts are read and models loaded
    for source, _ in names:
        check_source(source)
    _check_folder(folder)

    console = Console()
    text_source = without_credentials(text or dataset or defaults.dataset)
    with Display(console) as display:
        display.update("texts", "reading passages")
        texts = _texts(
            console,
            text_source,
            each=each,
            split=split,
            field=field,
            passages=passages or defaults.passages,
            words=words or defaults.passage_words,
            seed=defaults.passage_seed if seed is None else seed,
            most=passages,
        )
    loading = {
        "tokenizer": tokenizer,
        "dtype": dtype,
        "device_map": device_map or ("auto" if max_memory or offload else None),
        "max_memory": _budget(max_memory or []),
        "offload_folder": offload,
        "eight_bit": eight_bit,
    }
    measuring = {
        "tokens": tokens,
        "metrics": chosen_metrics,
        "logits": logits,
        "blocks": blocks,
        "batch_size": batch_size,
    }
    done: list[tuple[str, int | None, Profile]] = []
    for (source, step), short in zip(names, labels, strict=True):
        label = short if step is None else f"step {step:,}"
        profile = _measure(console, source, label, texts, loading, measuring, each=each).at(final)  # type: ignore[arg-type]
        profile.info.update({"source": text_source, "seed": seed or 0, "step": step, "name": label})
        place = folder if len(names) == 1 else folder / options.slug(label)
        profile.save(place / "profile")
        done.append((label, step, profile))
        _show(console, label, profile, place, bins, heat_map, palette)
    if len(done) > 1:
        _compare(console, done, folder, family, pairs, bins, heat_map, palette)
    console.print(f"results: {folder}", highlight=False, markup=False, soft_wrap=True)


# ---- arguments -------------------------------------------------------------------------------------------------------


def _names(
    models: list[str], checkpoints: str | None, revisions: str | None, pairs: bool
) -> list[tuple[str, int | None]]:
    """The models to measure, with their training step where they are checkpoints."""
    from decondense.measuring.running import MeasureError

    if revisions is not None and checkpoints is None:
        if len(models) != 1:
            raise MeasureError(
                "--revisions belongs to one hub id: decondense measure --checkpoints ID --revisions A,B,C."
            )
        checkpoints, models = models[0], []
    if checkpoints is not None:
        if models:
            raise MeasureError(f"--checkpoints measures one run; omit {', '.join(models)}.")
        return _checkpoints(checkpoints, revisions)
    if not models:
        raise MeasureError("no model given: decondense measure DIRECTORY_OR_HUB_ID, or --checkpoints RUN.")
    if pairs and len(models) % 2:
        raise MeasureError(
            f"--pairs needs an even number of models (base distilled base distilled ...), got {len(models)}."
        )
    return [(model, None) for model in models]


def _checkpoints(run: str, revisions: str | None) -> list[tuple[str, int | None]]:
    from decondense.checkpoints import checkpoint_folders
    from decondense.measuring.running import MeasureError

    if revisions is not None:
        names = [name.strip() for name in revisions.split(",") if name.strip()]
        found = [(f"{run}@{name}", _step(name)) for name in names]
    else:
        root = Path(run)
        if not root.is_dir():
            raise MeasureError(
                f"{run} is not a directory; for the revisions of a hub model name them: --revisions A,B,C."
            )
        folders = checkpoint_folders(root)
        found = [(str(path), _step(path.name)) for path in folders]
    numbered = sorted((pair for pair in found if pair[1] is not None), key=lambda pair: pair[1] or 0)
    if not numbered:
        raise MeasureError(
            f"{run} has no checkpoints: expected folders or revisions named by their step (checkpoint-500, step1000)."
        )
    return numbered


def _step(name: str) -> int | None:
    found = re.search(r"(?:step|checkpoint|iter)[-_ ]*(\d+)", name) or re.search(r"(\d+)(?!.*\d)", name)
    return int(found.group(1)) if found else None


def _budget(entries: list[str]) -> dict[Any, str] | None:
    from decondense.measuring.running import MeasureError

    budget: dict[Any, str] = {}
    for entry in entries:
        device, equals, amount = entry.partition("=")
        if not equals or not amount:
            raise MeasureError(f"--max-memory {entry!r}: expected DEVICE=AMOUNT, for example cpu=8GiB or 0=20GiB.")
        budget[int(device) if device.isdigit() else device] = amount
    return budget or None


def _texts(
    console: Console,
    source: str,
    *,
    each: bool,
    split: str,
    field: str | None,
    passages: int,
    words: tuple[int, int],
    seed: int,
    most: int | None,
) -> list[str]:
    from decondense.corpora.columns import TextWarning
    from decondense.corpora.passages import read_each, sample_passages

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", TextWarning)
        if each:
            texts: list[str] = read_each(source, split=split, field=field, most=most)
        else:
            texts = sample_passages(source, count=passages, words=words, seed=seed, split=split, field=field)
    for warning in told:
        _note(console, str(warning.message))
    return texts


def _note(console: Console, message: str) -> None:
    console.print(f"note: {message}", highlight=False, markup=False, soft_wrap=True)


def _long_enough(console: Console, label: str, texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The records of two tokens and more: one token has no pairs."""
    from decondense.measuring.running import MeasureError

    # two tokens are enough to tell
    kept = [text for text in texts if len(tokenizer(text, truncation=True, max_length=2)["input_ids"]) >= 2]
    if not kept:
        raise MeasureError(f"all {len(texts):,} records have fewer than two tokens; a cosine needs two. Omit --each.")
    if len(kept) < len(texts):
        short = len(texts) - len(kept)
        _note(console, f"{label}: {short:,} of {len(texts):,} records have fewer than two tokens and are skipped.")
    return kept


def _check_folder(folder: Path) -> None:
    """Refuse a directory of results that cannot be written to, and leave nothing behind."""
    from decondense.measuring.running import MeasureError

    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise MeasureError(
            f"{folder} cannot hold the results ({error.strerror or error}); choose a directory that you may write to: "
            "--out."
        ) from error
    finally:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


def _short(source: str) -> str:
    name, at, revision = str(source).rstrip("/").rpartition("@")
    return f"{Path(name).name}@{revision}" if at and name else Path(str(source)).resolve().name


def _labels(sources: list[str]) -> list[str]:
    """A short name for each source, all different: runs/a/final and runs/b/final are a and b, not final and final."""
    if len(set(sources)) < len(sources):
        from decondense.measuring.running import MeasureError

        twice = next(source for source in sources if sources.count(source) > 1)
        raise MeasureError(f"{twice} is given twice.")
    labels = [_short(source) for source in sources]
    if len(set(labels)) == len(labels):
        return labels
    parts = [Path(source).resolve().parts for source in sources]
    shared = 0
    while len({path[-1 - shared] for path in parts}) == 1:
        shared += 1
    parts = [path[: len(path) - shared] for path in parts]
    for depth in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(path[-depth:]) for path in parts]
        if len(set(labels)) == len(labels):
            break
    return labels


# ---- work ------------------------------------------------------------------------------------------------------------


def _measure(
    console: Console,
    source: str,
    label: str,
    texts: list[str],
    loading: dict[str, Any],
    measuring: dict[str, Any],
    *,
    each: bool,
) -> Profile:
    import torch
    from transformers.utils import logging

    from decondense.cli.display import Display
    from decondense.measuring import measure
    from decondense.measuring.loading import load_model
    from decondense.measuring.running import MeasureError

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with Display(console) as display:
        display.update("loading", f"loading {source}")
        model, tokenizer = load_model(source, **loading)
        if tokenizer is None:
            raise MeasureError(
                f"{source} comes without a tokenizer; name the right one: --tokenizer DIRECTORY_OR_HUB_ID."
            )
        if each:
            texts = _long_enough(console, label, texts, tokenizer)
        if loading["device_map"] is None and not loading["eight_bit"] and torch.cuda.is_available():
            model = model.to("cuda")
        display.drop("loading")
        name = f"measuring {label}"
        display.update(name, name, 0, len(texts))
        return measure(
            model,
            tokenizer,
            texts,
            progress=lambda _, done, total: display.update(name, name, done, total),
            **measuring,
        )


def _show(console: Console, label: str, profile: Profile, place: Path, bins: int, kind: str, palette: str) -> None:
    from decondense.figures import condensation
    from decondense.figures.style import export
    from decondense.measuring import tables
    from decondense.records import atomic_write

    table = tables.layer_table(profile)
    title = f"{label}: {profile.n_passages} passages of up to {profile.tokens} tokens"
    console.print(tables.terminal_layers(profile).to_rich(title=title))
    if profile.metrics:
        console.print(tables.metric_table(profile).to_rich(title="side metrics"))
    for name in ("spearman", "kendall"):
        low, high = profile.interval(name)
        known = f"95 % interval over passages {low:+.2f}..{high:+.2f}" if low == low else "one passage has no interval"
        console.print(
            f"{name.capitalize()} of mean cosine and depth: {getattr(profile, name):+.2f} ({known})",
            highlight=False,
            soft_wrap=True,
        )
    if profile.has_final_norm:
        console.print(f"(the last layer of the depth is the state {_last_state(profile)})", highlight=False)
    atomic_write(place / "layers.md", table.to_markdown())
    atomic_write(place / "layers.csv", table.to_csv())
    data = _mapping(profile, label, bins)
    if data[kind] is None:
        console.print(f"[yellow]note:[/] {profile.no_averaged} Drawing the pooled one.", highlight=False)
        kind = "pooled"
    export(condensation.heatmap_figure(data, kind=kind, palette=palette), place / "heatmap")  # type: ignore[arg-type]


def _last_state(profile: Profile) -> str:
    """Which of the two last states the rank correlations count."""
    return "after the final norm" if profile.final == "after" else "before the final norm"


def _compare(
    console: Console,
    done: list[tuple[str, int | None, Profile]],
    folder: Path,
    family: str | None,
    pairs: bool,
    bins: int,
    kind: str,
    palette: str,
) -> None:
    from decondense.figures import condensation
    from decondense.figures.style import export
    from decondense.measuring import tables
    from decondense.records import atomic_write

    table = tables.model_table([(label, profile) for label, _, profile in done])
    by_size = done if done[0][1] is not None or pairs else sorted(done, key=lambda item: item[2].info["parameters"])
    title = f"{family or 'models'}: mean cosine, and its rank correlation with depth"
    console.print(tables.terminal_models([(label, profile) for label, _, profile in by_size]).to_rich(title=title))
    atomic_write(folder / "models.md", table.to_markdown())
    atomic_write(folder / "models.csv", table.to_csv())
    data = [{**_mapping(profile, label, bins), "step": step} for label, step, profile in done]
    if any(item[kind] is None for item in data):
        kind = "pooled"
    look: dict[str, Any] = {"kind": kind, "palette": palette}
    if done[0][1] is not None:
        export(condensation.checkpoints_figure(data, **look), folder / "checkpoints")
    elif pairs:
        export(condensation.pairs_figure(list(zip(data[::2], data[1::2], strict=True)), **look), folder / "pairs")
    else:
        export(condensation.family_figure(data, family=family or "", **look), folder / "family")


def _mapping(profile: Profile, label: str, bins: int) -> dict[str, Any]:
    from decondense.measuring.profile import as_mapping

    return {**as_mapping(profile, bins=bins), "label": label}
