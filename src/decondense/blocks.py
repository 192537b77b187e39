"""Find the transformer blocks of a model, and turn ``"deep"`` or ``[0, -1]`` into block numbers.

There is no list of architecture names: in every decoder and encoder family that was tried, the blocks are the only
*outermost* ``nn.ModuleList`` below the decoder (lists of experts are nested in a block, so they never match) whose
members are more than single layers (lists of embeddings, norms and linear layers never match). Otherwise the configured
number of layers decides, or the error names the candidates and the argument that selects one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from decondense.config import one_of, suggest

LAYER_NAMES = ("all", "deep", "shallow", "last")

# what the families call the norm between the last block and the output head, inside the module that owns the blocks
_FINAL_NORM_NAMES = (
    "norm",
    "ln_f",
    "final_layer_norm",
    "final_layernorm",
    "final_norm",
    "norm_f",
    "ln_out",
    "norm_out",
    "emb_layer_norm_after",
)

# where models keep their settings, and what they call the number of blocks there; the first name that is set counts
_CONFIG_NAMES = ("config", "cfg", "args", "params", "hparams")
_LAYER_COUNT_NAMES = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_layer", "n_blocks", "num_blocks", "depth"),
)


class BlocksError(ValueError):
    """The blocks (or the final norm) of a model cannot be determined; the message lists the candidates."""


@dataclass(frozen=True)
class Blocks:
    """The transformer blocks of a model, in the order in which they run."""

    path: str
    """Where the list of blocks is: ``root.get_submodule(path)``."""
    modules: list[nn.Module]
    root: nn.Module
    """The unwrapped model whose ``forward`` runs them (for PEFT: the PeftModel)."""

    def __len__(self) -> int:
        return len(self.modules)


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside ``torch.compile`` and distributed wrappers; PEFT models stay as they are."""
    while True:
        inner = getattr(model, "_orig_mod", None)  # torch.compile's OptimizedModule
        if inner is None and isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = model.module
        if inner is None and type(model).__name__ == "FullyShardedDataParallel":  # FSDP1; FSDP2 wraps nothing
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def base_model(root: nn.Module) -> nn.Module:
    """The Hugging Face model inside a PEFT model; any other module as it is."""
    get_base_model = getattr(root, "get_base_model", None)
    core = get_base_model() if callable(get_base_model) else root
    return core if isinstance(core, nn.Module) else root


def find_blocks(model: nn.Module, blocks: str | None = None) -> Blocks:
    """Find the transformer blocks of ``model``.

    Args:
        model: Any causal or masked language model; ``torch.compile``, DDP and PEFT wrappers are looked through.
        blocks: Dotted path of the ``nn.ModuleList`` (or ``nn.ModuleDict`` with digit keys) that holds the blocks,
            relative to the model. Only needed if the rule below does not find it.

    Raises:
        BlocksError: there is no candidate list, or more than one; the message lists the candidates.

    The rule: of the decoder (``get_decoder()``), the base model and the model itself, in this order, the first that has
    exactly one outermost list of modules; if each has several, the one with the configured number of layers
    (``num_hidden_layers``, ``n_layer``, ``num_layers``, ... of ``config``, ``args``, ... or of the model). A list of
    single layers (embeddings, norms, linear layers) is not a candidate; to use it anyway, give its path.
    """
    root = unwrap(model)
    names = {id(module): name for name, module in root.named_modules()}
    if blocks is not None:
        members = _by_path(root, blocks)
        _refuse_containers(blocks, members)
        return Blocks(blocks, members, root)

    core = base_model(root)
    count = _configured_layers(core)
    seen: dict[str, list[nn.Module]] = {}
    several: list[tuple[str, list[nn.Module]]] = []
    chosen: tuple[str, list[nn.Module]] | None = None
    for start in _starts(core):
        lists = [(names[id(holder)], members) for holder, members in _outermost_lists(start)]
        several = several or [item for item in lists if count is not None and len(item[1]) == count[1]]
        seen.update(lists)
        if len(lists) == 1 or len(several) == 1:
            chosen = lists[0] if len(lists) == 1 else several[0]
            break
    if chosen is not None:
        _refuse_containers(*chosen)
        _refuse_stages(*chosen, count)
        return Blocks(*chosen, root)
    if not seen:
        raise BlocksError(_no_list(core, root))
    listed = ", ".join(f"{path!r} ({len(members)} modules)" for path, members in sorted(seen.items()))
    known = "" if count is None else f" ({count[0]} = {count[1]} does not decide between them)"
    raise BlocksError(
        f"{type(core).__name__} has more than one list that could hold the transformer blocks: {listed}{known}. "
        "Name the one that you mean: blocks='dotted.path'."
    )


def find_final_norm(blocks: Blocks) -> nn.Module:
    """The norm that the last block's output passes before the output head.

    Raises:
        BlocksError: the model has none (post-norm models such as BERT), or there are several candidates.
    """
    parent = blocks.root.get_submodule(blocks.path.rpartition(".")[0])
    found = [(name, child) for name, child in parent.named_children() if name in _FINAL_NORM_NAMES]
    if len(found) == 1:
        return found[0][1]
    children = ", ".join(name for name, _ in parent.named_children())
    what = "no final norm" if not found else "more than one module that could be the final norm"
    raise BlocksError(
        f"{type(parent).__name__} has {what} beside its blocks (it contains: {children}). Use the state before the "
        "norm: final_norm=False."
    )


def resolve_layers(spec: str | Sequence[int], n_blocks: int) -> list[int]:
    """Block numbers (from 0, ascending) for a choice of layers.

    Args:
        spec: ``"all"``; ``"deep"``, the second half (blocks ``n_blocks // 2`` and up; Liu et al. 2026,
            arXiv:2602.00217, table 3: better than all or the shallow half); ``"shallow"``, the first half;
            ``"last"``; or block numbers, negative ones counted from the end.
        n_blocks: Number of blocks of the model.

    Raises:
        ValueError: an unknown name, a number out of range, a repeated number, or no layer at all.
    """
    half = n_blocks // 2
    if isinstance(spec, str):
        one_of("choice of layers", spec, LAYER_NAMES)
        chosen = {
            "all": range(n_blocks),
            "deep": range(half, n_blocks),
            "shallow": range(max(half, 1)),
            "last": range(n_blocks - 1, n_blocks),
        }[spec]
        return list(chosen)
    numbers = list(spec)
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int):
            raise ValueError(f"layers must be block numbers or one of {', '.join(LAYER_NAMES)}; got {number!r}.")
        if not -n_blocks <= number < n_blocks:
            raise ValueError(f"layer {number} does not exist: the model has blocks 0 to {n_blocks - 1}.")
    result = sorted({number % n_blocks for number in numbers})
    if not result:
        raise ValueError("layers is empty; name at least one block, or do not attach the loss.")
    if len(result) != len(numbers):
        raise ValueError(f"layers {numbers} name a block twice (the model has {n_blocks} blocks).")
    return result


def _starts(core: nn.Module) -> Iterator[nn.Module]:
    get_decoder = getattr(core, "get_decoder", None)
    if callable(get_decoder):
        try:
            decoder = get_decoder()
        except (AttributeError, NotImplementedError):  # some families declare it and cannot answer
            decoder = None
        # ModernBERT answers with the Linear of its masked-LM head: it contains no list, and is passed over
        if isinstance(decoder, nn.Module):
            yield decoder
    base = getattr(core, "base_model", core)
    if isinstance(base, nn.Module):
        yield base
    yield core


def _outermost_lists(module: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    for child in module.children():
        members = _members(child)
        if members and not all(_is_single_layer(member) for member in members):
            yield child, members
        elif not members:
            yield from _outermost_lists(child)


def _members(module: nn.Module) -> list[nn.Module]:
    if isinstance(module, nn.ModuleList):
        return list(module)
    # torchtitan keeps its blocks in a dictionary whose keys are the layer numbers
    if isinstance(module, nn.ModuleDict) and all(str(key).isdigit() for key in module):
        return list(module.values())
    return []


def _is_single_layer(module: nn.Module) -> bool:
    """An embedding, a norm, a linear layer: nothing inside that attends or transforms."""
    for wrapper in ("_orig_mod", "_checkpoint_wrapped_module", "base_layer"):  # compile, checkpointing, PEFT
        inner = getattr(module, wrapper, None)
        if isinstance(inner, nn.Module):
            return _is_single_layer(inner)
    return not any(name != "parametrizations" for name, _ in module.named_children())


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.ModuleDict))


def _refuse_containers(path: str, members: list[nn.Module]) -> None:
    """A list of lists: its members are never called, so no hook on them ever runs."""
    if not any(_is_container(member) for member in members):
        return
    kind = next(type(member).__name__ for member in members if _is_container(member))
    inner = []
    for place, member in enumerate(members):
        names = {id(module): f"{path}.{place}.{name}" for name, module in member.named_modules()}
        lists = [(names[id(holder)], found) for holder, found in _outermost_lists(member)]
        inner += lists if not _members(member) else [(f"{path}.{place}", _members(member))]
    serving = [(name, len(found)) for name, found in inner if _is_uniform(found)]
    if serving:
        listed = ", ".join(f"{name!r} ({length} modules)" for name, length in serving)
        remedy = f"Name one of the inner lists, blocks={serving[0][0]!r}: {listed}."
    else:
        remedy = (
            "No module here outputs the state after a layer: wrap the parts of each layer in a module whose forward "
            "returns that state."
        )
    raise BlocksError(f"{path!r} is a nested list: its members are {kind}, which have no forward to observe. {remedy}")


def _refuse_stages(path: str, members: list[nn.Module], count: tuple[str, int] | None) -> None:
    """A list of stages or towers that hold the blocks, by the configured number of layers."""
    if count is None or len(members) == count[1]:
        return
    inner = []
    for place, member in enumerate(members):
        names = {id(module): name for name, module in member.named_modules()}
        lists = [(f"{path}.{place}.{names[id(holder)]}", found) for holder, found in _outermost_lists(member)]
        inner += [(name, found) for name, found in lists if _is_uniform(found)]
    serving = [(name, len(found)) for name, found in inner if len(found) == count[1]]
    if not serving and sum(len(found) for _, found in inner) == count[1]:
        serving = [(name, len(found)) for name, found in inner]
    if serving:
        listed = ", ".join(f"{name!r} ({length} modules)" for name, length in serving)
        raise BlocksError(
            f"{path!r} is a nested list: it has {len(members)} modules where {count[0]} = {count[1]}, and the blocks "
            f"are in the inner lists. Name one, blocks={serving[0][0]!r}: {listed}; or blocks={path!r} for the outer "
            "modules."
        )


def _is_uniform(members: list[nn.Module]) -> bool:
    """Modules of one class that hold others: a list that blocks can stand in."""
    kinds = {type(member) for member in members}
    return len(kinds) == 1 and not any(_is_container(member) or _is_single_layer(member) for member in members)


def _no_list(core: nn.Module, root: nn.Module) -> str:
    """Why there is no candidate, and the path of what may be meant."""
    what = f"{type(core).__name__} has no nn.ModuleList of transformer blocks. "
    chains = [name for name, found in root.named_modules() if isinstance(found, nn.Sequential)]
    chains = [name for name in chains if _is_uniform(list(root.get_submodule(name).children()))]
    single = [name for name, found in root.named_modules() if _members(found)]
    if chains:
        return f"{what}Use the nn.Sequential that holds them: blocks={chains[0]!r}."
    if single:
        listed = ", ".join(f"{name!r} ({type(_members(root.get_submodule(name))[0]).__name__})" for name in single)
        what += f"Its module lists hold single layers: {listed}. "
    return f"{what}Put the blocks into an nn.ModuleList, or name the list to use: blocks='dotted.path'."


def _by_path(root: nn.Module, path: str) -> list[nn.Module]:
    modules = dict(root.named_modules())
    if path not in modules:
        lists = [name for name, module in modules.items() if _members(module)]
        raise BlocksError(
            f"{type(root).__name__} has no module {path!r}.{suggest(path, lists)} Its module lists: "
            f"{', '.join(lists) or 'none'}."
        )
    chosen = modules[path]
    if isinstance(chosen, nn.Sequential):
        return list(chosen)
    members = _members(chosen)
    if not members:
        raise BlocksError(
            f"blocks={path!r} is a {type(chosen).__name__}; expected a non-empty nn.ModuleList, nn.Sequential, or "
            "nn.ModuleDict with digit keys."
        )
    return members


def _configured_layers(core: nn.Module) -> tuple[str, int] | None:
    """The number of blocks that the model's settings give, with the name that it has there."""
    places: list[Any] = [getattr(core, name, None) for name in _CONFIG_NAMES]
    if hasattr(places[0], "get_text_config"):
        places[0] = places[0].get_text_config()
    for place in (*places, core):
        for name in _LAYER_COUNT_NAMES:
            value = place.get(name) if isinstance(place, dict) else getattr(place, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return name, value
    return None
