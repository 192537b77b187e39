"""Which runs form a pair: faults of single runs, and faults between the arms of one seed."""

from __future__ import annotations

from collections.abc import Sequence

from decondense.compare.context import Context
from decondense.compare.results import Pairing
from decondense.compare.study import Cell, Fault, FaultKind, Study

_HASHES = {"init_hash": "initial weights", "order_hash": "data order", "corpus_hash": "corpus"}


def faults_of(cell: Cell, *, measured: bool = False) -> list[Fault]:
    """What is wrong with one run."""

    def fault(kind: FaultKind, text: str) -> Fault:
        return Fault(cell.id, kind, text)

    if cell.status == "missing":
        return [fault("missing", "has no rows: it was never run")]
    if cell.status == "failed":
        return [fault("failed", f"failed: {cell.run.get('error') or 'no reason recorded'}")]
    if cell.status == "unfinished":
        last = max([*cell.steps, *cell.profiles, 0])
        return [fault("unfinished", f"is unfinished (last row at step {last})")]
    faults = [fault("conflict", f"has {conflict}") for conflict in cell.conflicts]
    if cell.finishes > 1:
        faults.append(fault("repeated", f"finished {cell.finishes} times: two runs of one cell"))
    final = f"of its final checkpoint (step {cell.final_step})"
    if measured or (not cell.scores and cell.profiles):
        # condensation alone can be compared too
        if cell.final_profile() is None:
            faults.append(fault("no profile", f"has no profile {final}"))
    elif all(cell.final_score(key) is None for key in cell.scores):  # nothing to compare
        faults.append(fault("no score", f"has no score {final}"))
    for key, curve in cell.scores.items():
        if cell.final_step not in curve:
            faults.append(fault("no score", f"has no {key[0]} {key[1]} {final}"))
    return faults


def unpaired(cells: Sequence[Cell], baseline: str, study: Study) -> list[Fault]:
    """Faults between the arms of one seed, each named after the cell that departs from the baseline's."""
    reference = next((cell for cell in cells if cell.arm == baseline), None)
    if reference is None:
        return []
    faults = []
    for cell in cells:
        for what, title in _HASHES.items():
            own_hash, base_hash = cell.recorded(what), reference.recorded(what)
            own = study.has_own_model(cell.arm) or study.has_own_model(reference.arm)
            if what == "init_hash" and (own or study.measured):
                continue  # other weights by design
            if own_hash is None:
                # an arm that is not trained reads no data, and a study that only measures has no corpus
                if not study.measured and (what != "order_hash" or cell.final_step != 0):
                    faults.append(Fault(cell.id, "no hash", f"has no {what}, so its pairing cannot be verified"))
            elif cell is not reference and base_hash is not None and own_hash != base_hash:
                text = f"is not paired with {reference.id}: different {title} ({own_hash} against {base_hash})"
                faults.append(Fault(cell.id, "other hash", text))
        if cell is reference:
            continue
        for key in reference.scores.keys() | cell.scores.keys():
            if (key in cell.scores) != (key in reference.scores):
                lacking = reference if key in cell.scores else cell
                faults.append(Fault(lacking.id, "no score", f"has no score of {key[0]} {key[1]}"))
                continue
            mine, theirs = cell.final_items(key), reference.final_items(key)
            if mine.names and theirs.names and not mine.same_items(theirs):
                only = len({*mine.names} ^ {*theirs.names})
                how = f"{only} items are in only one of them" if only else "the same items have different weights"
                text = f"was scored on other items of {key[0]} than {reference.id}: {how}"
                faults.append(Fault(cell.id, "other items", text))
    return sorted(faults, key=str)


def pairings(context: Context) -> tuple[Pairing, ...]:
    """What the runs of each seed share."""
    found = []
    for seed in context.seeds:
        cells = [context.cells[arm, seed] for arm in context.arms if (arm, seed) in context.cells]
        others = set(context.other_starts())

        def shared(what: str, cells: list[Cell] = cells) -> str | None:
            values = (cell.recorded(what) for cell in cells)
            return next((str(value) for value in values if value is not None), None)

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
