"""The checker of all plans: replays one, operation by operation, and says what it takes.

Operations are issued in the plan's order. Each starts as soon as its engine is free, what it reads is there and what
it allocates fits; memory is given out in the plan's order. What is dropped is free once nobody reads it any more, and
what was issued before the drop has ended.
With `overlap="none"` all operations are on one engine, with "full" computing, writing and reading have one each, and
with "half" writes and reads share one. So the times follow from the order alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Literal, NoReturn

import numpy as np
import numpy.typing as npt

from distsim.memory.chain import Chain, Floats
from distsim.memory.plan import MemoryPlan, Op, PlanError, name, reads

Overlap = Literal["none", "half", "full"]
COMPUTE, WRITER, READER = 0, 1, 2
WRITES, READS = (Op.WRITE, Op.WRITE_SAVED), (Op.READ, Op.READ_SAVED)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Replay:
    """What a plan takes. Columns have an entry for each row of it."""

    time: float
    """When the last backward has ended."""
    peak_memory: float
    forwards: int
    loads: int
    stores: int
    start: Floats
    finish: Floats
    """NaN for drops."""
    engine: npt.NDArray[np.int8]
    """0 computes, 1 writes, 2 reads; -1 for drops."""
    memory_at: Floats
    """What is resident as a row starts, its outputs included; NaN for drops."""
    waits: tuple[tuple[int, int], ...]
    """(before, after): rows that must have ended before others start, for data, for an engine, or for memory."""


def engine_of(op: Op, overlap: Overlap) -> int:
    """Return on which engine an operation runs."""
    if overlap == "none" or op not in WRITES + READS:
        return COMPUTE
    return READER if overlap == "full" and op in READS else WRITER


def cost(chain: Chain, op: Op, layer: int) -> float | None:
    """Return how long an operation takes; None if the chain has no such operation."""
    columns = {
        **dict.fromkeys((Op.FORWARD, Op.RECORD), chain.forward),
        **{Op.BACKWARD: chain.backward, Op.WRITE: chain.write, Op.READ: chain.read},
        **{Op.WRITE_SAVED: chain.write_saved, Op.READ_SAVED: chain.read_saved},
    }
    if op == Op.LOSS:
        return 0.0
    column = columns[op]
    return None if column is None else float(column[layer - 1])


def replay(chain: Chain, plan: MemoryPlan, budget: float | None = None, overlap: Overlap = "none") -> Replay:
    """Replay a plan from its first operation to its last.

    Raises: PlanError naming the row and the operation that cannot be: it reads what is not resident or not on disk,
    makes what is there already, does not fit into the budget, is a backward out of order, or is missing.
    """
    run = _Run(chain, plan, np.inf if budget is None else budget, overlap)
    for row, (op, layer) in enumerate(plan.rows()):
        run.take(row, op, layer)
    return run.result()


@dataclass(slots=True)
class _Held:
    """What of a layer is resident: a_i, or abar_i."""

    size: float
    whole: bool
    made_by: int
    readers: list[int] = field(default_factory=list)


class _Run:
    """The state of a replay."""

    def __init__(self, chain: Chain, plan: MemoryPlan, budget: float, overlap: Overlap) -> None:
        self.chain, self.plan, self.budget, self.overlap = chain, plan, budget, overlap
        rows = len(plan)
        self.start, self.finish, self.memory_at = (np.full(rows, np.nan) for _ in range(3))
        self.engine = np.full(rows, -1, np.int8)
        self.waits: set[tuple[int, int]] = set()
        self.held = {0: _Held(float(chain.size[0]), False, -1)}
        self.gradient: tuple[int, int] | None = None  # (layer, row that made it)
        self.next_backward = chain.layers
        self.on_disk: dict[tuple[int, bool], int] = {}  # (layer, whole) -> row that wrote it
        self.last_on = [-1, -1, -1]
        self.issued = -1  # the last row that is no drop
        self.used = float(chain.size[0])
        self.frees: list[tuple[float, int, float]] = []  # (when, row that ends then, how much)
        self.freed_by = [-1, -1, -1]  # per engine: the last row whose end has given memory back
        self.freed_at = 0.0
        self.changes = [(0.0, -1, 0, self.used)]  # (when, row, 0 as it starts or 1 as it ends, how much)

    def take(self, row: int, op: Op, layer: int) -> None:
        if not 1 <= layer <= self.chain.layers:
            self.refuse(row, op, layer, f"layers are 1 to {self.chain.layers}")
        if op in (Op.DROP, Op.DROP_SAVED):
            self.drop(row, op, layer)
            return
        inputs = self.inputs(row, op, layer)
        before = [made for made, _ in inputs if made >= 0]
        stays, tmp = self.allocates(row, op, layer)
        time = cost(self.chain, op, layer)
        if time is None:
            self.refuse(row, op, layer, "this chain has no times for it")

        engine = engine_of(op, self.overlap)
        before += [last for last in [self.last_on[engine]] if last >= 0]
        at = max([0.0, *(float(self.finish[each]) for each in before)])
        if stays + tmp > 0:
            at = max(at, self.fit(row, op, layer, stays + tmp, at))
            before += [each for each in self.freed_by if each >= 0]
        self.waits |= {(each, row) for each in before}
        self.start[row], self.finish[row], self.engine[row] = at, at + time, engine
        self.last_on[engine] = self.issued = row

        self.changes.append((at, row, 0, stays + tmp))
        if tmp:
            self.free(at + time, row, tmp)
        for _, held in inputs:
            if held is not None:
                held.readers.append(row)
        self.effect(row, op, layer, stays)

    def inputs(self, row: int, op: Op, layer: int) -> list[tuple[int, _Held | None]]:
        """Return what an operation reads: the row that made it, and where it is resident."""
        found: list[tuple[int, _Held | None]] = []
        for each, what in reads(self.chain, op, layer):
            held = self.held.get(each)
            if held is None:
                self.refuse(row, op, layer, f"it reads a_{each}, which is not resident")
            if what == 2 and not held.whole:
                self.refuse(row, op, layer, f"it reads abar_{each}, of which only a_{each} is resident")
            found.append((held.made_by, held))
        if op in READS:
            whole = op == Op.READ_SAVED
            if (layer, whole) not in self.on_disk:
                self.refuse(row, op, layer, f"it reads {'abar' if whole else 'a'}_{layer}, which is not on disk")
            found.append((self.on_disk[layer, whole], None))
        if op == Op.BACKWARD:
            if self.gradient is None:
                self.refuse(row, op, layer, "it comes before LOSS")
            if layer != self.next_backward:
                expected = f"B_{self.next_backward}" if self.next_backward else "none: all are done"
                self.refuse(row, op, layer, f"it is out of order; expected {expected}")
            found.append((self.gradient[1], None))
        if op == Op.LOSS and (self.gradient is not None or layer != self.chain.layers):
            self.refuse(row, op, layer, f"it comes once, of layer {self.chain.layers}")
        return found

    def allocates(self, row: int, op: Op, layer: int) -> tuple[float, float]:
        """Return how much an operation allocates, to stay and for its own time."""
        chain = self.chain
        makes_whole = op in (Op.RECORD, Op.READ_SAVED)
        if makes_whole and chain.saved is None:
            self.refuse(row, op, layer, "this chain has no saved intermediates")
        if makes_whole or op in (Op.FORWARD, Op.READ):
            if layer in self.held:
                self.refuse(row, op, layer, f"a_{layer} is resident already")
            assert not makes_whole or chain.saved is not None
            size = chain.saved[layer - 1] if makes_whole and chain.saved is not None else chain.size[layer]
            tmp = chain.tmp(True)[layer - 1] if op in (Op.FORWARD, Op.RECORD) else 0.0
            return float(size), float(tmp)
        if op == Op.LOSS:
            return float(chain.size[layer]), 0.0
        if op == Op.BACKWARD:
            return float(chain.size[layer - 1]), float(chain.tmp(False)[layer - 1])
        return 0.0, 0.0

    def fit(self, row: int, op: Op, layer: int, size: float, at: float) -> float:
        """Return from when on there is room; everything that is given back until then is."""
        while self.frees and (self.frees[0][0] <= at or self.used + size > self.budget):
            when, by, freed = heappop(self.frees)
            self.used -= freed
            self.freed_at = max(self.freed_at, when)
            if by >= 0:
                engine = int(self.engine[by])
                if self.freed_by[engine] < 0 or self.finish[by] >= self.finish[self.freed_by[engine]]:
                    self.freed_by[engine] = by
        if self.used + size > self.budget:
            over = f"it needs {self.used + size:,.15g}, {self.used:,.15g} of it for what is resident"
            self.refuse(row, op, layer, f"{over}; the budget is {self.budget:,.15g}")
        self.used += size
        return self.freed_at

    def free(self, when: float, by: int, size: float) -> None:
        heappush(self.frees, (when, by, size))
        self.changes.append((when, by, 1, -size))

    def effect(self, row: int, op: Op, layer: int, size: float) -> None:
        """What an operation has made is there, what a backward has used up is free."""
        if op in (Op.FORWARD, Op.RECORD, *READS):
            self.held[layer] = _Held(size, op in (Op.RECORD, Op.READ_SAVED), row)
        elif op in WRITES:
            self.on_disk.setdefault((layer, op == Op.WRITE_SAVED), row)
        elif op == Op.LOSS:
            self.gradient = layer, row
        elif op == Op.BACKWARD:
            self.free(float(self.finish[row]), row, float(self.chain.size[layer]))
            if self.chain.saved is not None:
                self.let_go(self.held.pop(layer), self.held_size(layer))
            self.gradient, self.next_backward = (layer - 1, row), layer - 1

    def held_size(self, layer: int) -> float:
        assert self.chain.saved is not None
        return float(self.chain.saved[layer - 1])

    def drop(self, row: int, op: Op, layer: int) -> None:
        held = self.held.get(layer)
        if held is None:
            self.refuse(row, op, layer, f"a_{layer} is not resident")
        if op == Op.DROP:
            self.let_go(self.held.pop(layer), held.size)
            return
        if not held.whole:
            self.refuse(row, op, layer, f"abar_{layer} is not resident")
        rest = float(self.chain.size[layer])
        self.let_go(held, held.size - rest)
        held.size, held.whole = rest, False

    def let_go(self, held: _Held, size: float) -> None:
        """Free it as soon as it has been made, and all who read it, and what was issued last, have ended."""
        by = max((held.made_by, *held.readers, self.issued), key=lambda each: (self.finish[each], each))
        self.free(float(self.finish[by]), by, size)

    def refuse(self, row: int, op: Op, layer: int, why: str) -> NoReturn:
        raise PlanError(f"operation {row + 1} of {len(self.plan)}, {name(op, layer)}: {why}")

    def result(self) -> Replay:
        if self.gradient is None or self.next_backward:
            missing = f"B_{self.next_backward}" if self.gradient is not None else "LOSS"
            raise PlanError(f"the plan ends after {len(self.plan)} operations without {missing}")
        resident = peak = 0.0
        for _, row, ends, size in sorted(self.changes):  # at one time in the order in which memory is given out
            resident += size
            if not ends and row >= 0:
                self.memory_at[row] = resident
            peak = max(peak, resident)
        counts: Sequence[int] = [self.plan.count(*ops) for ops in ((Op.FORWARD, Op.RECORD), READS, WRITES)]
        return Replay(
            time=float(self.finish[self.gradient[1]]),
            peak_memory=peak,
            forwards=counts[0],
            loads=counts[1],
            stores=counts[2],
            start=self.start,
            finish=self.finish,
            engine=self.engine,
            memory_at=self.memory_at,
            waits=tuple(sorted(self.waits)),
        )
