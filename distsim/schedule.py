"""Schedule: a gradient exchange as a table of transfers, read by checker, simulator and trainers alike.

A row `(step, src, dst, chunk, op, source)` says: at `step`, rank `src` sends its value of `chunk` to rank
`dst`, which adds it to its own running value (`reduce`) or overwrites that (`copy`). `source` says which of
the sender's two values goes out: `input`, its own contribution, which nothing ever changes, or `work`, the
running value. What must wait for what follows from the rows alone and is derived once, in dependencies.py;
no interpreter adds rules of its own.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from distsim.collectives import find
from distsim.compiled import call
from distsim.errors import ScheduleError
from distsim.messages import Messages, coalesced, each_row
from distsim.places import places
from distsim.traffic import Rows, Traffic

Ints = npt.NDArray[np.int32]
Bools = npt.NDArray[np.bool_]


class Op(IntEnum):
    """What the receiver does with a chunk that has arrived."""

    REDUCE = 0
    COPY = 1


class Source(IntEnum):
    """Which of the sender's values is sent."""

    INPUT = 0
    WORK = 1


ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of an element by the name of its type."""

COLUMNS = ("step", "src", "dst", "chunk", "op", "source")


def split(params: int, chunks: int) -> npt.NDArray[np.int64]:
    """Sizes of `chunks` nearly equal parts of `params` elements, the larger ones first; shape (chunks,).

    Some are 0 when there are more chunks than parameters.
    """
    whole, rest = divmod(params, chunks)
    return whole + (np.arange(chunks, dtype=np.int64) < rest)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Schedule:
    """A frozen table of transfers between ranks, with what is there before it and what must be there after."""

    ranks: int
    chunk_elements: npt.NDArray[np.int64]
    """Elements of each chunk, shape (chunks,). Chunks lie one behind another in a flat array."""
    step: Ints
    src: Ints
    dst: Ints
    chunk: Ints
    op: npt.NDArray[np.int8]
    source: npt.NDArray[np.int8]
    """The columns, one entry a transfer, in step order."""
    contributes: Bools
    """Initial holders: who contributes a value to which chunk, shape (ranks, chunks)."""
    must_hold: Bools
    """Postcondition: who must hold the sum of all contributions to a chunk afterwards, shape (ranks, chunks)."""
    coalesced: bool = False
    """Whether rows travel together where messages.py says that they can; otherwise each is a message of its own."""

    @staticmethod
    def of(
        *,
        ranks: int,
        chunk_elements: npt.NDArray[np.int64],
        step: npt.ArrayLike,
        src: npt.ArrayLike,
        dst: npt.ArrayLike,
        chunk: npt.ArrayLike,
        op: npt.ArrayLike,
        source: npt.ArrayLike,
        contributes: npt.ArrayLike = True,
        must_hold: npt.ArrayLike = True,
        coalesced: bool = False,
    ) -> Schedule:
        """Build a schedule from columns in any order that broadcast against each other.

        Rows are put in step order (kept in the given order within a step); rows of chunks without
        parameters are left out: they are neither sent nor counted.

        Raises: ScheduleError if the table is malformed (see `Schedule`).
        """
        given = (step, src, dst, chunk, op, source)
        columns = [_integers(name, np.atleast_1d(column)) for name, column in zip(COLUMNS, given, strict=True)]
        columns = [column.reshape(-1) for column in np.broadcast_arrays(*columns)]
        shape = (ranks, len(chunk_elements))
        if columns[3].size and not 0 <= columns[3].min() <= columns[3].max() < shape[1]:
            raise ScheduleError(f"a transfer names a chunk outside 0..{shape[1] - 1}")
        if (chunk_elements <= 0).any():
            sent = chunk_elements[columns[3]] > 0
            columns = [column[sent] for column in columns]
        if (columns[0][1:] < columns[0][:-1]).any():
            rows = np.argsort(columns[0], kind="stable")
            columns = [column[rows] for column in columns]
        steps, senders, receivers, chunks, ops, sources = map(np.ascontiguousarray, columns)
        return Schedule(
            ranks=ranks,
            chunk_elements=np.array(chunk_elements),
            step=steps,
            src=senders,
            dst=receivers,
            chunk=chunks,
            op=ops,
            source=sources,
            contributes=_flags("contributes", contributes, shape),
            must_hold=_flags("must_hold", must_hold, shape),
            coalesced=coalesced,
        )

    def __post_init__(self) -> None:
        """Refuse a malformed table; whether a well-formed one is right is for the checker to prove."""
        for name in COLUMNS:
            column = getattr(self, name)
            column.flags.writeable = False
            if column.shape != self.step.shape:
                raise ScheduleError(f"column {name} has shape {column.shape}, step has {self.step.shape}")
        self.chunk_elements.flags.writeable = False
        if self.chunk_elements.dtype != np.int64 or self.chunk_elements.ndim != 1 or (self.chunk_elements < 0).any():
            raise ScheduleError("chunk_elements must be a row of 64-bit integers, none of them negative")
        if self.ranks < 1:
            raise ScheduleError(f"a schedule needs at least 1 rank, not {self.ranks}")
        for name in ("contributes", "must_hold"):
            getattr(self, name).flags.writeable = False
            if getattr(self, name).shape != (self.ranks, self.chunks):
                raise ScheduleError(f"{name} must have shape (ranks, chunks) = {(self.ranks, self.chunks)}")
        limits = {"src": self.ranks, "dst": self.ranks, "chunk": self.chunks, "op": 2, "source": 2}
        for name, limit in limits.items():
            column = getattr(self, name)
            if column.size and not 0 <= column.min() <= column.max() < limit:
                self._refuse((column < 0) | (column >= limit), f"{name} outside 0..{limit - 1}")
        self._refuse(self.step < 0, "negative step")
        if (self.step[1:] < self.step[:-1]).any():
            self._refuse(np.diff(self.step, prepend=0) < 0, "rows out of step order")
        self._refuse(self.src == self.dst, "a rank sends to itself")
        if (self.chunk_elements <= 0).any():
            self._refuse(self.chunk_elements[self.chunk] <= 0, "a chunk without parameters is sent")
        self._refuse_mixed_copies()

    def _refuse(self, bad: Bools, what: str) -> None:
        if bad.any():
            raise ScheduleError(f"{what}: {self.describe(int(np.argmax(bad)))}")

    def _refuse_mixed_copies(self) -> None:
        """At most one copy may land at a (step, dst, chunk), and none beside a reduce: order would decide."""
        (lands,), count = places(self.chunks, (self.dst, self.chunk))
        row = call(_mixed_copy, self.rows, self.step, self.op, lands, np.full(count, -1, np.int32))
        if row >= 0:
            raise ScheduleError(f"a copy lands beside another transfer: {self.describe(int(row))}")

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return len(self.chunk_elements)

    @property
    def params(self) -> int:
        """Elements of the exchanged array."""
        return int(self.chunk_elements.sum())

    @property
    def rows(self) -> int:
        """Number of transfers."""
        return len(self.step)

    def messages(self) -> Messages:
        """Find out which rows travel together (messages.py)."""
        if not self.coalesced:
            return each_row(self.rows)
        return coalesced(self.chunk, (self.src, self.dst, self.step, self.op, self.source))

    @property
    def steps(self) -> int:
        """Number of steps (1 + the last one)."""
        return int(self.step[-1]) + 1 if self.rows else 0

    def elements(self) -> npt.NDArray[np.int64]:
        """Elements of each transfer, shape (rows,)."""
        return self.chunk_elements[self.chunk]

    def traffic(self, itemsize: int) -> Traffic:
        """Count messages and bytes row by row, for elements of `itemsize` bytes."""
        return Traffic.of_rows(self.ranks, [self.sent(itemsize)])

    def sent(self, itemsize: int) -> Rows:
        """The messages (messages.py) of this schedule, for elements of `itemsize` bytes."""
        each = self.messages()
        if each.single:
            return Rows(self.src, self.dst, self.chunk, self.chunk_elements * itemsize)
        sizes, kind = np.unique(each.totals(self.elements()), return_inverse=True)
        return Rows(self.src[each.first], self.dst[each.first], kind.astype(np.int32), sizes * itemsize)

    def digest(self) -> str:
        """SHA-256 of the whole description, in hexadecimal; the same on every machine."""
        digest = hashlib.sha256(f"schedule 1 {self.ranks} {self.chunks} {self.rows}".encode())
        digest.update(self.chunk_elements.astype("<i8").tobytes())
        for name in COLUMNS:
            digest.update(getattr(self, name).astype("<i4").tobytes())
        for name in ("contributes", "must_hold"):
            digest.update(np.packbits(getattr(self, name)).tobytes())
        if self.coalesced:
            digest.update(b"coalesced")
        return digest.hexdigest()

    def describe(self, row: int) -> str:
        """Say in words what one row does."""
        verb = "reduces into" if self.op[row] == Op.REDUCE else "copies to"
        value = "input" if self.source[row] == Source.INPUT else "work"
        return (
            f"row {row} (step {self.step[row]}: rank {self.src[row]} {verb} rank {self.dst[row]}, "
            f"chunk {self.chunk[row]}, from {value})"
        )


def _integers(name: str, column: npt.NDArray[np.generic]) -> npt.NDArray[np.signedinteger]:
    """Give a column of whole numbers the table's own type, copied where the caller could still change it."""
    if column.size and column.dtype.kind not in "iu":
        raise ScheduleError(f"column {name} must hold whole numbers, not {column.dtype}")
    kind = np.int8 if name in ("op", "source") else np.int32
    limit = np.iinfo(kind).max
    if column.size and column.dtype != kind and not -limit <= column.min() <= column.max() <= limit:
        raise ScheduleError(f"column {name} holds numbers beyond {limit}")
    return column.astype(kind)


def _flags(name: str, value: npt.ArrayLike, shape: tuple[int, int]) -> Bools:
    """Copy a table of flags, and repeat it as often as it takes to fill `shape`."""
    given = np.array(value, dtype=bool)
    try:
        return np.broadcast_to(given, shape)
    except ValueError:
        raise ScheduleError(f"{name} has shape {given.shape}, wanted (ranks, chunks) = {shape}") from None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Exchange:
    """One training step's communication: reduce gradients, update, and share parameters where that is needed.

    Whoever `gradients` leaves with the complete sum makes the update; `parameters`, if there is one, then
    takes the updated values to the others. An all-reduce needs no second schedule, a parameter server does.
    """

    strategy: str
    """Its spec: a name, and the options that differ from their defaults."""
    workers: int
    """Ranks 0..workers-1 compute gradients; further ranks are servers."""
    gradients: Schedule
    parameters: Schedule | None = None
    collective: str = "all-reduce"
    """What it does; whatever is not an all-reduce is no training step, and `gradients` is all of it."""

    @property
    def ranks(self) -> int:
        """Workers and servers."""
        return self.gradients.ranks

    @property
    def params(self) -> int:
        """Elements of a worker's array, the larger one of what it sends and receives."""
        return self.gradients.params // find(self.collective).arrays(self.workers)

    def schedules(self) -> tuple[Schedule, ...]:
        """The schedules in the order in which they run."""
        return (self.gradients,) if self.parameters is None else (self.gradients, self.parameters)

    def updates(self) -> Bools:
        """Which ranks hold a complete gradient sum after `gradients` and so update, shape (ranks,)."""
        return np.asarray(self.gradients.must_hold.any(axis=1))

    def traffic(self, itemsize: int) -> Traffic:
        """Count the messages and bytes of both schedules."""
        return Traffic.of_rows(self.ranks, [part.sent(itemsize) for part in self.schedules()])

    def digest(self) -> str:
        """SHA-256 over the schedules' digests, in hexadecimal."""
        what = [] if self.collective == "all-reduce" else [self.collective]
        text = " ".join([self.strategy, *what, str(self.workers), *(part.digest() for part in self.schedules())])
        return hashlib.sha256(text.encode()).hexdigest()


def _mixed_copy(step: Any, op: Any, lands: Any, last: Any) -> int:
    """Return the first row that lands at one (step, place) with another while one of them is a copy; -1 for none."""
    for row in range(len(step)):
        other = last[lands[row]]
        if other >= 0 and step[other] == step[row] and (op[other] == 1 or op[row] == 1):
            return row
        last[lands[row]] = row
    return -1
