"""What executing a memory plan needs to know of it, looked up once, and what comes of it, counted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from distsim.memory.plan import DROPS, MemoryPlan, Op, Row
from distsim.memory.replay import READS, WRITES


@dataclass(slots=True)
class Counts:
    """What has really happened, counted where it happens; of layers 1..L in this order."""

    forwards: list[int]
    loads: list[int]
    stores: list[int]
    read_bytes: int
    written_bytes: int
    resident_bytes: list[int]
    """Of each row, the counterpart of `Replay.memory_at`: activations, saved tensors and gradients between layers, but
    not what a layer needs for itself while it runs, nor g_0 where the input has no gradient; 0 for drops."""

    @staticmethod
    def zero(layers: int, rows: int) -> Counts:
        """Return counts of nothing."""
        return Counts([0] * layers, [0] * layers, [0] * layers, 0, 0, [0] * rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """A plan, and what there is to look up in it."""

    rows: list[Row]
    copies_before: list[list[int]]
    """Of each row: writes and reads that must have ended before it, beside those of what it reads."""
    loss_row: int
    backward_row: dict[int, int]
    """Of each layer."""
    runs_again: frozenset[int]
    """Layers that are run more than once."""


def compiled(plan: MemoryPlan, waits: Iterable[tuple[int, int]] | None) -> Program:
    """Look up once what every pass needs to know of a plan."""
    rows = plan.rows()
    copies: list[list[int]] = [[] for _ in rows]
    if waits is None:
        busy = [row for row, (op, _) in enumerate(rows) if op not in DROPS]
        for before, after in pairwise(busy):
            copies[after].append(before)
    else:
        for before, after in waits:
            if _has_to_wait(rows[before], rows[after]):
                copies[after].append(before)
    runs = [layer for op, layer in rows if op in (Op.FORWARD, Op.RECORD)]
    return Program(
        rows=rows,
        copies_before=copies,
        loss_row=next(row for row, (op, _) in enumerate(rows) if op == Op.LOSS),
        backward_row={layer: row for row, (op, layer) in enumerate(rows) if op == Op.BACKWARD},
        runs_again=frozenset(layer for layer in runs if runs.count(layer) > 1),
    )


def _has_to_wait(before: Row, after: Row) -> bool:
    """Say whether a row must wait for a copy, beside those of what it reads.

    The store makes writes one after the other, and reads; a write takes no memory, so it waits for nothing else.
    """
    if after[0] in WRITES:
        return False
    return before[0] in WRITES or (before[0] in READS and after[0] not in READS)
