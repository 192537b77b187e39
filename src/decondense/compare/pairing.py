"""Which runs are a pair: what is wrong with single runs, and between the arms of one seed."""

from __future__ import annotations

from collections.abc import Sequence

from decondense.compare.context import Context, weights_of
from decondense.compare.results import Pairing
from decondense.compare.study import Cell, Study

_HASHES = {"init_hash": "initial weights", "order_hash": "data order", "corpus_hash": "corpus"}


def faults_of(cell: Cell, *, measured: bool = False) -> list[str]:
    """What is wrong with one run."""
    if cell.status == "missing":
        return [f"{cell.name} has no rows: it was never run"]
    if cell.status == "failed":
        return [f"{cell.name} failed: {cell.run.get('error') or 'no reason recorded'}"]
    if cell.status == "unfinished":
        last = max([*cell.steps, *cell.profiles, 0])
        return [f"{cell.name} is unfinished (last row at step {last})"]
    found = [f"{cell.name} has {conflict}" for conflict in cell.conflicts]
    if cell.finishes > 1:
        found.append(f"{cell.name} finished {cell.finishes} times: two runs of one cell")
    if measured or (not cell.scores and cell.profiles):
        # condensation alone can be compared too
        if cell.final_profile() is None:
            found.append(f"{cell.name} has no profile of its final checkpoint (step {cell.final_step})")
    elif all(cell.final_score(key) is None for key in cell.scores):  # nothing to compare
        found.append(f"{cell.name} has no score of its final checkpoint (step {cell.final_step})")
    for key, curve in cell.scores.items():
        if cell.final_step not in curve:
            found.append(f"{cell.name} has no {key[0]} {key[1]} of its final checkpoint (step {cell.final_step})")
    return found


def unpaired(cells: Sequence[Cell], baseline: str, study: Study) -> list[str]:
    """Faults between the arms of one seed, each named after the cell that departs from the baseline's."""
    reference = next((cell for cell in cells if cell.arm == baseline), None)
    if reference is None:
        return []
    found = []
    for cell in cells:
        for what, words in _HASHES.items():
            mine, theirs = cell.said(what), reference.said(what)
            own = study.has_own_model(cell.arm) or study.has_own_model(reference.arm)
            if what == "init_hash" and (own or study.measured):
                continue  # other weights by design
            if mine is None:
                # an arm that is not trained reads no data, and a study that only measures has no corpus
                if not study.measured and (what != "order_hash" or cell.final_step != 0):
                    found.append(f"{cell.name} has no {what}, so that its pairing cannot be proven")
            elif cell is not reference and theirs is not None and mine != theirs:
                found.append(
                    f"{cell.name} is not paired with {reference.name}: other {words} ({mine} against {theirs})"
                )
        if cell is reference:
            continue
        for key in reference.scores.keys() | cell.scores.keys():
            if (key in cell.scores) != (key in reference.scores):
                lacking = reference if key in cell.scores else cell
                found.append(f"{lacking.name} has no score of {key[0]} {key[1]}")
                continue
            mine_items, their_items = cell.final_items(key), reference.final_items(key)
            if mine_items and their_items and weights_of(mine_items) != weights_of(their_items):
                only = len(mine_items.keys() ^ their_items.keys())
                how = f"{only} items are in one of them only" if only else "the same items have other weights"
                found.append(f"{cell.name} was scored on other items of {key[0]} than {reference.name}: {how}")
    return sorted(found)


def pairings(context: Context) -> tuple[Pairing, ...]:
    """What the runs of each seed share."""
    found = []
    for seed in context.seeds:
        cells = [context.cells[arm, seed] for arm in context.arms if (arm, seed) in context.cells]
        others = set(context.other_starts())

        def shared(what: str, cells: list[Cell] = cells) -> str | None:
            said = (cell.said(what) for cell in cells)
            return next((str(value) for value in said if value is not None), None)

        found.append(
            Pairing(
                seed=seed,
                arms=tuple(cell.arm for cell in cells),
                # what is measured as it is has no start to share
                init_hash=None
                if context.study.measured
                else shared("init_hash", [cell for cell in cells if cell.arm not in others]),
                order_hash=shared("order_hash"),
                corpus_hash=shared("corpus_hash"),
                other_starts=tuple(cell.arm for cell in cells if cell.arm in others),
            )
        )
    return tuple(found)
