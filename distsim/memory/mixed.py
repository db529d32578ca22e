"""Recompute, offload or keep, chosen layer by layer: near-optimal plans for any chain, with transfers that overlap.

The exact planners know chains whose offload overlaps only without saved intermediates, and up to a dozen layers.
Here each layer has one of several ways, what follows is built, replayed and timed, and ways are changed, one and then
two neighbours at a time, as long as the time goes down.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import IntEnum
from itertools import product

from distsim.memory.chain import Chain
from distsim.memory.plan import InfeasibleBudget, MemoryPlan, Op, Row, with_drops
from distsim.memory.replay import Overlap, replay

AHEAD = (1, 2, 4)
"""How many backwards before it is needed a read may be issued."""


class Way(IntEnum):
    """What becomes of a layer between its forward and its backward."""

    KEEP = 0
    RECOMPUTE = 1
    """Nothing is kept."""
    CHECKPOINT = 2
    """a_i is kept, and what else its backward needs is recomputed; without saved intermediates the same as KEEP."""
    OFFLOAD = 3
    """All that is kept is copied to disk."""
    OFFLOAD_OUTPUT = 4
    """a_i is, and what else its backward needs is recomputed."""
    OFFLOAD_REST = 5
    """a_i is kept, and all that its backward needs is on disk."""
    OFFLOAD_BOTH = 6
    """a_i is on disk for itself, beside all that its backward needs: B_(i+1) needs only a_i."""


STARTS = 2
"""Of the plans to begin with, how many are improved."""

Ways = tuple[Way, ...]
Score = tuple[float, float, float]


def plan(chain: Chain, budget: float, overlap: Overlap = "none") -> MemoryPlan:
    """Return the best plan found.

    Raises: InfeasibleBudget with the least budget for which a plan was found.
    """
    known: dict[tuple[Ways, int], tuple[Score, MemoryPlan]] = {}

    def score(ways: Ways, ahead: int) -> Score:
        """(what does not fit, time, peak): less is better."""
        if (ways, ahead) not in known:
            made = with_drops(chain, rows(chain, ways, ahead))
            one_by_one = replay(chain, made)  # fits if it fits so: whoever waits for memory waits for earlier rows
            over = max(0.0, one_by_one.peak_memory - budget)
            time = one_by_one.time if over or overlap == "none" else replay(chain, made, budget, overlap).time
            known[ways, ahead] = (over, time, one_by_one.peak_memory), made
        return known[ways, ahead][0]

    def descend(start: tuple[Ways, int]) -> tuple[Ways, int]:
        best, at_once = start, 1  # layers that change together: two only when no single one is left that helps
        while at_once <= 2:
            before = best
            for first in range(chain.layers):
                best = min([best, *_neighbours(chain, *best, first, at_once)], key=lambda each: score(*each))
            at_once = 1 if best != before else at_once + 1
        return best

    starts = sorted({(ways, ahead) for ways in _starts(chain) for ahead in AHEAD}, key=lambda each: score(*each))
    best = starts[0]
    for start in starts[:STARTS]:
        best = min(best, descend(start), key=lambda each: score(*each))
    (over, _, peak), found = known[best]
    if over:
        raise InfeasibleBudget(budget, peak)
    return found


def rows(chain: Chain, ways: Sequence[Way], ahead: int) -> list[Row]:
    """Return the operations, without drops, of a way for each layer; reads come `ahead` backwards early."""
    record = Op.FORWARD if chain.saved is None else Op.RECORD
    found: list[Row] = []
    for layer, way in enumerate(ways, 1):
        last = layer == chain.layers
        found.append((record if way in (Way.KEEP, *_RECORDED) or last else Op.FORWARD, layer))
        if not last:
            found += [(op, layer) for op, _ in _transfers(chain, way)]
    found.append((Op.LOSS, chain.layers))
    reads = [layer for layer in range(chain.layers - 1, 0, -1) if ways[layer - 1] in _ON_DISK]
    resident = {layer for layer, way in enumerate(ways, 1) if way in _RESIDENT} | {0, chain.layers}
    whole = {layer for layer, way in enumerate(ways, 1) if way == Way.KEEP} | {chain.layers}
    for layer in range(chain.layers, 0, -1):
        needed = {layer - 1, layer} if chain.saved is not None or chain.needs == "both" else set()
        needed |= {layer - 1} if chain.needs == "input" else {layer} if chain.needs == "output" else set()
        base = min(needed)  # from where on everything has to be made
        while base not in resident and base not in reads:
            base -= 1
        while reads and reads[0] >= min(base, layer - ahead):
            each = reads.pop(0)
            found.append((_transfers(chain, ways[each - 1])[-1][1], each))  # of both, a_i
            resident.add(each)
            if ways[each - 1] == Way.OFFLOAD:
                whole.add(each)
        for each in range(base + 1, layer + 1):
            if chain.saved is not None and each not in whole:
                from_disk = ways[each - 1] in (Way.OFFLOAD_REST, Way.OFFLOAD_BOTH)
                found.append((Op.READ_SAVED if from_disk else Op.RECORD, each))
                whole.add(each)
            elif chain.saved is None and each not in resident and each <= max(needed):
                found.append((record, each))
            resident.add(each)
        found.append((Op.BACKWARD, layer))
    return found


_RECORDED = (Way.OFFLOAD, Way.OFFLOAD_REST, Way.OFFLOAD_BOTH)
_ON_DISK = (Way.OFFLOAD, Way.OFFLOAD_OUTPUT, Way.OFFLOAD_BOTH)
"""From where a_i, alone or in abar_i, is read back; of the others it is resident or made again."""
_RESIDENT = (Way.KEEP, Way.CHECKPOINT, Way.OFFLOAD_REST)


def _transfers(chain: Chain, way: Way) -> list[tuple[Op, Op]]:
    """Return the writes of a way, each with its read; what B_(i+1) reads comes last."""
    plain, saved = (Op.WRITE, Op.READ), (Op.WRITE_SAVED, Op.READ_SAVED)
    if chain.saved is None:
        return [plain] if way == Way.OFFLOAD else []
    return {
        **{Way.OFFLOAD: [saved], Way.OFFLOAD_OUTPUT: [plain]},
        **{Way.OFFLOAD_REST: [saved], Way.OFFLOAD_BOTH: [saved, plain]},
    }.get(way, [])


def allowed(chain: Chain) -> list[Way]:
    """Return the ways that a chain has operations for."""
    found = [Way.KEEP, Way.RECOMPUTE]
    if chain.saved is None:
        return [*found, Way.OFFLOAD] if chain.write is not None else found
    found.append(Way.CHECKPOINT)
    if chain.write_saved is not None:
        found += [Way.OFFLOAD, Way.OFFLOAD_REST]
    if chain.write is not None:
        found.append(Way.OFFLOAD_OUTPUT)
    if chain.write_saved is not None and chain.write is not None:
        found.append(Way.OFFLOAD_BOTH)
    return found


def _starts(chain: Chain) -> Iterator[Ways]:
    """Yield ways to begin with: one for all, and checkpoints at every k-th layer."""
    possible = allowed(chain)
    yield from ((way,) * chain.layers for way in possible)
    anchors = [way for way in (Way.KEEP, Way.CHECKPOINT, Way.OFFLOAD_OUTPUT) if way in possible]
    for every in range(2, chain.layers):
        for anchor in anchors:
            yield tuple(anchor if layer % every == 0 else Way.RECOMPUTE for layer in range(1, chain.layers + 1))


def _neighbours(chain: Chain, ways: Ways, ahead: int, first: int, at_once: int) -> Iterator[tuple[Ways, int]]:
    """Yield what has other ways from layer `first` on, or earlier or later reads."""
    changed = ways[first : first + at_once]
    for others in product(allowed(chain), repeat=len(changed)):
        if at_once == 1 or all(one != other for one, other in zip(others, changed, strict=True)):
            yield (*ways[:first], *others, *ways[first + at_once :]), ahead
    if first == 0:
        yield from ((ways, other) for other in AHEAD)
