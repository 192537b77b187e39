"""The verb ``measure``: profiles, tables and figures of one model, a family, pairs, or the checkpoints of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from decondense.cli import inputs, options

if TYPE_CHECKING:
    from decondense.atlas import Entry
    from decondense.cli.console import Console
    from decondense.measuring import Profile

_WHAT = "What is measured"
_FIGURE = "Figures and files"


def measure_command(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help=f"Model directory, GGUF file or {options.ID_HELP}; several are compared.", metavar="MODEL..."
        ),
    ] = None,
    states: Annotated[
        Path | None,
        typer.Option(
            "--states",
            help="Instead of a model: a directory of hidden states that an engine wrote, with a manifest.json.",
            metavar="DIR",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Directory for the results. Default: decondense-measure-NAME.")
    ] = None,
    family: Annotated[
        str | None,
        typer.Option(
            "--family", help="Family name of the models: also plot condensation over size.", rich_help_panel=_FIGURE
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
    skip_tokens: Annotated[
        int,
        typer.Option(
            "--skip-tokens", min=0, help="Leave out the first N tokens of each passage.", rich_help_panel=_WHAT
        ),
    ] = 0,
    metrics: Annotated[
        str | None,
        typer.Option("--metrics", help="Side metrics by name, separated by commas, or all.", rich_help_panel=_WHAT),
    ] = None,
    bins: Annotated[
        int | None,
        typer.Option("--bins", help="Bins of the heat map, a power of two. Default: 128.", rich_help_panel=_WHAT),
    ] = None,
    final: Annotated[
        str,
        typer.Option(
            "--final", help="Take the last layer after (as published) or before the final norm.", rich_help_panel=_WHAT
        ),
    ] = "after",
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            help="What the verdict compares with: a shipped reference, a profile or an atlas entry. Default: the "
            "nearest shipped one.",
            metavar="NAME|FILE",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    logits: Annotated[bool, typer.Option("--logits", help="Measure the logits too.", rich_help_panel=_WHAT)] = False,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size", min=1, help="Passages per forward pass. Default: what fits.", rich_help_panel=options.MODEL
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
            help="Memory budget of a device for --device-map, e.g. 0=20GiB, cpu=8GiB.",
            rich_help_panel=options.MODEL,
        ),
    ] = None,
    offload: Annotated[
        Path | None,
        typer.Option(
            "--offload", help="Directory for layers that do not fit in memory.", rich_help_panel=options.MODEL
        ),
    ] = None,
    eight_bit: Annotated[
        bool, typer.Option("--8bit", help="8-bit weights (needs bitsandbytes).", rich_help_panel=options.MODEL)
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Measure embedding condensation: how alike a model's token vectors become, layer by layer."""
    from decondense.atlas.entry import check_names
    from decondense.cli.console import Console
    from decondense.cli.display import Display
    from decondense.config import MeasureConfig, one_of
    from decondense.hashing import hash_texts
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
    if text is not None and dataset is not None:
        raise MeasureError("give either --dataset or --text, not both.")
    measuring: dict[str, Any] = {"tokens": tokens, "skip_tokens": skip_tokens, "metrics": chosen_metrics}
    console = Console(stderr=as_json)
    look = (bins, heat_map, palette)
    if states is not None:
        if models or checkpoints or text or dataset or logits or each:
            raise MeasureError(
                "--states measures stored hidden states: omit the models, the options for text and --logits."
            )
        _measure_states(console, states, out, measuring, final, look, reference, as_json)
        return
    names = inputs.named_models(models or [], checkpoints, revisions, pairs)
    labels = inputs.labels_of([source for source, _ in names])
    folder = out or Path(f"decondense-measure-{options.slug(family or inputs.short_name(checkpoints or names[0][0]))}")
    # everything that can be known to fail fails before texts are read and models loaded
    for source, _ in names:
        check_source(source)
    labels = [f"step {step:,}" if step is not None else short for (_, step), short in zip(names, labels, strict=True)]
    inputs.check_folder(folder, labels if len(names) > 1 else [])
    compared = _reference(reference, final)
    text_source = without_credentials(text or dataset or defaults.dataset)
    for (source, _), label in zip(names, labels, strict=True):
        check_names(
            f"the results of {source!r}", model=label, text=text_source, remedy="Rename the directory or the file."
        )
    with Display(console) as display:
        display.update("texts", "reading passages")
        texts = inputs.read_texts(
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
        "max_memory": inputs.memory_budget(max_memory or []),
        "offload_folder": offload,
        "eight_bit": eight_bit,
    }
    measuring |= {"logits": logits, "blocks": blocks, "batch_size": batch_size}
    done: list[tuple[str, int | None, Profile]] = []
    for (source, step), label in zip(names, labels, strict=True):
        profile = _measure(console, source, label, texts, loading, measuring, each=each).at(final)  # type: ignore[arg-type]
        profile.info.update(
            {"source": text_source, "seed": seed or 0, "step": step, "name": label, "text_hash": hash_texts(texts)}
        )
        place = folder if len(names) == 1 else folder / options.slug(label)
        profile.save(place / "profile")
        done.append((label, step, profile))
        _show(console, label, profile, place, *look)
        _say(console, profile, compared)
    if len(done) > 1:
        _compare(console, done, folder, family, pairs, *look)
    _end(console, folder, done, compared, as_json)


def _reference(name: str | None, final: str) -> Entry | None:
    """What the verdict compares with; refused where no measurement of this command can be, before a model is loaded."""
    from decondense.atlas import find_reference
    from decondense.measuring.running import MeasureError

    if name is None:
        return None
    entry = find_reference(name)
    if (other := entry.final) != final:
        raise MeasureError(
            f"--reference {name} takes its last layer {other} the final norm; measure with --final {other} too."
        )
    return entry


def _say(console: Console, profile: Profile, reference: Entry | None) -> None:
    """The verdict in sentences."""
    from decondense.atlas import judge, sentences

    console.print()
    for sentence in sentences(judge(profile.summary(), reference)):
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)


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
                f"{source} comes without a tokenizer; name the right one with --tokenizer DIRECTORY_OR_HUB_ID."
            )
        if each:
            texts = inputs.long_enough(console, label, texts, tokenizer, measuring["skip_tokens"])
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


def _measure_states(
    console: Console,
    source: Path,
    out: Path | None,
    measuring: dict[str, Any],
    final: str,
    look: tuple[int, str, str],
    reference: str | None,
    as_json: bool,
) -> None:
    from decondense.cli.display import Display
    from decondense.measuring import measure_states
    from decondense.measuring.dumps import StateFiles
    from decondense.measuring.running import MeasureError

    compared = _reference(reference, final)
    files = StateFiles(source)
    manifest, label = files.manifest, inputs.short_name(files.manifest.model)
    folder = out or Path(f"decondense-measure-{options.slug(label)}")
    inputs.check_folder(folder, [])
    with Display(console) as display:
        name = f"measuring {label}"
        profile = measure_states(
            files,
            layers=manifest.layers,
            final_norm=manifest.final_norm,
            info={**files.info, "name": label},
            progress=lambda _, done, total: display.update(name, name, done, total),
            **measuring,
        ).at(final)  # type: ignore[arg-type]
    if len(profile.layers) < 2:
        raise MeasureError(
            f"{source} holds the state of one layer ({profile.layers[0]}), but a trend with depth needs two; write the "
            "states of more layers."
        )
    profile.save(folder / "profile")
    _show(console, label, profile, folder, *look)
    _say(console, profile, compared)
    _end(console, folder, [(label, None, profile)], compared, as_json)


def _end(
    console: Console, folder: Path, done: list[tuple[str, int | None, Profile]], reference: Entry | None, as_json: bool
) -> None:
    """Say where the results are, or all that they are."""
    from decondense.atlas import judge
    from decondense.cli.printed import emit

    console.print(f"results: {folder}", highlight=False, markup=False, soft_wrap=True)
    if as_json:
        place = {label: folder if len(done) == 1 else folder / options.slug(label) for label, _, _ in done}
        models = [
            {
                "label": label,
                "folder": str(place[label]),
                "step": step,
                "verdict": judge(summary, reference).to_dict(),
                **summary,
            }
            for label, step, summary in ((label, step, profile.summary()) for label, step, profile in done)
        ]
        emit("measure", results=str(folder), models=models)


def _show(console: Console, label: str, profile: Profile, place: Path, bins: int, kind: str, palette: str) -> None:
    from decondense.figures import condensation
    from decondense.figures.style import export
    from decondense.measuring import tables
    from decondense.records import atomic_write

    table = tables.layer_table(profile)
    title = f"{label}: {profile.n_passages} passages of up to {profile.tokens} tokens"
    console.print(tables.terminal_layers(profile).to_rich(title=title))
    for part in tables.metric_tables(profile):
        console.print(part.to_rich(title="side metrics"))
    for name in profile.sides.between:
        atomic_write(place / f"{name}.csv", tables.between_table(profile, name).to_csv())
    for name in ("spearman", "kendall"):
        low, high = profile.interval(name)
        known = f"95 % interval over passages {low:+.2f}..{high:+.2f}" if low == low else "one passage has no interval"
        console.print(
            f"{name.capitalize()} of mean cosine and depth: {getattr(profile, name):+.2f} ({known})",
            highlight=False,
            soft_wrap=True,
        )
    for line in tables.sink_lines(profile):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
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
    from decondense.measuring.tables import as_mapping

    return {**as_mapping(profile, bins=bins), "label": label}
