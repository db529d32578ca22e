"""MemoryPlan: the operations of one forward and backward through a chain, in the order in which they are issued."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from distsim.errors import ConfigError, DistsimError
from distsim.memory.chain import Chain
from distsim.units import shown


class PlanError(DistsimError):
    """A plan that cannot be run: the message names the row, the operation and what is wrong."""


class InfeasibleBudget(ConfigError):
    """A budget within which no plan can be, or none of a policy."""

    def __init__(self, budget: float, least: float, policy: str = "", show: Callable[[float], str] = "{:,.15g}".format):
        """`least` is the least feasible budget; `show` writes sizes."""
        who = f"no plan of {policy}" if policy else "no plan"
        super().__init__(f"{who} fits into a budget of {show(budget)}; the least that is feasible is {show(least)}")
        self.budget, self.least, self.policy = budget, least, policy


class Op(IntEnum):
    """What a row does with its layer i."""

    FORWARD = 0
    """a_i of a_(i-1)."""
    RECORD = 1
    """Forward that leaves all that the backward needs: abar_i, which contains a_i."""
    LOSS = 2
    """g_L of a_L, once."""
    BACKWARD = 3
    """g_(i-1) of g_i; frees g_i, and abar_i where there is one."""
    WRITE = 4
    READ = 5
    """a_i to disk, and back."""
    WRITE_SAVED = 6
    READ_SAVED = 7
    """abar_i to disk, and back."""
    DROP = 8
    """Whatever of layer i is resident is no longer, as soon as nothing reads it any more."""
    DROP_SAVED = 9
    """Of abar_i only a_i stays."""


NAMES = ("F", "Fall", "LOSS", "B", "W", "R", "Wall", "Rall", "D", "Dall")
DROPS = (Op.DROP, Op.DROP_SAVED)
Row = tuple[Op, int]
_WORD = re.compile("([A-Za-z]+)(?:_([0-9]{1,9}))?")


@dataclass(frozen=True, slots=True, eq=False)
class MemoryPlan:
    """Operations as columns, a row for each, in the order in which they are issued."""

    op: npt.NDArray[np.int8]
    layer: npt.NDArray[np.int32]
    """1..L; of LOSS it is L."""

    @staticmethod
    def of(rows: Iterable[Row]) -> MemoryPlan:
        """Make a plan of (operation, layer) pairs."""
        listed = list(rows)
        return MemoryPlan(
            np.array([op for op, _ in listed], np.int8), np.array([layer for _, layer in listed], np.int32)
        )

    def __len__(self) -> int:
        return len(self.op)

    def rows(self) -> list[Row]:
        """Return (operation, layer) pairs."""
        return [(Op(op), layer) for op, layer in zip(self.op.tolist(), self.layer.tolist(), strict=True)]

    def count(self, *ops: Op) -> int:
        """Return how many rows are one of these operations."""
        return int(np.isin(self.op, ops).sum())

    def schedule(self) -> str:
        """Return the operations without drops: `F_1 F_2 LOSS B_2 F_1 B_1`."""
        return " ".join(name(op, layer) for op, layer in self.rows() if op not in DROPS)

    def text(self) -> str:
        """Return all operations, what `parse` reads."""
        return " ".join(name(op, layer) for op, layer in self.rows())


def name(op: int, layer: int) -> str:
    """Return an operation as it is written: `B_3`."""
    return NAMES[op] if op == Op.LOSS else f"{NAMES[op]}_{layer}"


def parse(text: str, layers: int) -> MemoryPlan:
    """Read a plan for a chain of so many layers from its text; ConfigError naming the word that is none."""
    rows: list[Row] = []
    for place, word in enumerate(text.split(), 1):
        match = _WORD.fullmatch(word)
        if match is None or match[1] not in NAMES or (match[1] == "LOSS") == (match[2] is not None):
            words = ", ".join(each if each == "LOSS" else f"{each}_i" for each in NAMES)
            raise ConfigError(f"operation {place} of the plan, {shown(word)}, is none; expected one of {words}")
        layer = layers if match[2] is None else int(match[2])
        if not 1 <= layer <= layers:
            raise ConfigError(f"operation {place} of the plan, {shown(word)}: layers are 1 to {layers}")
        rows.append((Op(NAMES.index(match[1])), layer))
    return MemoryPlan.of(rows)


def with_drops(chain: Chain, rows: Sequence[Row]) -> MemoryPlan:
    """Make a plan of operations that drop nothing: all is dropped once it is not read again before it is made anew.

    Walks backwards, so that of each layer it is known how much is still read: nothing, a_i, or all of abar_i.
    """
    nothing, plain, whole = 0, 1, 2
    wanted = [nothing] * (chain.layers + 1)
    found: list[Row] = []

    def drop(layer: int, held: int) -> None:
        """From here on less is read than is held."""
        if wanted[layer] < held:
            found.append((Op.DROP if wanted[layer] == nothing else Op.DROP_SAVED, layer))

    for op, layer in reversed(rows):
        assert op not in DROPS, "rows without drops"
        if op in (Op.FORWARD, Op.READ, Op.RECORD, Op.READ_SAVED):
            drop(layer, whole if op in (Op.RECORD, Op.READ_SAVED) else plain)
            wanted[layer] = nothing
        if op == Op.BACKWARD and chain.saved is not None:
            wanted[layer] = whole  # which it frees by itself
        for each, held in reads(chain, op, layer):
            if each and wanted[each] < held:
                drop(each, held)
                wanted[each] = held
        found.append((op, layer))
    return MemoryPlan.of(reversed(found))


def reads(chain: Chain, op: Op, layer: int) -> list[tuple[int, int]]:
    """Return what an operation reads: (layer, 1) for a_i, alone or in abar_i, (layer, 2) for all of abar_i."""
    if op in (Op.FORWARD, Op.RECORD):
        return [(layer - 1, 1)]
    if op in (Op.LOSS, Op.WRITE):
        return [(layer, 1)]
    if op == Op.WRITE_SAVED:
        return [(layer, 2)]
    if op != Op.BACKWARD:
        return []
    if chain.saved is not None:
        return [(layer - 1, 1), (layer, 2)]
    return {"input": [(layer - 1, 1)], "output": [(layer, 1)], "both": [(layer - 1, 1), (layer, 1)]}[chain.needs]


class Point(NamedTuple):
    """A point of a front: the least budget with which this time is possible."""

    budget: float
    time: float
    plan: MemoryPlan
